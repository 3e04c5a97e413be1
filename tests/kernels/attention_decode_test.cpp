// Decoding with cached keys and values, token by token: every row against the naive double-precision reference and, bit for bit, against the row
// of the forward pass over the whole sequence.

#include <gtest/gtest.h>
#include <omp.h>

#include <cstring>
#include <limits>

#include "attention_cases.h"
#include "kernels/cpu/attention.h"

namespace tessera::reference {
namespace {

/// Token-major: o [B, T, H, D], z [B, T, H].
struct Rows {
  std::vector<float> o, z;
};

/// A problem's inputs as the model has them, packed [B, T, 3, H, D].
struct Packed {
  explicit Packed(const AttentionProblem& problem) : p(problem), s(p.in.shape), tiles(p.tiles), qkv(3 * s.batch * s.tokens * row()) {
    each([&](auto b, auto h, auto t, auto at) {
      const std::vector<float>* parts[] = {&p.q, &p.k, &p.v};
      for (int part = 0; part < 3; ++part)
        std::copy_n(parts[part]->data() + at, s.head_size, qkv.data() + ((b * s.tokens + t) * 3 + part) * row() + h * s.head_size);
    });
  }
  std::int64_t row() const { return s.heads * s.head_size; }
  /// f(b, h, t, offset of the vector in [B, H, T, D]).
  template <class F>
  void each(F&& f) const {
    for (std::int64_t b = 0; b < s.batch; ++b)
      for (std::int64_t h = 0; h < s.heads; ++h)
        for (std::int64_t t = 0; t < s.tokens; ++t) f(b, h, t, ((b * s.heads + h) * s.tokens + t) * s.head_size);
  }

  Rows forward() {
    const auto [B, H, T, D] = s;
    const std::int64_t query_tiles = (T + p.tiles->tile_query - 1) / p.tiles->tile_query, key_tiles = (T + p.tiles->tile_key - 1) / p.tiles->tile_key;
    std::vector<float> o(B * T * H * D), z(B * H * T), z_rows(B * T * H);
    std::vector<std::uint32_t> bitmap(B * H * query_tiles * bitmap_words(key_tiles));
    const auto part = [&, H = H, T = T, D = D](int n) { return HeadsView{qkv.data() + n * H * D, DType::f32, T * 3 * H * D, D, 3 * H * D}; };
    AttentionForward a;
    a.shape = s;
    a.math = p.in.math;
    a.tiles = &tiles;
    a.q = part(0), a.k = part(1), a.v = part(2);
    a.o = {o.data(), DType::f32, T * H * D, D, H * D};
    a.scale = {scale.data(), DType::f32, {H}};
    a.threshold = {tau.data(), DType::f32, {H}};
    if (!start.empty()) a.document_start = {start.data(), DType::i32, {B, T}};
    a.z = {z.data(), DType::f32, {B, H, T}};
    a.active_tiles = {bitmap.data(), DType::u32, {B, H, query_tiles, bitmap_words(key_tiles)}};
    cpu_attention_forward(a);
    each([&, H = H, T = T](auto b, auto h, auto t, auto) { z_rows[(b * T + t) * H + h] = z[(b * H + h) * T + t]; });
    return {o, z_rows};
  }

