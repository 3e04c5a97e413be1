// An experiment: which inactive tiles could be certified before q k^T is computed?
//
//   certified_tiles [--in FILE.h5] [--tokens 4096] [--heads 4] [--head-size 64]
//
// A 64 x 64 tile needs no scores when an upper bound of every <q_i, k_j> in it does not reach the threshold. Three bounds, c and r centroid and
// radius:
//
//   tile   <c_q, c_k> + |c_q| r_k + r_q max|k|     one product of D a tile: 1/4096 of the scores' cost
//   rows   max_i <q_i, c_k> + |q_i| r_k            64 products a tile: 1/64
//   parts  the same with the keys in four parts    256 products a tile: 1/16
//
// Printed: the share of causal edges and tiles that are active (by all scores: the oracle), and the share of the inactive tiles each bound certifies.
// A certified tile with an active edge ends the program with an error.
//
// Without --in, synthetic unit vectors at edge sparsities 0.99 and 0.9966 a head. With --in, q and k (float32 [B, H, T, D]) as `tessera attention`
// takes them, divided by their lengths, and the threshold on the cosine tau [H] / scale [H] from the file; without those, the sparsities above.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "data/hdf5_file.h"

namespace {

constexpr int kTile = 64, kParts = 4;
using Floats = std::vector<float>;

struct Head {
  std::int64_t tokens, size;
  Floats q, k;  // [tokens, size], unit length
};

float dot(const float* x, const float* y, std::int64_t n) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (std::int64_t d = 0; d < n; ++d) sum += x[d] * y[d];
  return sum;
}
float length(const float* x, std::int64_t n) { return std::sqrt(dot(x, x, n)); }

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

/// Active edges are those whose score exceeds `threshold`.
Counts measure(const Head& head, float threshold) {
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
#pragma omp parallel
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
        if (active && (certified(tile_bound) || certified(row_bound) || certified(part_bound))) {
          std::fprintf(stderr, "certified_tiles: tile (%lld, %lld) is certified and has %lld active edges\n", static_cast<long long>(a),
                       static_cast<long long>(b), static_cast<long long>(active));
          std::exit(1);
        }
        mine.active_edges += active, ++mine.tiles, mine.active_tiles += active > 0;
        mine.by_tile += certified(tile_bound), mine.by_rows += certified(row_bound), mine.by_parts += certified(part_bound);
      }
    }
#pragma omp critical
    total += mine;
  }
  return total;
}

/// The score that a share `sparsity` of the causal edges does not exceed, from a million of them.
float threshold_for(const Head& head, double sparsity) {
  std::mt19937 rng(7);
  Floats sample(1 << 20);
  for (float& s : sample) {
    const std::int64_t x = static_cast<std::int64_t>(rng() % head.tokens), y = static_cast<std::int64_t>(rng() % head.tokens);
    s = dot(&head.q[std::max(x, y) * head.size], &head.k[std::min(x, y) * head.size], head.size);
  }
  const auto at = sample.begin() + static_cast<std::ptrdiff_t>(sparsity * static_cast<double>(sample.size() - 1));
  std::nth_element(sample.begin(), at, sample.end());
  return *at;
}

void normalize(Floats& x, std::int64_t size) {
  for (std::size_t t = 0; t < x.size(); t += size) {
    const float l = length(&x[t], size);
    for (std::int64_t d = 0; d < size; ++d) x[t + d] /= l > 0 ? l : 1;
  }
}

/// Rows follow `direction(t)` with noise: 0 exactly, infinity not at all.
Head synthetic(std::int64_t tokens, std::int64_t size, unsigned seed, float noise, const std::function<std::int64_t(std::int64_t)>& direction) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal;
  Floats centres(16 * size);
  for (float& c : centres) c = normal(rng);
  Head head{tokens, size, Floats(tokens * size), Floats(tokens * size)};
  for (Floats* x : {&head.q, &head.k})
    for (std::int64_t t = 0; t < tokens; ++t) {
      const std::int64_t cluster = std::isinf(noise) ? 0 : direction(t + (x == &head.q ? 977 : 0));
      for (std::int64_t d = 0; d < size; ++d)
        (*x)[t * size + d] = std::isinf(noise) ? normal(rng) : centres[cluster * size + d] + noise * normal(rng);
    }
  normalize(head.q, size), normalize(head.k, size);
  return head;
}

void print(const std::string& name, const std::string& threshold, const Counts& c) {
  const double inactive = std::max<double>(1, static_cast<double>(c.tiles - c.active_tiles));
  const auto share = [](double x, double of) { return 100 * x / of; };
  std::printf("%-36s %-10s %8.3f %8.2f %9.2f %9.2f %9.2f\n", name.c_str(), threshold.c_str(), share(c.active_edges, c.edges),
              share(c.active_tiles, c.tiles), share(c.by_tile, inactive), share(c.by_rows, inactive), share(c.by_parts, inactive));
  std::fflush(stdout);
}

