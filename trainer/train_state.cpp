#include "trainer/train_state.h"

namespace tessera {
namespace {

Gpt::Options training_options(const Config& config, int ranks) {
  Gpt::Options o;
  o.micro_batch = config.train.micro_batch;
  o.tokens = config.model.context;
  o.training = true;
  o.shard_multiple = ShardedAdamW::padding_multiple(ranks);
  return o;
}

}  // namespace

BatchBuffer::BatchBuffer(MemoryPlan& plan, std::int64_t micro_batch, std::int64_t tokens) : plan_(&plan) {
  const Shape shape{micro_batch, tokens};
  token_ = plan.reserve(MemoryCategory::activations, "batch.tokens", DType::i32, shape);
  target_ = plan.reserve(MemoryCategory::activations, "batch.targets", DType::i32, shape);
  position_ = plan.reserve(MemoryCategory::activations, "batch.positions", DType::i32, shape);
  document_start_ = plan.reserve(MemoryCategory::activations, "batch.document_start", DType::i32, shape);
}

Batch BatchBuffer::upload(Ops& ops, const HostBatch& host) const {
  const auto put = [&](MemoryPlan::Slot slot, const std::vector<std::int32_t>& from) {
    const Tensor to = (*plan_)[slot].view({host.batch, host.tokens});
    ops.upload(to, from.data());
    return to;
  };
  return {put(token_, host.token), put(target_, host.target), put(position_, host.position), put(document_start_, host.document_start)};
}

TrainState::TrainState(const Config& config, Ops& ops, int rank, int ranks)
    : model(config.model, ops, plan, training_options(config, ranks)),
      optimizer(model.layout(), rank, ranks, plan),
      batch(plan, config.train.micro_batch, config.model.context),
      scalar(plan.reserve(MemoryCategory::workspace, "scalar", DType::f64, {1})) {}

}  // namespace tessera
