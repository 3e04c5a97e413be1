#include "trainer/train_state.h"

#include <stdexcept>

#include "trainer/device.h"

namespace tessera {
namespace {

Gpt::Options training_options(const Config& config, int ranks, int place) {
  Gpt::Options o;
  o.micro_batch = config.train.micro_batch;
  o.tokens = config.model.context;
  o.training = true;
  o.shard_multiple = ShardedAdamW::padding_multiple(ranks);
  o.recompute = config.train.recompute;
  o.sequence = {config.parallel.sequence, place, config.parallel.layout, config.parallel.exchange};
  o.device = device_kind(config.device);
  return o;
}

std::int64_t bucket_elements(const Config& config) {
  return (std::int64_t{config.parallel.bucket_mib} << 20) / static_cast<std::int64_t>(sizeof(float));
}

}  // namespace

BatchBuffer::BatchBuffer(MemoryPlan& plan, std::int64_t micro_batch, std::int64_t tokens) : shape_{micro_batch, tokens}, plan_(&plan) {
  token_ = plan.reserve(MemoryCategory::activations, "batch.tokens", DType::i32, shape_);
  target_ = plan.reserve(MemoryCategory::activations, "batch.targets", DType::i32, shape_);
  position_ = plan.reserve(MemoryCategory::activations, "batch.positions", DType::i32, shape_);
  document_start_ = plan.reserve(MemoryCategory::activations, "batch.document_start", DType::i32, shape_);
}

Batch BatchBuffer::upload(Ops& ops, const HostBatch& host) const {
  const auto put = [&](MemoryPlan::Slot slot, const std::vector<std::int32_t>& from) {
    const Tensor to = (*plan_)[slot].view({host.batch, host.tokens});
    ops.upload(to, from.data());
    return to;
  };
  return {put(token_, host.token), put(target_, host.target), put(position_, host.position), put(document_start_, host.document_start)};
}

TrainState::TrainState(const Config& config, Ops& ops, int rank, int ranks, int place)
    : model(config.model, ops, plan, training_options(config, ranks, place)),
      optimizer(model.layout(), rank, ranks, plan, compute_type(device_kind(config.device)), bucket_elements(config)),
      batch(plan, config.train.micro_batch, std::ssize(model.positions())),
      sums(plan.reserve(MemoryCategory::workspace, "sums", DType::f64, {2})) {}

void TrainState::bind(Ops& ops, Communicator& comm, const std::vector<int>& members) {
  model.bind({&comm, members});
  optimizer.bind(ops, comm, {model.weights(), model.vectors(), model.gradients()});
}

void TrainState::initialize(std::uint64_t seed) {
  for (const ParameterInfo& p : model.layout().parameters) set_parameters(p.offset, initial_values(p, seed));
}

void TrainState::set_parameters(std::int64_t first, std::span<const float> values) {
  model.set_parameters(first, values);
  optimizer.set_master(first, values);
}

}  // namespace tessera
