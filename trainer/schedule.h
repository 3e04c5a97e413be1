#pragma once
// What changes over a run as a pure function of the step, so that a resumed run needs no schedule state. Steps count from 1: step t is the
// t-th update of a run of `steps`.

#include <cstdint>

#include "trainer/config.h"

namespace tessera {

/// Learning rate of step t. Linear warm-up reaches the peak at t = warmup; then
///   constant  the peak
///   cosine    half a cosine from the peak to final_lr x peak at t = steps         (Loshchilov & Hutter, arXiv 1608.03983)
///   wsd       the peak, then a straight line to final_lr x peak over the last `decay` share of the steps (Hu et al., arXiv 2404.06395)
/// Past `steps` the value at `steps` holds.
double learning_rate(const OptimizerConfig& config, std::int64_t steps, std::int64_t t);

/// Density (active / causal edges) that head `head` of a layer's `heads` ends with: 1 - target_edge_sparsity times spread^(-head/(heads-1)) over the
/// mean of that over the heads. So a layer meets the target (where no pattern lets a head see less than that), its densities fall geometrically from
/// first head to last, and head_spread is the first over the last.
double head_target(const ThresholdConfig& config, int heads, int head);

/// Density that the threshold controller steers a head for at step t: geometric from anneal_from (t = 0) to `target` (t = anneal x steps), then
/// constant.
double wanted_density(const ThresholdConfig& config, double target, std::int64_t steps, std::int64_t t);

/// How far and how fast the controller may move tau.
struct ThresholdRange {
  float low, high, rate;
};
/// cosine    +-16 scale_init: an edge is active when cos > tau / c, so |tau| <= c already spans dense to empty; 16 leaves room for a learned c to
/// grow dot       +-128, far outside what scores c <q, k> of a trained model reach fidelity  [0, 1 - 1e-4] on the squared overlap itself. tau is
/// inside the scale there, so the rate is divided by scale_init to move x as fast
ThresholdRange threshold_range(const AttentionConfig& config);

}  // namespace tessera
