#pragma once
// All that a training run keeps in device memory, reserved in one plan: the model, its optimizer's block, the micro-batch. `tessera plan` makes
// the same object for any number of ranks and never allocates it.

#include "data/loader.h"
#include "kernels/memory_plan.h"
#include "model/gpt.h"
#include "trainer/config.h"
#include "trainer/optimizer.h"

namespace tessera {

/// A micro-batch on the device.
class BatchBuffer {
 public:
  BatchBuffer(MemoryPlan& plan, std::int64_t micro_batch, std::int64_t tokens);
  /// Copies a host batch of at most the reserved size; the returned tensors have its shape.
  Batch upload(Ops& ops, const HostBatch& host) const;

 private:
  const MemoryPlan* plan_;
  MemoryPlan::Slot token_, target_, position_, document_start_;
};

struct TrainState {
  TrainState(const Config& config, Ops& ops, int rank, int ranks);

  MemoryPlan plan;
  Gpt model;
  ShardedAdamW optimizer;
  BatchBuffer batch;
  MemoryPlan::Slot scalar;  // f64 [1]: sums over micro-batches and ranks
};

}  // namespace tessera
