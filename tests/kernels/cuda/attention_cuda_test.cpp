// The CUDA attention against the naive definition in double precision, and against itself.
//
// Tolerance: the error against fp64 of the same maths done with bf16 roundings where the kernels round (weights, their gradients,
// outputs), computed here edge by edge; the kernels may err twice as much (largest error over a tensor).

#include "kernels/cuda/attention/attention.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <string>

#include "attention_problem.h"

namespace tessera {
namespace {

using namespace cuda_test;

struct Result {
  std::vector<Bf16> o, dq, dk, dv;
  std::vector<float> z, dscale, dtau;
  std::vector<std::uint32_t> bitmap;
  std::vector<std::uint64_t> counters;
};

/// Runs work(stream) from a CUDA graph.
template <class Work>
void run_recorded(Work work) {
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t recorded;
  TESSERA_CUDA_CHECK(cudaStreamCreate(&stream));
  TESSERA_CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed));
  work(stream);
  TESSERA_CUDA_CHECK(cudaStreamEndCapture(stream, &graph));
  TESSERA_CUDA_CHECK(cudaGraphInstantiate(&recorded, graph, 0));
  TESSERA_CUDA_CHECK(cudaGraphLaunch(recorded, stream));
  TESSERA_CUDA_CHECK(cudaStreamSynchronize(stream));
  TESSERA_CUDA_CHECK(cudaGraphExecDestroy(recorded));
  TESSERA_CUDA_CHECK(cudaGraphDestroy(graph));
  TESSERA_CUDA_CHECK(cudaStreamDestroy(stream));
}

