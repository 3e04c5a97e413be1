#include "trainer/step.h"

#include <cmath>

namespace tessera {

TrainStep::TrainStep(TrainState& state, Ops& ops, Communicator& comm, bool records)
    : state_(state), ops_(ops), comm_(comm), records_(records && state.model.options().sequence.ranks == 1) {
  Gpt::Hooks hooks;
  hooks.before_forward = [this](int block) { state_.optimizer.await(block); };
  hooks.after_backward = [this](int block) {
    if (reducing_) state_.optimizer.begin_reduce(block);
  };
  state_.model.set_hooks(std::move(hooks));
}

TrainStep::~TrainStep() { state_.model.set_hooks({}); }

void TrainStep::begin() {
  state_.model.zero_gradients();
  state_.model.zero_counters();
  ops_.zero(state_.plan[state_.sums]);
}

TrainStep::Sums TrainStep::gradients(std::span<const HostBatch> micro_batches, float scale) {
  for (std::size_t i = 0; i < micro_batches.size(); ++i) micro_batch(micro_batches[i], scale, i == 0, i + 1 == micro_batches.size());
  const Tensor sums = state_.plan[state_.sums], counters = state_.model.counters();
  state_.optimizer.reduce(sums);
  comm_.all_reduce_sum(counters);
  if (const Tensor thresholds = state_.model.threshold_gradients()) comm_.all_reduce_sum(thresholds);

  Sums result;
  double host[2];
  ops_.download(host, sums);
  result.grad_norm = std::sqrt(host[0]);
  result.loss = host[1];
  result.counters.resize(static_cast<std::size_t>(counters.numel()));
  ops_.download(result.counters.data(), counters);
  return result;
}

void TrainStep::micro_batch(const HostBatch& host, float scale, bool first, bool last) {
  const Batch batch = state_.batch.upload(ops_, host);
  const auto work = [&] {
    state_.model.forward_backward(batch, scale);
    ops_.add_sum(state_.plan[state_.sums].slice(1, 1), state_.model.losses().slice(0, host.batch * host.tokens));
  };
  // The first pass waits for the weights of other ranks, the last begins to reduce gradients, each block by block: such a pass is put together anew.
  // Every other one is the same work in the same memory as the one before it; where the device records, it is asked for it in one call. Recording
  // takes about as long as calling once; `tessera bench step --no-graph` shows what it saves.
  if (comm_.size() > 1 && (first || last)) {
    reducing_ = last;
    work();
    reducing_ = false;
    return;
  }
  const Pass pass{host.batch, host.tokens, scale};
  if (pass != last_pass_) {
    // Not yet: libraries choose their kernels, and scratch memory grows, in the first call.
    recorded_.reset();
    last_pass_ = pass;
    return work();
  }
  if (!recorded_ && records_) {
    state_.optimizer.await_all();
    recorded_ = ops_.record(work);
    records_ = recorded_ != nullptr;
  }
  if (!recorded_) return work();
  recorded_->replay();
}

void TrainStep::update(const ShardedAdamW::Settings& settings) { state_.optimizer.apply(state_.plan[state_.sums].slice(0, 1), settings); }

}  // namespace tessera
