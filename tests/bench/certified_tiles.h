#pragma once
// For the experiments with certified tiles: three upper bounds of the scores of a kTile x kTile tile, none of which needs q k^T. A tile can be
// skipped unseen when a bound does not reach the threshold. c and r: centroid of a tile's rows, and the largest distance from it.
//
//   tile   <c_q, c_k> + |c_q| r_k + r_q max|k|     one product of D a tile: 1/kTile^2 of the scores' cost
//   rows   max_i <q_i, c_k> + |q_i| r_k            kTile products a tile: 1/kTile
//   parts  the same with the keys in four parts    4/kTile

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <vector>

namespace tessera::certified {

using Floats = std::vector<float>;

struct Head {
  std::int64_t tokens, size;
  Floats q, k;  // [tokens, size], unit length
};

inline float dot(const float* x, const float* y, std::int64_t n) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (std::int64_t d = 0; d < n; ++d) sum += x[d] * y[d];
  return sum;
}
inline float length(const float* x, std::int64_t n) { return std::sqrt(dot(x, x, n)); }

/// Rows [first, last) of x: centroid, largest distance from it, largest length.
struct Ball {
  Floats centre;
  float radius = 0, longest = 0;
  Ball(const Floats& x, std::int64_t first, std::int64_t last, std::int64_t size) : centre(size) {
    for (std::int64_t t = first; t < last; ++t)
      for (std::int64_t d = 0; d < size; ++d) centre[d] += x[t * size + d] / static_cast<float>(last - first);
    for (std::int64_t t = first; t < last; ++t) {
      float square = 0;
      for (std::int64_t d = 0; d < size; ++d) square += (x[t * size + d] - centre[d]) * (x[t * size + d] - centre[d]);
      radius = std::max(radius, std::sqrt(square));
      longest = std::max(longest, length(&x[t * size], size));
    }
  }
};

struct Counts {
  std::int64_t edges = 0, active_edges = 0, tiles = 0, active_tiles = 0, by_tile = 0, by_rows = 0, by_parts = 0;
  void operator+=(const Counts& o) {
    edges += o.edges, active_edges += o.active_edges, tiles += o.tiles, active_tiles += o.active_tiles;
    by_tile += o.by_tile, by_rows += o.by_rows, by_parts += o.by_parts;
  }
};

/// Of kTile x kTile tiles. Active edges are those whose score exceeds `threshold`. Throws std::logic_error when a certified tile has an active edge.
template <int kTile>
Counts measure(const Head& head, float threshold) {
  constexpr int kParts = 4;
  const std::int64_t T = head.tokens, D = head.size, tiles = (T + kTile - 1) / kTile;
  constexpr float kRounding = 1e-5f;  // of fp32 products and sums: a bound has to hold all the same
  std::vector<Ball> queries, keys, parts;
  std::vector<std::int64_t> first_part;
  std::vector<float> query_length(T);
  for (std::int64_t t = 0; t < T; ++t) query_length[t] = length(&head.q[t * D], D);
  for (std::int64_t n = 0; n < tiles; ++n) {
    const std::int64_t end = std::min(T, (n + 1) * kTile);
    queries.emplace_back(head.q, n * kTile, end, D), keys.emplace_back(head.k, n * kTile, end, D);
    first_part.push_back(static_cast<std::int64_t>(parts.size()));
    for (std::int64_t t = n * kTile; t < end; t += kTile / kParts) parts.emplace_back(head.k, t, std::min(end, t + kTile / kParts), D);
  }
  first_part.push_back(static_cast<std::int64_t>(parts.size()));

  Counts total;
  bool wrong = false;
#pragma omp parallel reduction(|| : wrong)
  {
    Counts mine;
    Floats transposed(D * kTile), scores(kTile);
#pragma omp for schedule(dynamic)
    for (std::int64_t b = 0; b < tiles; ++b) {
      const std::int64_t key_end = std::min(T, (b + 1) * kTile), width = key_end - b * kTile;
      std::fill(transposed.begin(), transposed.end(), 0.f);
      for (std::int64_t j = 0; j < width; ++j)
        for (std::int64_t d = 0; d < D; ++d) transposed[d * kTile + j] = head.k[(b * kTile + j) * D + d];
      for (std::int64_t a = b; a < tiles; ++a) {
        const std::int64_t query_end = std::min(T, (a + 1) * kTile);
        std::int64_t active = 0;
        float row_bound = -INFINITY, part_bound = -INFINITY;
        for (std::int64_t i = a * kTile; i < query_end; ++i) {
          const float* q = &head.q[i * D];
          std::fill(scores.begin(), scores.end(), 0.f);
          for (std::int64_t d = 0; d < D; ++d)
            for (int j = 0; j < kTile; ++j) scores[j] += q[d] * transposed[d * kTile + j];
          const std::int64_t visible = a == b ? i - b * kTile + 1 : width;
          mine.edges += visible;
          for (std::int64_t j = 0; j < visible; ++j) active += scores[j] > threshold;
          row_bound = std::max(row_bound, dot(q, keys[b].centre.data(), D) + query_length[i] * keys[b].radius);
          for (std::int64_t p = first_part[b]; p < first_part[b + 1]; ++p)
            part_bound = std::max(part_bound, dot(q, parts[p].centre.data(), D) + query_length[i] * parts[p].radius);
        }
        const float tile_bound = dot(queries[a].centre.data(), keys[b].centre.data(), D) + length(queries[a].centre.data(), D) * keys[b].radius +
                                 queries[a].radius * keys[b].longest;
        const auto certified = [&](float bound) { return bound + kRounding <= threshold; };
        wrong = wrong || (active && (certified(tile_bound) || certified(row_bound) || certified(part_bound)));
        mine.active_edges += active, ++mine.tiles, mine.active_tiles += active > 0;
        mine.by_tile += certified(tile_bound), mine.by_rows += certified(row_bound), mine.by_parts += certified(part_bound);
      }
    }
#pragma omp critical
    total += mine;
  }
  if (wrong) throw std::logic_error("a tile is certified as inactive and has active edges");
  return total;
}

inline void normalize(Floats& x, std::int64_t size) {
  for (std::size_t t = 0; t < x.size(); t += size) {
    const float l = length(&x[t], size);
    for (std::int64_t d = 0; d < size; ++d) x[t + d] /= l > 0 ? l : 1;
  }
}

}  // namespace tessera::certified
