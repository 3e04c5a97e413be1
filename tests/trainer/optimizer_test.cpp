// The sharded AdamW against AdamW written plainly in double, on 1, 2, 3 and 4 ranks; the schedules against their closed forms.

#include "trainer/optimizer.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>

#include "tests/trainer/thread_ranks.h"
#include "trainer/schedule.h"

namespace tessera {
namespace {

/// `decayed` elements of one matrix, then `plain` of one vector.
ParameterLayout small_layout(std::int64_t decayed, std::int64_t plain) {
  ParameterLayout layout;
  layout.parameters.push_back({"w", {decayed}, 0, true, 0, 0});
  layout.parameters.push_back({"b", {plain}, decayed, false, 0, 0});
  layout.count = decayed + plain;
  layout.decayed_count = decayed;
  return layout;
}

struct PlainAdamW {
  std::vector<double> p, m, v;
  void step(const std::vector<double>& g, const ShardedAdamW::Settings& s, std::size_t decayed) {
    double sumsq = 0;
    for (const double x : g) sumsq += x * x;
    const double norm = std::sqrt(sumsq), scale = s.clip > 0 && norm > s.clip ? s.clip / norm : 1;
    for (std::size_t i = 0; i < p.size(); ++i) {
      const double gi = g[i] * scale;
      m[i] = s.beta1 * m[i] + (1 - s.beta1) * gi;
      v[i] = s.beta2 * v[i] + (1 - s.beta2) * gi * gi;
      const double mh = m[i] / (1 - std::pow(s.beta1, s.update)), vh = v[i] / (1 - std::pow(s.beta2, s.update));
      p[i] -= s.lr * (mh / (std::sqrt(vh) + s.eps) + (i < decayed ? s.weight_decay * p[i] : 0));
    }
  }
};

/// The gradient that rank r has at a step; ranks' gradients add up.
float gradient(int step, int rank, std::int64_t i) {
  std::mt19937 random(static_cast<unsigned>(step * 1000003 + rank * 7919 + i));
  return std::normal_distribution<float>(0, 1)(random);
}

constexpr int kSteps = 12;

class ShardedAdamWTest : public ::testing::TestWithParam<int> {};

TEST_P(ShardedAdamWTest, MatchesPlainAdamW) {
  const int ranks = GetParam();
  const std::int64_t decayed = 333, plain = 58;  // the boundary falls inside a block, and the last block has padding
  const ParameterLayout layout = small_layout(decayed, plain);
  const auto n = static_cast<std::size_t>(layout.count);
  for (const double clip : {0.0, 1.0, 1e6}) {
    PlainAdamW plainly{std::vector<double>(n), std::vector<double>(n), std::vector<double>(n)};
    for (std::size_t i = 0; i < n; ++i) plainly.p[i] = static_cast<float>(std::sin(static_cast<double>(i)));
    const std::vector<double> first = plainly.p;
    ShardedAdamW::Settings settings{.lr = 1e-2, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .weight_decay = 0.1, .clip = clip, .update = 1};
    std::vector<double> norms;
    for (int step = 1; step <= kSteps; ++step) {
      std::vector<double> g(n);
      for (std::size_t i = 0; i < n; ++i)
        for (int r = 0; r < ranks; ++r) g[i] += gradient(step, r, static_cast<std::int64_t>(i));
      settings.update = step;
      double sumsq = 0;
      for (const double x : g) sumsq += x * x;
      norms.push_back(std::sqrt(sumsq));
      plainly.step(g, settings, static_cast<std::size_t>(decayed));
    }

    testing::ThreadRanks::run(ranks, [&](Communicator& comm) {
      const auto ops = make_cpu_ops(1);
      MemoryPlan plan;
      ShardedAdamW optimizer(layout, comm.rank(), ranks, plan);
      const std::int64_t padded = optimizer.padded() * ranks;
      const auto parameters = plan.reserve(MemoryCategory::parameters, "p", DType::f32, {padded});
      const auto gradients = plan.reserve(MemoryCategory::gradients, "g", DType::f32, {padded});
      plan.allocate(*ops);
      EXPECT_EQ(padded % ShardedAdamW::padding_multiple(ranks), 0);
      std::vector<float> host(static_cast<std::size_t>(padded));
      for (std::size_t i = 0; i < n; ++i) host[i] = static_cast<float>(first[i]);
      ops->upload(plan[parameters], host.data());
      ShardedAdamW::Settings s = settings;
      for (int step = 1; step <= kSteps; ++step) {
        std::fill(host.begin(), host.end(), 0.0f);
        for (std::int64_t i = 0; i < layout.count; ++i) host[static_cast<std::size_t>(i)] = gradient(step, comm.rank(), i);
        ops->upload(plan[gradients], host.data());
        const double norm = optimizer.reduce(*ops, comm, plan[gradients]);
        EXPECT_NEAR(norm, norms[static_cast<std::size_t>(step - 1)], 1e-5 * norm);
        s.update = step;
        optimizer.apply(*ops, comm, plan[parameters], plan[gradients], s);
      }
      ops->download(host.data(), plan[parameters]);
      // Float against double: each of 12 steps rounds p (about 1) to 6e-8 and its change (lr x about 1) to a few 1e-7 of itself.
      for (std::size_t i = 0; i < n; ++i) ASSERT_NEAR(host[i], plainly.p[i], 3e-6) << "rank " << comm.rank() << " element " << i << " clip " << clip;
      for (std::size_t i = n; i < host.size(); ++i) ASSERT_EQ(host[i], 0.0f) << "padding";
    });
  }
}

TEST_P(ShardedAdamWTest, DoesNothingWhenTheNormIsNotFinite) {
  const int ranks = GetParam();
  const ParameterLayout layout = small_layout(100, 30);
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    testing::ThreadRanks::run(ranks, [&](Communicator& comm) {
      const auto ops = make_cpu_ops(1);
      MemoryPlan plan;
      ShardedAdamW optimizer(layout, comm.rank(), ranks, plan);
      const std::int64_t padded = optimizer.padded() * ranks;
      const auto parameters = plan.reserve(MemoryCategory::parameters, "p", DType::f32, {padded});
      const auto gradients = plan.reserve(MemoryCategory::gradients, "g", DType::f32, {padded});
      plan.allocate(*ops);
      std::vector<float> g(static_cast<std::size_t>(padded), 0.0f), p(g.size(), 0.5f);
      if (comm.rank() == ranks - 1) g[7] = bad;  // seen by one rank only, skipped by all
      ops->upload(plan[gradients], g.data());
      ops->upload(plan[parameters], p.data());
      EXPECT_FALSE(std::isfinite(optimizer.reduce(*ops, comm, plan[gradients])));
      optimizer.apply(*ops, comm, plan[parameters], plan[gradients], {.lr = 1, .weight_decay = 1, .update = 1});
      ops->download(p.data(), plan[parameters]);
      for (const float x : p) ASSERT_EQ(x, 0.5f);
      std::vector<float> m(static_cast<std::size_t>(optimizer.count()));
      ops->download(m.data(), optimizer.m());
      for (const float x : m) ASSERT_EQ(x, 0.0f);
    });
  }
}

INSTANTIATE_TEST_SUITE_P(Ranks, ShardedAdamWTest, ::testing::Values(1, 2, 3, 4));

TEST(ShardedAdamW, BlocksCoverTheParametersOnce) {
  for (const std::int64_t count : {1, 63, 64, 65, 1000, 100003}) {
    for (const int ranks : {1, 2, 3, 7, 16}) {
      const ParameterLayout layout = small_layout(count / 2, count - count / 2);
      std::int64_t next = 0;
      for (int r = 0; r < ranks; ++r) {
        MemoryPlan plan;
        const ShardedAdamW optimizer(layout, r, ranks, plan);
        if (optimizer.count() > 0) {
          EXPECT_EQ(optimizer.first(), next);
        }
        next += optimizer.count();
        EXPECT_EQ(plan.bytes(MemoryCategory::optimizer), 2 * optimizer.padded() * sizeof(float) + MemoryPlan::kAlignment);
      }
      EXPECT_EQ(next, count);
    }
  }
}

TEST(Schedule, WarmUpIsLinearAndReachesThePeak) {
  OptimizerConfig o;
  o.lr = 2.0;
  o.warmup = 10;
  for (const Schedule s : {Schedule::constant, Schedule::cosine, Schedule::wsd}) {
    o.schedule = s;
    for (int t = 1; t <= 10; ++t) EXPECT_DOUBLE_EQ(learning_rate(o, 100, t), 0.2 * t);
  }
  o.warmup = 0;
  o.schedule = Schedule::constant;
  EXPECT_DOUBLE_EQ(learning_rate(o, 100, 1), 2.0);
}

TEST(Schedule, Cosine) {
  OptimizerConfig o;
  o.lr = 1.0;
  o.warmup = 20;
  o.final_lr = 0.1;
  o.schedule = Schedule::cosine;
  EXPECT_DOUBLE_EQ(learning_rate(o, 120, 70), 0.1 + 0.9 * 0.5);  // half way
  EXPECT_NEAR(learning_rate(o, 120, 45), 0.1 + 0.9 * 0.5 * (1 + std::sqrt(0.5)), 1e-12);
  EXPECT_DOUBLE_EQ(learning_rate(o, 120, 120), 0.1);
  EXPECT_DOUBLE_EQ(learning_rate(o, 120, 500), 0.1);
  for (int t = 21; t <= 120; ++t) EXPECT_LT(learning_rate(o, 120, t), learning_rate(o, 120, t - 1));
}

TEST(Schedule, WarmUpStableDecay) {
  OptimizerConfig o;
  o.lr = 1.0;
  o.warmup = 10;
  o.final_lr = 0.0;
  o.decay = 0.2;
  o.schedule = Schedule::wsd;
  for (int t = 10; t <= 80; ++t) EXPECT_DOUBLE_EQ(learning_rate(o, 100, t), 1.0);
  EXPECT_DOUBLE_EQ(learning_rate(o, 100, 90), 0.5);
  EXPECT_DOUBLE_EQ(learning_rate(o, 100, 95), 0.25);
  EXPECT_DOUBLE_EQ(learning_rate(o, 100, 100), 0.0);
  o.decay = 0.0;
  EXPECT_DOUBLE_EQ(learning_rate(o, 100, 100), 1.0);
}

TEST(Schedule, ARunAllWarmUp) {
  OptimizerConfig o;
  o.lr = 1.0;
  o.warmup = 100;
  for (const Schedule s : {Schedule::constant, Schedule::cosine, Schedule::wsd}) {
    o.schedule = s;
    EXPECT_DOUBLE_EQ(learning_rate(o, 50, 50), 0.5);
    EXPECT_TRUE(std::isfinite(learning_rate(o, 100, 100)));
  }
}

TEST(Schedule, WantedDensityFallsGeometrically) {
  ThresholdConfig c;
  c.target_edge_sparsity = 0.92;
  c.anneal = 0.4;
  c.anneal_from = 0.5;
  EXPECT_NEAR(wanted_density(c, 1000, 200), std::sqrt(0.5 * 0.08), 1e-12);  // half way: the geometric mean
  EXPECT_NEAR(wanted_density(c, 1000, 400), 0.08, 1e-12);
  EXPECT_NEAR(wanted_density(c, 1000, 1000), 0.08, 1e-12);
  const double ratio = wanted_density(c, 1000, 2) / wanted_density(c, 1000, 1);
  for (int t = 2; t < 400; ++t) EXPECT_NEAR(wanted_density(c, 1000, t + 1) / wanted_density(c, 1000, t), ratio, 1e-12);
  c.anneal = 0;
  EXPECT_NEAR(wanted_density(c, 1000, 1), 0.08, 1e-12);
}

TEST(Schedule, ThresholdRangesHoldEveryUsefulThreshold) {
  AttentionConfig a;
  a.score = Score::cosine;
  a.scale_init = 8;
  EXPECT_LE(threshold_range(a).low, -8);  // dense
  EXPECT_GE(threshold_range(a).high, 8);  // empty
  a.score = Score::fidelity;
  EXPECT_EQ(threshold_range(a).low, 0);
  EXPECT_LT(threshold_range(a).high, 1);
  EXPECT_FLOAT_EQ(threshold_range(a).rate, a.threshold.rate / 8);
}

}  // namespace
}  // namespace tessera
