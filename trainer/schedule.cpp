#include "trainer/schedule.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace tessera {

double learning_rate(const OptimizerConfig& c, std::int64_t steps, std::int64_t t) {
  if (t < c.warmup) return c.lr * static_cast<double>(t) / static_cast<double>(c.warmup);
  if (c.schedule == Schedule::constant) return c.lr;

  const auto decay_steps = c.schedule == Schedule::wsd ? std::llround(c.decay * static_cast<double>(steps)) : steps;
  const auto start = std::max<std::int64_t>(c.warmup, steps - decay_steps);
  if (t <= start) return c.lr;
  const double progress = std::min(1.0, static_cast<double>(t - start) / static_cast<double>(std::max<std::int64_t>(1, steps - start)));
  const double left = c.schedule == Schedule::cosine ? 0.5 * (1.0 + std::cos(std::numbers::pi * progress)) : 1.0 - progress;
  return c.lr * (c.final_lr + (1.0 - c.final_lr) * left);
}

double head_target(const ThresholdConfig& c, int heads, int head) {
  const auto weight = [&](int h) { return heads > 1 ? std::pow(c.head_spread, -static_cast<double>(h) / (heads - 1)) : 1.0; };
  double sum = 0;
  for (int h = 0; h < heads; ++h) sum += weight(h);
  return (1.0 - c.target_edge_sparsity) * weight(head) * heads / sum;
}

double wanted_density(const ThresholdConfig& c, double target, std::int64_t steps, std::int64_t t) {
  const double length = c.anneal * static_cast<double>(steps);
  const double progress = length > 0 ? std::min(1.0, static_cast<double>(t) / length) : 1.0;
  return std::pow(c.anneal_from, 1.0 - progress) * std::pow(target, progress);
}

ThresholdRange threshold_range(const AttentionConfig& c) {
  switch (c.score) {
    case Score::fidelity: return {0.0f, 1.0f - 1e-4f, c.threshold.rate / std::max(c.scale_init, 1.0f)};
    case Score::cosine: return {-16.0f * c.scale_init, 16.0f * c.scale_init, c.threshold.rate};
    case Score::dot: break;
  }
  return {-128.0f, 128.0f, c.threshold.rate};
}

}  // namespace tessera
