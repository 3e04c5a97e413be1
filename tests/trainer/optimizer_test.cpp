// The sharded AdamW against AdamW written plainly in double, on 1, 2, 3 and 4 ranks and with buckets of several sizes; how buckets are cut; the
// schedules against their closed forms.

#include "trainer/optimizer.h"

#include <fmt/core.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>

#include "kernels/bf16.h"
#include "tests/model/bf16_ops.h"
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

/// Blocks of matrices between an embedding and vectors, as make_parameter_layout() places them.
ParameterLayout layout_of_blocks(std::int64_t embedding, std::vector<std::int64_t> blocks, std::int64_t vectors) {
  ParameterLayout layout;
  const auto add = [&](const std::string& name, std::int64_t size, bool decayed) {
    layout.parameters.push_back({name, {size}, layout.count, decayed, 0, 0});
    layout.count += size;
    if (decayed) layout.decayed_count = layout.count;
  };
  add("wte.weight", embedding, true);
  for (std::size_t l = 0; l < blocks.size(); ++l) {
    add(fmt::format("h.{}.attn.c_attn.weight", l), blocks[l] / 3, true);
    add(fmt::format("h.{}.mlp.c_fc.weight", l), blocks[l] - blocks[l] / 3, true);
  }
  add("h.0.ln_1.weight", vectors, false);
  return layout;
}

/// Memory and sums that an optimizer works with, in the type of weights that is wanted.
struct Problem {
  Problem(const ParameterLayout& layout, Communicator& comm, DType weights = DType::f32, std::int64_t bucket = 1 << 20)
      : ops(weights == DType::f32 ? make_cpu_ops(1) : test::make_bf16_ops()), optimizer(layout, comm.rank(), comm.size(), plan, weights, bucket) {
    const std::int64_t multiple = ShardedAdamW::padding_multiple(comm.size());
    padded = (layout.count + multiple - 1) / multiple * multiple;
    const auto w = plan.reserve(MemoryCategory::parameters, "w", weights, {padded});
    const auto v = plan.reserve(MemoryCategory::parameters, "v", DType::f32, {layout.count - layout.decayed_count});
    const auto g = plan.reserve(MemoryCategory::gradients, "g", DType::f32, {padded});
    const auto s = plan.reserve(MemoryCategory::workspace, "s", DType::f64, {2});
    plan.allocate(*ops);
    flat = {plan[w], plan[v], plan[g]};
    sums = plan[s];
    optimizer.bind(*ops, comm, flat);
  }
  /// Norm of the sum over ranks.
  double reduce(const std::vector<float>& gradient) {
    std::copy(gradient.begin(), gradient.end(), flat.gradients.as<float>());
    optimizer.reduce(sums);
    return std::sqrt(sums.as<double>()[0]);
  }
  void apply(const ShardedAdamW::Settings& s) {
    optimizer.apply(sums.slice(0, 1), s);
    optimizer.await_all();
  }

  std::unique_ptr<Ops> ops;
  MemoryPlan plan;
  ShardedAdamW optimizer;
  std::int64_t padded = 0;
  ShardedAdamW::Flat flat;
  Tensor sums;
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
      Problem p(layout, comm);
      std::vector<float> host(static_cast<std::size_t>(p.padded));
      for (std::size_t i = 0; i < n; ++i) p.flat.weights.as<float>()[i] = static_cast<float>(first[i]);
      ShardedAdamW::Settings s = settings;
      for (int step = 1; step <= kSteps; ++step) {
        std::fill(host.begin(), host.end(), 0.0f);
        for (std::int64_t i = 0; i < layout.count; ++i) host[static_cast<std::size_t>(i)] = gradient(step, comm.rank(), i);
        const double norm = p.reduce(host);
        EXPECT_NEAR(norm, norms[static_cast<std::size_t>(step - 1)], 1e-5 * norm);
        s.update = step;
        p.apply(s);
      }
      const float* found = p.flat.weights.as<float>();
      // Float against double: each of 12 steps rounds p (about 1) to 6e-8 and its change (lr x about 1) to a few 1e-7 of itself.
      for (std::size_t i = 0; i < n; ++i) ASSERT_NEAR(found[i], plainly.p[i], 3e-6) << "rank " << comm.rank() << " element " << i << " clip " << clip;
      for (std::size_t i = n; i < host.size(); ++i) ASSERT_EQ(found[i], 0.0f) << "padding";
    });
  }
}

