// Generation's attention on a GPU. The fast form: every row against the naive definition in double precision; weights are not rounded there, so that
// what remains is fp32 sums and one rounding to bf16, and against the forward kernel, which rounds weights, a row may differ by that. The exact form:
// the forward kernel's rows, to the bit.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>

#include "attention_problem.h"
#include "kernels/cuda/attention/attention.h"

namespace tessera {
namespace {

using namespace cuda_test;

using Tokens = std::vector<std::pair<std::int64_t, std::int64_t>>;  // sequence, token

struct Output {
  std::vector<Bf16> o;
  std::vector<float> z;
};

/// The sequences of a problem in a cache, in reverse order and with one more; what was not put there is NaN.
struct Cache {
  Cache(const Problem& problem, std::int64_t capacity)
      : p(problem),
        s(p.in.shape),
        tiles(upload_tiles_cuda(make_tiles(capacity, s.heads, p.patterns))),
        qkv(s.batch * s.tokens * token()),
        memory((s.batch + 1) * 2 * s.heads * capacity * s.head_size),
        scale(std::vector<float>(p.in.scale.begin(), p.in.scale.end())),
        threshold(std::vector<float>(p.in.tau.begin(), p.in.tau.end())) {
    const auto [B, H, T, D] = s;
    cache = {{memory.get(), DType::bf16, {static_cast<std::int64_t>(memory.size())}}, B + 1, H, capacity, D};
    const std::vector<Bf16> parts[3] = {rounded(p.in.q), rounded(p.in.k), rounded(p.in.v)};
    for (int n = 0; n < 3; ++n)
      for (std::int64_t b = 0; b < B; ++b)
        for (std::int64_t h = 0; h < H; ++h)
          for (std::int64_t t = 0; t < T; ++t) std::copy_n(&parts[n][((b * H + h) * T + t) * D], D, &qkv[(b * T + t) * token() + (n * H + h) * D]);
  }
  std::int64_t token() const { return 3 * s.heads * s.head_size; }
  std::int32_t place(std::int64_t b) const { return static_cast<std::int32_t>(s.batch - b); }

  /// Tokens [first, last) of a sequence, in one piece.
  void append(std::int64_t b, std::int64_t first, std::int64_t last) {
    if (first == last) return;
    Device<Bf16> rows(std::vector<Bf16>(qkv.begin() + (b * s.tokens + first) * token(), qkv.begin() + (b * s.tokens + last) * token()));
    Device<std::int32_t> sequence(std::vector<std::int32_t>{place(b)}), position(std::vector<std::int32_t>{static_cast<std::int32_t>(first)});
    cuda_cache_append({cache,
                       {rows.get(), DType::bf16, {1, last - first, 3, s.heads * s.head_size}},
                       {sequence.get(), DType::i32, {1}},
                       {position.get(), DType::i32, {1}}},
                      nullptr);
    TESSERA_CUDA_CHECK(cudaDeviceSynchronize());
  }

  /// Sequence 0 token by token from the start, the others further on: puts in what is new and calls step(tokens) with those of all that are not yet
  /// at their end, until a step has failed.
  template <class Step>
  void walk(std::int64_t stride, Step step) {
    std::vector<std::int64_t> known(s.batch, 0);
    for (std::int64_t first = 0; first < s.tokens && !::testing::Test::HasFatalFailure(); first += stride) {
      Tokens tokens;
      for (std::int64_t b = 0; b < s.batch; ++b) {
        const std::int64_t t = first + 37 * b;
        if (t >= s.tokens) continue;
        append(b, known[b], t + 1);
        known[b] = t + 1;
        tokens.emplace_back(b, t);
      }
      step(tokens);
    }
  }