  /// Sequence b goes to the cache in one piece up to token `known[b]`, then token by token, all sequences together as long as they last: each is at a
  /// length of its own. Rows before `known` stay NaN. The cache has more sequences than the batch, in another order, and is NaN where nothing was
  /// put.
  Rows decode(const std::vector<std::int64_t>& known, int threads = 1) {
    const auto [B, H, T, D] = s;
    const float nan = std::numeric_limits<float>::quiet_NaN();
    const std::int64_t sequences = B + 1, capacity = p.tiles->tokens;
    std::vector<float> memory(sequences * 2 * H * capacity * D, nan);
    Rows all{std::vector<float>(B * T * H * D, nan), std::vector<float>(B * T * H, nan)};
    const KeyValueCache cache{{memory.data(), DType::f32, {sequences, H * 2, capacity, D}}, sequences, H, capacity, D};
    const int before = omp_get_max_threads();
    omp_set_num_threads(threads);
    for (std::int64_t b = 0; b < B; ++b) {
      std::int32_t sequence = static_cast<std::int32_t>(B - b), zero = 0;
      if (known[b] > 0)
        cpu_cache_append(
            {cache, {qkv.data() + b * T * 3 * H * D, DType::f32, {1, known[b], 3, H * D}}, {&sequence, DType::i32, {1}}, {&zero, DType::i32, {1}}});
    }
    for (std::int64_t step = 0;; ++step) {
      std::vector<float> packed, o, z;
      std::vector<std::int32_t> sequence, position, document;
      for (std::int64_t b = 0; b < B; ++b) {
        const std::int64_t t = known[b] + step;
        if (t >= T) continue;
        const float* token = qkv.data() + (b * T + t) * 3 * H * D;
        packed.insert(packed.end(), token, token + 3 * H * D);
        sequence.push_back(static_cast<std::int32_t>(B - b));
        position.push_back(static_cast<std::int32_t>(t));
        if (!start.empty()) document.push_back(start[b * T + t]);
      }
      const auto rows = static_cast<std::int64_t>(sequence.size());
      if (rows == 0) break;
      o.assign(rows * H * D, nan);
      z.assign(rows * H, nan);
      AttentionDecode a;
      a.cache = cache;
      a.math = p.in.math;
      a.tiles = &tiles;
      a.qkv = {packed.data(), DType::f32, {rows, 3, H, D}};
      a.sequences = {sequence.data(), DType::i32, {rows}};
      a.positions = {position.data(), DType::i32, {rows}};
      if (!start.empty()) a.document_start = {document.data(), DType::i32, {rows}};
      a.scale = {scale.data(), DType::f32, {H}};
      a.threshold = {tau.data(), DType::f32, {H}};
      a.o = {o.data(), DType::f32, {rows, H, D}};
      a.z = {z.data(), DType::f32, {rows, H}};
      cpu_cache_append({cache, a.qkv, a.sequences, a.positions});
      cpu_attention_decode(a);
      for (std::int64_t r = 0; r < rows; ++r) {
        const std::int64_t row = ((B - sequence[r]) * T + position[r]) * H;
        std::copy_n(o.data() + r * H * D, H * D, all.o.data() + row * D);
        std::copy_n(z.data() + r * H, H, all.z.data() + row);
      }
    }
    omp_set_num_threads(before);
    return all;
  }