TEST_P(ShardedAdamWTest, DoesNothingWhenTheNormIsNotFinite) {
  const int ranks = GetParam();
  const ParameterLayout layout = small_layout(100, 30);
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    testing::ThreadRanks::run(ranks, [&](Communicator& comm) {
      Problem p(layout, comm);
      std::vector<float> g(static_cast<std::size_t>(p.padded), 0.0f);
      if (comm.rank() == ranks - 1) g[7] = bad;  // seen by one rank only, skipped by all
      std::fill_n(p.flat.weights.as<float>(), p.padded, 0.5f);
      EXPECT_FALSE(std::isfinite(p.reduce(g)));
      p.apply({.lr = 1, .weight_decay = 1, .update = 1});
      for (std::int64_t i = 0; i < p.padded; ++i) ASSERT_EQ(p.flat.weights.as<float>()[i], 0.5f);
      for (std::int64_t i = 0; i < p.optimizer.count(); ++i) ASSERT_EQ(p.optimizer.m().as<float>()[i], 0.0f);
    });
  }
}

TEST_P(ShardedAdamWTest, SizesOfBucketsChangeNoBit) {
  const int ranks = GetParam();
  const ParameterLayout layout = layout_of_blocks(3000, {5000, 7001, 100, 4000}, 777);
  std::vector<float> first;
  for (const std::int64_t bucket : {1, 3000, 9000, 1 << 20}) {
    testing::ThreadRanks::run(ranks, [&](Communicator& comm) {
      Problem p(layout, comm, DType::f32, bucket);
      for (std::int64_t i = 0; i < layout.count; ++i) p.flat.weights.as<float>()[i] = std::sin(static_cast<float>(i));
      std::vector<float> g(static_cast<std::size_t>(p.padded));
      for (int step = 1; step <= 3; ++step) {
        for (std::int64_t i = 0; i < layout.count; ++i) g[static_cast<std::size_t>(i)] = gradient(step, comm.rank(), i);
        p.reduce(g);
        p.apply({.lr = 1e-2, .weight_decay = 0.1, .clip = 1, .update = step});
      }
      if (comm.rank() != 0) return;
      const std::vector<float> found(p.flat.weights.as<float>(), p.flat.weights.as<float>() + layout.count);
      if (first.empty()) first = found;
      EXPECT_EQ(found, first) << bucket;  // the norm's last bit may differ, and the factor that it makes is rounded to fp32
    });
  }
}

// Weights in bf16 follow an fp32 master: what they and the vectors hold is the master, rounded and not.
TEST_P(ShardedAdamWTest, NarrowWeightsFollowTheMaster) {
  const int ranks = GetParam();
  const ParameterLayout layout = layout_of_blocks(1000, {2000, 2000}, 333);
  const auto n = static_cast<std::size_t>(layout.count);
  std::vector<float> start(n);
  for (std::size_t i = 0; i < n; ++i) start[i] = std::sin(static_cast<float>(i));
  testing::ThreadRanks::run(ranks, [&](Communicator& comm) {
    Problem wide(layout, comm, DType::f32, 1000), narrow(layout, comm, DType::bf16, 1000);
    std::copy(start.begin(), start.end(), wide.flat.weights.as<float>());
    narrow.optimizer.set_master(0, std::span(start).first(1234));
    narrow.optimizer.set_master(1234, std::span(start).subspan(1234));
    std::vector<float> g(static_cast<std::size_t>(wide.padded));
    for (int step = 1; step <= 3; ++step) {
      for (std::int64_t i = 0; i < layout.count; ++i) g[static_cast<std::size_t>(i)] = gradient(step, comm.rank(), i);
      EXPECT_EQ(wide.reduce(g), narrow.reduce(g));
      for (Problem* p : {&wide, &narrow}) p->apply({.lr = 1e-2, .weight_decay = 0.1, .clip = 1, .update = step});
    }
    const float* expected = wide.flat.weights.as<float>();
    const auto* rounded = static_cast<const std::uint16_t*>(narrow.flat.weights.data);
    for (std::size_t i = 0; i < n; ++i) ASSERT_EQ(rounded[i], to_bf16(expected[i])) << "rank " << comm.rank() << " element " << i;
    for (std::int64_t i = layout.decayed_count; i < layout.count; ++i)
      ASSERT_EQ(narrow.flat.vectors.as<float>()[i - layout.decayed_count], expected[i]) << "rank " << comm.rank() << " element " << i;
    const Tensor gathered = narrow.optimizer.gather_parameters();
    EXPECT_EQ(gathered.data, narrow.flat.gradients.data);
    for (std::size_t i = 0; i < n; ++i) ASSERT_EQ(gathered.as<float>()[i], expected[i]);
    EXPECT_EQ(wide.optimizer.gather_parameters().data, wide.flat.weights.data);
  });
}