  /// The rows [H, D], and z [H], of one token of some sequences, in one call: by the fast form, or the exact one on a path.
  Output decode(const Tokens& tokens, const CudaAttentionPath* exact = nullptr) {
    const auto rows = static_cast<std::int64_t>(tokens.size());
    std::vector<Bf16> packed;
    std::vector<std::int32_t> sequence, position, start;
    for (const auto& [b, t] : tokens) {
      packed.insert(packed.end(), qkv.begin() + (b * s.tokens + t) * token(), qkv.begin() + (b * s.tokens + t + 1) * token());
      sequence.push_back(place(b)), position.push_back(static_cast<std::int32_t>(t));
      if (!p.document_start.empty()) start.push_back(p.document_start[b * s.tokens + t]);
    }
    Device<Bf16> q(packed), o(rows * s.heads * s.head_size);
    Device<float> z(rows * s.heads);
    Device<std::int32_t> sequences(sequence), positions(position), starts(start);
    AttentionDecode a;
    a.cache = cache, a.math = p.in.math, a.tiles = tiles.get();
    a.qkv = {q.get(), DType::bf16, {rows, 3, s.heads, s.head_size}};
    a.sequences = {sequences.get(), DType::i32, {rows}}, a.positions = {positions.get(), DType::i32, {rows}};
    if (!start.empty()) a.document_start = {starts.get(), DType::i32, {rows}};
    a.scale = {scale.get(), DType::f32, {s.heads}}, a.threshold = {threshold.get(), DType::f32, {s.heads}};
    a.o = {o.get(), DType::bf16, {rows, s.heads, s.head_size}};
    a.z = {z.get(), DType::f32, {rows, s.heads}};
    Device<float> workspace(attention_decode_workspace(cache));
    a.workspace = {workspace.get(), DType::f32, {static_cast<std::int64_t>(workspace.size())}};
    exact ? cuda_attention_decode_exact(a, nullptr, {.path = *exact}) : cuda_attention_decode(a, nullptr);
    TESSERA_CUDA_CHECK(cudaDeviceSynchronize());
    return {o.host(), z.host()};
  }

  /// o of the forward kernel over whole sequences, [B, H, T, D], and z, [B, H, T].
  Output forward(CudaAttentionPath path) {
    const auto [B, H, T, D] = s;
    Device<Bf16> q(rounded(p.in.q)), k(rounded(p.in.k)), v(rounded(p.in.v)), o(B * H * T * D);
    Device<float> z(B * H * T);
    const std::int64_t words = (T + 63) / 64 * bitmap_words((T + 63) / 64);
    Device<std::uint32_t> bits(B * H * words);
    AttentionForward f;
    f.shape = s, f.math = p.in.math, f.tiles = tiles.get();
    f.q = packed(q.get(), s), f.k = packed(k.get(), s), f.v = packed(v.get(), s), f.o = packed(o.get(), s);
    f.scale = {scale.get(), DType::f32, {H}}, f.threshold = {threshold.get(), DType::f32, {H}};
    f.z = {z.get(), DType::f32, {B, H, T}}, f.active_tiles = {bits.get(), DType::u32, {B * H * words}};
    cuda_attention_forward(f, nullptr, {.path = path});
    TESSERA_CUDA_CHECK(cudaDeviceSynchronize());
    return {o.host(), z.host()};
  }

