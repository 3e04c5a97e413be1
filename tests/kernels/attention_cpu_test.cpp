// The CPU attention against the naive double-precision reference, and against itself: visiting all tiles or only active ones, with one
// thread or many, gives the same bits.

#include "kernels/cpu/attention.h"

#include <gtest/gtest.h>
#include <omp.h>

#include <bit>
#include <cmath>
#include <limits>

#include "attention_cases.h"
#include "kernels/cpu/simd.h"
#include "tests/kernels/same_bits.h"

namespace tessera::reference {
namespace {

/// Every output of a forward and backward pass; q, k, v, o are gathered back to [B, H, T, D].
struct Results {
  std::vector<float> o, z, dq, dk, dv, dscale, dtau;
  std::vector<std::uint32_t> bitmap;
  std::vector<std::uint64_t> counters;
};

/// Runs the operator on the packed layout [B, T, 3, H, D], as the model has it. Outputs start as NaN, so that an element left out shows.
Results run(const AttentionProblem& p, Visit visit, int threads) {
  const auto [B, H, T, D] = p.in.shape;
  const std::int64_t count = B * H * T * D, tile_query = p.tiles->tile_query;
  const auto query_tiles = (T + tile_query - 1) / tile_query, key_tiles = (T + p.tiles->tile_key - 1) / p.tiles->tile_key;
  const float nan = std::numeric_limits<float>::quiet_NaN();
  std::vector<float> qkv(3 * count), gradients(3 * count, nan), o(count, nan), d_o(count);
  const auto packed = [&](std::int64_t which, std::int64_t b, std::int64_t h, std::int64_t t) { return (((b * T + t) * 3 + which) * H + h) * D; };
  const auto token_major = [&](std::int64_t b, std::int64_t h, std::int64_t t) { return ((b * T + t) * H + h) * D; };
  const auto each_row = [&](auto f) {
    for (std::int64_t b = 0; b < B; ++b)
      for (std::int64_t h = 0; h < H; ++h)
        for (std::int64_t t = 0; t < T; ++t) f(b, h, t, ((b * H + h) * T + t) * D);
  };
  each_row([&](auto b, auto h, auto t, auto at) {
    std::copy_n(&p.q[at], D, &qkv[packed(0, b, h, t)]);
    std::copy_n(&p.k[at], D, &qkv[packed(1, b, h, t)]);
    std::copy_n(&p.v[at], D, &qkv[packed(2, b, h, t)]);
    std::copy_n(&p.d_o[at], D, &d_o[token_major(b, h, t)]);
  });
  Results r;
  r.z.assign(B * H * T, nan);
  r.bitmap.assign(B * H * query_tiles * bitmap_words(key_tiles), 0xdeadbeef);
  r.counters.assign(H * kAttentionCounters, 1000);  // added to
  r.dscale.assign(H, 0.0f);
  r.dtau.assign(H, 0.0f);
  auto scale = p.scale, tau = p.tau, balance = p.balance;
  auto start = p.document_start;
  std::vector<float> workspace(attention_backward_workspace(p.in.shape, p.tiles->tile_query), nan);

  const auto part = [&](std::vector<float>& x, int which) { return HeadsView{&x[packed(which, 0, 0, 0)], DType::f32, T * 3 * H * D, D, 3 * H * D}; };
  const auto heads = [&](std::vector<float>& x) { return HeadsView{x.data(), DType::f32, T * H * D, D, H * D}; };
  const DeviceTiles tiles(p.tiles);
  AttentionForward f;
  f.shape = p.in.shape;
  f.math = p.in.math;
  f.visit = visit;
  f.tiles = &tiles;
  f.q = part(qkv, 0);
  f.k = part(qkv, 1);
  f.v = part(qkv, 2);
  f.o = heads(o);
  f.scale = {scale.data(), DType::f32, {H}};
  f.threshold = {tau.data(), DType::f32, {H}};
  if (!start.empty()) f.document_start = {start.data(), DType::i32, {B, T}};
  f.z = {r.z.data(), DType::f32, {B, H, T}};
  f.active_tiles = {r.bitmap.data(), DType::u32, {B, H, query_tiles, bitmap_words(key_tiles)}};
  f.counters = {r.counters.data(), DType::u64, {H, kAttentionCounters}};
  AttentionBackward b;
  b.d_o = heads(d_o);
  b.dq = part(gradients, 0);
  b.dk = part(gradients, 1);
  b.dv = part(gradients, 2);
  b.dscale = {r.dscale.data(), DType::f32, {H}};
  b.dthreshold = {r.dtau.data(), DType::f32, {H}};
  if (!balance.empty()) b.balance = {balance.data(), DType::f32, {H}};
  b.workspace = {workspace.data(), DType::f32, {std::ssize(workspace)}};

  const int before = omp_get_max_threads();
  omp_set_num_threads(threads);
  cpu_attention_forward(f);
  b.forward = f;
  cpu_attention_backward(b);
  omp_set_num_threads(before);

  for (auto* x : {&r.o, &r.dq, &r.dk, &r.dv}) x->resize(count);
  each_row([&](auto b, auto h, auto t, auto at) {
    std::copy_n(&o[token_major(b, h, t)], D, &r.o[at]);
    std::copy_n(&gradients[packed(0, b, h, t)], D, &r.dq[at]);
    std::copy_n(&gradients[packed(1, b, h, t)], D, &r.dk[at]);
    std::copy_n(&gradients[packed(2, b, h, t)], D, &r.dv[at]);
  });
  return r;
}

/// Results against the reference, and every way to run against the first. The tolerance is on max |error| / max |reference|: fp32
/// sums of a few hundred terms, and x = c s - tau, whose rounding the normalizer `sum` can divide by a small row sum.
Results check(const AttentionProblem& p, double tolerance = 2e-5) {
  const auto r = run(p, Visit::active, 1);
  expect_same_bits(r, run(p, Visit::all, 1), "visit all");
  expect_same_bits(r, run(p, Visit::active, 16), "16 threads");  // more than heads: the walk by query tile makes dq
  expect_same_bits(r, run(p, Visit::all, 3), "visit all, 3 threads");
  EXPECT_LT(relative_error(r.o, p.out.o), tolerance);
  EXPECT_LT(relative_error(r.z, p.out.z), tolerance);
  EXPECT_LT(relative_error(r.dq, p.gradients.dq), tolerance);
  EXPECT_LT(relative_error(r.dk, p.gradients.dk), tolerance);
  EXPECT_LT(relative_error(r.dv, p.gradients.dv), tolerance);
  EXPECT_LT(relative_error(r.dscale, p.gradients.dscale), 10 * tolerance);  // sums that cancel
  EXPECT_LT(relative_error(r.dtau, p.gradients.dtau), 10 * tolerance);
  EXPECT_EQ(r.bitmap, p.active.bitmap);
  for (std::int64_t h = 0; h < p.in.shape.heads; ++h) {
    const std::uint64_t* counter = &r.counters[h * kAttentionCounters];
    EXPECT_EQ(counter[kActiveEdges], 1000 + p.out.active_edges[h]);
    EXPECT_EQ(counter[kVisibleEdges], 1000 + p.out.visible_edges[h]);
    EXPECT_EQ(counter[kActiveTiles], 1000 + p.active.active_tiles[h]);
    EXPECT_EQ(counter[kVisibleTiles], 1000 + p.active.visible_tiles[h]);
    EXPECT_EQ(counter[kEmptyRows], 1000 + p.out.empty_rows[h]);
  }
  return r;
}

struct Math {
  Score score;
  Gate gate;
  Normalizer normalizer;
  float beta;
};
class CpuAttention : public ::testing::TestWithParam<std::tuple<Score, Gate, Normalizer>> {};

TEST_P(CpuAttention, AgreesWithTheReferenceOnEveryPattern) {
  const auto [score, gate, normalizer] = GetParam();
  const std::pair<int, int> tiles[] = {{16, 16}, {8, 24}, {32, 8}, {64, 64}, {24, 40}, {16, 16}};
  for (std::size_t n = 0; n < std::size(kPatterns); ++n)
    for (float beta : {0.0f, 0.5f}) {
      if (beta > 0 && score != Score::cosine) continue;
      auto c = case_of(score, gate, normalizer, beta);
      c.pattern = kPatterns[n].visible;
      std::tie(c.tile_query, c.tile_key) = tiles[n];
      c.seed = 10 * n + 1;
      SCOPED_TRACE(name_of(c.math) + " " + kPatterns[n].name);
      check(make_problem(c));
    }
}

TEST_P(CpuAttention, AgreesWithTheReferenceOnDocuments) {
  const auto [score, gate, normalizer] = GetParam();
  for (std::int64_t longest : {1, 5, 40}) {  // 1: every token is a document of its own
    auto c = case_of(score, gate, normalizer);
    c.document_start = random_documents(c.shape, longest, 7);
    c.pattern = longest == 5 ? kPatterns[4].visible : kPatterns[0].visible;  // with no_self most rows see nothing
    SCOPED_TRACE(name_of(c.math) + " documents up to " + std::to_string(longest));
    check(make_problem(c));
  }
}

INSTANTIATE_TEST_SUITE_P(Every, CpuAttention,
                         ::testing::Combine(::testing::Values(Score::dot, Score::cosine, Score::fidelity),
                                            ::testing::Values(Gate::relu, Gate::relu2, Gate::relu4, Gate::softmax),
                                            ::testing::Values(Normalizer::none, Normalizer::length, Normalizer::sum, Normalizer::rms)),
                         [](const auto& info) {
                           return name_of({.score = std::get<0>(info.param), .gate = std::get<1>(info.param), .normalizer = std::get<2>(info.param)});
                         });

TEST(CpuAttentionSizes, EveryLengthHeadSizeAndTile) {
  for (std::int64_t tokens : {1, 2, 7, 8, 9, 63, 64, 65, 130})
    for (std::int64_t size : {8, 24, 64, 128, 256})
      for (auto [tile_query, tile_key] : {std::pair{64, 64}, {128, 64}, {8, 128}, {40, 72}}) {
        if (tokens > 9 && size > 64 && tile_key == 72) continue;  // time
        auto c = case_of(Score::cosine, Gate::relu2, Normalizer::sum);
        c.shape = {.batch = 1, .heads = 2, .tokens = tokens, .head_size = size};
        c.tau = 0.1;
        c.tile_query = tile_query;
        c.tile_key = tile_key;
        SCOPED_TRACE("T " + std::to_string(tokens) + " D " + std::to_string(size) + " tile " + std::to_string(tile_query) + "x" +
                     std::to_string(tile_key));
        check(make_problem(c));
      }
}

TEST(CpuAttentionSizes, AShortSequenceUsesTheListsOfALongOne) {
  for (const auto& pattern : kPatterns) {
    auto c = case_of(Score::dot, Gate::relu, Normalizer::length);
    c.pattern = pattern.visible;
    c.map_tokens = 150;
    SCOPED_TRACE(pattern.name);
    check(make_problem(c));
  }
}

TEST(CpuAttentionSizes, DefaultEpsilon) {
  auto c = case_of(Score::cosine, Gate::relu2, Normalizer::sum);
  c.math.epsilon = 1e-6f;
  c.least_kink = 1e-3;
  c.tau = 1.0;
  c.shape.tokens = 24;
  check(make_problem(c), 1e-3);  // da / z with z near epsilon: x = 1e-3 is known to 1e-6 only
}

TEST(CpuAttentionSkips, AHugeThresholdGivesExactZeros) {
  auto c = case_of(Score::cosine, Gate::relu2, Normalizer::sum);
  c.tau = 1e6;
  const auto p = make_problem(c);
  const auto r = check(p);
  const auto all_zero = [](const std::vector<float>& x) {
    return std::all_of(x.begin(), x.end(), [](float e) { return std::bit_cast<std::uint32_t>(e) == 0; });
  };
  EXPECT_TRUE(all_zero(r.o) && all_zero(r.dq) && all_zero(r.dk) && all_zero(r.dv) && all_zero(r.dscale) && all_zero(r.dtau));
  EXPECT_TRUE(std::all_of(r.bitmap.begin(), r.bitmap.end(), [](auto w) { return w == 0; }));
  EXPECT_EQ(r.counters[kEmptyRows], 1000u + 2 * 45);
}

// Queries of tile a point along direction a, keys of tile b along direction 3b mod 8: a tile is active only where the two meet.
TEST(CpuAttentionSkips, WholeTilesEmptiedByTheData) {
  for (Gate gate : {Gate::relu, Gate::relu2, Gate::relu4})
    for (Normalizer normalizer : {Normalizer::none, Normalizer::sum}) {
      auto c = case_of(Score::cosine, gate, normalizer);
      c.shape.tokens = 120;
      c.tau = 4.0;
      auto p = make_problem(c);
      const auto [B, H, T, D] = c.shape;
      for (std::int64_t row = 0; row < B * H * T; ++row)
        for (auto* x : {&p.q, &p.k}) {
          float* e = &(*x)[row * D];
          const auto direction = row % T / 16 * (x == &p.q ? 1 : 3) % 8;
          double sum = 0;
          for (std::int64_t d = 0; d < D; ++d) e[d] = 0.1f * e[d] + (d == direction ? 1.0f : 0.0f);
          for (std::int64_t d = 0; d < D; ++d) sum += static_cast<double>(e[d]) * e[d];
          for (std::int64_t d = 0; d < D; ++d) e[d] = static_cast<float>(e[d] / std::sqrt(sum));
        }
      solve(p, c);
      ASSERT_GT(p.out.nearest_kink, c.least_kink);
      ASSERT_GT(p.active.active_tiles[0], 0u);
      ASSERT_LT(p.active.active_tiles[0], p.active.visible_tiles[0] / 2);
      SCOPED_TRACE(name_of(c.math));
      check(p);
    }
}

// Scores that are exact: without a gradient of the output, an edge's dx is its head's balance, or nothing.
TEST(CpuAttentionBalance, ReachesTheEdgesAboveTheThresholdAndBelowOne) {
  constexpr float kX[] = {-0.5f, 0.0f, 0x1p-20f, 0.5f, 1 - 0x1p-24f, 1.0f, 1 + 0x1p-23f, 3.0f};
  for (Gate gate : {Gate::relu, Gate::relu2, Gate::relu4}) {
    auto c = case_of(Score::dot, gate, Normalizer::sum);
    c.balance = 0.25;
    auto p = make_problem(c);
    const auto [B, H, T, D] = c.shape;
    for (std::int64_t row = 0; row < B * H * T; ++row)
      for (std::int64_t d = 0; d < D; ++d) {
        p.q[row * D + d] = d == 0 ? 1.0f : 0.0f;
        p.k[row * D + d] = d == 0 ? kX[row % T % std::ssize(kX)] : 0.0f;
        p.d_o[row * D + d] = 0;
      }
    std::fill(p.scale.begin(), p.scale.end(), 1.0f);
    std::fill(p.tau.begin(), p.tau.end(), 0.0f);
    float near = 0;  // edges of a head: 2^-20, 1/2 and the last number before 1
    for (std::int64_t i = 0; i < T; ++i)
      for (std::int64_t j = 0; j <= i; ++j) near += j % 8 >= 2 && j % 8 <= 4;
    const auto r = run(p, Visit::active, 1);
    for (std::int64_t h = 0; h < H; ++h) EXPECT_EQ(r.dtau[h], -static_cast<float>(B) * near * p.balance[h]) << name_of(c.math) << " head " << h;
  }
}

// Results so small that they underflow to zero from below: +0 in an output all the same, whatever is visited.
TEST(CpuAttentionSkips, UnderflowLeavesNoTrace) {
  auto c = case_of(Score::dot, Gate::relu, Normalizer::length);
  auto p = make_problem(c);
  for (std::size_t n = 0; n < p.q.size(); ++n) {  // o and dk near 1e-44, ten times the smallest number
    p.q[n] *= 1e-15f;
    p.v[n] *= 1e-29f;
  }
  const auto [B, H, T, D] = c.shape;
  for (std::int64_t row = 0; row < B * H * T; ++row)
    if (row % T / 16 == 1)
      for (std::int64_t d = 0; d < D; ++d) p.k[row * D + d] = 0;  // tiles of inactive edges
  std::fill(p.tau.begin(), p.tau.end(), 0.0f);
  const auto r = run(p, Visit::active, 1);
  expect_same_bits(r, run(p, Visit::all, 1), "visit all");
  expect_same_bits(r, run(p, Visit::active, 16), "16 threads");
  for (const auto* x : {&r.o, &r.dq, &r.dk, &r.dv})
    for (float e : *x) ASSERT_FALSE(e == 0 && std::signbit(e));
}

// <do, v> overflows on edges that are not active; zero times infinity must not reach a gradient.
TEST(CpuAttentionSkips, OverflowOnInactiveEdgesStaysThere) {
  auto c = case_of(Score::cosine, Gate::relu2, Normalizer::none);
  auto p = make_problem(c);
  const auto [B, H, T, D] = c.shape;
  for (std::int64_t b = 0; b < B; ++b)
    for (std::int64_t h = 0; h < H; ++h) {
      const std::int64_t key = (b * H + h) * T + 3;
      for (std::int64_t d = 0; d < D; ++d) {
        p.v[key * D + d] = 3e38f;
        p.k[key * D + d] = 0;  // x = -tau: never active
      }
    }
  const auto r = run(p, Visit::all, 1);
  expect_same_bits(r, run(p, Visit::active, 1), "visit active");
  for (const auto* x : {&r.o, &r.dq, &r.dk, &r.dv})
    for (float e : *x) ASSERT_TRUE(std::isfinite(e));
}

TEST(CpuAttentionSkips, GradientsOfScaleAndThresholdAreAddedTo) {
  const auto p = make_problem(case_of(Score::fidelity, Gate::relu2, Normalizer::sum));
  const auto r = check(p);
  EXPECT_NE(r.dscale[0], 0.0f);
  EXPECT_NE(r.dtau[0], 0.0f);
  const auto q = make_problem(case_of(Score::cosine, Gate::relu2, Normalizer::sum, 0.5f));
  EXPECT_EQ(check(q).dtau[0], 0.0f);
}

class CpuAttentionArguments : public ::testing::Test {
 protected:
  float x[8 * 8] = {}, workspace[8 * 8] = {};
  std::uint32_t bits[1] = {};
  const DeviceTiles tiles{brute_force_tiles([](auto, auto, auto) { return true; }, 1, 8, 8, 8)};
  AttentionForward good;

