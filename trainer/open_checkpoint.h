#pragma once
// A trained model from its checkpoint, ready to run: for tessera eval and tessera generate.

#include <memory>
#include <string>

#include "data/tokenizer.h"
#include "kernels/memory_plan.h"
#include "kernels/ops.h"
#include "model/gpt.h"
#include "trainer/checkpoint.h"
#include "trainer/config.h"
#include "trainer/train_state.h"

namespace tessera {

struct OpenCheckpoint {
  enum class Use {
    evaluate,  // micro-batches of train.micro_batch sequences
    generate   // one sequence
  };
  /// `path`: see resolve_checkpoint(). `visit`: "all", "active", or "" as configured. Throws std::invalid_argument when it is no checkpoint,
  /// std::runtime_error naming the file when it is damaged.
  OpenCheckpoint(const std::string& path, Use use, int threads, const std::string& visit = "");

  CheckpointInfo info;
  Config config;
  std::unique_ptr<Tokenizer> tokenizer;
  std::unique_ptr<Ops> ops;
  MemoryPlan plan;
  std::unique_ptr<Gpt> model;
  std::unique_ptr<BatchBuffer> batch;  // Use::evaluate
};

}  // namespace tessera
