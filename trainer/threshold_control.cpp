#include "trainer/threshold_control.h"

#include <algorithm>

#include "trainer/schedule.h"

namespace tessera {

void control_thresholds(const Gpt& model, Ops& ops, const AttentionCounts& counts, std::int64_t t, std::int64_t steps) {
  const AttentionConfig& a = model.config().attention;
  const ThresholdRange range = threshold_range(a);
  const int heads = model.config().heads, rows = model.config().layers * heads;
  const Tensor thresholds = model.thresholds(), counters = model.counters(), balances = model.balances(), gradients = model.threshold_gradients();
  const auto rows_of = [](const Tensor& t, std::int64_t first, std::int64_t count) { return t ? t.slice(first, count) : t; };
  ThresholdUpdate u;
  u.causal_edges = counts.causal_edges();
  u.rate = range.rate;
  u.low = range.low;
  u.high = range.high;
  u.balance_rate = a.threshold.balance;
  const auto wanted = [&](int h) { return wanted_density(a.threshold, head_target(a.threshold, heads, h), steps, t); };
  u.wanted_density = wanted(0);
  const auto visible = [&](int r) { return static_cast<double>(counts.at(r / heads, r % heads, kVisibleEdges)) / u.causal_edges; };
  bool alike = a.threshold.head_spread == 1;
  for (int r = 0; r < rows; ++r) alike = alike && visible(r) >= u.wanted_density;
  if (alike) {
    u.threshold = thresholds.view({rows});
    u.balance = rows_of(balances, 0, rows), u.gradient = rows_of(gradients, 0, rows);
    u.counters = counters.view({rows, kAttentionCounters});
    ops.update_thresholds(u);
    return;
  }
  for (int r = 0; r < rows; ++r) {
    if (visible(r) == 0) continue;  // a block mask may hide everything from a head
    const double target = wanted(r % heads);
    const bool reachable = visible(r) >= target;
    u.threshold = thresholds.slice(r, 1);
    u.balance = reachable ? rows_of(balances, r, 1) : Tensor{}, u.gradient = rows_of(gradients, r, 1);
    u.counters = counters.slice(static_cast<std::int64_t>(r) * kAttentionCounters, kAttentionCounters).view({1, kAttentionCounters});
    u.wanted_density = reachable ? target : visible(r);
    ops.update_thresholds(u);
  }
}

}  // namespace tessera
