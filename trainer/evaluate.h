#pragma once
// Loss on held-out text, and accuracy at the answers of a synthetic task. The unit of work is a micro-batch of consecutive sequences, the same ones
// on any number of ranks; sums of per-token losses are taken per sequence in double and added in the order of the sequences, so that any number of
// ranks gives the same number: to the bit where no ranks share sequences.

#include <array>
#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "data/dataset.h"
#include "data/loader.h"
#include "data/tokenizer.h"
#include "kernels/comm/communicator.h"
#include "model/gpt.h"
#include "trainer/metrics.h"
#include "trainer/rank_layout.h"
#include "trainer/train_state.h"

namespace tessera {

/// Answers of a synthetic task whose distances d are 2^b <= d < 2^(b+1).
struct AnswerTally {
  std::uint64_t answers = 0, right = 0;  // right: the likeliest token is the answer
};
using AnswerTallies = std::array<AnswerTally, 31>;  // by b

struct Evaluation {
  double loss = 0;           // nats a target token; of a synthetic task an answer
  double bits_per_byte = 0;  // loss in bits over the exact bytes of the target tokens' text; of a synthetic task not a number
  std::uint64_t tokens = 0, bytes = 0;
  std::int64_t sequences = 0, sequence_tokens = 0;
  double seconds = 0;
  std::vector<std::uint64_t> counters;   // [layers, heads, kAttentionCounters], of all ranks
  std::uint64_t compared = 0;            // losses that skipping was seen not to change (Skipping::compare)
  std::optional<AnswerTallies> answers;  // of a synthetic task
  double perplexity() const;
  double accuracy() const;  // share of all answers that are right; not a number without any
};

/// [{"from": 16, "to": 31, "answers", "accuracy"}, ...]: the distances that there are answers of.
nlohmann::ordered_json accuracy_by_distance(const AnswerTallies& answers);
/// "8-15", and "1" where they are one: distances for a reader.
std::string distance_text(std::int64_t from, std::int64_t to);
/// "1 1.0000, 2-3 0.9900, 4-7 0.0310": the same list for a reader.
std::string accuracy_text(const nlohmann::ordered_json& by_distance);

/// The loss on the mixture of several datasets, in which dataset i has `shares[i]` of the tokens: of those that were evaluated (others have no
/// tokens). Tokens, bytes, sequences, counters and seconds are sums; one alone stays as it is.
Evaluation mixed(std::span<const Evaluation> parts, std::span<const double> shares);

/// Whether losses are computed once, as the model's attention.visit says, or twice, visiting every tile and only the active ones.
enum class Skipping { as_configured, compare };

/// Evaluates one split. Holds its reader and the byte length of every token, so it can be used again during a run.
class Evaluator {
 public:
  /// Sequences have `context` tokens, or the whole split's when that is shorter. `places`: which of them this rank computes, where ranks share
  /// sequences (Gpt::positions()); sequences then have `context` tokens always, the last of them without targets in a shorter split.
  Evaluator(const DatasetInfo& info, const SplitInfo& split, const Tokenizer& tokenizer, std::int64_t context, std::int64_t micro_batch,
            std::vector<std::int32_t> places = {});
  /// A synthetic task's validation split, or as many of its first training sequences.
  Evaluator(const SyntheticSource& source, std::int64_t micro_batch, std::vector<std::int32_t> places = {});

  /// Micro-batches that the split holds: 0 when it has no two tokens.
  std::int64_t batches() const { return (sequences_ + micro_batch_ - 1) / micro_batch_; }
  /// The first `batches` micro-batches (0: all). The model's counters are zero afterwards. Each rank computes on its own device; `host` adds up what
  /// they found. Skipping::compare throws std::runtime_error at the first loss or counter whose bits differ, naming its place. Collective.
  Evaluation run(Gpt& model, Ops& ops, Communicator& host, const RankLayout& ranks, const BatchBuffer& buffer, std::int64_t batches,
                 Skipping skipping = Skipping::as_configured);

 private:
  void compare_skipping(Gpt& model, Ops& ops, const Batch& batch, std::int64_t first, std::span<const float> losses) const;

  std::function<HostBatch(std::int64_t first, std::int64_t count)> read_;  // sequences
  std::vector<std::uint32_t> token_bytes_;                                 // of text
  std::int64_t context_, micro_batch_, sequences_;
  std::vector<std::int32_t> places_;
  bool asks_ = false;  // for answers: a synthetic task
};

}  // namespace tessera
