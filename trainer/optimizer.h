#pragma once
// Data parallelism with sharded optimizer state (ZeRO stage 1: Rajbhandari et al., arXiv 1910.02054). Every rank holds all weights and all
// gradients of its own micro-batches. The flat buffers are cut into buckets (buckets.h), each into a slice a rank; rank r owns slice r of every
// bucket, its Adam moments, its fp32 master, and its update:
//
//   gradients --reduce_scatter_sum--> own slices --add_sum_of_squares, all_reduce--> global norm --adamw--> own weights --all_gather--> all
//
// bucket by bucket: the first step beside the backward pass, the last beside the next forward pass. The master is the weights themselves where these
// are fp32. Which element is whose depends on the ranks and on the size of the buckets; what becomes of an element does not, but for the rounding
// of the norm's sum (fp64).

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "kernels/comm/communicator.h"
#include "kernels/memory_plan.h"
#include "kernels/ops.h"
#include "model/parameters.h"
#include "trainer/buckets.h"

namespace tessera {

class ShardedAdamW {
 public:
  /// Reserves m, v and, unless `weights` is f32, the master of this rank's slices (category optimizer) in `plan`; nothing is allocated. Fresh moments
  /// are zero. `weights`: type of the flat weights. `bucket`: elements. One rank has one bucket: nothing is to be overlapped.
  ShardedAdamW(const ParameterLayout& layout, int rank, int ranks, MemoryPlan& plan, DType weights = DType::f32,
               std::int64_t bucket = std::int64_t{25} << 20);

  /// What the flat buffers must be padded to a multiple of (Gpt::Options::shard_multiple), so that each slice starts on a 256-byte boundary.
  static int padding_multiple(int ranks) { return 64 * ranks; }

  /// The memory it works on, after the plan's allocate(): see Gpt. `vectors` is not used where weights are f32.
  struct Flat {
    Tensor weights, vectors, gradients;
  };
  /// Both must live longer; `comm` moves memory of `ops`.
  void bind(Ops& ops, Communicator& comm, const Flat& flat);

  // -- A step. Collective; nothing here waits for the device.
  /// The gradients of this block and all above it are complete (Gpt::Hooks::after_backward; -1: all): begins the reduction of every bucket that
  /// is. Until reduce(), nothing may touch them.
  void begin_reduce(int block);
  /// Begins what has not been begun. sums [n] f64, on the device: element 0 becomes the squared norm of the gradient, then all are added up over the
  /// ranks.
  void reduce(const Tensor& sums);

  struct Settings {
    double lr = 0, beta1 = 0.9, beta2 = 0.95, eps = 1e-8, weight_decay = 0, clip = 0;
    std::int64_t update = 1;  // 1-based number of this update (skipped steps do not count), for bias correction
  };
  /// AdamW with the gradients of the last reduce() and its squared norm, sumsq [1] f64, which changes nothing when that is not finite; then every
  /// rank gets every slice, but not before await().
  void apply(const Tensor& sumsq, const Settings& settings);

  /// The weights that the block's forward pass uses (Gpt::Hooks::before_forward) are there for what the device is asked from now on.
  void await(int block);
  void await_all();

  // -- State
  /// A piece of the flat buffers that this rank owns. Padding is left out.
  struct Segment {
    std::int64_t first;  // in the flat buffers
    std::int64_t local;  // in m(), v() and the master
    std::int64_t count;
  };
  const std::vector<Segment>& segments() const { return segments_; }  // in order, without gaps in `local`
  std::int64_t count() const { return count_; }                       // elements of all; 0 is possible with more ranks than a small model needs
  Tensor m() const { return (*plan_)[m_].slice(0, count_); }
  Tensor v() const { return (*plan_)[v_].slice(0, count_); }
  const Buckets& buckets() const { return buckets_; }

  /// Elements [first, first + values.size()) of the flat parameters, from the host: this rank's master takes its own.
  void set_master(std::int64_t first, std::span<const float> values);
  /// All parameters in f32, flat: the weights where they are, else gathered from the masters into the gradients, which are lost. Collective.
  Tensor gather_parameters();

 private:
  /// Slice of bucket i that is this rank's, with padding.
  Tensor own(const Tensor& flat, std::size_t i) const { return flat.slice(slices_[i].first, slices_[i].count); }
  Tensor of(const Tensor& flat, std::size_t i) const { return flat.slice(buckets_.list[i].first, buckets_.list[i].count); }
  bool has_master() const { return master_ >= 0; }
  void update(std::size_t i, const Tensor& sumsq, const Settings& settings);
  void update_vectors();

  MemoryPlan* plan_;
  std::int64_t decayed_, parameters_;
  Buckets buckets_;
  std::vector<Segment> slices_;    // a bucket, with padding
  std::vector<Segment> segments_;  // those that hold parameters, without
  std::int64_t count_ = 0;
  MemoryPlan::Slot m_, v_, master_ = -1;

  Ops* ops_ = nullptr;
  Communicator* comm_ = nullptr;
  Flat flat_;
  using Tickets = std::vector<std::optional<Communicator::Ticket>>;  // a bucket
  Tickets reducing_, gathering_;
};

}  // namespace tessera
