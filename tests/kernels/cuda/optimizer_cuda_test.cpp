// Sums, AdamW and the threshold controller on the GPU.

#include "ops_cuda.h"
#include "tests/kernels/ops_testing.h"

namespace tessera {
namespace {

using namespace cuda_test;

constexpr double kEpsilon = testing::kEpsilon;  // the relative error of one rounding to f32

/// The CPU twin.
Ops& cpu() { return testing::ops(); }

// -- sums ---------------------------------------------------------------------------------------------------------------

TEST(CudaSums, AreTakenInDoubleAndAddedTo) {
  TESSERA_NEEDS_GPU();
  // One block has 4096 elements at a time; 1024 blocks go round again beyond 4 Mi.
  for (const std::int64_t count : {1, 3, 5, 4095, 4096, 4097, 100003, 5000011}) {
    const Doubles values = random_f32(count, 1);
    double sum = 3, squares = 4, magnitude = 0;
    for (const double v : values) sum += v, squares += v * v, magnitude += std::abs(v);
    const OnDevice x(DType::f32, {count}, values), total(DType::f64, {2}, {3, 4});
    cuda::add_sum(context(), total.tensor().slice(0, 1), x);
    cuda::add_sum_of_squares(context(), total.tensor().slice(1, 1), x);
    EXPECT_NEAR(total.doubles()[0], sum, 1e-12 * magnitude) << count;
    EXPECT_NEAR(total.doubles()[1], squares, 1e-12 * squares) << count;
  }
}

TEST(CudaSums, RepeatTheirBitsWhereverTheMemoryBegins) {
  TESSERA_NEEDS_GPU();
  constexpr std::int64_t kCount = 100003;
  const Doubles values = random_f32(kCount, 1);
  OnDevice total(DType::f64, {1});
  std::vector<std::vector<unsigned char>> results;
  for (const std::int64_t first : {0, 1, 2, 64}) {
    Doubles shifted(first, 1e30);
    shifted.insert(shifted.end(), values.begin(), values.end());
    const OnDevice x(DType::f32, {first + kCount}, shifted);
    const auto run = [&] {
      total.set({0.5});
      cuda::add_sum(context(), total, x.tensor().slice(first, kCount));
      return total.bytes();
    };
    expect_repeatable(run, "sum");
    results.push_back(run());
  }
  for (const auto& r : results) EXPECT_EQ(r, results[0]);
}

TEST(CudaSums, LargeValuesAndNaN) {
  TESSERA_NEEDS_GPU();
  const OnDevice large(DType::f32, {3}, {3e38, 3e38, -3e38}), nan(DType::f32, {2}, {1.0, NAN}), total(DType::f64, {1}, {0.0});
  cuda::add_sum(context(), total, large);  // beyond f32 on the way
  EXPECT_EQ(total.doubles()[0], static_cast<double>(3e38f));
  cuda::add_sum(context(), total, large.tensor().slice(0, 0));
  EXPECT_EQ(total.doubles()[0], static_cast<double>(3e38f));
  cuda::add_sum_of_squares(context(), total, nan);
  EXPECT_TRUE(std::isnan(total.doubles()[0]));
  EXPECT_THROW(cuda::add_sum(context(), large, nan), std::logic_error);
  EXPECT_THROW(cuda::add_sum(context(), total, total), std::logic_error);
}

// -- AdamW --------------------------------------------------------------------------------------------------------------

struct AdamWCase {
  std::int64_t count, decayed;
  float clip;
  DType weights;
};

TEST(CudaAdamW, FollowsThePaperAndTheCpuOverSeveralUpdates) {
  TESSERA_NEEDS_GPU();
  std::vector<AdamWCase> cases;
  for (const std::int64_t count : {1, 7, 8, 1000, 20011}) {
    for (const std::int64_t decayed : {std::int64_t{0}, count / 3, count * 17 / 20, count}) {  // also inside a thread's eight elements
      for (const float clip : {0.0f, 0.5f, 1e9f}) {
        for (const DType weights : {DType::bf16, DType::f32, DType::f64}) cases.push_back({count, decayed, clip, weights});  // f64: none
      }
    }
  }
  for (const AdamWCase& c : cases) {
    const Doubles start = random_f32(c.count, 1);
    const OnDevice parameter(DType::f32, {c.count}, start), m(DType::f32, {c.count}, Doubles(c.count, 0.0)),
        v(DType::f32, {c.count}, Doubles(c.count, 0.0));
    OnDevice weights(c.weights == DType::bf16 ? DType::bf16 : DType::f32, {c.count});
    testing::Floats cpu_parameter({c.count}, std::vector<float>(start.begin(), start.end())), cpu_m({c.count}), cpu_v({c.count});
    Doubles p = start, ms(c.count), vs(c.count);
    for (int update = 1; update <= 5; ++update) {
      const Doubles g = random_f32(c.count, 10 + update, 0.1);
      testing::Floats cpu_gradient({c.count}, std::vector<float>(g.begin(), g.end()));
      testing::Host<double> cpu_sumsq({1});
      for (const double x : g) cpu_sumsq[0] += x * x;
      const OnDevice gradient(DType::f32, {c.count}, g), norm(DType::f64, {1}, {cpu_sumsq[0]});
      AdamW a{.parameter = parameter.tensor(),
              .gradient = gradient.tensor(),
              .m = m.tensor(),
              .v = v.tensor(),
              .decayed = c.decayed,
              .lr = 1e-2f,
              .weight_decay = 0.1f,
              .update = update,
              .gradient_sumsq = norm.tensor(),
              .clip = c.clip};
      if (c.weights != DType::f64) a.weights = weights;
      weights.poison();
      cuda::adamw(context(), a);
      a.parameter = cpu_parameter.tensor(), a.gradient = cpu_gradient.tensor(), a.m = cpu_m.tensor(), a.v = cpu_v.tensor();
      a.gradient_sumsq = cpu_sumsq.tensor(), a.weights = {};
      cpu().adamw(a);

      const double scale = c.clip > 0 ? std::min(1.0, c.clip / std::sqrt(cpu_sumsq[0])) : 1.0;
      for (std::int64_t i = 0; i < c.count; ++i) {
        const double x = g[i] * scale;
        ms[i] = a.beta1 * ms[i] + (1 - static_cast<double>(a.beta1)) * x;
        vs[i] = a.beta2 * vs[i] + (1 - static_cast<double>(a.beta2)) * x * x;
        const double mh = ms[i] / (1 - std::pow(a.beta1, update)), vh = vs[i] / (1 - std::pow(a.beta2, update));
        p[i] -= a.lr * (mh / (std::sqrt(vh) + a.epsilon) + (i < c.decayed ? a.weight_decay * p[i] : 0.0));
      }
    }
    const std::string what = "adamw of " + std::to_string(c.count) + ", " + std::to_string(c.decayed) + " decayed";
    const Doubles got = parameter.doubles();
    // Five updates of lr each with a handful of roundings relative to it, and of the parameter itself.
    for (std::int64_t i = 0; i < c.count; ++i) {
      const double tolerance = 5 * (20 * 1e-2 + 2 * std::abs(p[i])) * kEpsilon;
      ASSERT_NEAR(got[i], p[i], tolerance) << what << " at " << i;
      ASSERT_NEAR(got[i], cpu_parameter[i], 2 * tolerance) << what << " at " << i;
    }
    expect_close(m.doubles(), ms, 30 * kEpsilon, what + ": m");
    expect_close(v.doubles(), vs, 30 * kEpsilon, what + ": v");
    if (c.weights == DType::bf16) {
      EXPECT_EQ(weights.doubles(), bf16(got)) << what;  // the new parameters, to nearest even
    } else if (c.weights == DType::f32) {
      EXPECT_EQ(weights.doubles(), got) << what;
    }
  }
}

TEST(CudaAdamW, WeightsRoundTiesToEven) {
  TESSERA_NEEDS_GPU();
  // lr 0: the parameters stay as they are.
  const Doubles values{1.00390625, 1.01171875, -1.00390625, 1.0039063692092896, 0.0, 3.0, -2.5, 65792.0, 66304.0};
  const OnDevice parameter(DType::f32, {9}, values), gradient(DType::f32, {9}, Doubles(9, 1.0)), m(DType::f32, {9}, Doubles(9, 0.0)),
      v(DType::f32, {9}, Doubles(9, 0.0)), sumsq(DType::f64, {1}, {9.0});
  OnDevice weights(DType::bf16, {9});
  cuda::adamw(context(), {.parameter = parameter,
                          .gradient = gradient,
                          .m = m,
                          .v = v,
                          .decayed = 4,
                          .weight_decay = 0.1f,
                          .weights = weights,
                          .gradient_sumsq = sumsq});
  EXPECT_EQ(parameter.doubles(), values);
  EXPECT_EQ(weights.doubles(), (Doubles{1.0, 1.015625, -1.0, 1.0078125, 0.0, 3.0, -2.5, 65536.0, 66560.0}));
}

TEST(CudaAdamW, ANormThatIsNotFiniteChangesNothing) {
  TESSERA_NEEDS_GPU();
  const OnDevice parameter(DType::f32, {100}, random_f32(100, 1)), gradient(DType::f32, {100}, random_f32(100, 2)),
      m(DType::f32, {100}, random_f32(100, 3)), v(DType::f32, {100}, Doubles(100, 1.0)), weights(DType::bf16, {100}, random_bf16(100, 4));
  const auto p0 = parameter.bytes(), m0 = m.bytes(), v0 = v.bytes(), w0 = weights.bytes();
  for (const double norm : {static_cast<double>(NAN), static_cast<double>(INFINITY)}) {
    const OnDevice sumsq(DType::f64, {1}, {norm});
    cuda::adamw(context(), {.parameter = parameter,
                            .gradient = gradient,
                            .m = m,
                            .v = v,
                            .decayed = 50,
                            .lr = 1,
                            .weight_decay = 1,
                            .weights = weights,
                            .gradient_sumsq = sumsq,
                            .clip = 1});
    EXPECT_EQ(parameter.bytes(), p0);
    EXPECT_EQ(m.bytes(), m0);
    EXPECT_EQ(v.bytes(), v0);
    EXPECT_EQ(weights.bytes(), w0);
  }
}

TEST(CudaAdamW, SlicesOfTheFlatParametersAndTheirBits) {
  TESSERA_NEEDS_GPU();
  constexpr std::int64_t kAll = 300000, kFirst = 64 * 33, kCount = 200003;
  const Doubles start = random_f32(kAll, 1), g = random_f32(kAll, 2, 0.1);
  const OnDevice gradient(DType::f32, {kAll}, g), sumsq(DType::f64, {1}, {10.0});
  OnDevice parameter(DType::f32, {kAll}), m(DType::f32, {kAll}), v(DType::f32, {kAll}), weights(DType::bf16, {kAll});
  const auto run = [&] {
    parameter.set(start);
    m.set(Doubles(kAll, 0.25)), v.set(Doubles(kAll, 0.5)), weights.set(Doubles(kAll, 7.0));
    cuda::adamw(context(), {.parameter = parameter.tensor().slice(kFirst, kCount),
                            .gradient = gradient.tensor().slice(kFirst, kCount),
                            .m = m.tensor().slice(kFirst, kCount),
                            .v = v.tensor().slice(kFirst, kCount),
                            .decayed = 100001,
                            .lr = 1e-3f,
                            .weight_decay = 0.1f,
                            .update = 3,
                            .weights = weights.tensor().slice(kFirst, kCount),
                            .gradient_sumsq = sumsq,
                            .clip = 1});
    auto all = parameter.bytes();
    for (const OnDevice* t : {&m, &v, &weights}) {
      const auto more = t->bytes();
      all.insert(all.end(), more.begin(), more.end());
    }
    return all;
  };
  expect_repeatable(run, "adamw");
  const Doubles p = parameter.doubles(), w = weights.doubles();
  for (std::int64_t i = 0; i < kAll; ++i) {
    const bool inside = i >= kFirst && i < kFirst + kCount;
    ASSERT_EQ(p[i] == start[i], !inside) << i;
    ASSERT_EQ(w[i], inside ? bf16(p[i]) : 7.0) << i;
  }
}

TEST(CudaAdamW, WrongArgumentsAreRefused) {
  TESSERA_NEEDS_GPU();
  const OnDevice x(DType::f32, {8}, Doubles(8, 0.0)), y(DType::f32, {7}), sumsq(DType::f64, {1}, {1.0}), i(DType::i32, {8});
  AdamW a{.parameter = x, .gradient = y, .m = x, .v = x, .gradient_sumsq = sumsq};
  EXPECT_THROW(cuda::adamw(context(), a), std::logic_error);
  a.gradient = x, a.update = 0;
  EXPECT_THROW(cuda::adamw(context(), a), std::logic_error);
  a.update = 1, a.decayed = 9;
  EXPECT_THROW(cuda::adamw(context(), a), std::logic_error);
  a.decayed = 8, a.weights = i;
  EXPECT_THROW(cuda::adamw(context(), a), std::logic_error);
}

// -- thresholds -----------------------------------------------------------------------------------------------------------

TEST(CudaThresholds, FollowTheDensityAsOnTheCpu) {
  TESSERA_NEEDS_GPU();
  for (const std::int64_t rows : {7, 384}) {
    Doubles counts(rows * kAttentionCounters, 12345);
    const Doubles special{100, 200, 50, 0, 1000, 1, 100000}, random = random_i32(rows, 0, 400, 1);
    for (std::int64_t r = 0; r < rows; ++r) counts[r * kAttentionCounters + kActiveEdges] = r < 7 ? special[r] : random[r];
    const Doubles start(rows, 0.5);
    const OnDevice threshold(DType::f32, {rows}, start), counters(DType::u64, {rows, kAttentionCounters}, counts);
    testing::Floats cpu_threshold({rows}, 0.5f);
    testing::Host<std::uint64_t> cpu_counters({rows, kAttentionCounters}, std::vector<std::uint64_t>(counts.begin(), counts.end()));
    for (const auto& [rate, low, high] : {std::tuple{0.2f, 0.35f, 0.65f}, std::tuple{1.0f, -10.0f, 10.0f}}) {
      ThresholdUpdate u{
          .threshold = threshold, .counters = counters, .causal_edges = 1000, .wanted_density = 0.1, .rate = rate, .low = low, .high = high};
      cuda::update_thresholds(context(), u);
      u.threshold = cpu_threshold.tensor(), u.counters = cpu_counters.tensor();
      cpu().update_thresholds(u);
      const Doubles got = threshold.doubles();
      for (std::int64_t r = 0; r < rows; ++r) ASSERT_NEAR(got[r], cpu_threshold[r], 4 * kEpsilon) << r;  // log of one library or the other
    }
    EXPECT_NEAR(threshold.doubles()[3], 0.35 - 1.0, 1e-6);  // nothing active: as if it were as sparse as can be
  }
  {
    // 100 edges wanted: near that, sums that are not finite, no edge, too few and too many by more than a factor e.
    const Doubles active{100, 200, 50, 50, 0, 36, 36, 272, 272}, gradients{30.0, -40.0, INFINITY, NAN, 7.0, 30.0, -36.0, -544.0, 136.0},
        wanted{0.4, 0.15, 0.25, 0.25, 0.0, 0.0, -0.25, 0.0, 0.5};
    const auto rows = static_cast<std::int64_t>(active.size());
    Doubles counts(active.size() * kAttentionCounters, 0.0);
    for (std::size_t r = 0; r < active.size(); ++r) counts[r * kAttentionCounters + kActiveEdges] = active[r];
    const OnDevice threshold(DType::f32, {rows}, Doubles(active.size(), 0.5)), counters(DType::u64, {rows, kAttentionCounters}, counts),
        balance(DType::f32, {rows}, Doubles(active.size(), 0.25)), gradient(DType::f32, {rows}, gradients);
    cuda::update_thresholds(context(), {.threshold = threshold,
                                        .counters = counters,
                                        .causal_edges = 1000,
                                        .wanted_density = 0.1,
                                        .rate = 0.2f,
                                        .low = -10,
                                        .high = 10,
                                        .balance = balance,
                                        .gradient = gradient,
                                        .balance_rate = 0.5f});
    const Doubles got = balance.doubles();
    for (std::size_t r = 0; r < active.size(); ++r) EXPECT_NEAR(got[r], wanted[r], 1e-7) << r;
  }
  const OnDevice threshold(DType::f32, {1}, {0.5}), counters(DType::u64, {1, kAttentionCounters}, Doubles(kAttentionCounters, 1.0));
  EXPECT_THROW(cuda::update_thresholds(context(), {.threshold = threshold, .counters = counters, .causal_edges = 0, .wanted_density = 1}),
               std::logic_error);
  EXPECT_THROW(cuda::update_thresholds(context(), {.threshold = counters, .counters = counters, .causal_edges = 1, .wanted_density = 1}),
               std::logic_error);
}

}  // namespace
}  // namespace tessera
