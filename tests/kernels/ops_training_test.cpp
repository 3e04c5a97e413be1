// The classifier, sums, AdamW, the threshold controller, copies, and the promise that bits do not depend on the number of threads.

#include <omp.h>

#include <bit>
#include <cstring>
#include <filesystem>
#include <fstream>

#include "kernels/cpu/ops.h"
#include "tests/kernels/ops_testing.h"

namespace tessera::testing {
namespace {

// -- classifier -------------------------------------------------------------------------------------------------------------

struct ClassifierCase {
  std::int64_t rows, columns, vocabulary, padded, chunk;
};

/// Sum of the losses, and the losses themselves when wanted.
double cross_entropy(const ClassifierCase& c, const std::vector<double>& x, const std::vector<double>& w, const Ints& targets,
                     std::vector<double>* losses = nullptr) {
  double total = 0;
  for (std::int64_t n = 0; n < c.rows; ++n) {
    std::vector<double> logits(static_cast<std::size_t>(c.vocabulary));
    for (std::int64_t v = 0; v < c.vocabulary; ++v) {
      for (std::int64_t i = 0; i < c.columns; ++i) {
        logits[static_cast<std::size_t>(v)] += x[static_cast<std::size_t>(n * c.columns + i)] * w[static_cast<std::size_t>(v * c.columns + i)];
      }
    }
    const double highest = *std::max_element(logits.begin(), logits.end());
    double sum = 0;
    for (const double l : logits) sum += std::exp(l - highest);
    const double loss = targets[n] < 0 ? 0.0 : highest + std::log(sum) - logits[static_cast<std::size_t>(targets[n])];
    if (losses) losses->push_back(loss);
    total += loss;
  }
  return total;
}

class ClassifierTest : public ::testing::TestWithParam<ClassifierCase> {};

TEST_P(ClassifierTest, LossesAndGradientsMatchTheDefinition) {
  const ClassifierCase c = GetParam();
  constexpr float kScale = 0.25f;
  Floats x = random_floats({c.rows, c.columns}, 1), w = random_floats({c.padded, c.columns}, 2), losses({c.rows}, NAN);
  const Floats w_used({c.vocabulary, c.columns}, std::vector<float>(w.values.begin(), w.values.begin() + c.vocabulary * c.columns));
  std::fill(w.values.begin() + c.vocabulary * c.columns, w.values.end(), NAN);  // padding takes no part
  Floats dx({c.rows, c.columns}, NAN), dw = random_floats({c.padded, c.columns}, 3), workspace({c.chunk, c.padded}, NAN);
  const Floats dw0 = dw;
  Ints targets = random_ints({c.rows}, 0, static_cast<std::int32_t>(c.vocabulary) - 1, 4), predictions({c.rows}, -7);
  for (std::int64_t n = 1; n < c.rows; n += 3) targets[n] = -1;
  ops().classifier({.x = x.tensor(),
                    .w = w.tensor(),
                    .vocabulary = c.vocabulary,
                    .targets = targets.tensor(),
                    .losses = losses.tensor(),
                    .predictions = predictions.tensor(),
                    .dx = dx.tensor(),
                    .dw = dw.tensor(),
                    .gradient_scale = kScale,
                    .workspace = workspace.tensor()});

  const auto xs = x.doubles(), ws = w_used.doubles();
  std::vector<double> wanted;
  cross_entropy(c, xs, ws, targets, &wanted);
  // Logits have a standard deviation of sqrt(C) and C roundings each; the loss adds a few more.
  const double tolerance = (static_cast<double>(c.columns) + 10) * kEpsilon * std::sqrt(static_cast<double>(c.columns)) * 4;
  for (std::int64_t n = 0; n < c.rows; ++n) {
    ASSERT_NEAR(losses[n], wanted[static_cast<std::size_t>(n)], tolerance * 3) << n;
    double highest = -1e30;
    std::int64_t best = -1;
    for (std::int64_t v = 0; v < c.vocabulary; ++v) {
      double logit = 0;
      for (std::int64_t i = 0; i < c.columns; ++i) logit += static_cast<double>(x[n * c.columns + i]) * w[v * c.columns + i];
      if (logit > highest) highest = logit, best = v;
    }
    ASSERT_EQ(predictions[n], best) << n;
  }
  auto wanted_dx = numeric_gradient([&](const auto& v) { return kScale * cross_entropy(c, v, ws, targets); }, xs);
  expect_close(dx.values, wanted_dx, 1e-5, "dx");
  auto wanted_dw = numeric_gradient([&](const auto& v) { return kScale * cross_entropy(c, xs, v, targets); }, ws);
  wanted_dw.resize(dw.values.size());  // nothing is added to padding
  expect_close(dw.values, plus(dw0, wanted_dw), 1e-5, "dw");

  // Without gradients: the same losses.
  Floats again({c.rows}, NAN);
  ops().classifier({.x = x.tensor(),
                    .w = w.tensor(),
                    .vocabulary = c.vocabulary,
                    .targets = targets.tensor(),
                    .losses = again.tensor(),
                    .workspace = workspace.tensor()});
  EXPECT_EQ(again.values, losses.values);
}

INSTANTIATE_TEST_SUITE_P(Cases, ClassifierTest,
                         ::testing::Values(ClassifierCase{1, 1, 1, 1, 1}, ClassifierCase{1, 5, 3, 8, 4}, ClassifierCase{7, 6, 13, 16, 1},
                                           ClassifierCase{7, 6, 13, 16, 3}, ClassifierCase{7, 6, 13, 16, 7}, ClassifierCase{10, 4, 601, 640, 4}));

TEST(ClassifierTest, HugeLogitsDoNotOverflow) {
  Floats x({1, 1}, 1.0f), w({3, 1}, {3e4f, 1e4f, -3e4f}), losses({3}), workspace({1, 3}), dx({1, 1});
  for (const auto& [target, loss] : {std::pair{0, 0.0f}, std::pair{1, 2e4f}, std::pair{2, 6e4f}}) {
    Ints targets({1}, {target});
    Tensor out = losses.tensor().view({1});
    ops().classifier({.x = x.tensor(),
                      .w = w.tensor(),
                      .vocabulary = 3,
                      .targets = targets.tensor(),
                      .losses = out,
                      .dx = dx.tensor(),
                      .workspace = workspace.tensor()});
    EXPECT_FLOAT_EQ(losses[0], loss);
    EXPECT_TRUE(std::isfinite(dx[0]));
  }
}

TEST(ClassifierTest, TheLowestIndexWinsATieAndNonFiniteShows) {
  Floats x({2, 1}, {1.0f, NAN}), w({4, 1}, {1.0f, 5.0f, 2.0f, 5.0f}), losses({2}), workspace({2, 4}), dx({2, 1});
  Ints targets({2}, {0, 0}), predictions({2});
  ops().classifier({.x = x.tensor(),
                    .w = w.tensor(),
                    .vocabulary = 4,
                    .targets = targets.tensor(),
                    .losses = losses.tensor(),
                    .predictions = predictions.tensor(),
                    .dx = dx.tensor(),
                    .workspace = workspace.tensor()});
  EXPECT_EQ(predictions[0], 1);
  EXPECT_TRUE(std::isfinite(losses[0]));
  EXPECT_TRUE(std::isnan(losses[1]));
  EXPECT_TRUE(std::isnan(dx[1]));
}

TEST(ClassifierTest, WrongArgumentsAreRefused) {
  Floats x({2, 3}), w({8, 3}), losses({2}), workspace({2, 8}), small({1, 7});
  Ints targets({2}, {0, 6});
  Classifier c{
      .x = x.tensor(), .w = w.tensor(), .vocabulary = 6, .targets = targets.tensor(), .losses = losses.tensor(), .workspace = workspace.tensor()};
  EXPECT_THROW(ops().classifier(c), std::logic_error);  // target 6 of 6
  targets[1] = -2;
  EXPECT_THROW(ops().classifier(c), std::logic_error);
  targets[1] = -1;
  EXPECT_NO_THROW(ops().classifier(c));
  c.vocabulary = 9;
  EXPECT_THROW(ops().classifier(c), std::logic_error);
  c.vocabulary = 6;
  c.workspace = small.tensor();
  EXPECT_THROW(ops().classifier(c), std::logic_error);
}

// -- sums -------------------------------------------------------------------------------------------------------------------

TEST(Sums, AreTakenInDoubleAndAddedTo) {
  for (const std::int64_t count : {0, 1, 5, 16384, 100003}) {
    Floats x = random_floats({count}, 1);
    Host<double> sum({1}, 3.0), squares({1}, 4.0);
    double wanted_sum = 3, wanted_squares = 4;
    for (const float v : x.values) wanted_sum += v, wanted_squares += static_cast<double>(v) * v;
    ops().add_sum(sum.tensor(), x.tensor());
    ops().add_sum_of_squares(squares.tensor(), x.tensor());
    EXPECT_NEAR(sum[0], wanted_sum, 1e-12 * wanted_squares) << count;  // about the sum of magnitudes
    EXPECT_NEAR(squares[0], wanted_squares, 1e-12 * wanted_squares) << count;
  }
  Host<double> sum({1});
  Floats large({3}, {3e38f, 3e38f, -3e38f});  // beyond f32 on the way
  ops().add_sum(sum.tensor(), large.tensor());
  EXPECT_EQ(sum[0], static_cast<double>(3e38f));
  Floats nan({2}, {1.0f, NAN});
  ops().add_sum_of_squares(sum.tensor(), nan.tensor());
  EXPECT_TRUE(std::isnan(sum[0]));
  Floats not_double({1});
  EXPECT_THROW(ops().add_sum(not_double.tensor(), nan.tensor()), std::logic_error);
}

TEST(Add, IsElementwiseAndMayBeInPlace) {
  Floats a = random_floats({70001}, 1), b = random_floats({70001}, 2), to({70001});
  ops().add(to.tensor(), a.tensor(), b.tensor());
  for (std::int64_t i = 0; i < 70001; ++i) ASSERT_EQ(to[i], a[i] + b[i]);
  ops().add(a.tensor(), a.tensor(), b.tensor());
  EXPECT_EQ(a.values, to.values);
  EXPECT_THROW(ops().add(to.tensor(), a.tensor(), b.tensor().slice(0, 5)), std::logic_error);
}

// -- optimizer --------------------------------------------------------------------------------------------------------------

TEST(AdamWTest, FollowsThePaperOverSeveralUpdates) {
  constexpr std::int64_t kCount = 20011;  // more than one chunk of the loop
  for (const std::int64_t decayed : {std::int64_t{0}, std::int64_t{17003}, kCount}) {
    for (const float clip : {0.0f, 0.5f, 1e9f}) {
      Floats parameter = random_floats({kCount}, 1), m({kCount}), v({kCount});
      std::vector<double> p = parameter.doubles(), ms(kCount), vs(kCount);
      for (int update = 1; update <= 5; ++update) {
        Floats gradient = random_floats({kCount}, 10 + static_cast<std::uint32_t>(update), 0.1f);
        Host<double> sumsq({1});
        ops().add_sum_of_squares(sumsq.tensor(), gradient.tensor());
        const AdamW a{.parameter = parameter.tensor(),
                      .gradient = gradient.tensor(),
                      .m = m.tensor(),
                      .v = v.tensor(),
                      .decayed = decayed,
                      .lr = 1e-2f,
                      .weight_decay = 0.1f,
                      .update = update,
                      .gradient_sumsq = sumsq.tensor(),
                      .clip = clip};
        ops().adamw(a);
        const double scale = clip > 0 ? std::min(1.0, clip / std::sqrt(sumsq[0])) : 1.0;
        for (std::size_t i = 0; i < p.size(); ++i) {
          const double g = gradient.values[i] * scale;
          ms[i] = a.beta1 * ms[i] + (1 - static_cast<double>(a.beta1)) * g;
          vs[i] = a.beta2 * vs[i] + (1 - static_cast<double>(a.beta2)) * g * g;
          const double mh = ms[i] / (1 - std::pow(a.beta1, update)), vh = vs[i] / (1 - std::pow(a.beta2, update));
          p[i] -= a.lr * (mh / (std::sqrt(vh) + a.epsilon) + (static_cast<std::int64_t>(i) < decayed ? a.weight_decay * p[i] : 0.0));
        }
      }
      // Five updates of lr each with a handful of roundings relative to it, and of the parameter itself.
      for (std::size_t i = 0; i < p.size(); ++i) ASSERT_NEAR(parameter.values[i], p[i], 5 * (20 * 1e-2 + 2 * std::abs(p[i])) * kEpsilon) << i;
      expect_close(m.values, ms, 30 * kEpsilon, "m");
      expect_close(v.values, vs, 30 * kEpsilon, "v");
    }
  }
}

TEST(AdamWTest, ANonFiniteNormChangesNothing) {
  Floats parameter = random_floats({100}, 1), gradient = random_floats({100}, 2), m = random_floats({100}, 3), v({100}, 1.0f);
  const Floats p0 = parameter, m0 = m, v0 = v;
  for (const double norm : {static_cast<double>(NAN), static_cast<double>(INFINITY)}) {
    Host<double> sumsq({1}, norm);
    ops().adamw({.parameter = parameter.tensor(),
                 .gradient = gradient.tensor(),
                 .m = m.tensor(),
                 .v = v.tensor(),
                 .decayed = 50,
                 .lr = 1,
                 .weight_decay = 1,
                 .gradient_sumsq = sumsq.tensor(),
                 .clip = 1});
    EXPECT_EQ(parameter, p0);
    EXPECT_EQ(m, m0);
    EXPECT_EQ(v, v0);
  }
}

TEST(AdamWTest, WeightsReceiveTheUpdatedParameters) {
  Floats parameter = random_floats({20'000}, 1), gradient = random_floats({20'000}, 2), m({20'000}), v({20'000}), weights({20'000}, NAN);
  Host<double> sumsq({1}, 1.0);
  ops().adamw({.parameter = parameter.tensor(),
               .gradient = gradient.tensor(),
               .m = m.tensor(),
               .v = v.tensor(),
               .lr = 0.1f,
               .weights = weights.tensor(),
               .gradient_sumsq = sumsq.tensor()});
  EXPECT_EQ(weights, parameter);
}

TEST(AdamWTest, WrongArgumentsAreRefused) {
  Floats x({8}), y({7});
  Host<double> sumsq({1});
  AdamW a{.parameter = x.tensor(), .gradient = y.tensor(), .m = x.tensor(), .v = x.tensor(), .gradient_sumsq = sumsq.tensor()};
  EXPECT_THROW(ops().adamw(a), std::logic_error);
  a.gradient = x.tensor();
  a.update = 0;
  EXPECT_THROW(ops().adamw(a), std::logic_error);
  a.update = 1;
  a.decayed = 9;
  EXPECT_THROW(ops().adamw(a), std::logic_error);
}

TEST(Thresholds, FollowTheDensity) {
  constexpr double kCausal = 1000, kWanted = 0.1;
  const std::vector<std::uint64_t> active{100, 200, 50, 0, 1000, 1, 100000};
  const auto rows = static_cast<std::int64_t>(active.size());
  Floats threshold({rows}, 0.5f);
  Host<std::uint64_t> counters({rows, kAttentionCounters}, 12345);
  for (std::int64_t r = 0; r < rows; ++r) counters[r * kAttentionCounters + kActiveEdges] = active[static_cast<std::size_t>(r)];
  ThresholdUpdate u{.threshold = threshold.tensor(),
                    .counters = counters.tensor(),
                    .causal_edges = kCausal,
                    .wanted_density = kWanted,
                    .rate = 0.2f,
                    .low = 0.35f,
                    .high = 0.65f};
  ops().update_thresholds(u);
  EXPECT_FLOAT_EQ(threshold[0], 0.5f);                                             // as wanted
  EXPECT_FLOAT_EQ(threshold[1], 0.5f + 0.2f * static_cast<float>(std::log(2.0)));  // too dense: up
  EXPECT_FLOAT_EQ(threshold[2], std::max(0.35f, 0.5f - 0.2f * std::log(2.0f)));    // too sparse: down
  EXPECT_FLOAT_EQ(threshold[3], 0.35f);                                            // nothing active: clamp -1, then low
  EXPECT_FLOAT_EQ(threshold[4], 0.65f);                                            // ln 10 clamped to 1, then high
  EXPECT_FLOAT_EQ(threshold[5], 0.35f);
  EXPECT_FLOAT_EQ(threshold[6], 0.65f);
  u.low = -10, u.high = 10, u.rate = 1;
  const float before = threshold[4];
  ops().update_thresholds(u);
  EXPECT_FLOAT_EQ(threshold[4], before + 1.0f);
  u.wanted_density = 0;
  EXPECT_THROW(ops().update_thresholds(u), std::logic_error);
  u.wanted_density = kWanted, u.causal_edges = 0;
  EXPECT_THROW(ops().update_thresholds(u), std::logic_error);
}

/// 100 of 1,000 causal edges wanted.
ThresholdUpdate balancing(Tensor threshold, Tensor counters, Tensor balance, Tensor gradient) {
  return {.threshold = threshold,
          .counters = counters,
          .causal_edges = 1000,
          .wanted_density = 0.1,
          .rate = 0.2f,
          .low = -10,
          .high = 10,
          .balance = balance,
          .gradient = gradient,
          .balance_rate = 0.1f};
}

struct BalanceCase {
  std::uint64_t active;  // edges
  float gradient, wanted;
};

TEST(Thresholds, BalancesTakeOffTheMeanGradient) {
  const std::vector<BalanceCase> cases{
      {100, 30.0f, 0.25f + 0.5f * 30.0f / 100.0f},
      {200, -40.0f, 0.25f - 0.5f * 40.0f / 200.0f},
      {50, -40.0f, 0.25f - 0.5f * 40.0f / 50.0f},
      {50, INFINITY, 0.25f},  // a sum that is not finite
      {50, NAN, 0.25f},
      {0, 7.0f, 0.0f},       // no edge: no step, and nothing that lowers scores
      {36, 30.0f, 0.0f},     // too few edges by more than a factor e
      {36, -36.0f, -0.25f},  // raises them
      {272, -544.0f, 0.0f},  // too many: nothing that raises scores
      {272, 136.0f, 0.5f},
      {1000, NAN, 0.25f},
  };
  const auto rows = static_cast<std::int64_t>(cases.size());
  Floats threshold({rows}, 0.5f), balance({rows}, 0.25f), gradient({rows});
  Host<std::uint64_t> counters({rows, kAttentionCounters}, 0);
  for (std::int64_t r = 0; r < rows; ++r) {
    const BalanceCase& c = cases[static_cast<std::size_t>(r)];
    counters[r * kAttentionCounters + kActiveEdges] = c.active, gradient[r] = c.gradient;
  }
  ThresholdUpdate u = balancing(threshold.tensor(), counters.tensor(), balance.tensor(), gradient.tensor());
  u.balance_rate = 0.5f;
  ops().update_thresholds(u);
  EXPECT_FLOAT_EQ(threshold[0], 0.5f);
  for (std::int64_t r = 0; r < rows; ++r) EXPECT_FLOAT_EQ(balance[r], cases[static_cast<std::size_t>(r)].wanted) << r;
  u.gradient = counters.tensor();
  EXPECT_THROW(ops().update_thresholds(u), std::logic_error);
}

// The sum of a head's dx goes to zero: each step adds to dx, on the active edges near the threshold, what update_thresholds says.
TEST(Thresholds, BalancesEndWithAZeroSum) {
  for (const double near : {100.0, 20.0}) {  // of 100 active edges
    Floats threshold({1}, 0.0f), balance({1}, 0.0f), gradient({1}, 0.0f);
    Host<std::uint64_t> counters({1, kAttentionCounters}, 0);
    counters[kActiveEdges] = 100;
    double sum = 0;
    for (int step = 0; step < 1000; ++step) {
      sum = 100 * 0.003 + near * static_cast<double>(balance[0]);
      gradient[0] = static_cast<float>(-sum);
      ops().update_thresholds(balancing(threshold.tensor(), counters.tensor(), balance.tensor(), gradient.tensor()));
    }
    EXPECT_NEAR(sum, 0, 1e-6);
    EXPECT_NEAR(balance[0], -0.3 / near, near == 100 ? 1e-8 : 5e-8);  // a step is below the last bit of m from there
  }
}

// -- memory -----------------------------------------------------------------------------------------------------------------

TEST(Memory, CopiesConvertAndZeroClears) {
  Floats x({6}, {1.0f, -2.5f, 1.00390625f, 1.01171875f, INFINITY, NAN}), back({6});  // third and fourth: halfway between two bf16 values
  std::vector<std::uint16_t> half(6);
  const Tensor bf16(half.data(), DType::bf16, {6});
  ops().copy(bf16, x.tensor());
  ops().copy(back.tensor(), bf16);
  EXPECT_EQ(back[0], 1.0f);
  EXPECT_EQ(back[1], -2.5f);
  EXPECT_EQ(back[2], 1.0f);       // ties to even, down
  EXPECT_EQ(back[3], 1.015625f);  // ties to even, up
  EXPECT_EQ(back[4], INFINITY);
  EXPECT_TRUE(std::isnan(back[5]));
  Floats same({6}), down({6}, 9.0f);
  ops().copy(same.tensor(), x.tensor());
  EXPECT_EQ(std::memcmp(same.values.data(), x.values.data(), 6 * sizeof(float)), 0);
  ops().upload(same.tensor(), std::vector<float>(6, 7.0f).data());
  ops().download(down.values.data(), same.tensor());
  EXPECT_EQ(down.values, std::vector<float>(6, 7.0f));
  ops().zero(down.tensor().slice(1, 4));
  EXPECT_EQ(down.values, (std::vector<float>{7, 0, 0, 0, 0, 7}));
  Ints ints({6});
  EXPECT_THROW(ops().copy(ints.tensor(), x.tensor()), std::logic_error);
  EXPECT_THROW(ops().copy(back.tensor(), x.tensor().slice(0, 3)), std::logic_error);
}

TEST(Memory, AllocatesAligned) {
  void* p = ops().allocate(1001);
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(p) % 256, 0u);
  std::memset(p, 1, 1001);
  ops().deallocate(p);
  EXPECT_THROW(ops().allocate(SIZE_MAX - 100), std::bad_alloc);
}

class Available : public ::testing::Test {
 protected:
  void SetUp() override { std::filesystem::remove_all(root_); }
  void TearDown() override { std::filesystem::remove_all(root_); }
  void write(const std::string& file, const std::string& text) {
    std::filesystem::create_directories((root_ / file).parent_path());
    std::ofstream(root_ / file) << text;
  }
  std::filesystem::path root_ =
      std::filesystem::temp_directory_path() / (std::string("tessera_available_") + ::testing::UnitTest::GetInstance()->current_test_info()->name());
};

TEST_F(Available, IsWhatTheSystemSays) {
  write("proc/meminfo", "MemTotal:  9000 kB\nMemFree: 10 kB\nMemAvailable:    5000 kB\n");
  EXPECT_EQ(cpu::memory_available(root_), 5000u * 1024);
  EXPECT_GT(ops().memory_available(), 1u << 20);
  EXPECT_EQ(ops().peak_flops(), 0);
  EXPECT_NE(ops().device_name().find("cpu (2 threads, OpenBLAS"), std::string::npos) << ops().device_name();
}

TEST_F(Available, RespectsGroupsOfVersionTwoAndTheirParents) {
  write("proc/meminfo", "MemAvailable:    5000 kB\n");
  write("proc/self/cgroup", "0::/outer/inner\n");
  write("sys/fs/cgroup/outer/inner/memory.max", "max\n");
  write("sys/fs/cgroup/outer/inner/memory.current", "100\n");
  EXPECT_EQ(cpu::memory_available(root_), 5000u * 1024);
  write("sys/fs/cgroup/outer/memory.max", "1000000\n");
  write("sys/fs/cgroup/outer/memory.current", "600000\n");
  write("sys/fs/cgroup/outer/memory.stat", "anon 1\ninactive_file 100000\nactive_file 7\n");
  EXPECT_EQ(cpu::memory_available(root_), 500000u);
  write("sys/fs/cgroup/outer/memory.current", "2000000\n");
  EXPECT_EQ(cpu::memory_available(root_), 0u);
}

TEST_F(Available, RespectsGroupsOfVersionOneSeenFromInsideAContainer) {
  write("proc/meminfo", "MemAvailable:    5000 kB\n");
  write("proc/self/cgroup", "12:cpu,cpuacct:/x\n9:memory:/docker/0123\n0::/\n");  // the path is the host's: only the mount's root exists
  write("sys/fs/cgroup/memory/memory.limit_in_bytes", "300000\n");
  write("sys/fs/cgroup/memory/memory.usage_in_bytes", "100000\n");
  EXPECT_EQ(cpu::memory_available(root_), 200000u);
}

TEST_F(Available, ASystemThatSaysNothingHasNoLimit) { EXPECT_EQ(cpu::memory_available(root_), SIZE_MAX); }

// -- the number of threads --------------------------------------------------------------------------------------------------

/// The bytes of everything that one pass through all operations writes.
std::vector<char> all_outputs(int threads) {
  const auto ops = make_cpu_ops(threads);
  EXPECT_EQ(omp_get_max_threads(), threads);
  std::vector<char> bytes;
  const auto keep = [&](const auto& host) {
    const auto* first = reinterpret_cast<const char*>(host.values.data());
    bytes.insert(bytes.end(), first, first + host.values.size() * sizeof(host.values[0]));
  };
  constexpr std::int64_t kRows = 531, kColumns = 192, kOut = 384, kVocabulary = 701, kPadded = 768, kHeads = 4;
  Ints tokens = random_ints({kRows}, 0, kVocabulary - 1, 1), targets = random_ints({kRows}, -1, kVocabulary - 1, 2);
  Floats wte = random_floats({kPadded, kColumns}, 3), x({kRows, kColumns}), gain = random_floats({kColumns}, 4), bias = random_floats({kOut}, 5);
  ops->embedding_forward(x.tensor(), tokens.tensor(), {}, wte.tensor(), {});
  Floats y({kRows, kColumns}), mean({kRows}), rstd({kRows}), w = random_floats({kOut, kColumns}, 6), z({kRows, kOut}), g({kRows, kOut});
  ops->norm_forward(
      {.kind = NormKind::layernorm, .x = x.tensor(), .gain = gain.tensor(), .y = y.tensor(), .mean = mean.tensor(), .rstd = rstd.tensor()});
  ops->linear_forward(
      {.x = y.tensor(), .w = w.tensor(), .bias = bias.tensor(), .y = g.tensor(), .activation = Activation::gelu, .pre_activation = z.tensor()});
  keep(x), keep(y), keep(z), keep(g);

  Floats losses({kRows}), dx({kRows, kColumns}), dw({kPadded, kColumns}), workspace({200, kPadded});
  ops->classifier({.x = y.tensor(),
                   .w = wte.tensor(),
                   .vocabulary = kVocabulary,
                   .targets = targets.tensor(),
                   .losses = losses.tensor(),
                   .dx = dx.tensor(),
                   .dw = dw.tensor(),
                   .workspace = workspace.tensor()});
  keep(losses), keep(dx), keep(dw);
  Floats dw2({kOut, kColumns}), dbias({kOut}), dy({kRows, kColumns}), dgain({kColumns});
  ops->linear_backward({.dy = g.tensor(),
                        .x = y.tensor(),
                        .w = w.tensor(),
                        .dx = dy.tensor(),
                        .gelu_argument = x.tensor(),
                        .dw = dw2.tensor(),
                        .dbias = dbias.tensor()});
  ops->norm_backward({.kind = NormKind::layernorm,
                      .dy = dy.tensor(),
                      .x = x.tensor(),
                      .gain = gain.tensor(),
                      .mean = mean.tensor(),
                      .rstd = rstd.tensor(),
                      .dx = dx.tensor(),
                      .dgain = dgain.tensor()});
  ops->embedding_backward(dx.tensor(), tokens.tensor(), {}, dw.tensor(), {});
  keep(dw2), keep(dbias), keep(dy), keep(dx), keep(dgain), keep(dw);

  Floats qkv = random_floats({kRows, 3 * kColumns}, 7), inverse({kRows, 2, kHeads}), dqkv = random_floats({kRows, 3 * kColumns}, 8);
  const QkTransform t{.qkv = qkv.tensor(), .heads = kHeads, .unit = true, .inverse_norm = inverse.tensor()};
  ops->qk_transform_forward(t);
  ops->qk_transform_backward(t, dqkv.tensor());
  Floats head_gain = random_floats({kHeads, kColumns / kHeads}, 9), head_rstd({kRows, kHeads}), head_dgain({kHeads, kColumns / kHeads});
  ops->head_norm_forward({.x = x.tensor(), .gain = head_gain.tensor(), .y = y.tensor(), .rstd = head_rstd.tensor()});
  ops->head_norm_backward(
      {.dy = dy.tensor(), .x = x.tensor(), .gain = head_gain.tensor(), .rstd = head_rstd.tensor(), .dx = dx.tensor(), .dgain = head_dgain.tensor()});
  keep(qkv), keep(dqkv), keep(y), keep(dx), keep(head_dgain);

  constexpr std::int64_t kSize = kColumns / kHeads, kPacked = 3 * kColumns;
  const auto packed = [&](Floats& of, std::int64_t part) {
    return HeadsView{of.values.data() + part * kColumns, DType::f32, kRows * kPacked, kSize, kPacked};
  };
  const auto heads = [&](Floats& of) { return HeadsView{of.values.data(), DType::f32, kRows * kColumns, kSize, kColumns}; };
  Floats ones({kHeads}, 1.0f), row_sums({kHeads, kRows}, 1.0f), self_dscale({kHeads}), self_dbias({kHeads});
  const SelfEdge self{.shape = {1, kHeads, kRows, kSize},
                      .q = packed(qkv, 0),
                      .k = packed(qkv, 1),
                      .v = packed(qkv, 2),
                      .o = heads(y),
                      .scale = ones.tensor(),
                      .bias = ones.tensor(),
                      .z = row_sums.tensor()};
  ops->self_edge_forward(self);
  ops->self_edge_backward({.forward = self,
                           .d_o = heads(dx),
                           .dq = packed(dqkv, 0),
                           .dk = packed(dqkv, 1),
                           .dv = packed(dqkv, 2),
                           .dscale = self_dscale.tensor(),
                           .dbias = self_dbias.tensor()});
  keep(y), keep(row_sums), keep(dqkv), keep(self_dscale), keep(self_dbias);

  Floats keys = random_floats({kHeads, 2, kSize}, 10), dkeys({kHeads, 2, kSize}), dvalues({kHeads, 2, kSize}), twos({kHeads, 2}, 2.0f),
         sink_dbias({kHeads, 2});
  const Sinks sinks{.shape = {1, kHeads, kRows, kSize},
                    .q = packed(qkv, 0),
                    .o = heads(y),
                    .scale = ones.tensor(),
                    .keys = keys.tensor(),
                    .values = keys.tensor(),
                    .bias = twos.tensor(),
                    .z = row_sums.tensor()};
  ops->sinks_forward(sinks);
  ops->sinks_backward({.forward = sinks,
                       .d_o = heads(dx),
                       .dq = packed(dqkv, 0),
                       .dscale = self_dscale.tensor(),
                       .dkeys = dkeys.tensor(),
                       .dvalues = dvalues.tensor(),
                       .dbias = sink_dbias.tensor()});
  keep(y), keep(row_sums), keep(dqkv), keep(self_dscale), keep(dkeys), keep(dvalues), keep(sink_dbias);

  Host<double> sums({2});
  ops->add_sum(sums.tensor().slice(0, 1), dw.tensor());
  ops->add_sum_of_squares(sums.tensor().slice(1, 1), dw.tensor());
  Floats m({kPadded, kColumns}), v({kPadded, kColumns});
  ops->adamw({.parameter = wte.tensor(),
              .gradient = dw.tensor(),
              .m = m.tensor(),
              .v = v.tensor(),
              .decayed = 1000,
              .lr = 1e-3f,
              .weight_decay = 0.1f,
              .gradient_sumsq = sums.tensor().slice(1, 1),
              .clip = 1});
  keep(sums), keep(wte), keep(m), keep(v);
  return bytes;
}

TEST(Threads, TheirNumberDoesNotChangeABit) {
  const int before = omp_get_max_threads();
  const auto one = all_outputs(1);
  EXPECT_TRUE(one == all_outputs(2));
  EXPECT_TRUE(one == all_outputs(3));
  omp_set_num_threads(before);
  EXPECT_THROW(make_cpu_ops(-1), std::invalid_argument);
}

}  // namespace
}  // namespace tessera::testing
