// Norms of the gradient, AdamW, and the controller of the attention's thresholds.

#include <cmath>

#include "kernels/cpu/check.h"
#include "kernels/cpu/ops.h"
#include "kernels/cpu/parallel.h"

namespace tessera::cpu {

namespace {

constexpr std::int64_t kGrain = 1 << 14;

/// The sum of term(x[i]) in double: over chunks of fixed size in parallel, then over the chunks in order.
template <class Term>
double chunked_sum(const float* x, std::int64_t count, Term term) {
  std::vector<double> sums(static_cast<std::size_t>((count + kGrain - 1) / kGrain));
  parallel_ranges(count, kGrain, [&](std::int64_t first, std::int64_t last) {
    double s = 0;
#pragma omp simd reduction(+ : s)
    for (std::int64_t i = first; i < last; ++i) s += term(static_cast<double>(x[i]));
    sums[static_cast<std::size_t>(first / kGrain)] = s;
  });
  double total = 0;
  for (const double s : sums) total += s;
  return total;
}

}  // namespace

void add_sum(const Tensor& out, const Tensor& x) {
  const float* from = elements<float>("add_sum", "x", x, x.numel());
  *elements<double>("add_sum", "out", out, 1) += chunked_sum(from, x.numel(), [](double v) { return v; });
}

void add_sum_of_squares(const Tensor& out, const Tensor& x) {
  const float* from = elements<float>("add_sum_of_squares", "x", x, x.numel());
  *elements<double>("add_sum_of_squares", "out", out, 1) += chunked_sum(from, x.numel(), [](double v) { return v * v; });
}

void adamw(const AdamW& a) {
  constexpr const char* kOp = "adamw";
  const std::int64_t count = a.parameter.numel();
  float* parameter = elements<float>(kOp, "parameter", a.parameter, count);
  const float* gradient = elements<float>(kOp, "gradient", a.gradient, count);
  float* m = elements<float>(kOp, "m", a.m, count);
  float* v = elements<float>(kOp, "v", a.v, count);
  float* weights = optional_elements<float>(kOp, "weights", a.weights, count);
  const double sumsq = *elements<double>(kOp, "gradient_sumsq", a.gradient_sumsq, 1);
  require(a.update >= 1, kOp, "update counts from 1");
  require(a.decayed >= 0 && a.decayed <= count, kOp, "decayed must be within the shard");
  if (!std::isfinite(sumsq)) return;

  const double norm = std::sqrt(sumsq);
  const auto scale = static_cast<float>(a.clip > 0 && norm > a.clip ? a.clip / norm : 1.0);
  // The bias corrections and the rate go into two factors: lr m^/(sqrt(v^) + eps) = step m / (sqrt(v) root + eps).
  const auto step = static_cast<float>(a.lr / (1.0 - std::pow(static_cast<double>(a.beta1), static_cast<double>(a.update))));
  const auto root = static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(static_cast<double>(a.beta2), static_cast<double>(a.update))));
  const float beta1 = a.beta1, beta2 = a.beta2, epsilon = a.epsilon;
  const auto update = [=](std::int64_t first, std::int64_t last, float decay) {
#pragma omp simd
    for (std::int64_t i = first; i < last; ++i) {
      const float g = gradient[i] * scale;
      m[i] = beta1 * m[i] + (1.0f - beta1) * g;
      v[i] = beta2 * v[i] + (1.0f - beta2) * (g * g);
      parameter[i] -= decay * parameter[i] + step * m[i] / (std::sqrt(v[i]) * root + epsilon);
    }
  };
  const float decay = a.lr * a.weight_decay;
  parallel_ranges(count, kGrain, [&](std::int64_t first, std::int64_t last) {
    const std::int64_t border = std::clamp(a.decayed, first, last);
    update(first, border, decay);
    update(border, last, 0.0f);
    if (weights && weights != parameter) std::copy(parameter + first, parameter + last, weights + first);
  });
}

void update_thresholds(const ThresholdUpdate& a) {
  constexpr const char* kOp = "update_thresholds";
  const std::int64_t rows = a.threshold.numel();
  float* threshold = elements<float>(kOp, "threshold", a.threshold, rows);
  const std::uint64_t* counters = elements<std::uint64_t>(kOp, "counters", a.counters, rows * kAttentionCounters);
  require(a.causal_edges > 0 && a.wanted_density > 0, kOp, "causal_edges and wanted_density must be positive");
  require(a.low <= a.high, kOp, "low must not exceed high");
  float* balance = a.balance ? elements<float>(kOp, "balance", a.balance, rows) : nullptr;
  const float* gradient = balance ? elements<float>(kOp, "gradient", a.gradient, rows) : nullptr;
  for (std::int64_t r = 0; r < rows; ++r) {
    const auto active = static_cast<double>(counters[r * kAttentionCounters + kActiveEdges]);
    const double error = active > 0 ? std::clamp(std::log(active / a.causal_edges / a.wanted_density), -1.0, 1.0) : -1.0;
    threshold[r] = std::clamp(static_cast<float>(threshold[r] + a.rate * error), a.low, a.high);
    if (!balance) continue;
    if (active > 0 && std::isfinite(gradient[r])) balance[r] += static_cast<float>(a.balance_rate * (gradient[r] / active));
    if (error <= -1) balance[r] = std::fmin(balance[r], 0.0f);
    if (error >= 1) balance[r] = std::fmax(balance[r], 0.0f);
  }
}

}  // namespace tessera::cpu