  const Problem& p;
  const AttentionShape s;
  std::unique_ptr<DeviceTiles> tiles;
  std::vector<Bf16> qkv;
  Device<Bf16> memory;
  Device<float> scale, threshold;
  KeyValueCache cache;
};

/// Every step's rows, of all sequences in one call, against the definition, and the last one alone.
void compare(const Problem& p, std::int64_t capacity, std::int64_t stride, const std::string& what) {
  const auto exact = reference::attention_forward(p.in);
  const auto [B, H, T, D] = p.in.shape;
  double largest = 0;
  for (const double x : exact.o) largest = std::max(largest, std::abs(x));
  Cache cache(p, capacity);
  cache.walk(stride, [&](const Tokens& tokens) {
    const auto made = cache.decode(tokens);
    for (std::size_t r = 0; r < tokens.size(); ++r)
      for (std::int64_t h = 0; h < H; ++h) {
        const std::int64_t row = (tokens[r].first * H + h) * T + tokens[r].second;
        const std::string where = what + " sequence " + std::to_string(tokens[r].first) + " token " + std::to_string(tokens[r].second);
        // Sums of fp32 terms, each of scores that are sums of D.
        ASSERT_NEAR(made.z[r * H + h], exact.z[row], 1e-4 * std::max(1.0, std::abs(exact.z[row]))) << "z of " << where;
        for (std::int64_t d = 0; d < D; ++d) {
          const double wanted = exact.o[row * D + d], found = __bfloat162float(made.o[(r * H + h) * D + d]);
          ASSERT_NEAR(found, wanted, std::abs(wanted) / 256 + 2e-5 * largest) << where;
        }
      }
    const auto alone = cache.decode({tokens.back()});
    ASSERT_EQ(std::memcmp(alone.o.data(), made.o.data() + (tokens.size() - 1) * H * D, H * D * sizeof(Bf16)), 0)
        << what << ": a row depends on the batch";
  });
}

/// check(problem, number of the case, what varies beside) for every score, gate, normalizer and head size; stops when one has failed.
template <class Check>
void for_every_combination(std::int64_t tokens, bool documents, float epsilon, Check check) {
  const std::vector<std::vector<Pattern>> patterns = {{is_causal}, {windowed}, {strided, is_causal}, {sinks, holes}};
  unsigned n = 0;
  for (const auto score : {Score::dot, Score::cosine, Score::fidelity})
    for (const auto gate : {Gate::relu, Gate::relu2, Gate::relu4, Gate::softmax})
      for (const auto norm : {Normalizer::none, Normalizer::length, Normalizer::sum, Normalizer::rms})
        for (const std::int64_t D : {64, 128}) {
          ++n;
          AttentionMath math;
          math.score = score, math.gate = gate, math.normalizer = norm, math.length_alpha = n / 2 % 2 ? 1.0f : 0.5f, math.epsilon = epsilon;
          if (score == Score::cosine && n % 3 == 0 && gate != Gate::softmax) math.length_beta = 0.6f;
          const double tau = score == Score::fidelity ? 0.01 : score == Score::cosine ? 0.4 * int(n % 3) : 0.2;
          const unsigned mix = n * 2654435761u >> 16;  // what the cases do not count off: pattern, documents, room in the cache
          const Problem p = make_problem({2, 2, tokens, D}, math, patterns[mix % 4], documents && mix / 4 % 2, tau, n);
          check(p, n, mix);
          if (::testing::Test::HasFatalFailure()) return;
        }
}

TEST(CudaAttentionDecode, IsTheDefinitionInEveryCombination) {
  NEEDS_GPU();
  for_every_combination(
      190, true, 1e-2f, [](const Problem& p, unsigned n, unsigned mix) {  // epsilon: how much a row with a tiny sum magnifies rounding
        compare(p, mix / 8 % 2 ? 190 : 333, 7,
                "case " + std::to_string(n) + " gate " + std::to_string(int(p.in.math.gate)) + " score " + std::to_string(int(p.in.math.score)));
      });
}

TEST(CudaAttentionDecode, ListsOfManyParts) {
  NEEDS_GPU();
  for (const auto gate : {Gate::relu2, Gate::softmax})
    for (const std::int64_t D : {64, 128}) {
      const Problem p = make_problem({1, 1, 2500, D}, {.gate = gate, .epsilon = 1e-2f}, {is_causal}, false, 0.8, 3);
      compare(p, 2500, 311, "T=2500 D=" + std::to_string(D));
    }
}

TEST(CudaAttentionDecode, AgreesWithTheForwardKernelOverALongContext) {
  NEEDS_GPU();
  // 520 key tiles: more than a tile a warp and part.
  const std::int64_t B = 1, H = 2, T = 33280, D = 64;
  for (const auto gate : {Gate::relu2, Gate::softmax}) {
    const Problem p = make_problem({B, H, T, D}, {.gate = gate, .epsilon = 1e-2f}, {is_causal}, false, 1.0, 4);
    Cache cache(p, T);
    cache.tiles = upload_tiles_cuda(make_window_tiles(T, H, 0));
    const auto whole = cache.forward(CudaAttentionPath::automatic).o;
    cache.append(0, 0, T);
    for (const std::int64_t t : {std::int64_t{0}, std::int64_t{16383}, std::int64_t{16384}, T - 1}) {
      const auto row = cache.decode({{0, t}}).o;
      for (std::int64_t h = 0; h < H; ++h)
        for (std::int64_t d = 0; d < D; ++d) {
          const double wanted = __bfloat162float(whole[(h * T + t) * D + d]);
          ASSERT_NEAR(__bfloat162float(row[h * D + d]), wanted, std::abs(wanted) / 128 + 4e-3 / std::sqrt(1.0 + t / 64.0)) << "token " << t;
        }
    }
  }
}

/// Rows of both sequences, in one call and alone, against those of the forward pass over whole sequences.
void compare_exactly(const Problem& p, std::int64_t capacity, std::int64_t stride, const std::string& what) {
  const auto [B, H, T, D] = p.in.shape;
  for (const CudaAttentionPath path : paths()) {
    Cache cache(p, capacity);  // NaN where nothing was put
    const auto whole = cache.forward(path);
    cache.walk(stride, [&](const Tokens& tokens) {
      const auto made = cache.decode(tokens, &path), alone = cache.decode({tokens[0]}, &path);
      ASSERT_EQ(std::memcmp(alone.o.data(), made.o.data(), H * D * sizeof(Bf16)), 0) << what << ": a row depends on the batch";
      for (std::size_t r = 0; r < tokens.size(); ++r)
        for (std::int64_t h = 0; h < H; ++h) {
          const std::int64_t n = r * H + h, row = (tokens[r].first * H + h) * T + tokens[r].second;
          const std::string where = describe(p.in.math, p.in.shape, path) + " " + what + " sequence " + std::to_string(tokens[r].first) + " token " +
                                    std::to_string(tokens[r].second);
          ASSERT_EQ(std::memcmp(&made.o[n * D], &whole.o[row * D], D * sizeof(Bf16)), 0) << where;
          ASSERT_EQ(std::memcmp(&made.z[n], &whole.z[row], sizeof(float)), 0) << "z of " << where;
        }
    });
    if (::testing::Test::HasFatalFailure()) return;
  }
}

TEST(CudaAttentionDecode, ExactHasTheForwardKernelsBitsInEveryCombination) {
  NEEDS_GPU();
  for_every_combination(330, false, AttentionMath{}.epsilon, [](const Problem& p, unsigned n, unsigned mix) {
    compare_exactly(p, mix / 8 % 2 ? 330 : 450, 23, "case " + std::to_string(n));
  });
}

TEST(CudaAttentionDecode, ExactWithNegativeScales) {
  NEEDS_GPU();
  Problem negative = make_problem({1, 2, 250, 64}, {.epsilon = 1e-2f}, {is_causal, windowed}, false, -0.5, 5);
  for (double& c : negative.in.scale) c = -c;
  compare_exactly(negative, 260, 31, "negative scale");
}

TEST(CudaAttentionDecode, ExactOverLongLists) {
  NEEDS_GPU();
  for (const std::int64_t D : {64, 128}) {
    const Problem longer = make_problem({1, 1, 5000, D}, {.epsilon = 1e-2f}, {is_causal}, false, 0.8, 3);
    compare_exactly(longer, 5000, 1237, "T=5000");
  }
}

TEST(CudaAttentionDecode, WhatIsNotInTheCacheIsNeitherReadNorWritten) {
  NEEDS_GPU();
  const Problem p = make_problem({2, 2, 100, 64}, {}, {is_causal}, false, 0.1, 1);
  Cache cache(p, 100);
  cache.append(0, 0, 100);
  const auto before = cache.memory.host();
  Device<Bf16> qkv(std::vector<Bf16>(cache.qkv.begin(), cache.qkv.begin() + 3 * cache.token())), o(3 * 2 * 64);
  Device<std::int32_t> sequences(std::vector<std::int32_t>{2, 3, -1}), positions(std::vector<std::int32_t>{100, 5, 5});
  const Tensor at{positions.get(), DType::i32, {3}}, of{sequences.get(), DType::i32, {3}};
  cuda_cache_append({cache.cache, {qkv.get(), DType::bf16, {3, 1, 3, 128}}, of, at}, nullptr);
  AttentionDecode a;
  Device<float> workspace(attention_decode_workspace(cache.cache));
  a.cache = cache.cache, a.math = p.in.math, a.tiles = cache.tiles.get(), a.qkv = {qkv.get(), DType::bf16, {3, 3, 2, 64}};
  a.sequences = of, a.positions = at, a.o = {o.get(), DType::bf16, {3, 2, 64}};
  a.scale = {cache.scale.get(), DType::f32, {2}}, a.threshold = {cache.threshold.get(), DType::f32, {2}};
  a.workspace = {workspace.get(), DType::f32, {static_cast<std::int64_t>(workspace.size())}};
  for (const bool exact : {false, true}) {
    TESSERA_CUDA_CHECK(cudaMemset(o.get(), 0, 3 * 2 * 64 * sizeof(Bf16)));
    exact ? cuda_attention_decode_exact(a, nullptr) : cuda_attention_decode(a, nullptr);
    TESSERA_CUDA_CHECK(cudaDeviceSynchronize());
    for (const Bf16 x : o.host()) ASSERT_TRUE(std::isnan(__bfloat162float(x)));
  }
  const auto after = cache.memory.host();
  EXPECT_EQ(std::memcmp(before.data(), after.data(), before.size() * sizeof(Bf16)), 0);
}

/// A negative scale turns the order of scores round.
TEST(CudaAttentionDecode, NegativeScale) {
  NEEDS_GPU();
  Problem p = make_problem({1, 2, 150, 64}, {.epsilon = 1e-2f}, {is_causal, windowed}, true, -0.5, 5);
  for (double& c : p.in.scale) c = -c;
  compare(p, 160, 11, "negative scale");
}

TEST(CudaAttentionDecode, RefusesWhatItCannotDo) {
  NEEDS_GPU();
  const Problem p = make_problem({1, 1, 64, 64}, {}, {is_causal}, false, 0.1, 1);
  Cache cache(p, 64);
  const auto refuses = [&](AttentionDecode a, const std::string& what) {
    try {
      cuda_attention_decode(a, nullptr);
      ADD_FAILURE() << "not refused: " << what;
    } catch (const std::logic_error& e) {
      EXPECT_NE(std::string(e.what()).find(what), std::string::npos) << e.what();
    }
  };
  AttentionDecode a;
  a.cache = cache.cache;
  refuses(a, "upload_tiles_cuda");
  a.tiles = cache.tiles.get();
  a.cache.capacity = 65, a.cache.data.shape = {2 * 2 * 65 * 64};
  refuses(a, "longer than the tile map");
  a.cache = cache.cache;
  a.cache.head_size = 32, a.cache.capacity = 64, a.cache.data.shape = {2 * 2 * 64 * 32};
  a.positions = {cache.scale.get(), DType::i32, {1}};
  refuses(a, "head sizes 64 and 128");
  a.cache = cache.cache;
  Device<Bf16> rows(3 * 64);
  Device<float> few(1), many(attention_decode_workspace(a.cache));
  Device<std::int32_t> numbers(1);
  a.positions = a.sequences = {numbers.get(), DType::i32, {1}}, a.qkv = {rows.get(), DType::bf16, {1, 3, 1, 64}};
  a.o = {rows.get(), DType::bf16, {1, 1, 64}}, a.scale = a.threshold = {cache.scale.get(), DType::f32, {1}};
  a.workspace = {few.get(), DType::f32, {1}};
  refuses(a, "workspace is too small");
  a.workspace = {many.get() + 1, DType::f32, {static_cast<std::int64_t>(many.size())}};
  refuses(a, "workspace");
  Device<std::int32_t> three(3);
  Device<Bf16> three_rows(9 * 64);
  AttentionDecode more = a;
  more.positions = more.sequences = {three.get(), DType::i32, {3}}, more.qkv = {three_rows.get(), DType::bf16, {3, 3, 1, 64}};
  refuses(more, "more rows than cached sequences");
  a.workspace = {many.get(), DType::f32, {static_cast<std::int64_t>(many.size())}}, a.document_start = a.positions;
  EXPECT_THROW(cuda_attention_decode_exact(a, nullptr), std::logic_error);
}

}  // namespace
}  // namespace tessera
