// Attention, forward: a query tile walks its list of key tiles.
//
//   S^T [keys, queries] = K Q^T         queries run over vector lanes: row sums are sums of whole registers
//   A^T = gate(S^T), z += column sums   in place; the tile's active edges are counted on the way
//   O [queries, D] += A V               only where the tile has an active edge, unless every tile is to be visited
//
// Softmax keeps a running maximum and rescales (Milakov & Gimelshein, arXiv 1805.02867); the gates need neither.

#include <omp.h>

#include <cmath>
#include <limits>

#include "kernels/cpu/attention.h"
#include "kernels/cpu/attention_call.h"

namespace tessera {
namespace cpu {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

/// A thread's working memory: one query tile.
struct ForwardScratch {
  std::int64_t lanes;           // queries of a tile, padded
  float *q, *scores, *sum;      // q [D][lanes], scores [keys][lanes], sum [queries][D]
  float *tau, *total;           // [lanes]: total: sum of a (softmax: of exp(x - top))
  float *top, *next_top;        // [lanes] softmax: running maximum before and after a tile
  std::int32_t *active, *seen;  // [lanes] active and visible edges of each query
  std::int32_t *tile_active, *visible;

  static std::int64_t elements(const AttentionCall& c) {
    const auto lanes = padded(c.tile_query);
    return c.size * lanes + c.tile_key * lanes + padded(c.tile_query * c.size) + 8 * lanes;
  }
  ForwardScratch(const AttentionCall& c, float* memory) : lanes(padded(c.tile_query)) {
    Carver carve(memory);
    q = carve.floats(c.size * lanes);
    scores = carve.floats(c.tile_key * lanes);
    sum = carve.floats(c.tile_query * c.size);
    for (auto* p : {&tau, &total, &top, &next_top}) *p = carve.floats(lanes);
    for (auto* p : {&active, &seen, &tile_active, &visible}) *p = carve.ints(lanes);
  }
};

/// Calls f(key, row of scores, masked) for each key of a tile with s.visible filled where the tile is masked, and counts visible edges.
/// Returns the number of visible edges.
template <class F>
std::int64_t for_each_key(const Tile& tile, ForwardScratch& s, F&& f) {
  if (!tile.masked()) {
    for (std::int64_t j = 0; j < tile.keys; ++j) f(s.scores + j * s.lanes, std::false_type{});
    for (std::int64_t i = 0; i < tile.queries; ++i) s.seen[i] += static_cast<std::int32_t>(tile.keys);
    return tile.keys * tile.queries;
  }
  std::int64_t edges = 0;
  for (std::int64_t j = 0; j < tile.keys; ++j) {
    visible_queries(tile, j, s.visible);
    std::int32_t count = 0;
    for (std::int64_t i = 0; i < tile.queries; ++i) {
      s.seen[i] -= s.visible[i];
      count -= s.visible[i];
    }
    edges += count;
    f(s.scores + j * s.lanes, std::true_type{});
  }
  return edges;
}

/// Scores to gate values, in place. Returns the tile's visible edges; s.tile_active has each query's active ones.
template <Form form, Gate gate>
std::int64_t gate_tile(const Tile& tile, float c, ForwardScratch& s) {
  std::fill_n(s.tile_active, s.lanes, 0);
  return for_each_key(tile, s, [&](float* row, auto masked) {
#pragma omp simd
    for (std::int64_t i = 0; i < s.lanes; ++i) {
      const float x = argument<form>(row[i], c, s.tau[i]);
      const bool active = (!masked || s.visible[i] != 0) & (x > 0.0f);
      const float a = gate_value<gate>(active ? x : 0.0f);
      row[i] = a;
      s.total[i] += a;
      s.tile_active[i] += active ? 1 : 0;
    }
  });
}

/// Scores to exp(x - running maximum), in place; what was summed before is rescaled to the new maximum.
template <Form form>
std::int64_t softmax_tile(const AttentionCall& call, const Tile& tile, float c, ForwardScratch& s) {
  float* top = s.next_top;
  std::copy_n(s.top, s.lanes, top);
  const auto edges = for_each_key(tile, s, [&](float* row, auto masked) {
#pragma omp simd
    for (std::int64_t i = 0; i < s.lanes; ++i) {
      const float x = !masked || s.visible[i] != 0 ? argument<form>(row[i], c, 0.0f) : kMinusInfinity;
      row[i] = x;
      top[i] = x > top[i] ? x : top[i];
    }
  });
  if (edges == 0) return edges;
  for (std::int64_t i = 0; i < tile.queries; ++i) {
    if (top[i] == s.top[i]) continue;  // also while both are -infinity
    const float factor = s.top[i] == kMinusInfinity ? 0.0f : exp_vector(s.top[i] - top[i]);
    s.total[i] *= factor;
    float* sum = s.sum + i * call.size;
#pragma omp simd
    for (std::int64_t d = 0; d < call.size; ++d) sum[d] *= factor;
  }
  for (std::int64_t j = 0; j < tile.keys; ++j) {
    float* row = s.scores + j * s.lanes;
#pragma omp simd
    for (std::int64_t i = 0; i < s.lanes; ++i) {
      const float a = row[i] == kMinusInfinity ? 0.0f : exp_vector(row[i] - top[i]);
      row[i] = a;
      s.total[i] += a;
    }
  }
  std::copy_n(top, s.lanes, s.top);
  return edges;
}

struct Counts {
  std::uint64_t of[kAttentionCounters] = {};
};

/// z of a row, from its sum and its number of visible keys.
float normalizer_of(const AttentionMath& math, float total, float top, std::int32_t visible) {
  if (math.gate == Gate::softmax) return visible == 0 ? 0.0f : top + std::log(total);
  if (math.normalizer == Normalizer::sum) return math.epsilon + total;
  if (math.normalizer == Normalizer::length) return static_cast<float>(std::pow(std::max(1.0, static_cast<double>(visible)), math.length_alpha));
  return 1.0f;
}

template <Form form, Gate gate>
Counts query_tile(const AttentionCall& call, std::int64_t b, std::int64_t h, std::int64_t at, ForwardScratch& s) {
  const std::int64_t first = at * call.tile_query, queries = std::min(call.tile_query, call.tokens - first);
  transpose(call.q.at(b, h, first), call.q.token, queries, call.size, s.q, s.lanes);
  std::fill_n(s.sum, queries * call.size, 0.0f);
  std::fill_n(s.total, s.lanes, 0.0f);
  std::fill_n(s.top, s.lanes, kMinusInfinity);
  std::fill_n(s.active, s.lanes, 0);
  std::fill_n(s.seen, s.lanes, 0);
  for (std::int64_t i = 0; i < queries; ++i) s.tau[i] = call.tau(h, first + i);
  std::uint32_t* bitmap = call.bitmap(b, h, at);
  std::fill_n(bitmap, call.words, 0u);

  Counts counts;
  const auto documents = call.documents_of(b, at);
  for (const TileEntry entry : call.query_list(h, at)) {
    if (entry.tile >= call.key_tiles) break;
    Tile tile;
    if (!call.tile(at, entry.tile, entry.mask, documents, tile)) continue;
    product(tile.keys, s.lanes, call.size, {call.k.at(b, h, tile.first_key), 1, call.k.token}, s.q, s.lanes, s.scores, s.lanes, false);

    std::int64_t visible, active = 0;
    if constexpr (gate == Gate::softmax) {
      active = visible = softmax_tile<form>(call, tile, call.scale[h], s);
    } else {
      visible = gate_tile<form, gate>(tile, call.scale[h], s);
      for (std::int64_t i = 0; i < queries; ++i) {
        s.active[i] += s.tile_active[i];
        active += s.tile_active[i];
      }
    }
    counts.of[kVisibleEdges] += visible;
    counts.of[kVisibleTiles] += visible > 0;
    counts.of[kActiveEdges] += active;
    counts.of[kActiveTiles] += active > 0;
    if (active > 0) bitmap[entry.tile / 32] |= 1u << (entry.tile % 32);
    // A tile that documents leave without a visible edge is skipped like one that no list names.
    if (active > 0 || (call.visit_all && visible > 0))
      product(queries, call.size, tile.keys, {s.scores, s.lanes, 1}, call.v.at(b, h, tile.first_key), call.v.token, s.sum, call.size, true);
  }

  float* z = call.z_of(b, h, at);
  for (std::int64_t i = 0; i < queries; ++i) {
    z[i] = normalizer_of(call.math, s.total[i], s.top[i], s.seen[i]);
    counts.of[kEmptyRows] += (gate == Gate::softmax ? s.seen[i] : s.active[i]) == 0;
    const float inverse = inverse_of(gate == Gate::softmax ? s.total[i] : z[i]);
    const float* sum = s.sum + i * call.size;
    float* o = call.o.at(b, h, first + i);
    for (std::int64_t d = 0; d < call.size; ++d) o[d] = sum[d] * inverse + 0.0f;  // + 0: no -0 in an output
  }
  return counts;
}

template <Form form, Gate gate>
void forward(const AttentionCall& call) {
  const ThreadScratch memory(omp_get_max_threads(), ForwardScratch::elements(call));
#pragma omp parallel
  {
    ForwardScratch scratch(call, memory.of(omp_get_thread_num()));
#pragma omp for schedule(dynamic, 1)
    for (std::int64_t item = 0; item < call.batch * call.heads * call.query_tiles; ++item) {
      // Within a head from the last query tile on: causal lists are longest there, and the longest go first.
      const std::int64_t head = item / call.query_tiles, at = call.query_tiles - 1 - item % call.query_tiles;
      const auto counts = query_tile<form, gate>(call, head / call.heads, head % call.heads, at, scratch);
      if (call.counters)
        for (int n = 0; n < kAttentionCounters; ++n) {
          std::uint64_t& counter = call.counters[head % call.heads * kAttentionCounters + n];
#pragma omp atomic
          counter += counts.of[n];
        }
    }
  }
}

}  // namespace
}  // namespace cpu

void cpu_attention_forward(const AttentionForward& a) {
  const cpu::AttentionCall call("attention_forward", a);
  cpu::with_math(call.math, [&](auto form, auto gate) { cpu::forward<form.value, gate.value>(call); });
}

}  // namespace tessera
