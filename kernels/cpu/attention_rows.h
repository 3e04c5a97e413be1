#pragma once
// A block of queries of one head on its way through tiles of keys: what the forward pass (a query tile at a time) and decoding (one query) share.
//
//   S^T [keys, queries] = K Q^T         queries run over vector lanes: row sums are sums of whole registers
//   A^T = gate(S^T), z += column sums   in place; the tile's active edges are counted on the way
//   O [queries, D] += A V               only where the tile has an active edge, unless every tile is to be visited
//
// Softmax keeps a running maximum and rescales (Milakov & Gimelshein, arXiv 1805.02867); the gates need neither. The bits of a query's row are a
// function of its own keys alone, not of the other queries in the block.

#include <cmath>
#include <cstring>
#include <limits>

#include "kernels/cpu/attention_call.h"

namespace tessera::cpu {

inline constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

/// A thread's working memory: a block of at most `rows` queries, a tile of at most `tile_key` keys, heads of `size`.
struct RowsScratch {
  std::int64_t lanes, size;     // lanes: queries, padded
  float *q, *scores, *sum;      // q [D][lanes], scores [keys][lanes], sum [queries][D]
  float *tau, *total;           // [lanes]: total: sum of a (softmax: of exp(x - top))
  float *top, *next_top;        // [lanes] softmax: running maximum before and after a tile
  std::int32_t *active, *seen;  // [lanes] active and visible edges of each query
  std::int32_t *tile_active, *visible;

  static std::int64_t elements(std::int64_t rows, std::int64_t tile_key, std::int64_t size) {
    const auto lanes = padded(rows);
    return size * lanes + tile_key * lanes + padded(rows * size) + 8 * lanes;
  }
  RowsScratch(std::int64_t rows, std::int64_t tile_key, std::int64_t head_size, float* memory) : lanes(padded(rows)), size(head_size) {
    Carver carve(memory);
    q = carve.floats(size * lanes);
    scores = carve.floats(tile_key * lanes);
    sum = carve.floats(rows * size);
    for (auto* p : {&tau, &total, &top, &next_top}) *p = carve.floats(lanes);
    for (auto* p : {&active, &seen, &tile_active, &visible}) *p = carve.ints(lanes);
  }

  /// Takes up `queries` queries that lie `stride` apart; their tau is the caller's to fill in.
  void begin(const float* queries_at, std::int64_t stride, std::int64_t queries) {
    transpose(queries_at, stride, queries, size, q, lanes);
    std::fill_n(sum, queries * size, 0.0f);
    std::fill_n(total, lanes, 0.0f);
    std::fill_n(top, lanes, kMinusInfinity);
    std::fill_n(active, lanes, 0);
    std::fill_n(seen, lanes, 0);
  }

  // From one call to the next (AttentionForward::carry).
  void suspend(float* carry, std::int64_t queries) const {
    for (std::int64_t i = 0; i < queries; ++i, carry += size + kCarryExtra) {
      std::copy_n(sum + i * size, size, carry);
      carry[size] = total[i];
      carry[size + 1] = top[i];
      std::memcpy(carry + size + 2, seen + i, sizeof(float));
      std::memcpy(carry + size + 3, active + i, sizeof(float));
    }
  }
  void resume(const float* carry, std::int64_t queries) {
    for (std::int64_t i = 0; i < queries; ++i, carry += size + kCarryExtra) {
      std::copy_n(carry, size, sum + i * size);
      total[i] = carry[size];
      top[i] = carry[size + 1];
      std::memcpy(seen + i, carry + size + 2, sizeof(float));
      std::memcpy(active + i, carry + size + 3, sizeof(float));
    }
  }
};

/// Calls f(row of scores, masked) for each key of a tile with s.visible filled where the tile is masked, and counts visible edges.
/// Returns the number of visible edges.
template <class F>
std::int64_t for_each_key(const Tile& tile, RowsScratch& s, F&& f) {
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
std::int64_t gate_tile(const Tile& tile, float c, RowsScratch& s) {
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
std::int64_t softmax_tile(const Tile& tile, float c, RowsScratch& s) {
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
    float* sum = s.sum + i * s.size;
#pragma omp simd
    for (std::int64_t d = 0; d < s.size; ++d) sum[d] *= factor;
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

/// Rows of a head that lie `stride` floats apart.
struct Strided {
  const float* data;
  std::int64_t stride;
};

struct TileEdges {
  std::int64_t visible = 0, active = 0;
};

/// Takes the block through one tile, whose keys and values are `k` and `v`; c is the head's scale.
template <Form form, Gate gate>
TileEdges visit_tile(const Tile& tile, Strided k, Strided v, float c, bool visit_all, RowsScratch& s) {
  product(tile.keys, s.lanes, s.size, {k.data, 1, k.stride}, s.q, s.lanes, s.scores, s.lanes, false);
  TileEdges edges;
  if constexpr (gate == Gate::softmax) {
    edges.active = edges.visible = softmax_tile<form>(tile, c, s);
  } else {
    edges.visible = gate_tile<form, gate>(tile, c, s);
    for (std::int64_t i = 0; i < tile.queries; ++i) {
      s.active[i] += s.tile_active[i];
      edges.active += s.tile_active[i];
    }
  }
  // A tile that documents leave without a visible edge is skipped like one that no list names.
  if (edges.active > 0 || (visit_all && edges.visible > 0))
    product(tile.queries, s.size, tile.keys, {s.scores, s.lanes, 1}, v.data, v.stride, s.sum, s.size, true);
  return edges;
}

/// o of query i of the block, after its last tile; returns its z.
inline float finish_row(const AttentionMath& math, std::int64_t i, float* o, const RowsScratch& s) {
  float z = 1.0f;
  if (math.gate == Gate::softmax) {
    z = s.seen[i] == 0 ? 0.0f : s.top[i] + std::log(s.total[i]);
  } else if (math.normalizer == Normalizer::sum) {
    z = math.epsilon + s.total[i];
  } else if (math.normalizer == Normalizer::length) {
    z = static_cast<float>(std::pow(std::max(1.0, static_cast<double>(s.seen[i])), math.length_alpha));
  }
  const float inverse = inverse_of(math.gate == Gate::softmax ? s.total[i] : z);
  const float* sum = s.sum + i * s.size;
  for (std::int64_t d = 0; d < s.size; ++d) o[d] = sum[d] * inverse + 0.0f;  // + 0: no -0 in an output
  return z;
}

}  // namespace tessera::cpu
