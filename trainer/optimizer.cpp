#include "trainer/optimizer.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

namespace tessera {

ShardedAdamW::ShardedAdamW(const ParameterLayout& layout, int rank, int ranks, MemoryPlan& plan) : plan_(&plan), ranks_(ranks) {
  const std::int64_t multiple = padding_multiple(ranks);
  block_ = (layout.count + multiple - 1) / multiple * multiple / ranks;
  first_ = std::min(rank * block_, layout.count);
  count_ = std::clamp<std::int64_t>(layout.count - rank * block_, 0, block_);
  decayed_ = std::clamp<std::int64_t>(layout.decayed_count - rank * block_, 0, block_);
  m_ = plan.reserve(MemoryCategory::optimizer, "adamw.m", DType::f32, {block_});
  v_ = plan.reserve(MemoryCategory::optimizer, "adamw.v", DType::f32, {block_});
  sumsq_ = plan.reserve(MemoryCategory::optimizer, "adamw.gradient_sumsq", DType::f64, {1});
}

double ShardedAdamW::reduce(Ops& ops, Communicator& comm, const Tensor& gradients) {
  if (gradients.numel() != block_ * ranks_ || comm.size() != ranks_) throw std::logic_error("gradients do not match the optimizer's blocks");
  const Tensor block = gradients.slice(comm.rank() * block_, block_);
  const Tensor sumsq = (*plan_)[sumsq_];
  comm.reduce_scatter_sum(gradients, block);
  ops.zero(sumsq);
  ops.add_sum_of_squares(sumsq, block);
  comm.all_reduce_sum(sumsq);
  double host = 0;
  ops.download(&host, sumsq);
  return std::sqrt(host);
}

void ShardedAdamW::apply(Ops& ops, Communicator& comm, const Tensor& parameters, const Tensor& gradients, const Settings& s) {
  AdamW a;
  a.parameter = parameters.slice(comm.rank() * block_, block_);
  a.gradient = gradients.slice(comm.rank() * block_, block_);
  a.m = (*plan_)[m_];
  a.v = (*plan_)[v_];
  a.decayed = decayed_;
  a.lr = static_cast<float>(s.lr);
  a.beta1 = static_cast<float>(s.beta1);
  a.beta2 = static_cast<float>(s.beta2);
  a.epsilon = static_cast<float>(s.eps);
  a.weight_decay = static_cast<float>(s.weight_decay);
  a.update = s.update;
  a.gradient_sumsq = (*plan_)[sumsq_];
  a.clip = static_cast<float>(s.clip);
  ops.adamw(a);
  comm.all_gather(a.parameter, parameters);
}

}  // namespace tessera