void run(int argc, char** argv) {
  std::int64_t tokens = 4096, heads = 4, size = 64;
  std::string in;
  for (int n = 1; n < argc; n += 2) {
    const std::string arg = argv[n];
    if (n + 1 == argc) throw std::invalid_argument("unknown option or missing value: " + arg);
    if (arg == "--in")
      in = argv[n + 1];
    else if (arg == "--tokens")
      tokens = std::stoll(argv[n + 1]);
    else if (arg == "--heads")
      heads = std::stoll(argv[n + 1]);
    else if (arg == "--head-size")
      size = std::stoll(argv[n + 1]);
    else
      throw std::invalid_argument("unknown option: " + arg);
  }
  if (tokens < 1 || heads < 1 || size < 1) throw std::invalid_argument("tokens, heads and the head size must be at least 1");
  std::printf("%-36s %-10s %8s %8s %29s\n", "", "", "active %", "", "inactive tiles certified, %");
  std::printf("%-36s %-10s %8s %8s %9s %9s %9s\n", "", "threshold", "edges", "tiles", "tile", "rows", "parts");
  const double sparsities[] = {0.99, 0.9966};
  const auto at_sparsities = [&](const std::string& name, const std::vector<Head>& all) {
    for (const double sparsity : sparsities) {
      Counts total;
      for (const Head& head : all) total += measure(head, threshold_for(head, sparsity));
      print(name, "at " + std::to_string(sparsity).substr(0, 6), total);
    }
  };

  if (in.empty()) {
    const auto hash = [](std::int64_t x) { return static_cast<std::int64_t>(std::mt19937(static_cast<unsigned>(x))() % 10); };
    const struct {
      const char* name;
      float noise;
      std::function<std::int64_t(std::int64_t)> direction;
    } cases[] = {
        {"independent", INFINITY, {}},
        {"ten directions, one a tile, 0.5", 0.5f, [&](std::int64_t t) { return hash(t / kTile); }},
        {"ten directions, one a tile, 0.2", 0.2f, [&](std::int64_t t) { return hash(t / kTile); }},
        {"ten directions, 16 tokens each, 0.2", 0.2f, [&](std::int64_t t) { return hash(t / 16); }},
        {"ten directions, token by token, 0.2", 0.2f, hash},
    };
    for (const auto& c : cases) {
      std::vector<Head> all;
      for (std::int64_t h = 0; h < heads; ++h) all.push_back(synthetic(tokens, size, static_cast<unsigned>(h + 1), c.noise, c.direction));
      at_sparsities(c.name, all);
    }
    return;
  }

  const auto file = tessera::Hdf5File::open(in);
  const auto shape = file.info("q").shape;
  if (shape.size() != 4 || file.info("q").elements() == 0 || file.info("k").shape != shape)
    throw std::invalid_argument(in + ": expected q and k of one shape [B, H, T, D]");
  const std::int64_t B = static_cast<std::int64_t>(shape[0]), H = static_cast<std::int64_t>(shape[1]), T = static_cast<std::int64_t>(shape[2]),
                     D = static_cast<std::int64_t>(shape[3]);
  const Floats q = file.read<float>("q"), k = file.read<float>("k");
  const bool has_threshold = file.contains("tau") && file.contains("scale");
  Floats tau, scale;
  if (has_threshold) {
    tau = file.read<float>("tau"), scale = file.read<float>("scale");
    const auto positive = [](float c) { return c > 0; };
    if (static_cast<std::int64_t>(tau.size()) != H || static_cast<std::int64_t>(scale.size()) != H ||
        !std::all_of(scale.begin(), scale.end(), positive))
      throw std::invalid_argument(in + ": expected tau [H] and scale [H], scale above 0");
  }
  for (std::int64_t h = 0; h < H; ++h) {
    std::vector<Head> all;
    for (std::int64_t b = 0; b < B; ++b) {
      const auto part = [&](const Floats& x) { return Floats(x.begin() + (b * H + h) * T * D, x.begin() + (b * H + h + 1) * T * D); };
      all.push_back({T, D, part(q), part(k)});
      normalize(all.back().q, D), normalize(all.back().k, D);
    }
    const std::string name = "head " + std::to_string(h);
    if (!has_threshold) {
      at_sparsities(name, all);
      continue;
    }
    Counts total;
    for (const Head& head : all) total += measure(head, tau[h] / scale[h]);
    print(name, std::to_string(tau[h] / scale[h]).substr(0, 6), total);
  }
}

}  // namespace

int main(int argc, char** argv) {
  try {
    run(argc, argv);
  } catch (const std::invalid_argument& e) {
    return std::fprintf(stderr, "certified_tiles: %s\n", e.what()), 2;
  } catch (const std::exception& e) {
    return std::fprintf(stderr, "certified_tiles: %s\n", e.what()), 1;
  }
}