  const AttentionProblem& p;
  AttentionShape s;
  DeviceTiles tiles;
  std::vector<float> qkv;
  std::vector<float> scale = p.scale, tau = p.tau;
  std::vector<std::int32_t> start = p.document_start;
};

void check(const AttentionProblem& p, std::vector<std::int64_t> known) {
  Packed packed(p);
  const auto whole = packed.forward(), made = packed.decode(known);
  EXPECT_EQ(std::memcmp(made.o.data(), packed.decode(known, 5).o.data(), made.o.size() * sizeof(float)), 0) << "5 threads";
  std::vector<float> rows;
  std::vector<double> expected;
  packed.each([&](auto b, auto h, auto t, auto at) {
    const auto [B, H, T, D] = packed.s;
    const std::int64_t head = (b * T + t) * H + h, row = head * D;
    if (t < known[b]) return;
    ASSERT_EQ(std::memcmp(&made.o[row], &whole.o[row], D * sizeof(float)), 0) << "sequence " << b << " head " << h << " token " << t;
    ASSERT_EQ(made.z[head], whole.z[head]) << "z of sequence " << b << " head " << h << " token " << t;
    rows.insert(rows.end(), made.o.begin() + row, made.o.begin() + row + D);
    expected.insert(expected.end(), p.out.o.begin() + at, p.out.o.begin() + at + D);
  });
  EXPECT_LT(relative_error(rows, expected), 2e-5);
}

/// As case_of(), with a cache that holds more than the sequences.
AttentionCase decoding_case(Score score, Gate gate, Normalizer normalizer, float beta = 0) {
  AttentionCase c = case_of(score, gate, normalizer, beta);
  c.map_tokens = 53;
  return c;
}

class AttentionDecoding : public ::testing::TestWithParam<std::tuple<Score, Gate, Normalizer>> {};

TEST_P(AttentionDecoding, IsTheForwardPassRowForRowOnEveryPattern) {
  const auto [score, gate, normalizer] = GetParam();
  const std::pair<int, int> tiles[] = {{16, 16}, {8, 24}, {32, 8}, {64, 64}, {24, 40}, {16, 128}};
  for (std::size_t n = 0; n < std::size(kPatterns); ++n)
    for (float beta : {0.0f, 0.5f}) {
      if (beta > 0 && score != Score::cosine) continue;
      auto c = decoding_case(score, gate, normalizer, beta);
      c.pattern = kPatterns[n].visible;
      std::tie(c.tile_query, c.tile_key) = tiles[n];
      c.seed = 10 * n + 1;
      SCOPED_TRACE(name_of(c.math) + " " + kPatterns[n].name);
      check(make_problem(c), {0, 13});
    }
}

TEST_P(AttentionDecoding, SeesItsDocumentOnly) {
  const auto [score, gate, normalizer] = GetParam();
  for (std::int64_t longest : {1, 5, 40}) {
    auto c = decoding_case(score, gate, normalizer);
    c.document_start = random_documents(c.shape, longest, 7);
    c.pattern = longest == 5 ? kPatterns[4].visible : kPatterns[0].visible;
    SCOPED_TRACE(name_of(c.math) + " documents up to " + std::to_string(longest));
    check(make_problem(c), {7, 0});
  }
}

INSTANTIATE_TEST_SUITE_P(Every, AttentionDecoding,
                         ::testing::Combine(::testing::Values(Score::dot, Score::cosine, Score::fidelity),
                                            ::testing::Values(Gate::relu, Gate::relu2, Gate::relu4, Gate::softmax),
                                            ::testing::Values(Normalizer::none, Normalizer::length, Normalizer::sum, Normalizer::rms)),
                         [](const auto& info) {
                           return name_of({.score = std::get<0>(info.param), .gate = std::get<1>(info.param), .normalizer = std::get<2>(info.param)});
                         });

TEST(AttentionDecodingSizes, EveryLengthHeadSizeAndTile) {
  for (std::int64_t tokens : {1, 2, 7, 9, 63, 65, 130})
    for (std::int64_t size : {8, 24, 64, 128, 256})
      for (auto [tile_query, tile_key] : {std::pair{64, 64}, {128, 64}, {8, 128}, {40, 72}}) {
        if (tokens > 9 && size > 64 && tile_key == 72) continue;  // time
        auto c = decoding_case(Score::cosine, Gate::relu2, Normalizer::sum);
        c.shape = {.batch = 3, .heads = 2, .tokens = tokens, .head_size = size};
        c.map_tokens = 0;  // the cache ends with the sequence
        c.tau = 0.1;
        c.tile_query = tile_query;
        c.tile_key = tile_key;
        SCOPED_TRACE("T " + std::to_string(tokens) + " D " + std::to_string(size) + " tile " + std::to_string(tile_query) + "x" +
                     std::to_string(tile_key));
        check(make_problem(c), {0, tokens / 2, tokens - 1});
      }
}

TEST(AttentionDecodingSizes, AHugeThresholdGivesExactZeros) {
  auto c = decoding_case(Score::cosine, Gate::relu2, Normalizer::sum);
  c.tau = 1e6;
  const auto p = make_problem(c);
  for (float o : Packed(p).decode({0, 0}).o) ASSERT_EQ(std::bit_cast<std::uint32_t>(o), 0u);
}

TEST(AttentionDecodingArguments, WrongOnesAreTheCallersBug) {
  float x[3 * 8] = {}, memory[2 * 8 * 8] = {}, one[1] = {1};
  std::int32_t zero[1] = {0}, eight[1] = {8}, minus[1] = {-1}, two[2] = {0, 0};
  const DeviceTiles tiles{brute_force_tiles([](auto, auto, auto) { return true; }, 1, 8, 8, 8)};
  AttentionDecode good;
  good.cache = {{memory, DType::f32, {2 * 8, 8}}, 1, 1, 8, 8};
  good.tiles = &tiles;
  good.qkv = {x, DType::f32, {1, 3, 1, 8}};
  good.sequences = good.positions = {zero, DType::i32, {1}};
  good.scale = good.threshold = {one, DType::f32, {1}};
  good.o = {x, DType::f32, {8}};
  EXPECT_NO_THROW(cpu_attention_decode(good));
  const auto rejects = [&](auto change) {
    auto a = good;
    change(a);
    EXPECT_THROW(cpu_attention_decode(a), std::logic_error);
  };
  rejects([](auto& a) { a.tiles = nullptr; });
  rejects([](auto& a) { a.cache.capacity = 9; });
  rejects([](auto& a) { a.cache.sequences = 2; });
  rejects([](auto& a) { a.cache.heads = 0; });
  rejects([](auto& a) { a.cache.data.dtype = DType::bf16; });
  rejects([](auto& a) { a.qkv.shape = {1, 2, 1, 8}; });
  rejects([&](auto& a) { a.positions.data = eight; });
  rejects([&](auto& a) { a.positions.data = minus; });
  rejects([](auto& a) { a.positions = {}; });
  rejects([&](auto& a) { a.sequences.data = eight; });
  rejects([&](auto& a) { a.sequences = {two, DType::i32, {2}}; });
  rejects([](auto& a) { a.scale = {}; });
  rejects([](auto& a) { a.threshold = {}; });
  rejects([](auto& a) { a.o.shape = {9}; });
  rejects([](auto& a) { a.z = {a.o.data, DType::f32, {2}}; });
  rejects([](auto& a) { a.math.score = Score::dot, a.math.length_beta = 1.0f; });
  CacheAppend append{good.cache, good.qkv, good.sequences, good.positions};
  EXPECT_NO_THROW(cpu_cache_append(append));
  append.positions.data = eight;
  EXPECT_THROW(cpu_cache_append(append), std::logic_error);
}

}  // namespace
}  // namespace tessera::reference
