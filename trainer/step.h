#pragma once
// One step of training on one rank: forward and backward passes of its micro-batches, the sum of gradients over the ranks beside the last of them,
// the update. The host waits once, for what every step logs: the loss, the norm and the counters of active edges.

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "data/loader.h"
#include "kernels/comm/communicator.h"
#include "kernels/ops.h"
#include "trainer/train_state.h"

namespace tessera {

class TrainStep {
 public:
  /// Of a state that is bound to the same `ops` and `comm`; sets the model's hooks. All must live longer. records: micro-batches are recorded and
  /// replayed where the device can.
  TrainStep(TrainState& state, Ops& ops, Communicator& comm, bool records = true);
  ~TrainStep();
  TrainStep(const TrainStep&) = delete;
  TrainStep& operator=(const TrainStep&) = delete;

  /// Zero gradients, sums and counters.
  void begin();

  struct Sums {
    double loss = 0;                      // sum over all target tokens of all ranks, in nats
    double grad_norm = 0;                 // of the sum of all gradients
    std::vector<std::uint64_t> counters;  // [layers, heads, kAttentionCounters], of all ranks; on the device, Gpt::counters() has the same
  };
  /// Adds up the gradients of loss * scale over micro-batches and ranks. Waits for the device. Collective.
  Sums gradients(std::span<const HostBatch> micro_batches, float scale);
  /// AdamW with what gradients() found; changes nothing when the norm was not finite. Does not wait. Collective.
  void update(const ShardedAdamW::Settings& settings);

 private:
  void micro_batch(const HostBatch& host, float scale, bool first, bool last);

  TrainState& state_;
  Ops& ops_;
  Communicator& comm_;
  bool reducing_ = false;  // the backward pass at work is the step's last

  /// What a recorded pass depends on, beside addresses that never change.
  struct Pass {
    std::int64_t batch = 0, tokens = 0;
    float scale = 0;
    bool operator==(const Pass&) const = default;
  };
  Pass last_pass_;                          // put together last
  std::unique_ptr<RecordedWork> recorded_;  // of last_pass_
  bool records_;                            // as far as is known; exchanges between ranks cannot be recorded
};

}  // namespace tessera
