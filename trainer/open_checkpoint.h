#pragma once
// A trained model from its checkpoint, ready to run: for tessera eval and tessera generate.

#include <memory>
#include <string>

#include "data/tokenizer.h"
#include "kernels/comm/communicator.h"
#include "kernels/memory_plan.h"
#include "kernels/ops.h"
#include "model/gpt.h"
#include "trainer/checkpoint.h"
#include "trainer/config.h"
#include "trainer/rank_layout.h"
#include "trainer/train_state.h"

namespace tessera {

/// What a checkpoint is, without its parameters.
struct CheckpointContents {
  CheckpointInfo info;
  Config config;                         // with the vocabulary
  std::unique_ptr<Tokenizer> tokenizer;  // none of a synthetic task
};
/// `path`: see resolve_checkpoint(). Throws std::invalid_argument when it is no checkpoint, std::runtime_error naming the file when it is damaged.
CheckpointContents read_checkpoint(const std::string& path);
/// Throws std::invalid_argument when the model knows no text, which `purpose` ("tessera generate") needs.
void require_text(const CheckpointInfo& info, const std::string& purpose);

struct OpenCheckpoint {
  enum class Use {
    evaluate,  // micro-batches of train.micro_batch sequences
    generate   // a sequence at a time, and a cache where the device has one
  };
  struct Options {
    int threads = 0;     // of the CPU
    std::string visit;   // "all", "active", or "" as configured
    std::string device;  // "cpu", "cuda", or "" as configured where this process has that, else the cpu, with a notice
    /// Use::evaluate: tokens a sequence; 0: model.context. More than that only where positions are not learned.
    std::int64_t context = 0;
    /// Use::evaluate: sequences at once; 0: train.micro_batch, or fewer where `context` is longer than in training: about as many tokens.
    std::int64_t micro_batch = 0;
    int tile = 0;  // Use::evaluate: queries and keys a tile of attention; 0: as configured
    /// Use::evaluate: so many ranks share each sequence, with the default exchange and layout. They divide the ranks.
    int sequence = 1;
    /// Use::generate:
    std::int64_t cache_sequences = 0;  // whose keys and values are kept
    std::int64_t sequence_tokens = 0;  // of the longest text; 0 or more than the context: the context
    bool fast = false;                 // on a GPU: not batch_invariant, see make_cuda_ops()
  };
  /// `path`: see resolve_checkpoint(). Throws std::invalid_argument when it is no checkpoint or its device is not here, std::runtime_error naming the
  /// file when it is damaged. Collective: each rank of `host` has a model of its own; ranks share GPUs where there are fewer.
  OpenCheckpoint(const std::string& path, Use use, const Options& options, Communicator& host);

  CheckpointInfo info;
  std::string notice;  // what is not as configured; "" when all is
  Config config;
  std::unique_ptr<Tokenizer> tokenizer;  // none of a synthetic task
  std::unique_ptr<Ops> ops;
  RankLayout ranks;                    // what they evaluate
  std::unique_ptr<Communicator> comm;  // of ops, where ranks share sequences and the host's will not do
  MemoryPlan plan;
  std::unique_ptr<Gpt> model;
  std::unique_ptr<BatchBuffer> batch;  // Use::evaluate: [micro_batch, this rank's tokens of the context]
  std::int64_t micro_batch = 0, context = 0;

 private:
  void set_batch(Use use, const Options& o);
  void choose_device(const std::string& wanted, Communicator& host);
};

}  // namespace tessera
