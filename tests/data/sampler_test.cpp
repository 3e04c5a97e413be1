#include "data/sampler.h"

#include <gtest/gtest.h>

#include <cmath>
#include <numeric>
#include <set>
#include <vector>

namespace tessera {
namespace {

TEST(Permutation, IsABijectionForEverySmallSize) {
  std::vector<std::uint64_t> sizes(70);
  std::iota(sizes.begin(), sizes.end(), 1);
  for (std::uint64_t power = 128; power <= 8192; power *= 2) sizes.insert(sizes.end(), {power - 1, power, power + 1});
  for (const std::uint64_t n : sizes)
    for (const std::uint64_t key : {0ull, 1ull, ~0ull}) {
      const Permutation p(n, key);
      std::vector<bool> seen(n);
      for (std::uint64_t i = 0; i < n; ++i) {
        const std::uint64_t j = p(i);
        ASSERT_LT(j, n);
        ASSERT_FALSE(seen[j]) << n;
        seen[j] = true;
        ASSERT_EQ(p.inverse(j), i);
      }
    }
}

TEST(Permutation, LargeSizesInvert) {
  for (const std::uint64_t n : {(1ull << 32) - 1, 1ull << 32, (1ull << 32) + 1, 11'500'000'000ull, (1ull << 63) + 12345, ~0ull}) {
    const Permutation p(n, 7);
    for (std::uint64_t i = 0; i < 2000; ++i) {
      const std::uint64_t x = i < 1000 ? i : n - 1 - (i - 1000) * (n / 1001);
      ASSERT_LT(p(x), n);
      ASSERT_EQ(p.inverse(p(x)), x);
      ASSERT_EQ(p(p.inverse(x)), x);
    }
  }
}

TEST(Permutation, LooksRandomAndDependsOnTheKey) {
  constexpr std::uint64_t n = 10'000;
  const Permutation a(n, 1), b(n, 2);
  int equal = 0, fixed = 0;
  double covariance = 0;
  for (std::uint64_t i = 0; i < n; ++i) {
    equal += a(i) == b(i);
    fixed += a(i) == i;
    covariance += (double(i) / n - 0.5) * (double(a(i)) / n - 0.5);
  }
  // Of a random permutation: fixed points ~ Poisson(1), covariance normal with deviation 1/(12 sqrt(n)) after dividing by n.
  EXPECT_LT(equal, 10);
  EXPECT_LT(fixed, 10);
  EXPECT_LT(std::abs(covariance / n), 5.0 / 12 / std::sqrt(double(n)));
}

TEST(Sampler, VisitsEverySequenceOfAnEpochOnce) {
  constexpr std::uint64_t context = 10, per_step = 6;
  const Sampler sampler(1005, context, per_step, 3);
  ASSERT_EQ(sampler.sequences(), 100u);  // (1005 - 1) / 10
  std::vector<std::vector<std::uint64_t>> epochs(3);
  for (std::uint64_t step = 0; step < 50; ++step)  // 300 sequences; epochs end within steps
    for (std::uint64_t i = 0; i < per_step; ++i) epochs[(step * per_step + i) / 100].push_back(sampler.first_token(step, i));
  for (auto& epoch : epochs) {
    std::set<std::uint64_t> seen(epoch.begin(), epoch.end());
    EXPECT_EQ(seen.size(), 100u);
    EXPECT_EQ(*seen.rbegin(), 990u);
    for (const std::uint64_t first : seen) EXPECT_EQ(first % context, 0u);
  }
  EXPECT_NE(epochs[0], epochs[1]);
  EXPECT_NE(epochs[1], epochs[2]);
  EXPECT_EQ(sampler.epoch(0), 0u);
  EXPECT_EQ(sampler.epoch(16), 0u);
  EXPECT_EQ(sampler.epoch(17), 1u);
}

TEST(Sampler, TheSeedDecides) {
  const Sampler a(100'000, 10, 8, 1), same(100'000, 10, 8, 1), b(100'000, 10, 8, 2);
  int equal = 0;
  for (std::uint64_t step = 0; step < 100; ++step) {
    EXPECT_EQ(a.first_token(step, 3), same.first_token(step, 3));
    equal += a.first_token(step, 3) == b.first_token(step, 3);
  }
  EXPECT_LT(equal, 5);
}

TEST(Sampler, RefusesTooLittleText) {
  EXPECT_EQ(Sampler(11, 10, 1, 0).sequences(), 1u);
  EXPECT_THROW(Sampler(10, 10, 1, 0), std::invalid_argument);
  EXPECT_THROW(Sampler(0, 10, 1, 0), std::invalid_argument);
  EXPECT_THROW(Sampler(100, 0, 1, 0), std::invalid_argument);
  EXPECT_THROW(Sampler(100, 10, 0, 0), std::invalid_argument);
}

}  // namespace
}  // namespace tessera
