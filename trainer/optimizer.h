#pragma once
// Data parallelism with sharded optimizer state (ZeRO stage 1: Rajbhandari et al., arXiv 1910.02054). Every rank holds all parameters and all
// gradients of its own micro-batches; rank r owns block r of the flat buffer, its Adam moments, and its update:
//
//   gradients --reduce_scatter_sum--> block r --add_sum_of_squares, all_reduce--> global norm --adamw--> block r of parameters --all_gather--> all
//
// The flat buffer is padded so that the blocks are equal; the padding has zero gradients and stays zero.

#include <cstdint>

#include "kernels/comm/communicator.h"
#include "kernels/memory_plan.h"
#include "kernels/ops.h"
#include "model/parameters.h"

namespace tessera {

class ShardedAdamW {
 public:
  /// Reserves m and v of this rank's block (category optimizer) in `plan`; nothing is allocated. Fresh moments are zero.
  ShardedAdamW(const ParameterLayout& layout, int rank, int ranks, MemoryPlan& plan);

  /// What the flat buffers must be padded to a multiple of (Gpt::Options::shard_multiple), so that each block starts on a 256-byte boundary.
  static int padding_multiple(int ranks) { return 64 * ranks; }

  struct Settings {
    double lr = 0, beta1 = 0.9, beta2 = 0.95, eps = 1e-8, weight_decay = 0, clip = 0;
    std::int64_t update = 1;  // 1-based number of this update (skipped steps do not count), for bias correction
  };

  /// Sums the flat gradients (f32 [padded]) over the ranks, each keeping its block, and returns the norm of the whole sum: not finite when any
  /// element is not. Collective.
  double reduce(Ops& ops, Communicator& comm, const Tensor& gradients);
  /// AdamW with the gradients and the norm of the last reduce(), then every rank gets every block. Does nothing when the norm is not finite.
  /// Collective.
  void apply(Ops& ops, Communicator& comm, const Tensor& parameters, const Tensor& gradients, const Settings& settings);

  // This rank's block. `count` leaves out the padding: it may be 0 on the last ranks of a very small model.
  std::int64_t first() const { return first_; }   // flat offset
  std::int64_t count() const { return count_; }   // elements that are parameters
  std::int64_t padded() const { return block_; }  // elements with padding
  Tensor m() const { return (*plan_)[m_].slice(0, count_); }
  Tensor v() const { return (*plan_)[v_].slice(0, count_); }

 private:
  MemoryPlan* plan_;
  int ranks_;
  std::int64_t block_, first_, count_, decayed_;
  MemoryPlan::Slot m_, v_, sumsq_;
};

}  // namespace tessera
