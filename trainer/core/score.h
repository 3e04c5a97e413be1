#pragma once
// How well a model answers the items of a task. An item's prompts are computed together, items of about the same length in one batch, so that little
// is padded; padding stands behind the prompt, where a causal model does not see it. Batches are the same on any number of ranks, which take them
// in turn, longest first: the numbers are the same, and every rank has about the same work.

#include <cstdint>
#include <functional>
#include <vector>

#include "data/loader.h"
#include "data/tokenizer.h"
#include "kernels/comm/communicator.h"
#include "model/gpt.h"
#include "trainer/core/bundle.h"
#include "trainer/core/prompts.h"
#include "trainer/train_state.h"

namespace tessera {

/// What the model says of the tokens of a batch [B, T].
struct TokenScores {
  std::vector<float> losses;              // [B*T] nats, of the targets; anything where the target is -1
  std::vector<std::int32_t> predictions;  // [B*T] the likeliest next token; only when asked for
};
/// Runs the model. `predictions`: whether they are needed.
using ScoreBatch = std::function<void(const HostBatch& batch, bool predictions, TokenScores& scores)>;
/// A Gpt as it is, thresholds and all. What is given must live longer.
ScoreBatch score_with(Gpt& model, Ops& ops, const BatchBuffer& buffer);

/// What a batch may hold.
struct BatchLimits {
  std::size_t sequences = 1;
  std::size_t context = 1;  // tokens of a sequence; longer prompts lose their first ones
};

/// A task ready to be scored.
struct CoreWork {
  /// Reads the items, shuffles them and keeps the first `limit` (0: all, else more than task.shots). Throws std::invalid_argument when the file is
  /// not as expected.
  CoreWork(const CoreTask& task, std::size_t limit, const Tokenizer& tokenizer, const BatchLimits& limits);

  CoreTask task;
  std::vector<CoreItem> items;
  std::size_t available = 0;  // items of the file
  struct Part {
    std::vector<std::size_t> items;  // scored together
    double tokens = 0;               // of their prompts, estimated from the bytes of the text
  };
  std::vector<Part> parts;  // longest prompts first

  /// Of the parts that `rank` of `ranks` scores.
  double tokens(int rank, int ranks) const;
};

struct CoreResult {
  std::vector<std::uint64_t>
      chosen;  // by item: the candidate with the lowest loss; language modelling: 1 when the continuation was predicted, else 0
  std::uint64_t right = 0;
  std::uint64_t prompts = 0, cut = 0;  // prompts, and those that were longer than the context
  std::uint64_t empty = 0;             // prompts whose answer has no tokens
  std::uint64_t tokens = 0;            // of the prompts as the model saw them, without padding
  double seconds = 0;
  double accuracy() const { return static_cast<double>(right) / static_cast<double>(chosen.size()); }
};

/// Scores a task; `done(tokens)` is called on every rank after each of its parts with Part::tokens. Collective: the result is that of all ranks.
///   multiple choice, schema   the candidate with the lowest mean loss over its answer is chosen, the first of equals. A candidate with an empty
///   answer
///                             has no loss to compare: it is chosen only when all are empty, and then the first is
///   language modelling        right when each token of the answer is the model's prediction. An empty answer is wrong, and so is one that does not
///   fit
///                             into the context
/// Throws std::runtime_error when a loss is not a number.
CoreResult score_task(const CoreWork& work, const Tokenizer& tokenizer, const BatchLimits& limits, const ScoreBatch& score, Communicator& host,
                      const std::function<void(double)>& done);

}  // namespace tessera
