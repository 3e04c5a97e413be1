#pragma once
// All that a training run keeps in device memory, reserved in one plan: the model, its optimizer's slices, the micro-batch. `tessera plan` makes
// the same object for any device and number of ranks and never allocates it.

#include <cstdint>
#include <span>
#include <vector>

#include "data/loader.h"
#include "kernels/comm/communicator.h"
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
  /// [sequences, tokens] that were reserved.
  const Shape& shape() const { return shape_; }

 private:
  Shape shape_;
  const MemoryPlan* plan_;
  MemoryPlan::Slot token_, target_, position_, document_start_;
};

struct TrainState {
  /// Of the memory of config.device, which `ops` must be of before bind(). `place`: of this rank among the parallel.sequence ranks that share
  /// sequences.
  TrainState(const Config& config, Ops& ops, int rank, int ranks, int place = 0);

  /// After plan.allocate(): binds model and optimizer. `comm` moves memory of `ops`; both must live longer. `members`: the ranks that share sequences
  /// with this one, by place.
  void bind(Ops& ops, Communicator& comm, const std::vector<int>& members = {});
  /// First values of all parameters: Gpt::initialize(), and the optimizer's master.
  void initialize(std::uint64_t seed);
  /// Elements of the flat parameters from `first` on, in the model and in the optimizer's master.
  void set_parameters(std::int64_t first, std::span<const float> values);

  MemoryPlan plan;
  Gpt model;
  ShardedAdamW optimizer;
  BatchBuffer batch;
  MemoryPlan::Slot sums;  // f64 [2]: squared norm of the gradient, loss; over micro-batches and ranks
};

}  // namespace tessera
