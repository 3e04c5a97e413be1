// The reference's analytic gradients against central differences of its own forward pass, for every score, gate and normalizer.

#include "attention_reference.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <string>
#include <tuple>

namespace tessera::reference {
namespace {

using Combination = std::tuple<Score, Gate, Normalizer, float>;  // and length_beta

AttentionInputs random_inputs(const Combination& c, std::uint64_t seed) {
  AttentionInputs in;
  in.shape = {.batch = 2, .heads = 2, .tokens = 6, .head_size = 4};
  std::tie(in.math.score, in.math.gate, in.math.normalizer, in.math.length_beta) = c;
  in.math.length_alpha = 0.75f;
  in.math.epsilon = 1e-3f;
  std::mt19937_64 rng(seed);
  std::normal_distribution<double> normal;
  const bool unit = in.math.score != Score::dot;
  const auto count = in.shape.batch * in.shape.heads * in.shape.tokens * in.shape.head_size;
  for (auto* x : {&in.q, &in.k, &in.v})
    for (std::int64_t n = 0; n < count; ++n) x->push_back(normal(rng) * (unit && x != &in.v ? 0.5 : 1.0));
  in.scale = {1.5, 2.5};
  in.tau = in.math.score == Score::fidelity ? std::vector<double>{0.1, 0.3} : std::vector<double>{-0.3, 0.2};
  in.visible = [](auto b, auto h, auto i, auto j) { return !(b == 1 && i < 2) && (h == 0 || i - j < 3); };  // batch 1 starts with empty rows
  if (has_balances(in.math)) in.balance = {0.4, -0.7};
  return in;
}

double loss(const AttentionInputs& in, const std::vector<double>& d_o) {
  const auto out = attention_forward(in);
  double sum = 0;
  for (std::size_t n = 0; n < d_o.size(); ++n) sum += d_o[n] * out.o[n];
  if (in.balance.empty()) return sum;
  // What balances are the gradient of: m_h times the sum of the active arguments of head h, none counted beyond kBalanceReach.
  for (std::int64_t b = 0; b < in.shape.batch; ++b)
    for (std::int64_t h = 0; h < in.shape.heads; ++h)
      for (std::int64_t i = 0; i < in.shape.tokens; ++i)
        for (std::int64_t j = 0; j <= i; ++j)
          if (in.visible(b, h, i, j)) sum += in.balance[h] * std::clamp(edge_argument(in, b, h, i, j), 0.0, static_cast<double>(kBalanceReach));
  return sum;
}

class ReferenceGradients : public ::testing::TestWithParam<Combination> {};

TEST_P(ReferenceGradients, AgreeWithFiniteDifferences) {
  // Inputs are drawn until no edge is near a kink, where a difference quotient means nothing.
  std::uint64_t seed = 1;
  auto in = random_inputs(GetParam(), seed);
  while (attention_forward(in).nearest_kink < 0.01) in = random_inputs(GetParam(), ++seed);
  std::mt19937_64 rng(99);
  std::normal_distribution<double> normal;
  std::vector<double> d_o(in.q.size());
  for (auto& x : d_o) x = normal(rng);

  const auto out = attention_forward(in);
  for (auto z : out.z) ASSERT_TRUE(std::isfinite(z));
  const auto g = attention_backward(in, out, d_o);
  const auto check = [&](std::vector<double>& x, const std::vector<double>& analytic, const char* name) {
    double largest = 1e-3;
    for (auto value : analytic) largest = std::max(largest, std::abs(value));
    for (std::size_t n = 0; n < x.size(); ++n) {
      const double kept = x[n], step = 2e-6;
      x[n] = kept + step;
      const double up = loss(in, d_o);
      x[n] = kept - step;
      const double down = loss(in, d_o);
      x[n] = kept;
      ASSERT_NEAR(analytic[n], (up - down) / (2 * step), 1e-6 * largest) << name << '[' << n << ']';
    }
  };
  check(in.q, g.dq, "dq");
  check(in.k, g.dk, "dk");
  check(in.v, g.dv, "dv");
  check(in.scale, g.dscale, "dscale");
  check(in.tau, g.dtau, "dtau");
}

std::string name_of_case(const ::testing::TestParamInfo<Combination>& info) {
  const auto [score, gate, normalizer, beta] = info.param;
  static const char* scores[] = {"dot", "cosine", "fidelity"};
  static const char* gates[] = {"relu", "relu2", "relu4", "softmax"};
  static const char* normalizers[] = {"none", "length", "sum", "rms"};
  return std::string(scores[static_cast<int>(score)]) + "_" + gates[static_cast<int>(gate)] + "_" + normalizers[static_cast<int>(normalizer)] +
         (beta > 0 ? "_beta" : "");
}

const auto kGates = ::testing::Values(Gate::relu, Gate::relu2, Gate::relu4, Gate::softmax);
const auto kNormalizers = ::testing::Values(Normalizer::none, Normalizer::length, Normalizer::sum, Normalizer::rms);
INSTANTIATE_TEST_SUITE_P(Every, ReferenceGradients,
                         ::testing::Combine(::testing::Values(Score::dot, Score::cosine, Score::fidelity), kGates, kNormalizers,
                                            ::testing::Values(0.0f)),
                         name_of_case);
INSTANTIATE_TEST_SUITE_P(LengthThreshold, ReferenceGradients,
                         ::testing::Combine(::testing::Values(Score::cosine), kGates, kNormalizers, ::testing::Values(0.3f)), name_of_case);

// One row worked out by hand: q.k = 2 and 1, c = 1, tau = 0.5, relu2 -> a = 2.25, 0.25.
TEST(Reference, ByHand) {
  AttentionInputs in;
  in.shape = {.batch = 1, .heads = 1, .tokens = 2, .head_size = 1};
  in.math = {.score = Score::dot, .gate = Gate::relu2, .normalizer = Normalizer::sum, .epsilon = 0.0f};
  in.q = {-1, 1};
  in.k = {2, 1};
  in.v = {3, 5};
  in.scale = {1};
  in.tau = {0.5};
  in.visible = [](auto, auto, auto, auto) { return true; };
  in.math.epsilon = 0.5f;
  const auto out = attention_forward(in);
  EXPECT_EQ(out.o[0], 0.0);  // its only edge has x = -2.5
  EXPECT_DOUBLE_EQ(out.z[0], 0.5);
  EXPECT_DOUBLE_EQ(out.z[1], 3.0);
  EXPECT_DOUBLE_EQ(out.o[1], (2.25 * 3 + 0.25 * 5) / 3);
  EXPECT_EQ(out.active_edges[0], 2u);
  EXPECT_EQ(out.visible_edges[0], 3u);
  EXPECT_EQ(out.empty_rows[0], 1u);
  EXPECT_DOUBLE_EQ(out.nearest_kink, 0.5);
  const auto tiles = attention_tiles(in, 1, 1);
  EXPECT_EQ(tiles.bitmap, (std::vector<std::uint32_t>{0, 3}));
  EXPECT_EQ(tiles.visible_tiles[0], 3u);
  EXPECT_EQ(tiles.active_tiles[0], 2u);
}

}  // namespace
}  // namespace tessera::reference
