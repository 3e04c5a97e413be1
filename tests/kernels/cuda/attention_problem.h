#pragma once
// Random problems for the CUDA attention: inputs in bf16, patterns, documents, parts of them.

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../attention_reference.h"
#include "device.h"
#include "kernels/cuda/attention/attention.h"
#include "tests/kernels/same_bits.h"

namespace tessera::cuda_test {

using reference::AttentionInputs;

#define NEEDS_GPU() \
  if (!has_gpu()) GTEST_SKIP() << "NO GPU: the CUDA attention kernels were not run"

struct Problem {
  AttentionInputs in;
  std::vector<double> d_o;
  std::vector<std::int32_t> document_start;  // [B, T], may be empty
  std::vector<Pattern> patterns;
  std::int64_t map_tokens = 0;  // 0: as long as the sequence
};

inline bool is_causal(std::int64_t, std::int64_t) { return true; }

inline std::vector<double> random_bf16(std::mt19937& rng, std::int64_t rows, std::int64_t size, bool unit) {
  std::normal_distribution<double> normal;
  std::vector<double> v(rows * size);
  for (std::int64_t r = 0; r < rows; ++r) {
    double square = 0;
    for (std::int64_t d = 0; d < size; ++d) v[r * size + d] = normal(rng), square += v[r * size + d] * v[r * size + d];
    for (std::int64_t d = 0; d < size; ++d) v[r * size + d] = to_bf16(unit ? v[r * size + d] / std::sqrt(square) : v[r * size + d]);
  }
  return v;
}

/// document_tokens: of a document, in the mean. With balances of both signs where there can be any.
inline Problem make_problem(AttentionShape shape, AttentionMath math, std::vector<Pattern> patterns, bool documents, double tau, unsigned seed,
                            unsigned document_tokens = 48) {
  std::mt19937 rng(seed);
  Problem p;
  const std::int64_t rows = shape.batch * shape.heads * shape.tokens;
  const bool unit = math.score != Score::dot;
  p.in.shape = shape, p.in.math = math;
  p.in.q = random_bf16(rng, rows, shape.head_size, unit);
  p.in.k = random_bf16(rng, rows, shape.head_size, unit);
  p.in.v = random_bf16(rng, rows, shape.head_size, false);
  p.d_o = random_bf16(rng, rows, shape.head_size, false);
  for (std::int64_t h = 0; h < shape.heads; ++h) {
    p.in.scale.push_back(static_cast<float>(math.score == Score::dot ? 1 / std::sqrt(double(shape.head_size)) : 8.0 + h));
    p.in.tau.push_back(static_cast<float>(tau * (1 + 0.25 * h)));
    if (reference::has_balances(math)) p.in.balance.push_back(h % 2 ? -0.3f : 0.2f);
  }
  if (documents) {
    for (std::int64_t b = 0; b < shape.batch; ++b) {
      std::int32_t start = 0;
      for (std::int64_t t = 0; t < shape.tokens; ++t) {
        if (t && rng() % document_tokens == 0) start = static_cast<std::int32_t>(t);
        p.document_start.push_back(start);
      }
    }
  }
  p.patterns = std::move(patterns);
  p.in.visible = [patterns = p.patterns, starts = p.document_start, shape](std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t j) {
    return patterns[h % patterns.size()](i, j) && (starts.empty() || j >= starts[b * shape.tokens + i]);
  };
  return p;
}

inline std::vector<Bf16> rounded(const std::vector<double>& v) {
  std::vector<Bf16> out(v.size());
  for (std::size_t n = 0; n < v.size(); ++n) out[n] = __float2bfloat16_rn(static_cast<float>(v[n]));
  return out;
}

inline std::vector<CudaAttentionPath> paths() {
  if (cuda_attention_has_hopper_path()) return {CudaAttentionPath::portable, CudaAttentionPath::hopper};
  return {CudaAttentionPath::portable};
}
inline const char* name_of(CudaAttentionPath p) { return p == CudaAttentionPath::portable ? "portable" : "hopper"; }

inline std::string describe(const AttentionMath& m, const AttentionShape& s, CudaAttentionPath path) {
  const char *scores[] = {"dot", "cosine", "fidelity"}, *gates[] = {"relu", "relu2", "relu4", "softmax"}, *norms[] = {"none", "length", "sum", "rms"};
  return std::string(name_of(path)) + " " + scores[int(m.score)] + " " + gates[int(m.gate)] + " " + norms[int(m.normalizer)] +
         " D=" + std::to_string(s.head_size) + " T=" + std::to_string(s.tokens);
}

/// What query tiles `queries` see of the key tiles `keys`, which lie in a compact buffer; both ascend. Tile by tile from the whole map's lists.
inline std::shared_ptr<TileMap> part_of(const TileMap& whole, const std::vector<int>& queries, const std::vector<int>& keys) {
  const auto rows = [&](const std::vector<int>& tiles) {
    std::int64_t n = 0;
    for (int t : tiles) n += std::min<std::int64_t>(64, whole.tokens - 64ll * t);
    return n;
  };
  auto map = std::make_shared<TileMap>(whole);
  map->tokens = rows(queries), map->keys = rows(keys);
  map->query_tiles = static_cast<std::int64_t>(queries.size()), map->key_tiles = static_cast<std::int64_t>(keys.size());
  for (std::size_t g = 0; g < whole.groups.size(); ++g) {
    const TileGroup& from = whole.groups[g];
    TileGroup& to = map->groups[g];
    to = {};
    std::vector<std::vector<TileEntry>> by_key(keys.size());
    for (std::size_t a = 0; a < queries.size(); ++a) {
      to.query_offsets.push_back(static_cast<std::int64_t>(to.query_entries.size()));
      for (std::int64_t n = from.query_offsets[queries[a]]; n < from.query_offsets[queries[a] + 1]; ++n) {
        const TileEntry e = from.query_entries[n];
        const auto place = std::lower_bound(keys.begin(), keys.end(), e.tile) - keys.begin();
        if (place == std::ssize(keys) || keys[place] != e.tile) continue;
        to.query_entries.push_back({static_cast<std::int32_t>(place), e.mask});
        by_key[place].push_back({static_cast<std::int32_t>(a), e.mask});
      }
    }
    to.query_offsets.push_back(static_cast<std::int64_t>(to.query_entries.size()));
    for (const auto& list : by_key) {
      to.key_offsets.push_back(static_cast<std::int64_t>(to.key_entries.size()));
      to.key_entries.insert(to.key_entries.end(), list.begin(), list.end());
    }
    to.key_offsets.push_back(static_cast<std::int64_t>(to.key_entries.size()));
  }
  return map;
}

inline bool windowed(std::int64_t i, std::int64_t j) { return i - j < 70; }
inline bool strided(std::int64_t i, std::int64_t j) { return (i - j) % 5 == 0 || i - j < 3; }
inline bool sinks(std::int64_t i, std::int64_t j) { return j < 4 || (i - j < 20 && i % 7 != 0); }  // rows without any key beside the sinks
inline bool holes(std::int64_t i, std::int64_t j) { return i % 3 == 1 && j / 64 % 2 == 1; }        // empty rows, empty columns, empty tiles

/// Which of the combinations: every `of`-th from `first`. What takes long under compute-sanitizer is several tests.
struct Share {
  unsigned first = 0, of = 1;
};

/// body(problem, path, number, what) for every score, gate, normalizer, head size and path, with patterns, lengths and documents in turn.
template <class Body>
void for_every_combination(const std::array<std::int64_t, 6>& lengths, Body body, Share share = {}) {
  const std::vector<std::vector<Pattern>> patterns = {{is_causal}, {windowed}, {strided, is_causal}, {sinks, holes}};
  unsigned n = 0;
  for (const auto path : paths())
    for (const auto score : {Score::dot, Score::cosine, Score::fidelity})
      for (const auto gate : {Gate::relu, Gate::relu2, Gate::relu4, Gate::softmax})
        for (const auto norm : {Normalizer::none, Normalizer::length, Normalizer::sum, Normalizer::rms})
          for (const std::int64_t D : {64, 128}) {
            if (++n % share.of != share.first) continue;
            const AttentionShape shape{2, 2, lengths[n % 6], D};
            AttentionMath math;
            math.score = score, math.gate = gate, math.normalizer = norm, math.length_alpha = n % 2 ? 1.0f : 0.5f;
            const double tau = score == Score::fidelity ? 0.01 : score == Score::cosine ? 0.4 * int(n % 3) : 0.2;
            const Problem p = make_problem(shape, math, patterns[n / 2 % 4], n % 5 < 2, tau, n);
            body(p, path, n, describe(math, shape, path) + " case " + std::to_string(n));
            if (::testing::Test::HasFatalFailure()) return;
          }
}

}  // namespace tessera::cuda_test
