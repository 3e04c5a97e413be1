#pragma once
// The controller of thresholds (ThresholdMode::controlled): after a step, each head's threshold moves towards the density that is wanted at it.

#include <cstdint>

#include "model/gpt.h"
#include "trainer/metrics.h"

namespace tessera {

/// Moves the thresholds of `model` on the device after step `t` of `steps`, by its counters of that step (Ops::update_thresholds), and with them the
/// balances, where the model has any, by the thresholds' gradients. A head is steered to wanted_density() of its head_target(), or, where a static
/// pattern lets it see less than that, to what it can see: it could never reach the target, and its threshold would sink all the while, to be climbed
/// again later. The balance of such a head stays as it is: a threshold below all scores does not follow them. `counts`: the same counters, of all
/// ranks, on the host.
void control_thresholds(const Gpt& model, Ops& ops, const AttentionCounts& counts, std::int64_t t, std::int64_t steps);

}  // namespace tessera
