// The CUDA attention against the naive definition in double precision.
//
// Tolerance: the error against fp64 of the same maths done with bf16 roundings where the kernels round (weights, their gradients,
// outputs), computed here edge by edge; the kernels may err twice as much (largest error over a tensor).

#include "kernels/cuda/attention/attention.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <string>

#include "attention_run.h"

namespace tessera {
namespace {

using namespace cuda_test;

constexpr double kUndecided = 1e-5;  // in x

/// The same maths with bf16 roundings at the kernels' places, everything else in double.
struct Rounded {
  std::vector<double> o, dq, dk, dv;
  std::vector<double> dq_balance, dk_balance, dscale_balance, dtau_balance;  // what the balances of edges add that are within kUndecided of a kink
  std::vector<double> dscale_error, dtau_error;  // [H]: root of the sum over rows of the squared error of each row's share
  std::vector<double> dscale_size, dtau_size;    // [H]: sum of the absolute terms
  std::vector<std::uint64_t> undecided;          // [H]: edges so near to the gate's kink that fp32 may put them on its other side
};
Rounded with_roundings(const Problem& p, const reference::AttentionOutputs& exact) {
  const AttentionInputs& in = p.in;
  const auto [B, H, T, D] = in.shape;
  const bool softmax = in.math.gate == Gate::softmax, fidelity = in.math.score == Score::fidelity;
  const int power = gate_power(in.math.gate);
  Rounded r;
  r.o.assign(B * H * T * D, 0), r.dq = r.dk = r.dv = r.dq_balance = r.dk_balance = r.o;
  for (auto* v : {&r.dscale_error, &r.dtau_error, &r.dscale_size, &r.dtau_size, &r.dscale_balance, &r.dtau_balance}) v->assign(H, 0);
  r.undecided.assign(H, 0);
  for (std::int64_t b = 0; b < B; ++b)
    for (std::int64_t h = 0; h < H; ++h)
      for (std::int64_t i = 0; i < T; ++i) {
        const std::int64_t row = (b * H + h) * T + i, at_i = row * D;
        const double c = in.scale[h];
        double z = exact.z[row];
        std::vector<double> a(i + 1), x(i + 1);
        double top = -1e30, delta = 0;
        for (std::int64_t j = 0; j <= i; ++j) {
          if (!in.visible(b, h, i, j)) continue;
          x[j] = reference::edge_argument(in, b, h, i, j);
          top = std::max(top, x[j]);
          r.undecided[h] += !softmax && std::abs(x[j]) <= kUndecided;
        }
        if (!softmax && in.math.normalizer == Normalizer::sum) {  // of the weights that the products take
          z = in.math.epsilon;
          for (std::int64_t j = 0; j <= i; ++j)
            if (x[j] > 0) z += to_bf16(std::pow(x[j], power));
        }
        for (std::int64_t j = 0; j <= i; ++j) {
          if (!in.visible(b, h, i, j)) continue;
          a[j] = softmax ? std::exp(x[j] - z) : x[j] > 0 ? std::pow(x[j], power) : 0;
          const double weight = softmax ? to_bf16(std::exp(x[j] - top)) * std::exp(top - z) : to_bf16(a[j]) / z;
          for (std::int64_t d = 0; d < D; ++d) r.o[at_i + d] += weight * in.v[((b * H + h) * T + j) * D + d];
        }
        for (std::int64_t d = 0; d < D; ++d) r.o[at_i + d] = to_bf16(r.o[at_i + d]), delta += r.o[at_i + d] * p.d_o[at_i + d];
        double exact_delta = 0, scale_error = 0, tau_error = 0;
        for (std::int64_t d = 0; d < D; ++d) exact_delta += exact.o[at_i + d] * p.d_o[at_i + d];
        std::vector<double> dq(D);
        for (std::int64_t j = 0; j <= i; ++j) {
          if (!in.visible(b, h, i, j)) continue;
          const std::int64_t at_j = ((b * H + h) * T + j) * D;
          double dp = 0, s = 0;
          for (std::int64_t d = 0; d < D; ++d) dp += p.d_o[at_i + d] * in.v[at_j + d], s += in.q[at_i + d] * in.k[at_j + d];
          const bool uses_delta = softmax || in.math.normalizer == Normalizer::sum;
          const double slope = softmax ? a[j] : x[j] > 0 ? std::pow(x[j], power - 1) / z : 0;
          const double m = in.balance.empty() ? 0 : in.balance[h], balance = x[j] > 0 && x[j] < kBalanceReach ? m / std::max(power, 1) : 0;
          if (std::min(std::abs(x[j]), std::abs(x[j] - kBalanceReach)) <= kUndecided) {
            r.dscale_balance[h] += std::abs(m * s), r.dtau_balance[h] += std::abs(m);
            for (std::int64_t d = 0; d < D; ++d)
              r.dq_balance[at_i + d] += std::abs(c * m * in.k[at_j + d]), r.dk_balance[at_j + d] += std::abs(c * m * in.q[at_i + d]);
          }
          const double dx = slope * (dp - (uses_delta ? delta : 0)) + balance,
                       exact_dx = slope * z / exact.z[row] * (dp - (uses_delta ? exact_delta : 0)) + balance;
          const double ds = to_bf16(fidelity ? dx * s : dx), factor = c * (softmax ? 1 : power) * (fidelity ? 2 : 1),
                       weight = to_bf16(softmax ? a[j] : a[j] / z);
          scale_error += factor / c * (ds * s - (fidelity ? exact_dx * s * s : exact_dx * s));
          r.dscale_size[h] += std::abs(factor / c * exact_dx * (fidelity ? s * s : s));
          r.dtau_size[h] += std::abs((softmax ? 1 : power) * exact_dx * (fidelity ? c : 1));
          tau_error += (softmax ? 1 : power) * (dx - exact_dx) * (fidelity ? c : 1);
          for (std::int64_t d = 0; d < D; ++d) {
            dq[d] += factor * ds * in.k[at_j + d];
            r.dk[at_j + d] += factor * ds * in.q[at_i + d];
            r.dv[at_j + d] += weight * p.d_o[at_i + d];
          }
        }
        for (std::int64_t d = 0; d < D; ++d) r.dq[at_i + d] = to_bf16(dq[d]);
        r.dscale_error[h] += scale_error * scale_error, r.dtau_error[h] += tau_error * tau_error;
      }
  for (auto* v : {&r.dscale_error, &r.dtau_error})
    for (double& x : *v) x = std::sqrt(x);
  for (auto* v : {&r.dk, &r.dv})
    for (double& x : *v) x = to_bf16(x);
  return r;
}

/// undecided: what each element may be off besides.
void expect_close(const std::vector<Bf16>& got, const std::vector<double>& exact, const std::vector<double>& rounded_maths, const std::string& what,
                  const std::vector<double>& undecided = {}) {
  double error = 0, allowed = 0, largest = 0;
  for (std::size_t n = 0; n < got.size(); ++n) {
    const double x = __bfloat162float(got[n]);
    ASSERT_TRUE(std::isfinite(x)) << what << " at " << n << " is not finite (not written?)";
    error = std::max(error, std::abs(x - exact[n]) - (undecided.empty() ? 0 : undecided[n]));
    allowed = std::max(allowed, std::abs(rounded_maths[n] - exact[n]));
    largest = std::max(largest, std::abs(exact[n]));
  }
  // The last term is what fp32 leaves where terms of size 10 cancel (T = 1 under softmax: dq = 0).
  EXPECT_LE(error, 2 * allowed + 1e-6 * largest + 1e-5) << what << ": largest value " << largest;
}

struct Expected {
  reference::AttentionOutputs exact;
  reference::AttentionGradients gradient;
  Rounded maths;
  reference::AttentionTiles tiles;
};
Expected expected(const Problem& p) {
  Expected e;
  e.exact = reference::attention_forward(p.in);
  e.gradient = reference::attention_backward(p.in, e.exact, p.d_o);
  e.maths = with_roundings(p, e.exact);
  e.tiles = reference::attention_tiles(p.in, 64, 64);
  return e;
}

void expect_count(std::uint64_t found, std::uint64_t wanted, std::uint64_t undecided, const std::string& what) {
  EXPECT_LE(std::max(found, wanted) - std::min(found, wanted), undecided) << what << ": " << found << ", expected " << wanted;
}

void compare(const Problem& p, const Expected& e, CudaAttentionPath path, const std::string& what, CudaAttentionSchedule schedule) {
  const auto& [exact, gradient, maths, tiles] = e;
  const Result r = run(p, path, Visit::active, nullptr, schedule);
  const auto [B, H, T, D] = p.in.shape;
  expect_close(r.o, exact.o, maths.o, what + " o");
  expect_close(r.dq, gradient.dq, maths.dq, what + " dq", maths.dq_balance);
  expect_close(r.dk, gradient.dk, maths.dk, what + " dk", maths.dk_balance);
  expect_close(r.dv, gradient.dv, maths.dv, what + " dv");
  double z_error = 0, z_largest = 0, z_off = 0;
  for (std::int64_t n = 0; n < B * H * T; ++n) {
    const double error = std::abs(r.z[n] - exact.z[n]), size = std::abs(exact.z[n]);
    z_error = std::max(z_error, error), z_largest = std::max(z_largest, size), z_off = std::max(z_off, (error - 1e-5) / size);
  }
  // Sums are of the weights that the products take: rounded to bf16, by 2^-8 at most.
  if (p.in.math.normalizer == Normalizer::sum && p.in.math.gate != Gate::softmax) {
    EXPECT_LE(z_off, 1.0 / 256) << what << " z";
  } else {
    EXPECT_LE(z_error, 1e-5 * z_largest + 1e-5) << what << " z";
  }
  std::uint64_t undecided = 0;
  for (std::int64_t h = 0; h < H; ++h) {
    // Sums over B T rows whose errors are independent: four standard deviations, and what fp32 products and sums leave (some 2^-19 of the terms'
    // sizes, and of the products of size 100 that cancel in them).
    EXPECT_NEAR(r.dscale[h], gradient.dscale[h], 4 * maths.dscale_error[h] + 2e-6 * maths.dscale_size[h] + maths.dscale_balance[h] + 1e-4)
        << what << " dscale of head " << h;
    EXPECT_NEAR(r.dtau[h], gradient.dtau[h], 4 * maths.dtau_error[h] + 2e-6 * maths.dtau_size[h] + maths.dtau_balance[h] + 1e-4)
        << what << " dtau of head " << h;
    const std::uint64_t* c = r.counters.data() + h * kAttentionCounters;
    EXPECT_EQ(c[kVisibleEdges], exact.visible_edges[h]) << what;
    EXPECT_EQ(c[kVisibleTiles], tiles.visible_tiles[h]) << what;
    // An undecided edge moves each count by one at most.
    expect_count(c[kActiveEdges], exact.active_edges[h], maths.undecided[h], what + " active edges");
    expect_count(c[kActiveTiles], tiles.active_tiles[h], maths.undecided[h], what + " active tiles");
    expect_count(c[kEmptyRows], exact.empty_rows[h], maths.undecided[h], what + " empty rows");
    undecided += maths.undecided[h];
  }
  ASSERT_EQ(r.bitmap.size(), tiles.bitmap.size()) << what;
  std::uint64_t differ = 0;
  for (std::size_t n = 0; n < r.bitmap.size(); ++n) differ += std::popcount(r.bitmap[n] ^ tiles.bitmap[n]);
  expect_count(differ, 0, undecided, what + " bits of the bitmap that differ");
}

void compare(const Problem& p, CudaAttentionPath path, const std::string& what, CudaAttentionSchedule schedule = CudaAttentionSchedule::automatic) {
  compare(p, expected(p), path, what, schedule);
}

TEST(CudaAttention, MatchesTheDefinitionInEveryCombination) {
  NEEDS_GPU();
  for_every_combination({1, 17, 64, 65, 130, 200}, [](Problem p, CudaAttentionPath path, unsigned n, const std::string& what) {
    if (n % 7 < 2) p.in.balance.clear();
    compare(p, path, what, n / 2 % 2 ? CudaAttentionSchedule::block_a_band : CudaAttentionSchedule::persistent);
  });
}

// 18 key tiles: every stage of a ring (8 at most) is filled more than once within a band. Documents are long enough for that too (4 and 5 stages with
// head size 128). With epsilon 1 no gradient is so large that its rounding would hide a lost tile: leaving out one of a query's is 2.5 to 20 times
// the tolerance.
TEST(CudaAttention, MatchesTheDefinitionOverLongLists) {
  NEEDS_GPU();
  for (const std::int64_t D : {64, 128})
    for (const auto gate : {Gate::relu2, Gate::softmax})
      for (const bool documents : {false, true}) {
        const AttentionMath math{.gate = gate, .epsilon = 1};
        const AttentionShape shape{1, 3, 1100, D};
        const Problem p = make_problem(shape, math, {is_causal, strided, holes}, documents, 0.8, 91, 600);
        const Expected e = expected(p);
        for (const auto path : paths())
          for (const auto schedule : {CudaAttentionSchedule::block_a_band, CudaAttentionSchedule::persistent})
            compare(p, e, path,
                    describe(math, shape, path) + (documents ? " documents" : "") +
                        (schedule == CudaAttentionSchedule::persistent ? " persistent" : " a block a band"),
                    schedule);
      }
}

// Scores that are exact: without a gradient of the output, an edge's dx is its head's balance, or nothing. Heads of the unbounded form (dot), and of
// the bounded one with bounds below, at and above 1.
TEST(CudaAttention, BalanceReachesTheEdgesAboveTheThresholdAndBelowOne) {
  NEEDS_GPU();
  constexpr double kScores[] = {-0.5, 0, 0x1p-20, 0.25, 0.25 + 0x1p-9, 0.5 - 0x1p-9, 0.5, 0.5 + 0x1p-8, 1 - 0x1p-8, 1};
  constexpr double kScales[] = {1, 1, 1, 4, 0.75, 2}, kTaus[] = {0, 0x1p-24, -0x1p-23, 1, 0.25, 1};
  const AttentionShape shape{1, std::size(kScales), 200, 64};
  const auto [B, H, T, D] = shape;
  for (const auto path : paths())
    for (const auto score : {Score::dot, Score::cosine})
      for (const auto gate : {Gate::relu, Gate::relu2, Gate::relu4}) {
        const AttentionMath math{.score = score, .gate = gate};
        const std::string what = describe(math, shape, path);
        Problem p = make_problem(shape, math, {is_causal}, false, 0, 11);
        ASSERT_EQ(std::ssize(p.in.balance), H) << what;
        std::ranges::fill(p.d_o, 0);
        for (auto* x : {&p.in.q, &p.in.k}) std::ranges::fill(*x, 0);
        for (std::int64_t h = 0; h < H; ++h) {
          p.in.scale[h] = kScales[h], p.in.tau[h] = kTaus[h], p.in.balance[h] = h % 2 ? -0.5 : 0.25;
          for (std::int64_t t = 0; t < T; ++t) p.in.q[(h * T + t) * D] = 1, p.in.k[(h * T + t) * D] = kScores[t % std::ssize(kScores)];
        }
        const Result r = run(p, path, Visit::active);
        for (std::int64_t h = 0; h < H; ++h) {
          const double m = p.in.balance[h], c = kScales[h];
          std::vector<double> dq(T), dk(T);
          double near = 0;
          for (std::int64_t i = 0; i < T; ++i)
            for (std::int64_t j = 0; j <= i; ++j) {
              const double k = p.in.k[(h * T + j) * D], x = c * k - kTaus[h];
              if (x <= 0 || x >= 1) continue;
              near += 1, dq[i] += c * m * k, dk[j] += c * m;
            }
          EXPECT_EQ(r.dtau[h], -near * m) << what << " head " << h;
          for (std::int64_t t = 0; t < T; ++t) {
            EXPECT_NEAR(__bfloat162float(r.dq[(h * T + t) * D]), dq[t], std::abs(dq[t]) / 256) << what << " head " << h << " query " << t;
            EXPECT_EQ(__bfloat162float(r.dk[(h * T + t) * D]), to_bf16(dk[t])) << what << " head " << h << " key " << t;
          }
        }
      }
}

TEST(CudaAttention, LengthBetaThreshold) {
  NEEDS_GPU();
  for (const auto path : paths())
    for (const std::int64_t D : {64, 128})
      for (const auto gate : {Gate::relu, Gate::relu2, Gate::relu4}) {
        AttentionMath math;
        math.gate = gate, math.length_beta = 0.6f;
        const AttentionShape shape{1, 2, 190, D};
        compare(make_problem(shape, math, {is_causal, windowed}, false, 0.1, 77), path, describe(math, shape, path) + " length_beta");
      }
}

TEST(CudaAttention, NegativeThresholdAndNegativeScale) {
  NEEDS_GPU();
  for (const auto path : paths())
    for (const double sign : {1.0, -1.0}) {
      const AttentionShape shape{1, 2, 150, 64};
      Problem p = make_problem(shape, {}, {is_causal}, true, -0.5, 5);  // every edge with x = 0.5 + small: padded rows must stay silent
      for (double& c : p.in.scale) c *= sign;
      compare(p, path, std::string(name_of(path)) + " sign " + std::to_string(sign));
    }
}

TEST(CudaAttention, ListsOfALongerSequenceServeAShorterOne) {
  NEEDS_GPU();
  for (const auto path : paths())
    for (const std::int64_t T : {1, 63, 129, 257}) {
      Problem p = make_problem({2, 2, T, 64}, {}, {is_causal, windowed}, false, 0.3, 9);
      p.map_tokens = 500;
      compare(p, path, std::string(name_of(path)) + " short T=" + std::to_string(T));
    }
}

TEST(CudaAttention, NothingActiveGivesZeros) {
  NEEDS_GPU();
  for (const auto path : paths())
    for (const auto visit : {Visit::active, Visit::all}) {
      const Problem p = make_problem({1, 2, 300, 64}, {}, {is_causal}, false, 100.0, 3);
      const Result r = run(p, path, visit);
      for (const auto* v : {&r.o, &r.dq, &r.dk, &r.dv})
        for (const Bf16 x : *v) ASSERT_EQ(__bfloat162float(x), 0.f);
      for (const std::uint32_t w : r.bitmap) ASSERT_EQ(w, 0u);
      EXPECT_EQ(r.counters[kActiveEdges], 0u);
      EXPECT_EQ(r.counters[kEmptyRows], 300u);
    }
}

TEST(CudaAttention, RefusesWhatItCannotDo) {
  NEEDS_GPU();
  auto map = make_tiles(64, 1, {is_causal});
  map->tile_key = 128;
  EXPECT_THROW(upload_tiles_cuda(map), std::invalid_argument);
  EXPECT_THROW(upload_tiles_cuda(nullptr), std::logic_error);
  AttentionForward f;
  f.shape = {1, 1, 64, 96};
  EXPECT_THROW(cuda_attention_forward(f, nullptr), std::logic_error);
  f.shape = {1, 1, 64, 64};
  EXPECT_THROW(cuda_attention_forward(f, nullptr), std::logic_error);  // no tiles
}

}  // namespace
}  // namespace tessera