  void SetUp() override {
    good.shape = {.batch = 1, .heads = 1, .tokens = 8, .head_size = 8};
    good.tiles = &tiles;
    good.q = good.k = good.v = good.o = {x, DType::f32, 64, 64, 8};
    good.scale = good.threshold = {x, DType::f32, {1}};
    good.z = {x, DType::f32, {8}};
    good.active_tiles = {bits, DType::u32, {1}};
  }
};

TEST_F(CpuAttentionArguments, CountersAndGradientsOfScaleAndThresholdAreOptional) {
  AttentionBackward b;
  b.forward = good;
  b.d_o = b.dq = b.dk = b.dv = good.q;
  b.workspace = {workspace, DType::f32, {attention_backward_workspace(good.shape, 8)}};
  EXPECT_NO_THROW(cpu_attention_forward(good));
  EXPECT_NO_THROW(cpu_attention_backward(b));
}

TEST_F(CpuAttentionArguments, WrongOnesAreTheCallersBug) {
  const auto rejects = [&](auto change) {
    auto a = good;
    change(a);
    EXPECT_THROW(cpu_attention_forward(a), std::logic_error);
  };
  rejects([](auto& a) { a.tiles = nullptr; });
  rejects([](auto& a) { a.shape.tokens = 9; });
  rejects([](auto& a) { a.shape.tokens = 0; });
  rejects([](auto& a) { a.shape.heads = 2; });
  rejects([](auto& a) { a.shape.head_size = 12; });
  rejects([](auto& a) { a.q.dtype = DType::bf16; });
  rejects([](auto& a) { a.v.data = nullptr; });
  rejects([](auto& a) { a.o.token = 4; });
  rejects([](auto& a) { a.scale = {}; });
  rejects([](auto& a) { a.threshold = {}; });
  rejects([](auto& a) { a.z.dtype = DType::f64; });
  rejects([](auto& a) { a.active_tiles.shape = {2}; });
  rejects([](auto& a) { a.math.score = Score::dot, a.math.length_beta = 1.0f; });
  AttentionBackward b;
  b.forward = good;
  b.d_o = b.dq = b.dk = b.dv = good.q;
  EXPECT_THROW(cpu_attention_backward(b), std::logic_error);  // no workspace
}

}  // namespace
}  // namespace tessera::reference