/// Runs forward and backward; q, k, v and their gradients in the packed layout [B, T, 3, H, D]. What follows in the stream must find the gradients.
Result run(const Problem& p, CudaAttentionPath path, Visit visit, const DeviceTiles* shared_tiles = nullptr,
           CudaAttentionSchedule schedule = CudaAttentionSchedule::automatic, bool recorded = false) {
  const auto& s = p.in.shape;
  const auto [B, H, T, D] = s;
  const std::int64_t tiles = (T + 63) / 64, words = bitmap_words(tiles), token = 3 * H * D;
  std::vector<Bf16> qkv(B * T * token);
  const std::vector<Bf16> parts[3] = {rounded(p.in.q), rounded(p.in.k), rounded(p.in.v)};
  for (int n = 0; n < 3; ++n)
    for (std::int64_t b = 0; b < B; ++b)
      for (std::int64_t h = 0; h < H; ++h)
        for (std::int64_t t = 0; t < T; ++t)
          for (std::int64_t d = 0; d < D; ++d) qkv[(b * T + t) * token + (n * H + h) * D + d] = parts[n][((b * H + h) * T + t) * D + d];
  Device<Bf16> d_qkv(qkv), d_gradient(qkv.size()), d_follows(qkv.size()), d_out(B * H * T * D), d_do(rounded(p.d_o));
  Device<float> d_scale(std::vector<float>(p.in.scale.begin(), p.in.scale.end())), d_tau(std::vector<float>(p.in.tau.begin(), p.in.tau.end()));
  Device<float> d_balance(std::vector<float>(p.in.balance.begin(), p.in.balance.end()));
  Device<float> d_z(B * H * T), d_dscale(std::vector<float>(H, 0.f)), d_dtau(std::vector<float>(H, 0.f)), d_work(attention_backward_workspace(s, 64));
  Device<std::uint32_t> d_bits(B * H * tiles * words);
  Device<std::uint64_t> d_counters(std::vector<std::uint64_t>(H * kAttentionCounters, 0));
  Device<std::int32_t> d_documents(p.document_start);
  std::unique_ptr<DeviceTiles> own;
  if (!shared_tiles) {
    own = upload_tiles_cuda(make_tiles(p.map_tokens ? p.map_tokens : T, H, p.patterns));
    shared_tiles = own.get();
  }
  const auto part = [&](const Device<Bf16>& from, int n) { return HeadsView{from.get() + n * H * D, DType::bf16, T * token, D, token}; };
  AttentionForward f;
  f.shape = s, f.math = p.in.math, f.visit = visit, f.tiles = shared_tiles;
  f.q = part(d_qkv, 0), f.k = part(d_qkv, 1), f.v = part(d_qkv, 2), f.o = packed(d_out.get(), s);
  f.scale = {d_scale.get(), DType::f32, {H}}, f.threshold = {d_tau.get(), DType::f32, {H}};
  if (!p.document_start.empty()) f.document_start = {d_documents.get(), DType::i32, {B, T}};
  f.z = {d_z.get(), DType::f32, {B, H, T}}, f.active_tiles = {d_bits.get(), DType::u32, {B, H, tiles, words}};
  f.counters = {d_counters.get(), DType::u64, {H, kAttentionCounters}};
  AttentionBackward g;
  g.forward = f, g.d_o = packed(d_do.get(), s);
  g.dq = part(d_gradient, 0), g.dk = part(d_gradient, 1), g.dv = part(d_gradient, 2);
  g.dscale = {d_dscale.get(), DType::f32, {H}}, g.dthreshold = {d_dtau.get(), DType::f32, {H}};
  if (!p.in.balance.empty()) g.balance = {d_balance.get(), DType::f32, {H}};
  g.workspace = {d_work.get(), DType::f32, {static_cast<std::int64_t>(d_work.size())}};
  const auto work = [&](cudaStream_t stream) {
    cuda_attention_forward(f, stream, {path, schedule});
    cuda_attention_backward(g, stream, {path, schedule});
    TESSERA_CUDA_CHECK(cudaMemcpyAsync(d_follows.get(), d_gradient.get(), qkv.size() * sizeof(Bf16), cudaMemcpyDeviceToDevice, stream));
  };
  TESSERA_CUDA_CHECK(cudaDeviceSynchronize());
  if (recorded)
    run_recorded(work);
  else
    work(nullptr);
  TESSERA_CUDA_CHECK(cudaDeviceSynchronize());

  Result r;
  r.o = d_out.host(), r.z = d_z.host(), r.dscale = d_dscale.host(), r.dtau = d_dtau.host(), r.bitmap = d_bits.host(), r.counters = d_counters.host();
  const std::vector<Bf16> gradient = d_gradient.host();
  EXPECT_TRUE(same_bits(d_follows.host(), gradient)) << "what follows in the stream began before the gradients were there";
  std::vector<Bf16>* to[3] = {&r.dq, &r.dk, &r.dv};
  for (int n = 0; n < 3; ++n) {
    to[n]->resize(B * H * T * D);
    for (std::int64_t b = 0; b < B; ++b)
      for (std::int64_t h = 0; h < H; ++h)
        for (std::int64_t t = 0; t < T; ++t)
          for (std::int64_t d = 0; d < D; ++d) (*to[n])[((b * H + h) * T + t) * D + d] = gradient[(b * T + t) * token + (n * H + h) * D + d];
  }
  return r;
}