INSTANTIATE_TEST_SUITE_P(Ranks, ShardedAdamWTest, ::testing::Values(1, 2, 3, 4));

TEST(ShardedAdamW, SegmentsCoverTheParametersOnce) {
  for (const std::int64_t count : {1, 63, 64, 65, 1000, 100003}) {
    for (const int ranks : {1, 2, 3, 7, 16}) {
      const ParameterLayout layout = layout_of_blocks(count / 5, {count / 5, count / 5}, count - 3 * (count / 5));
      std::vector<int> owners(static_cast<std::size_t>(count));
      for (int r = 0; r < ranks; ++r) {
        MemoryPlan plan;
        const ShardedAdamW optimizer(layout, r, ranks, plan, DType::f32, 500);
        std::int64_t local = 0;
        for (const auto& s : optimizer.segments()) {
          EXPECT_EQ(s.local, local);  // no gaps
          local += s.count;
          for (std::int64_t i = s.first; i < s.first + s.count; ++i) ++owners.at(static_cast<std::size_t>(i));
        }
        EXPECT_EQ(local, optimizer.count());
        const std::int64_t unit = ShardedAdamW::padding_multiple(ranks), padded = (count + unit - 1) / unit * unit;
        EXPECT_EQ(plan.bytes(MemoryCategory::optimizer), 2 * static_cast<std::size_t>(padded / ranks) * sizeof(float));
      }
      EXPECT_EQ(std::count(owners.begin(), owners.end(), 1), count) << ranks << " ranks";
    }
  }
}

/// "first+count:block ..."
std::string text(const Buckets& b) {
  std::string s;
  for (const Bucket& bucket : b.list) s += fmt::format("{}{}+{}:{}", s.empty() ? "" : " ", bucket.first, bucket.count, bucket.block);
  return s;
}

TEST(Buckets, BordersFollowTheBackwardPass) {
  // Blocks at 1000, 2000, 3000, vectors at 4000 to 4100; units of 128.
  const ParameterLayout layout = layout_of_blocks(1000, {1000, 1000, 1000}, 100);
  // A bucket a block, each from the first multiple of 128 in it: 1024, 2048, 3072. 3968 is the last one below the vectors.
  EXPECT_EQ(text(Buckets(layout, 128, 500)), "0+1024:-1 1024+1024:0 2048+1024:1 3072+896:2 3968+256:-1");
  // 896 elements are not enough: the last two blocks together, then the first with the embedding.
  EXPECT_EQ(text(Buckets(layout, 128, 1500)), "0+2048:-1 2048+1920:1 3968+256:-1");
  EXPECT_EQ(text(Buckets(layout, 128, 1920)), "0+2048:-1 2048+1920:1 3968+256:-1");
  EXPECT_EQ(text(Buckets(layout, 128, 1921)), "0+1024:-1 1024+2944:0 3968+256:-1");
  EXPECT_EQ(text(Buckets(layout, 128, 5000)), "0+3968:-1 3968+256:-1");
  EXPECT_EQ(text(Buckets(layout, 8192, 1)), "0+8192:-1");
}

