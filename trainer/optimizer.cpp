#include "trainer/optimizer.h"

#include <algorithm>
#include <stdexcept>

namespace tessera {

ShardedAdamW::ShardedAdamW(const ParameterLayout& layout, int rank, int ranks, MemoryPlan& plan, DType weights, std::int64_t bucket)
    : plan_(&plan), decayed_(layout.decayed_count), parameters_(layout.count), buckets_(layout, padding_multiple(ranks), bucket) {
  const std::int64_t padded = buckets_.list.back().first + buckets_.list.back().count;
  if (ranks == 1) buckets_.list = {{0, padded, -1}};
  std::int64_t local = 0;
  for (const Bucket& b : buckets_.list) {
    const std::int64_t n = b.count / ranks, first = b.first + rank * n;
    slices_.push_back({first, local, n});
    if (const std::int64_t count = std::min(n, parameters_ - first); count > 0) {
      segments_.push_back({first, local, count});
      count_ += count;
    }
    local += n;
  }
  m_ = plan.reserve(MemoryCategory::optimizer, "adamw.m", DType::f32, {local});
  v_ = plan.reserve(MemoryCategory::optimizer, "adamw.v", DType::f32, {local});
  if (weights != DType::f32) master_ = plan.reserve(MemoryCategory::optimizer, "adamw.master", DType::f32, {local});
  reducing_.resize(slices_.size());
  gathering_.resize(slices_.size());
}

void ShardedAdamW::bind(Ops& ops, Communicator& comm, const Flat& flat) {
  const std::int64_t padded = buckets_.list.back().first + buckets_.list.back().count;
  const bool f32 = flat.weights.dtype == DType::f32;
  if (flat.gradients.numel() != padded || flat.weights.numel() != padded || f32 == has_master() ||
      (!f32 && flat.vectors.numel() != parameters_ - decayed_) || slices_[0].count * comm.size() != buckets_.list[0].count)
    throw std::logic_error("the flat buffers do not match the optimizer's slices");
  ops_ = &ops;
  comm_ = &comm;
  flat_ = flat;
}

void ShardedAdamW::begin_reduce(int block) {
  // From the back, as the backward pass goes.
  for (std::size_t i = slices_.size(); i-- > 0;) {
    if (reducing_[i] || buckets_.list[i].block < block) continue;
    reducing_[i] = comm_->begin_reduce_scatter_sum(of(flat_.gradients, i), own(flat_.gradients, i));
  }
}

void ShardedAdamW::reduce(const Tensor& sums) {
  begin_reduce(-1);
  const Tensor sumsq = sums.slice(0, 1);
  ops_->zero(sumsq);
  const auto finish = [&](bool complete_early) {
    for (std::size_t i = slices_.size(); i-- > 0;) {
      if ((buckets_.list[i].block >= 0) != complete_early) continue;
      comm_->wait(*reducing_[i]);
      reducing_[i].reset();
      ops_->add_sum_of_squares(sumsq, own(flat_.gradients, i));
    }
  };
  finish(true);  // in the order in which they were begun: the last are still on their way
  finish(false);
  comm_->all_reduce_sum(sums);
}

void ShardedAdamW::apply(const Tensor& sumsq, const Settings& settings) {
  await_all();
  const auto gather = [&](std::size_t i) { gathering_[i] = comm_->begin_all_gather(own(flat_.weights, i), of(flat_.weights, i)); };
  // The last bucket holds what every block needs, and goes first.
  const std::size_t last = slices_.size() - 1;
  update(last, sumsq, settings);
  if (has_master()) update_vectors();
  gather(last);
  for (std::size_t i = 0; i < last; ++i) {
    update(i, sumsq, settings);
    gather(i);
  }
}

void ShardedAdamW::update(std::size_t i, const Tensor& sumsq, const Settings& s) {
  const Segment& slice = slices_[i];
  const auto local = [&](MemoryPlan::Slot slot) { return (*plan_)[slot].slice(slice.local, slice.count); };
  AdamW a;
  a.parameter = has_master() ? local(master_) : own(flat_.weights, i);
  if (has_master()) a.weights = own(flat_.weights, i);
  a.gradient = own(flat_.gradients, i);
  a.m = local(m_);
  a.v = local(v_);
  a.decayed = std::clamp<std::int64_t>(decayed_ - slice.first, 0, slice.count);
  a.lr = static_cast<float>(s.lr);
  a.beta1 = static_cast<float>(s.beta1);
  a.beta2 = static_cast<float>(s.beta2);
  a.epsilon = static_cast<float>(s.eps);
  a.weight_decay = static_cast<float>(s.weight_decay);
  a.update = s.update;
  a.gradient_sumsq = sumsq;
  a.clip = static_cast<float>(s.clip);
  ops_->adamw(a);
}

/// Vectors are read in f32 by all ranks: each puts its own there, and the others add zeros, which is exact.
void ShardedAdamW::update_vectors() {
  if (flat_.vectors.numel() == 0) return;
  if (comm_->size() > 1) ops_->zero(flat_.vectors);
  for (const Segment& s : segments_) {
    const std::int64_t from = std::max(s.first, decayed_), count = s.first + s.count - from;
    if (count > 0) ops_->copy(flat_.vectors.slice(from - decayed_, count), (*plan_)[master_].slice(s.local + from - s.first, count));
  }
  comm_->all_reduce_sum(flat_.vectors);
}

void ShardedAdamW::await(int block) {
  for (std::size_t i = 0; i < gathering_.size(); ++i) {
    if (!gathering_[i] || !buckets_.touches(i, block)) continue;
    comm_->wait(*gathering_[i]);
    gathering_[i].reset();
  }
}

void ShardedAdamW::await_all() {
  for (auto& ticket : gathering_) {
    if (ticket) comm_->wait(*ticket);
    ticket.reset();
  }
}

void ShardedAdamW::set_master(std::int64_t first, std::span<const float> values) {
  if (!has_master()) return;
  const auto end = first + static_cast<std::int64_t>(values.size());
  for (const Segment& s : segments_) {
    const std::int64_t from = std::max(first, s.first), count = std::min(end, s.first + s.count) - from;
    if (count > 0) ops_->upload((*plan_)[master_].slice(s.local + from - s.first, count), values.data() + (from - first));
  }
}

Tensor ShardedAdamW::gather_parameters() {
  await_all();
  if (!has_master()) return flat_.weights;
  for (std::size_t i = 0; i < slices_.size(); ++i) {
    const Tensor mine = own(flat_.gradients, i);
    ops_->copy(mine, (*plan_)[master_].slice(slices_[i].local, slices_[i].count));
    comm_->all_gather(mine, of(flat_.gradients, i));
  }
  return flat_.gradients;
}

}  // namespace tessera