/// The same maths with bf16 roundings at the kernels' places, everything else in double.
struct Rounded {
  std::vector<double> o, dq, dk, dv;
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
  r.o.assign(B * H * T * D, 0), r.dq = r.dk = r.dv = r.o;
  for (auto* v : {&r.dscale_error, &r.dtau_error, &r.dscale_size, &r.dtau_size}) v->assign(H, 0);
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
          r.undecided[h] += !softmax && std::abs(x[j]) <= 1e-5;
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
          const double balance = !in.balance.empty() && x[j] > 0 ? in.balance[h] / power : 0;
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

void expect_close(const std::vector<Bf16>& got, const std::vector<double>& exact, const std::vector<double>& rounded_maths, const std::string& what) {
  double error = 0, allowed = 0, largest = 0;
  for (std::size_t n = 0; n < got.size(); ++n) {
    const double x = __bfloat162float(got[n]);
    ASSERT_TRUE(std::isfinite(x)) << what << " at " << n << " is not finite (not written?)";
    error = std::max(error, std::abs(x - exact[n]));
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
  expect_close(r.dq, gradient.dq, maths.dq, what + " dq");
  expect_close(r.dk, gradient.dk, maths.dk, what + " dk");
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
    EXPECT_NEAR(r.dscale[h], gradient.dscale[h], 4 * maths.dscale_error[h] + 2e-6 * maths.dscale_size[h] + 1e-4) << what << " dscale of head " << h;
    EXPECT_NEAR(r.dtau[h], gradient.dtau[h], 4 * maths.dtau_error[h] + 2e-6 * maths.dtau_size[h] + 1e-4) << what << " dtau of head " << h;
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

/// With balances where there can be any, of both signs, unless an edge is so near to the kink that fp32 may give it its balance, or not.
Problem with_balances(Problem p) {
  if (p.in.math.gate == Gate::softmax || p.in.math.score == Score::fidelity || p.in.math.length_beta > 0) return p;
  if (reference::attention_forward(p.in).nearest_kink <= 1e-5) return p;
  for (std::int64_t h = 0; h < p.in.shape.heads; ++h) p.in.balance.push_back(h % 2 ? -0.3 : 0.2);
  return p;
}

TEST(CudaAttention, MatchesTheDefinitionInEveryCombination) {
  NEEDS_GPU();
  for_every_combination({1, 17, 64, 65, 130, 200}, [](const Problem& p, CudaAttentionPath path, unsigned n, const std::string& what) {
    compare(n % 3 ? with_balances(p) : p, path, what, n / 2 % 2 ? CudaAttentionSchedule::block_a_band : CudaAttentionSchedule::persistent);
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
        const Problem p = with_balances(make_problem(shape, math, {is_causal, strided, holes}, documents, 0.8, 91, 600));
        const Expected e = expected(p);
        for (const auto path : paths())
          for (const auto schedule : {CudaAttentionSchedule::block_a_band, CudaAttentionSchedule::persistent})
            compare(p, e, path,
                    describe(math, shape, path) + (documents ? " documents" : "") +
                        (schedule == CudaAttentionSchedule::persistent ? " persistent" : " a block a band"),
                    schedule);
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

void expect_same_bits(const Result& x, const Result& y, const std::string& what) {
  EXPECT_TRUE(same_bits(x.o, y.o)) << what << " o";
  EXPECT_TRUE(same_bits(x.z, y.z)) << what << " z";
  EXPECT_TRUE(same_bits(x.bitmap, y.bitmap)) << what << " bitmap";
  EXPECT_TRUE(same_bits(x.counters, y.counters)) << what << " counters";
  EXPECT_TRUE(same_bits(x.dq, y.dq)) << what << " dq";
  EXPECT_TRUE(same_bits(x.dk, y.dk)) << what << " dk";
  EXPECT_TRUE(same_bits(x.dv, y.dv)) << what << " dv";
  EXPECT_TRUE(same_bits(x.dscale, y.dscale)) << what << " dscale";
  EXPECT_TRUE(same_bits(x.dtau, y.dtau)) << what << " dtau";
}

TEST(CudaAttention, SkippingChangesNoBit) {
  NEEDS_GPU();
  for (const auto path : paths())
    for (const std::int64_t D : {64, 128})
      for (const auto gate : {Gate::relu, Gate::relu2, Gate::relu4})
        for (const auto score : {Score::cosine, Score::fidelity, Score::dot})
          for (const bool documents : {false, true}) {
            AttentionMath math;
            math.gate = gate, math.score = score;
            // Thresholds near the largest score of a tile, so that some tiles are active and most are not.
            const double root = D == 64 ? 1.0 : 0.7;
            const double tau = score == Score::cosine ? 3.6 * root : score == Score::fidelity ? 0.2 * root * root : 3.5;
            const Problem p = make_problem({1, 3, 700, D}, math, {is_causal, strided, sinks}, documents, tau, 31);
            const Result active = run(p, path, Visit::active), all = run(p, path, Visit::all);
            const std::string what = describe(math, p.in.shape, path);
            expect_same_bits(active, all, what);
            std::uint64_t tiles = 0, visible = 0;
            for (int h = 0; h < 3; ++h)
              tiles += active.counters[h * kAttentionCounters + kActiveTiles], visible += active.counters[h * kAttentionCounters + kVisibleTiles];
            EXPECT_GT(tiles, 0u) << what << ": nothing to compare";
            EXPECT_LT(tiles, visible) << what << ": nothing was skipped";
          }
}

TEST(CudaAttention, SchedulesGiveTheSameBits) {
  NEEDS_GPU();
  // More bands than a GPU has multiprocessors, so that blocks take several: 4 x 16 heads x at least 4 bands. Empty bands, empty columns, documents.
  for (const auto path : paths())
    for (const std::int64_t D : {64, 128})
      for (const auto math : {AttentionMath{}, AttentionMath{.gate = Gate::softmax}, AttentionMath{.length_beta = 0.6f}})
        for (const bool documents : {false, true}) {
          const Problem p = make_problem({4, 16, 700, D}, math, {is_causal, holes, windowed, sinks}, documents, 0.8, 51);
          const auto tiles = upload_tiles_cuda(make_tiles(700, 16, p.patterns));
          const Result once = run(p, path, Visit::active, tiles.get(), CudaAttentionSchedule::block_a_band);
          const std::string what = describe(math, p.in.shape, path) + (documents ? " documents" : "");
          for (const auto visit : {Visit::active, Visit::all})
            expect_same_bits(once, run(p, path, visit, tiles.get(), CudaAttentionSchedule::persistent), what + (visit == Visit::all ? " all" : ""));
        }
}

TEST(CudaAttention, SchedulesGiveTheSameBitsOverSectionsOfHeads) {
  NEEDS_GPU();
  // 12 heads' keys and values fit the part of the L2 cache that is counted on: sections of 7 and 6 heads, and bands enough to fill them.
  const Problem p = make_problem({1, 13, 4096, 128}, {}, {windowed, is_causal}, false, 0.8, 53);
  const auto tiles = upload_tiles_cuda(make_tiles(4096, 13, p.patterns));
  for (const auto path : paths())
    expect_same_bits(run(p, path, Visit::active, tiles.get(), CudaAttentionSchedule::block_a_band),
                     run(p, path, Visit::active, tiles.get(), CudaAttentionSchedule::persistent), describe(p.in.math, p.in.shape, path));
}

// The first keys' list is all queries, while a query's is short: dq, which starts before dk, dv ends, is done long before.
TEST(CudaAttention, WhatFollowsWaitsForTheLongestList) {
  NEEDS_GPU();
  const Problem p = make_problem({1, 1, 8192, 64}, {}, {[](std::int64_t i, std::int64_t j) { return j < 64 || i - j < 8; }}, false, 0.1, 54);
  const auto tiles = upload_tiles_cuda(make_tiles(8192, 1, p.patterns));
  for (const auto path : paths())
    for (const bool recorded : {false, true}) run(p, path, Visit::all, tiles.get(), CudaAttentionSchedule::automatic, recorded);
}

TEST(CudaAttention, ARecordedCallGivesTheSameBits) {
  NEEDS_GPU();
  for (const auto path : paths())
    for (const std::int64_t D : {64, 128})
      for (const auto schedule : {CudaAttentionSchedule::block_a_band, CudaAttentionSchedule::persistent}) {
        const Problem p = make_problem({4, 16, 700, D}, {}, {is_causal, holes, windowed, sinks}, true, 0.8, 52);
        const auto tiles = upload_tiles_cuda(make_tiles(700, 16, p.patterns));
        expect_same_bits(run(p, path, Visit::active, tiles.get(), schedule), run(p, path, Visit::active, tiles.get(), schedule, true),
                         describe(p.in.math, p.in.shape, path));
      }
}

TEST(CudaAttention, SomeQueriesOverTheKeysTheySeeGiveTheBitsOfTheWhole) {
  NEEDS_GPU();
  // 11 query tiles dealt to two ranks, each with a compact buffer of the key tiles that its queries touch.
  const std::vector<std::vector<int>> ranks = {{0, 3, 4, 7, 10}, {1, 2, 5, 6, 8, 9}};
  for (const auto path : paths())
    for (const std::int64_t D : {64, 128})
      for (const auto math : {AttentionMath{}, AttentionMath{.normalizer = Normalizer::length}, AttentionMath{.gate = Gate::softmax},
                              AttentionMath{.length_beta = 0.6f}, AttentionMath{.score = Score::fidelity}})
        for (const bool documents : {false, true}) {
          const std::int64_t B = 2, H = 3, T = 690;
          const double tau = math.score == Score::fidelity ? 0.02 : 0.8;
          const Problem p = make_problem({B, H, T, D}, math, {windowed, sinks, holes}, documents, tau, 61);
          const Result whole = run(p, path, Visit::active);
          const auto map = make_tiles(T, H, p.patterns);
          std::vector<double> dk(B * H * T * D), dv(B * H * T * D);
          std::vector<std::uint64_t> counters(H * kAttentionCounters);
          const std::string what = describe(math, p.in.shape, path) + (documents ? " documents" : "");
          for (const auto& queries : ranks) {
            std::vector<int> keys;
            for (int b = 0; b < map->key_tiles; ++b) {
              bool seen = false;
              for (const TileGroup& g : map->groups)
                for (const int a : queries)
                  for (std::int64_t n = g.query_offsets[a]; n < g.query_offsets[a + 1]; ++n) seen |= g.query_entries[n].tile == b;
              if (seen) keys.push_back(b);
            }
            const auto tokens_of = [&](const std::vector<int>& tiles) {
              std::vector<std::int64_t> t;
              for (const int tile : tiles)
                for (std::int64_t n = 64 * tile; n < std::min<std::int64_t>(T, 64 * tile + 64); ++n) t.push_back(n);
              return t;
            };
            const auto mine = tokens_of(queries), theirs = tokens_of(keys);
            const auto rows_of = [&](const std::vector<double>& from, const std::vector<std::int64_t>& tokens) {
              std::vector<double> to;
              for (std::int64_t bh = 0; bh < B * H; ++bh)
                for (const auto t : tokens) to.insert(to.end(), &from[(bh * T + t) * D], &from[(bh * T + t) * D] + D);
              return rounded(to);
            };
            const AttentionShape s{B, H, static_cast<std::int64_t>(mine.size()), D}, ks{B, H, static_cast<std::int64_t>(theirs.size()), D};
            const std::int64_t n = s.tokens, m = ks.tokens, words = bitmap_words((m + 63) / 64), tiles = (n + 63) / 64;
            Device<Bf16> q(rows_of(p.in.q, mine)), k(rows_of(p.in.k, theirs)), v(rows_of(p.in.v, theirs)), d_o(rows_of(p.d_o, mine));
            Device<Bf16> o(B * H * n * D), dq(B * H * n * D), d_k(B * H * m * D), d_v(B * H * m * D);
            Device<float> scale(std::vector<float>(p.in.scale.begin(), p.in.scale.end())),
                threshold(std::vector<float>(p.in.tau.begin(), p.in.tau.end()));
            Device<float> z(B * H * n), work(attention_backward_workspace(s, 64));
            Device<std::uint32_t> bits(B * H * tiles * words);
            Device<std::uint64_t> count(std::vector<std::uint64_t>(H * kAttentionCounters, 0));
            std::vector<std::int32_t> starts, positions(mine.begin(), mine.end());
            for (std::int64_t b = 0; b < B && documents; ++b)
              for (const auto t : mine)
                starts.push_back(
                    static_cast<std::int32_t>(std::lower_bound(theirs.begin(), theirs.end(), p.document_start[b * T + t]) - theirs.begin()));
            Device<std::int32_t> document_start(starts), position(positions);
            const auto lists = upload_tiles_cuda(part_of(*map, queries, keys));
            AttentionForward f;
            f.shape = s, f.keys = m, f.math = math, f.tiles = lists.get();
            f.q = packed(q.get(), s), f.k = packed(k.get(), ks), f.v = packed(v.get(), ks), f.o = packed(o.get(), s);
            f.scale = {scale.get(), DType::f32, {H}}, f.threshold = {threshold.get(), DType::f32, {H}};
            if (documents) f.document_start = {document_start.get(), DType::i32, {B, n}};
            f.positions = {position.get(), DType::i32, {n}};
            f.z = {z.get(), DType::f32, {B, H, n}}, f.active_tiles = {bits.get(), DType::u32, {B, H, tiles, words}};
            f.counters = {count.get(), DType::u64, {H, kAttentionCounters}};
            AttentionBackward g;
            g.forward = f, g.d_o = packed(d_o.get(), s), g.dq = packed(dq.get(), s), g.dk = packed(d_k.get(), ks), g.dv = packed(d_v.get(), ks);
            g.workspace = {work.get(), DType::f32, {static_cast<std::int64_t>(work.size())}};
            cuda_attention_forward(f, nullptr, {path});
            cuda_attention_backward(g, nullptr, {path});
            TESSERA_CUDA_CHECK(cudaDeviceSynchronize());
            const auto o_host = o.host(), dq_host = dq.host(), dk_host = d_k.host(), dv_host = d_v.host();
            const auto z_host = z.host();
            for (std::int64_t bh = 0; bh < B * H; ++bh) {
              for (std::int64_t i = 0; i < n; ++i) {
                const std::int64_t here = (bh * n + i) * D, there = (bh * T + mine[i]) * D;
                ASSERT_EQ(std::memcmp(&o_host[here], &whole.o[there], D * sizeof(Bf16)), 0) << what << " o of token " << mine[i];
                ASSERT_EQ(std::memcmp(&dq_host[here], &whole.dq[there], D * sizeof(Bf16)), 0) << what << " dq of token " << mine[i];
                ASSERT_EQ(z_host[bh * n + i], whole.z[bh * T + mine[i]]) << what << " z of token " << mine[i];
              }
              for (std::int64_t j = 0; j < m; ++j)
                for (std::int64_t d = 0; d < D; ++d) {
                  dk[(bh * T + theirs[j]) * D + d] += __bfloat162float(dk_host[(bh * m + j) * D + d]);
                  dv[(bh * T + theirs[j]) * D + d] += __bfloat162float(dv_host[(bh * m + j) * D + d]);
                }
            }
            const auto c = count.host();
            for (std::size_t x = 0; x < c.size(); ++x) counters[x] += c[x];
          }
          EXPECT_EQ(counters, whole.counters) << what;
          double largest[2] = {0, 0};
          for (std::size_t x = 0; x < dk.size(); ++x)
            largest[0] = std::max(largest[0], std::abs(dk[x])), largest[1] = std::max(largest[1], std::abs(dv[x]));
          for (std::size_t x = 0; x < dk.size(); ++x) {  // two ranks' sums and the whole: each was rounded to bf16 once
            ASSERT_NEAR(dk[x], __bfloat162float(whole.dk[x]), 3.0 / 256 * largest[0]) << what << " dk " << x;
            ASSERT_NEAR(dv[x], __bfloat162float(whole.dv[x]), 3.0 / 256 * largest[1]) << what << " dv " << x;
          }
        }
}

TEST(CudaAttention, TenRunsGiveTheSameBits) {
  NEEDS_GPU();
  for (const auto path : paths())
    for (const std::int64_t D : {64, 128}) {
      const Problem p = make_problem({2, 3, 900, D}, {}, {is_causal, strided}, true, 1.5, 11);
      const auto tiles = upload_tiles_cuda(make_tiles(900, 3, p.patterns));
      const Result first = run(p, path, Visit::active, tiles.get());
      for (int n = 1; n < 10; ++n)
        expect_same_bits(first, run(p, path, Visit::active, tiles.get()), std::string(name_of(path)) + " run " + std::to_string(n));
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

TEST(CudaAttention, OffsetsBeyondTwoToThe31) {
  NEEDS_GPU();
  // The last sequence of a batch of three in packed [B, T, 3, H, D] (2.4e9 elements), against the same sequence alone.
  const std::int64_t B = 3, H = 16, T = 131072, D = 128, token = 3 * H * D;
  std::size_t free = 0, total = 0;
  TESSERA_CUDA_CHECK(cudaMemGetInfo(&free, &total));
  if (free < (std::size_t{24} << 30)) GTEST_SKIP() << "needs 24 GiB of free GPU memory, has " << (free >> 30);
  const AttentionShape all{B, H, T, D}, one{1, H, T, D};
  const auto tiles = upload_tiles_cuda(make_window_tiles(T, H, 128));
  std::vector<Bf16> sequence(T * token);
  std::uint32_t state = 1;
  for (auto& x : sequence) x = __float2bfloat16_rn((static_cast<float>((state = state * 1664525u + 1013904223u) >> 8) / (1 << 23) - 1.f) * 0.15f);
  Device<Bf16> qkv(B * T * token), gradient(B * T * token), o(B * H * T * D), d_o(B * H * T * D);
  TESSERA_CUDA_CHECK(cudaMemset(qkv.get(), 0, qkv.size() * 2));
  TESSERA_CUDA_CHECK(cudaMemset(d_o.get(), 0, d_o.size() * 2));
  TESSERA_CUDA_CHECK(cudaMemcpy(qkv.get() + 2 * T * token, sequence.data(), sequence.size() * 2, cudaMemcpyHostToDevice));
  TESSERA_CUDA_CHECK(cudaMemcpy(d_o.get() + 2 * H * T * D, sequence.data(), H * T * D * 2, cudaMemcpyHostToDevice));
  const std::int64_t n = T / 64;
  Device<float> scale(std::vector<float>(H, 8.f)), tau(std::vector<float>(H, 0.1f)), z(B * H * T), work(attention_backward_workspace(all, 64));
  Device<std::uint32_t> bits(B * H * n * bitmap_words(n));
  const auto results = [&](const AttentionShape& s, Bf16* q, Bf16* out, Bf16* grad_out, Bf16* grad) {
    const auto part = [&](Bf16* p, int which) { return HeadsView{p + which * H * D, DType::bf16, T * token, D, token}; };
    AttentionForward f;
    f.shape = s, f.tiles = tiles.get();
    f.q = part(q, 0), f.k = part(q, 1), f.v = part(q, 2), f.o = packed(out, s);
    f.scale = {scale.get(), DType::f32, {H}}, f.threshold = {tau.get(), DType::f32, {H}}, f.z = {z.get(), DType::f32, {B, H, T}};
    f.active_tiles = {bits.get(), DType::u32, {static_cast<std::int64_t>(bits.size())}};
    AttentionBackward g;
    g.forward = f, g.d_o = packed(grad_out, s), g.dq = part(grad, 0), g.dk = part(grad, 1), g.dv = part(grad, 2);
    g.workspace = {work.get(), DType::f32, {static_cast<std::int64_t>(work.size())}};
    cuda_attention_forward(f, nullptr);
    cuda_attention_backward(g, nullptr);
    TESSERA_CUDA_CHECK(cudaDeviceSynchronize());
  };
  const auto last = [&](const Device<Bf16>& from, std::int64_t at, std::int64_t count) {
    std::vector<Bf16> v(count);
    TESSERA_CUDA_CHECK(cudaMemcpy(v.data(), from.get() + at, count * 2, cudaMemcpyDeviceToHost));
    return v;
  };
  results(all, qkv.get(), o.get(), d_o.get(), gradient.get());
  const auto o_all = last(o, 2 * H * T * D, H * T * D), g_all = last(gradient, 2 * T * token, T * token);
  o.poison(), gradient.poison();
  results(one, qkv.get() + 2 * T * token, o.get(), d_o.get() + 2 * H * T * D, gradient.get());
  EXPECT_TRUE(same_bits(o_all, last(o, 0, H * T * D)));
  EXPECT_TRUE(same_bits(g_all, last(gradient, 0, T * token)));
  double sum = 0;
  for (const Bf16 x : o_all) sum += std::abs(__bfloat162float(x));
  EXPECT_GT(sum, 0);
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
