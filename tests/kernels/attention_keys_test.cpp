// Attention of some of a sequence's query tiles over a compact buffer of the key tiles that they may see, as a rank of a sequence has them: the rows
// of the whole call, bit for bit, and gradients of keys and values that add up to the whole.

#include <gtest/gtest.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <set>
#include <span>

#include "attention_cases.h"
#include "kernels/cpu/attention.h"
#include "tests/kernels/same_bits.h"

namespace tessera::reference {
namespace {

/// Where the rows of a part lie in the sequence.
struct Part {
  std::vector<std::int64_t> query_tiles, key_tiles;  // of the sequence, ascending
  std::vector<std::int32_t> queries, keys;           // positions in the sequence
  std::shared_ptr<const TileMap> tiles;
};

std::vector<std::int32_t> rows_of(const std::vector<std::int64_t>& tiles, std::int64_t tile, std::int64_t tokens) {
  std::vector<std::int32_t> rows;
  for (const auto a : tiles)
    for (std::int64_t i = a * tile; i < std::min(tokens, (a + 1) * tile); ++i) rows.push_back(static_cast<std::int32_t>(i));
  return rows;
}

/// The lists of a part, edge by edge.
std::shared_ptr<const TileMap> lists_of(const AttentionCase& c, const Part& part) {
  const auto [B, H, T, D] = c.shape;
  auto map = std::make_shared<TileMap>();
  map->tokens = std::ssize(part.queries);
  map->keys = std::ssize(part.keys);
  map->tile_query = c.tile_query;
  map->tile_key = c.tile_key;
  map->query_tiles = std::ssize(part.query_tiles);
  map->key_tiles = std::ssize(part.key_tiles);
  map->mask_words = (c.tile_key + 63) / 64;
  for (std::int64_t h = 0; h < H; ++h) {
    TileGroup g;
    std::vector<std::vector<TileEntry>> by_key(map->key_tiles);
    g.query_offsets.push_back(0);
    for (std::int64_t a = 0; a < map->query_tiles; ++a) {
      for (std::int64_t b = 0; b < map->key_tiles; ++b) {
        std::vector<std::uint64_t> mask(c.tile_query * map->mask_words, 0);
        bool any = false;
        for (int r = 0; r < c.tile_query; ++r)
          for (int k = 0; k < c.tile_key; ++k) {
            const std::int64_t i = part.query_tiles[a] * c.tile_query + r, j = part.key_tiles[b] * c.tile_key + k;
            if (j > i || !c.pattern(h, i, j)) continue;
            mask[r * map->mask_words + k / 64] |= std::uint64_t{1} << (k % 64);
            any = any || (i < T && j < T);
          }
        if (!any) continue;
        const TileEntry entry{static_cast<std::int32_t>(b), static_cast<std::int32_t>(map->mask_count())};
        map->masks.insert(map->masks.end(), mask.begin(), mask.end());
        g.query_entries.push_back(entry);
        by_key[b].push_back({static_cast<std::int32_t>(a), entry.mask});
      }
      g.query_offsets.push_back(std::ssize(g.query_entries));
    }
    g.key_offsets.push_back(0);
    for (const auto& list : by_key) {
      g.key_entries.insert(g.key_entries.end(), list.begin(), list.end());
      g.key_offsets.push_back(std::ssize(g.key_entries));
    }
    map->group_of_head.push_back(static_cast<std::int32_t>(h));
    map->groups.push_back(std::move(g));
  }
  return map;
}

/// Query tile a goes to part a % parts; a part has the key tiles that any of its queries may see (the first of all where they see none).
std::vector<Part> deal(const AttentionCase& c, int parts) {
  const auto [B, H, T, D] = c.shape;
  std::vector<Part> result;
  for (int r = 0; r < parts; ++r) {
    Part part;
    for (std::int64_t a = r; a * c.tile_query < T; a += parts) part.query_tiles.push_back(a);
    if (part.query_tiles.empty()) continue;
    part.queries = rows_of(part.query_tiles, c.tile_query, T);
    std::set<std::int64_t> touched;
    for (std::int64_t h = 0; h < H; ++h)
      for (const auto i : part.queries)
        for (std::int64_t j = 0; j <= i; ++j)
          if (c.pattern(h, i, j)) touched.insert(j / c.tile_key);
    if (touched.empty()) touched.insert(0);
    part.key_tiles.assign(touched.begin(), touched.end());
    part.keys = rows_of(part.key_tiles, c.tile_key, T);
    part.tiles = lists_of(c, part);
    result.push_back(std::move(part));
  }
  return result;
}

struct Results {
  std::vector<float> o, z, dq, dk, dv, dscale, dtau;
  std::vector<std::uint64_t> counters;
};

/// Rows `at` of each head of [B, H, T, size].
std::vector<float> take(const std::vector<float>& x, const AttentionShape& s, const std::vector<std::int32_t>& at, std::int64_t size) {
  std::vector<float> out;
  for (std::int64_t head = 0; head < s.batch * s.heads; ++head)
    for (const auto i : at) out.insert(out.end(), x.begin() + (head * s.tokens + i) * size, x.begin() + (head * s.tokens + i + 1) * size);
  return out;
}

/// document_start of a part's queries, in rows of its keys; empty without documents.
std::vector<std::int32_t> first_rows(const AttentionProblem& p, const Part& part) {
  const auto [B, H, T, D] = p.in.shape;
  std::vector<std::int32_t> start;
  for (std::int64_t b = 0; b < B && !p.document_start.empty(); ++b)
    for (const auto i : part.queries)
      start.push_back(static_cast<std::int32_t>(std::ranges::lower_bound(part.keys, p.document_start[b * T + i]) - part.keys.begin()));
  return start;
}

/// `next`: parts of the same queries over later keys, a call each (AttentionForward::carry); then no gradients.
Results run(const AttentionProblem& p, const Part& part, Visit visit, int threads, std::span<const Part> next = {}) {
  const auto [B, H, T, D] = p.in.shape;
  const auto queries = std::ssize(part.queries), keys = std::ssize(part.keys);
  auto q = take(p.q, p.in.shape, part.queries, D), d_o = take(p.d_o, p.in.shape, part.queries, D);
  auto k = take(p.k, p.in.shape, part.keys, D), v = take(p.v, p.in.shape, part.keys, D);
  auto scale = p.scale, tau = p.tau, balance = p.balance;
  auto positions = part.queries;
  auto start = first_rows(p, part);
  const float nan = std::numeric_limits<float>::quiet_NaN();
  Results r;
  r.o.assign(B * H * queries * D, nan);
  r.dq = r.o;
  r.dk.assign(B * H * keys * D, nan);
  r.dv = r.dk;
  r.z.assign(B * H * queries, nan);
  r.dscale.assign(H, 0.0f);
  r.dtau.assign(H, 0.0f);
  r.counters.assign(H * kAttentionCounters, 0);
  const auto words = bitmap_words(part.tiles->key_tiles);
  std::vector<std::uint32_t> bitmap(B * H * part.tiles->query_tiles * words, 0xdeadbeef);
  const AttentionShape shape{B, H, queries, D};
  std::vector<float> workspace(attention_backward_workspace(shape, part.tiles->tile_query), nan);
  const auto heads = [&](std::vector<float>& x, std::int64_t rows) { return HeadsView{x.data(), DType::f32, H * rows * D, rows * D, D}; };
  const DeviceTiles tiles(part.tiles);
  AttentionForward f;
  f.shape = shape;
  f.keys = keys;
  f.math = p.in.math;
  f.visit = visit;
  f.tiles = &tiles;
  f.q = heads(q, queries);
  f.k = heads(k, keys);
  f.v = heads(v, keys);
  f.o = heads(r.o, queries);
  f.scale = {scale.data(), DType::f32, {H}};
  f.threshold = {tau.data(), DType::f32, {H}};
  if (!start.empty()) f.document_start = {start.data(), DType::i32, {B, queries}};
  f.positions = {positions.data(), DType::i32, {queries}};
  f.z = {r.z.data(), DType::f32, {B, H, queries}};
  f.active_tiles = {bitmap.data(), DType::u32, {B, H, part.tiles->query_tiles, words}};
  f.counters = {r.counters.data(), DType::u64, {H, kAttentionCounters}};
  AttentionBackward b;
  b.d_o = heads(d_o, queries);
  b.dq = heads(r.dq, queries);
  b.dk = heads(r.dk, keys);
  b.dv = heads(r.dv, keys);
  b.dscale = {r.dscale.data(), DType::f32, {H}};
  b.dthreshold = {r.dtau.data(), DType::f32, {H}};
  if (!balance.empty()) b.balance = {balance.data(), DType::f32, {H}};
  b.workspace = {workspace.data(), DType::f32, {std::ssize(workspace)}};
  const int before = omp_get_max_threads();
  omp_set_num_threads(threads);
  if (next.empty()) {
    cpu_attention_forward(f);
    b.forward = f;
    cpu_attention_backward(b);
  } else {
    std::vector<float> carry(B * H * queries * (D + kCarryExtra), nan);
    f.carry = {carry.data(), DType::f32, {B, H, queries, D + kCarryExtra}};
    f.carry_last = false;
    cpu_attention_forward(f);
    f.carry_first = false;
    for (const Part& later : next) {
      EXPECT_TRUE(std::ranges::all_of(r.o, [](float x) { return std::isnan(x); })) << "o was written before the last part";
      EXPECT_TRUE(std::ranges::all_of(r.z, [](float x) { return std::isnan(x); })) << "z was written before the last part";
      const auto count = std::ssize(later.keys);
      auto later_k = take(p.k, p.in.shape, later.keys, D), later_v = take(p.v, p.in.shape, later.keys, D);
      auto later_start = first_rows(p, later);
      std::vector<std::uint32_t> later_bitmap(B * H * later.tiles->query_tiles * bitmap_words(later.tiles->key_tiles));
      const DeviceTiles lists(later.tiles);
      f.keys = count;
      f.tiles = &lists;
      f.k = heads(later_k, count);
      f.v = heads(later_v, count);
      if (!later_start.empty()) f.document_start.data = later_start.data();
      f.active_tiles = {later_bitmap.data(), DType::u32, {std::ssize(later_bitmap)}};
      f.carry_last = &later == &next.back();
      cpu_attention_forward(f);
    }
  }
  omp_set_num_threads(before);
  return r;
}

template <class T>
void add(std::vector<T>& to, const std::vector<T>& from) {
  to.resize(from.size());
  for (std::size_t n = 0; n < from.size(); ++n) to[n] += from[n];
}

/// The rows `at` of each head of [B, H, T, D] get those of `from`.
void add_rows(std::vector<float>& to, const std::vector<float>& from, const AttentionShape& s, const std::vector<std::int32_t>& at) {
  to.resize(s.batch * s.heads * s.tokens * s.head_size);
  for (std::int64_t head = 0, n = 0; head < s.batch * s.heads; ++head)
    for (const auto i : at)
      for (std::int64_t d = 0; d < s.head_size; ++d) to[(head * s.tokens + i) * s.head_size + d] += from[n++];
}

void check(const AttentionCase& c, int parts) {
  const auto p = make_problem(c);
  Part whole;
  for (std::int64_t a = 0; a * c.tile_query < c.shape.tokens; ++a) whole.query_tiles.push_back(a);
  for (std::int64_t b = 0; b * c.tile_key < c.shape.tokens; ++b) whole.key_tiles.push_back(b);
  whole.queries = whole.keys = rows_of(whole.query_tiles, c.tile_query, c.shape.tokens);
  whole.tiles = p.tiles;
  const auto all = run(p, whole, Visit::active, 1);
  Results sum;
  for (const Part& part : deal(c, parts))
    for (const auto& [visit, threads] : {std::pair{Visit::active, 1}, {Visit::all, 9}}) {
      const auto r = run(p, part, visit, threads);
      EXPECT_TRUE(same_bits(r.o, take(all.o, c.shape, part.queries, c.shape.head_size))) << "o";
      EXPECT_TRUE(same_bits(r.z, take(all.z, c.shape, part.queries, 1))) << "z";
      EXPECT_TRUE(same_bits(r.dq, take(all.dq, c.shape, part.queries, c.shape.head_size))) << "dq";
      if (visit == Visit::all) continue;
      add_rows(sum.dk, r.dk, c.shape, part.keys);
      add_rows(sum.dv, r.dv, c.shape, part.keys);
      add(sum.dscale, r.dscale);
      add(sum.dtau, r.dtau);
      add(sum.counters, r.counters);
    }
  constexpr double kTolerance = 2e-5;
  EXPECT_LT(relative_error(all.o, p.out.o), kTolerance);
  EXPECT_LT(relative_error(all.dq, p.gradients.dq), kTolerance);
  EXPECT_LT(relative_error(sum.dk, p.gradients.dk), kTolerance);
  EXPECT_LT(relative_error(sum.dv, p.gradients.dv), kTolerance);
  EXPECT_LT(relative_error(sum.dscale, p.gradients.dscale), 10 * kTolerance);
  EXPECT_LT(relative_error(sum.dtau, p.gradients.dtau), 10 * kTolerance);
  EXPECT_EQ(sum.counters, all.counters);
}

template <class Body>
void for_each_case(Body body) {
  int n = 0;
  for (const auto& [score, gate, normalizer, beta] : {std::tuple{Score::cosine, Gate::relu2, Normalizer::sum, 0.0f},
                                                      {Score::cosine, Gate::relu2, Normalizer::length, 0.4f},
                                                      {Score::dot, Gate::softmax, Normalizer::none, 0.0f},
                                                      {Score::fidelity, Gate::relu, Normalizer::rms, 0.0f}})
    for (const auto& pattern : kPatterns)
      for (const bool documents : {false, true}) {
        auto c = case_of(score, gate, normalizer, beta);
        c.shape.tokens = documents ? 131 : 96;
        c.pattern = pattern.visible;
        if (documents) c.document_start = random_documents(c.shape, 50, 3);
        SCOPED_TRACE(name_of(c.math) + " " + pattern.name + (documents ? " documents" : ""));
        body(c, n++);
      }
}

TEST(AttentionKeys, PartsOfASequenceGiveItsRowsAndGradientsThatAddUp) {
  const std::pair<int, int> tiles[] = {{16, 16}, {8, 24}, {32, 8}, {8, 8}, {24, 40}, {16, 16}};
  for_each_case([&](AttentionCase c, int n) {
    std::tie(c.tile_query, c.tile_key) = tiles[n % std::size(tiles)];
    c.seed = 100 + n;
    check(c, 1 + (n + 1) % 4);
  });
}

TEST(AttentionKeys, KeysInPartsGiveTheBitsOfOneCall) {
  for_each_case([](AttentionCase c, int n) {
    c.seed = 200 + n;
    const auto p = make_problem(c);
    const std::int64_t tiles = (c.shape.tokens + c.tile_key - 1) / c.tile_key, parts = 2 + n % 3;
    const auto part = [&](std::int64_t k, std::int64_t of) {  // neighbouring key tiles
      Part part;
      for (std::int64_t a = 0; a * c.tile_query < c.shape.tokens; ++a) part.query_tiles.push_back(a);
      for (std::int64_t b = k * tiles / of; b < (k + 1) * tiles / of; ++b) part.key_tiles.push_back(b);
      part.queries = rows_of(part.query_tiles, c.tile_query, c.shape.tokens);
      part.keys = rows_of(part.key_tiles, c.tile_key, c.shape.tokens);
      part.tiles = lists_of(c, part);
      return part;
    };
    ASSERT_GE(tiles, parts);
    std::vector<Part> later;
    for (std::int64_t k = 1; k < parts; ++k) later.push_back(part(k, parts));
    const auto whole = run(p, part(0, 1), Visit::active, 1), sum = run(p, part(0, parts), Visit::active, 1, later);
    EXPECT_TRUE(same_bits(sum.o, whole.o)) << "o";
    EXPECT_TRUE(same_bits(sum.z, whole.z)) << "z";
    EXPECT_EQ(sum.counters, whole.counters);
  });
}

TEST(AttentionKeys, ACallSaysWhatDoesNotFit) {
  auto c = case_of(Score::cosine, Gate::relu2, Normalizer::sum);
  const auto p = make_problem(c);
  auto part = deal(c, 2)[1];
  part.keys.push_back(0);  // one more than the lists are for
  EXPECT_THROW(run(p, part, Visit::active, 1), std::logic_error);
}

}  // namespace
}  // namespace tessera::reference