TEST(Buckets, ModelsWithoutTheOneOrTheOther) {
  EXPECT_EQ(text(Buckets(small_layout(100, 28), 64, 1)), "0+64:-1 64+64:-1");  // no blocks
  EXPECT_EQ(text(Buckets(small_layout(128, 0), 64, 1)), "0+128:-1");
  EXPECT_EQ(text(Buckets(small_layout(0, 30), 64, 1)), "0+64:-1");
  EXPECT_EQ(text(Buckets(layout_of_blocks(0, {128, 128}, 64), 64, 64)), "0+128:0 128+128:1 256+64:-1");              // nothing before the blocks
  EXPECT_EQ(text(Buckets(layout_of_blocks(64, {10, 10, 10, 98}, 1), 64, 1)), "0+64:-1 64+64:0 128+64:3 192+64:-1");  // blocks smaller than the unit
}

TEST(Buckets, AreCompleteWhenTheyAreReducedAndThereWhenTheyAreUsed) {
  ModelConfig m;
  m.layers = 5;
  m.width = 64;
  m.heads = 1;
  m.vocabulary = m.vocabulary_padded = 300;
  m.bias = true;
  const ParameterLayout layout = make_parameter_layout(m);
  for (const std::int64_t unit : {64, 128, 448, 4096}) {
    for (const std::int64_t elements : {1, 50000, 100000, 1 << 24}) {
      const Buckets b(layout, unit, elements);
      std::int64_t next = 0;
      for (std::size_t i = 0; i < b.list.size(); ++i) {
        const Bucket& bucket = b.list[i];
        EXPECT_EQ(bucket.first, next);
        EXPECT_EQ(bucket.first % unit, 0);
        EXPECT_EQ(bucket.count % unit, 0);
        next += bucket.count;
        for (const ParameterInfo& p : layout.parameters) {
          if (p.offset + p.shape.numel() <= bucket.first || p.offset >= next) continue;
          int block = -1;
          if (p.decayed) std::sscanf(p.name.c_str(), "h.%d.", &block);
          EXPECT_LE(bucket.block, block) << p.name << ": its gradient is complete later than its bucket's";
          EXPECT_TRUE(b.touches(i, block)) << p.name << ": used before its bucket is there";
        }
        if (i > 0 && i + 1 < b.list.size()) {
          EXPECT_GE(bucket.count, elements);
        }
      }
      EXPECT_EQ(next, (layout.count + unit - 1) / unit * unit);
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
  c.anneal = 0.4;
  c.anneal_from = 0.5;
  EXPECT_NEAR(wanted_density(c, 0.08, 1000, 200), std::sqrt(0.5 * 0.08), 1e-12);  // half way: the geometric mean
  EXPECT_NEAR(wanted_density(c, 0.08, 1000, 400), 0.08, 1e-12);
  EXPECT_NEAR(wanted_density(c, 0.08, 1000, 1000), 0.08, 1e-12);
  const double ratio = wanted_density(c, 0.08, 1000, 2) / wanted_density(c, 0.08, 1000, 1);
  for (int t = 2; t < 400; ++t) EXPECT_NEAR(wanted_density(c, 0.08, 1000, t + 1) / wanted_density(c, 0.08, 1000, t), ratio, 1e-12);
  c.anneal = 0;
  EXPECT_NEAR(wanted_density(c, 0.08, 1000, 1), 0.08, 1e-12);
}

TEST(Schedule, HeadTargetsFallGeometricallyAndMeetTheTarget) {
  ThresholdConfig c;
  c.target_edge_sparsity = 0.9;
  for (int h = 0; h < 5; ++h) EXPECT_DOUBLE_EQ(head_target(c, 5, h), 1 - 0.9);
  EXPECT_DOUBLE_EQ(head_target(c, 1, 0), 1 - 0.9);
  c.head_spread = 16;  // 1, 1/2, 1/4, 1/8, 1/16 of the first
  for (int h = 0; h < 5; ++h) EXPECT_NEAR(head_target(c, 5, h), 0.1 * 5 / 1.9375 / (1 << h), 1e-12) << h;
  EXPECT_NEAR(head_target(c, 1, 0), 0.1, 1e-12);
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
