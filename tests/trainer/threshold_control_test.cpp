// What the controller makes of a step's counters and of the thresholds' gradients, head by head, beside the formulas written out here.

#include "trainer/threshold_control.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "tests/model/gpt_harness.h"
#include "trainer/schedule.h"

namespace tessera::test {
namespace {

constexpr float kRate = 0.05f, kBalance = 0.25f;
constexpr double kCausal = 20 * 21 / 2;  // one sequence of tiny_config()

struct Rows {
  std::vector<float> thresholds, balances;
};

/// After one call at the last of ten steps, from these counters and gradients [layers x heads].
Rows controlled(ModelConfig m, const std::vector<std::uint64_t>& active, const std::vector<std::uint64_t>& visible,
                const std::vector<float>& gradients, const std::vector<float>& balances) {
  m.attention.threshold.rate = kRate;
  m.attention.threshold.balance = kBalance;
  TestModel model(m, {.micro_batch = 1});
  std::vector<std::uint64_t> counters(active.size() * kAttentionCounters);
  for (std::size_t r = 0; r < active.size(); ++r) {
    counters[r * kAttentionCounters + kActiveEdges] = active[r];
    counters[r * kAttentionCounters + kVisibleEdges] = visible[r];
  }
  model.ops->upload(model.gpt.counters(), counters.data());
  model.ops->upload(model.gpt.threshold_gradients(), gradients.data());
  model.ops->upload(model.gpt.balances(), balances.data());
  control_thresholds(model.gpt, *model.ops, AttentionCounts(m, counters, 1, m.context), 10, 10);
  return {model.host(model.gpt.thresholds()), model.host(model.gpt.balances())};
}

ModelConfig controlled_config() {
  ModelConfig m = tiny_config();
  m.attention.threshold.mode = ThresholdMode::controlled;
  m.attention.threshold.target_edge_sparsity = 0.8f;
  return m;
}

// Two layers of two heads: all alike in one call, or each by itself where heads have targets of their own or one sees less than its share.
TEST(ControlThresholds, MovesEachHeadByItsOwnCountsAndGradient) {
  const std::vector<std::uint64_t> active{21, 84, 42, 63}, all(4, 210);
  const std::vector<float> gradients{0.5f, -3.0f, 0.25f, 7.0f}, balances{0.125f, -0.25f, 1.0f, 2.0f};
  for (const double spread : {1.0, 3.0}) {
    for (const bool narrow : {false, true}) {
      SCOPED_TRACE(testing::Message() << "spread " << spread << (narrow ? ", a head that sees few edges" : ""));
      ModelConfig m = controlled_config();
      m.attention.threshold.head_spread = static_cast<float>(spread);
      auto visible = all;
      if (narrow) visible[3] = 63, visible[2] = 30;
      const Rows found = controlled(m, active, visible, gradients, balances);
      for (std::size_t r = 0; r < 4; ++r) {
        const double share = spread == 1 ? 1 : r % 2 == 0 ? 1.5 : 0.5;  // of the mean; 3 to 1
        const double wanted = std::min(0.2 * share, static_cast<double>(visible[r]) / kCausal);
        const double error = std::clamp(std::log(static_cast<double>(active[r]) / kCausal / wanted), -1.0, 1.0);
        EXPECT_NEAR(found.thresholds[r], 0.1 + kRate * error, 1e-6) << "row " << r;
        double balance = balances[r] + kBalance * gradients[r] / static_cast<double>(active[r]);
        if (error == -1) balance = std::min(balance, 0.0);
        if (error == 1) balance = std::max(balance, 0.0);
        if (static_cast<double>(visible[r]) / kCausal < 0.2 * share) balance = balances[r];  // sees less than its share
        EXPECT_NEAR(found.balances[r], balance, 1e-6) << "row " << r;
      }
    }
  }
}

TEST(ControlThresholds, BalancesWithoutAFiniteGradientStayAndNoneLowersAHeadWithoutEdges) {
  const Rows found = controlled(controlled_config(), {0, 42, 42, 42}, {210, 210, 210, 210}, {0.0f, NAN, INFINITY, 42.0f}, {1.0f, 2.0f, 3.0f, 4.0f});
  EXPECT_EQ(found.balances, (std::vector<float>{0.0f, 2.0f, 3.0f, 4.25f}));
  EXPECT_NEAR(found.thresholds[0], 0.1f - kRate, 1e-6);
}

}  // namespace
}  // namespace tessera::test
