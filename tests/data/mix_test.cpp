#include "data/mix.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <set>

namespace tessera {
namespace {

void expect_every_number_once(const Mixture& mixture, std::uint64_t per_step, std::uint64_t first_step, std::uint64_t steps) {
  auto next = mixture.dealt(first_step);
  for (std::uint64_t step = first_step; step < first_step + steps; ++step) {
    std::vector<std::set<std::uint64_t>> numbers(mixture.parts());
    for (std::uint64_t i = 0; i < per_step; ++i) {
      const Mixture::Turn turn = mixture.turn(step, i);
      ASSERT_LT(turn.part, mixture.parts());
      ASSERT_TRUE(numbers[turn.part].insert(turn.number).second) << step << " " << i;
    }
    for (std::size_t part = 0; part < mixture.parts(); ++part) {
      if (numbers[part].empty()) continue;
      ASSERT_EQ(*numbers[part].begin(), next[part]);
      ASSERT_EQ(*numbers[part].rbegin() - *numbers[part].begin() + 1, numbers[part].size());
      next[part] += numbers[part].size();
    }
    ASSERT_EQ(next, mixture.dealt(step + 1));
  }
}

TEST(Mixture, DealsEveryNumberOnceAndInOrder) {
  std::mt19937 random(1);
  for (const std::size_t parts : {2, 3, 5, 17})
    for (const std::uint64_t per_step : {1, 2, 7, 64}) {
      std::vector<double> weights(parts);
      for (double& w : weights) w = std::exp(std::uniform_real_distribution(-5.0, 5.0)(random));
      const Mixture mixture(weights, per_step, 3);
      expect_every_number_once(mixture, per_step, 0, 300);
      expect_every_number_once(mixture, per_step, 123'456'789'012, 50);  // any step at once
    }
}

TEST(Mixture, SharesAreExactAfterEveryStep) {
  const auto worst = [](const std::vector<double>& weights, std::uint64_t per_step) {
    const Mixture mixture(weights, per_step, 1);
    double most = 0;
    for (std::uint64_t step = 0; step < 5000; ++step) {
      const auto dealt = mixture.dealt(step);
      std::uint64_t all = 0;
      for (std::size_t part = 0; part < weights.size(); ++part) {
        all += dealt[part];
        most = std::max(most, std::abs(static_cast<double>(dealt[part]) - mixture.share(part) * static_cast<double>(step * per_step)));
      }
      EXPECT_EQ(all, step * per_step);
    }
    return most;
  };
  EXPECT_LE(worst({0.7, 0.3}, 512), 0.5 + 1e-6);
  EXPECT_EQ(worst({3, 1}, 64), 0);
  EXPECT_LE(worst({0.5, 0.3, 0.2}, 7), 1);
  EXPECT_LE(worst({1, 1e-3, 1e-3}, 13), 1);
  std::mt19937 random(2);
  for (int i = 0; i < 30; ++i) {
    std::vector<double> weights(2 + static_cast<std::size_t>(random() % 20));
    for (double& w : weights) w = std::exp(std::uniform_real_distribution(-8.0, 8.0)(random));
    EXPECT_LT(worst(weights, 1 + random() % 100), 2);
  }
}

TEST(Mixture, RanksSeeTheMixture) {
  const Mixture mixture(std::vector{0.75, 0.25}, 64, 9);
  std::vector<int> second(8);
  for (std::uint64_t step = 0; step < 1000; ++step)
    for (std::uint64_t i = 0; i < 64; ++i) second[i / 8] += mixture.turn(step, i).part == 1;
  for (const int n : second) EXPECT_NEAR(n, 2000, 200);  // hypergeometric: a deviation of 36
  const Mixture same(std::vector{3.0, 1.0}, 64, 9), other(std::vector{3.0, 1.0}, 64, 10);
  int equal = 0;
  for (std::uint64_t i = 0; i < 64; ++i) {
    EXPECT_EQ(mixture.turn(5, i).part, same.turn(5, i).part);
    EXPECT_EQ(mixture.turn(5, i).number, same.turn(5, i).number);
    equal += mixture.turn(5, i).number == other.turn(5, i).number;
  }
  EXPECT_LT(equal, 32);
}

TEST(Mixture, OneDatasetIsAsItIs) {
  const Mixture mixture(std::vector{0.3}, 8, 1);
  for (std::uint64_t i = 0; i < 8; ++i) {
    EXPECT_EQ(mixture.turn(1000, i).part, 0u);
    EXPECT_EQ(mixture.turn(1000, i).number, 8000 + i);
  }
  EXPECT_EQ(mixture.dealt(3), std::vector<std::uint64_t>{24});
}

TEST(Mixture, RefusesWeightsThatAreNone) {
  EXPECT_THROW(Mixture(std::vector<double>{}, 8, 1), std::invalid_argument);
  EXPECT_THROW(Mixture(std::vector{1.0, 0.0}, 8, 1), std::invalid_argument);
  EXPECT_THROW(Mixture(std::vector{1.0, -1.0}, 8, 1), std::invalid_argument);
  EXPECT_THROW(Mixture(std::vector{1.0, std::nan("")}, 8, 1), std::invalid_argument);
  EXPECT_THROW(Mixture(std::vector<double>{1.0, INFINITY}, 8, 1), std::invalid_argument);
}

}  // namespace
}  // namespace tessera
