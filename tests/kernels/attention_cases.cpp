#include "attention_cases.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>

namespace tessera::reference {

std::shared_ptr<const TileMap> brute_force_tiles(const Pattern& pattern, int heads, std::int64_t tokens, int tile_query, int tile_key) {
  auto map = std::make_shared<TileMap>();
  map->tokens = tokens;
  map->tile_query = tile_query;
  map->tile_key = tile_key;
  map->query_tiles = (tokens + tile_query - 1) / tile_query;
  map->key_tiles = (tokens + tile_key - 1) / tile_key;
  map->mask_words = (tile_key + 63) / 64;
  const std::int64_t words = map->mask_words, mask_size = tile_query * words;
  const auto visible = [&](std::int64_t h, std::int64_t i, std::int64_t j) { return j <= i && pattern(h, i, j); };
  const auto mask_number = [&](const std::vector<std::uint64_t>& mask) {
    for (std::int64_t m = 0; m < map->mask_count(); ++m)
      if (std::equal(mask.begin(), mask.end(), map->masks.begin() + m * mask_size)) return static_cast<std::int32_t>(m);
    map->masks.insert(map->masks.end(), mask.begin(), mask.end());
    return static_cast<std::int32_t>(map->mask_count() - 1);
  };
  if (tile_query == tile_key) {
    std::vector<std::uint64_t> causal(mask_size, 0);
    for (int r = 0; r < tile_query; ++r)
      for (int c = 0; c <= r; ++c) causal[r * words + c / 64] |= std::uint64_t{1} << (c % 64);
    mask_number(causal);
    map->mask0_is_causal = true;
  }
  for (int h = 0; h < heads; ++h) {
    TileGroup g;
    std::vector<std::vector<TileEntry>> by_key(map->key_tiles);
    g.query_offsets.push_back(0);
    for (std::int64_t a = 0; a < map->query_tiles; ++a) {
      for (std::int64_t b = 0; b < map->key_tiles; ++b) {
        std::vector<std::uint64_t> mask(mask_size, 0);
        bool any = false, full = true;
        for (int r = 0; r < tile_query; ++r)
          for (int c = 0; c < tile_key; ++c) {
            const std::int64_t i = a * tile_query + r, j = b * tile_key + c;
            const bool sees = visible(h, i, j);
            if (sees) mask[r * words + c / 64] |= std::uint64_t{1} << (c % 64);
            full = full && sees;
            if (sees && i < tokens && j < tokens) {
              any = true;
              ++g.visible_edges;
            }
          }
        if (!any) continue;
        const std::int32_t number = full ? TileEntry::kFull : mask_number(mask);
        g.query_entries.push_back({static_cast<std::int32_t>(b), number});
        by_key[b].push_back({static_cast<std::int32_t>(a), number});
      }
      g.query_offsets.push_back(std::ssize(g.query_entries));
    }
    g.key_offsets.push_back(0);
    for (const auto& list : by_key) {
      g.key_entries.insert(g.key_entries.end(), list.begin(), list.end());
      g.key_offsets.push_back(std::ssize(g.key_entries));
    }
    map->group_of_head.push_back(h);
    map->groups.push_back(std::move(g));
  }
  return map;
}

void solve(AttentionProblem& p, const AttentionCase& c) {
  const auto widen = [](const std::vector<float>& x) { return std::vector<double>(x.begin(), x.end()); };
  p.in.shape = c.shape;
  p.in.math = c.math;
  p.in.q = widen(p.q);
  p.in.k = widen(p.k);
  p.in.v = widen(p.v);
  p.in.scale = widen(p.scale);
  p.in.tau = widen(p.tau);
  p.in.balance = widen(p.balance);
  p.in.visible = [pattern = c.pattern, start = c.document_start, tokens = c.shape.tokens](auto b, auto h, auto i, auto j) {
    return pattern(h, i, j) && (start.empty() || j >= start[b * tokens + i]);
  };
  p.document_start = c.document_start;
  p.out = attention_forward(p.in);
  p.gradients = attention_backward(p.in, p.out, widen(p.d_o));
  p.active = attention_tiles(p.in, c.tile_query, c.tile_key);
}

AttentionCase case_of(Score score, Gate gate, Normalizer normalizer, float beta) {
  AttentionCase c;
  c.math = {.score = score, .gate = gate, .normalizer = normalizer, .length_alpha = 0.8f, .epsilon = 0.05f, .length_beta = beta};
  c.tau = score == Score::fidelity ? 0.05 : 0.3;
  if (has_balances(c.math)) c.balance = 0.3;
  return c;
}

AttentionProblem make_problem(const AttentionCase& c) {
  const auto [B, H, T, D] = c.shape;
  AttentionProblem p;
  p.tiles = brute_force_tiles(c.pattern, static_cast<int>(H), c.map_tokens ? c.map_tokens : T, c.tile_query, c.tile_key);
  for (std::int64_t h = 0; h < H; ++h) {
    p.scale.push_back(c.math.score == Score::dot ? 1.0f / std::sqrt(static_cast<float>(D)) : 8.0f - static_cast<float>(h));
    p.tau.push_back(static_cast<float>(c.tau * (1.0 + 0.25 * static_cast<double>(h))));
    if (c.balance != 0) p.balance.push_back(static_cast<float>(h % 2 == 0 ? c.balance : -2 * c.balance));
  }
  for (std::uint64_t seed = c.seed;; seed += 1000003) {
    std::mt19937_64 rng(seed);
    std::normal_distribution<double> normal;
    for (auto* x : {&p.q, &p.k, &p.v, &p.d_o}) {
      x->resize(B * H * T * D);
      for (auto& e : *x) e = static_cast<float>(normal(rng));
      if (c.math.score == Score::dot || (x != &p.q && x != &p.k)) continue;
      for (std::int64_t row = 0; row < B * H * T; ++row) {
        double sum = 0;
        for (std::int64_t d = 0; d < D; ++d) sum += static_cast<double>((*x)[row * D + d]) * (*x)[row * D + d];
        for (std::int64_t d = 0; d < D; ++d) (*x)[row * D + d] = static_cast<float>((*x)[row * D + d] / std::sqrt(sum));
      }
    }
    solve(p, c);
    if (p.out.nearest_kink > c.least_kink) return p;
  }
}

std::vector<std::int32_t> random_documents(const AttentionShape& s, std::int64_t longest, std::uint64_t seed) {
  std::mt19937_64 rng(seed);
  std::vector<std::int32_t> start(s.batch * s.tokens);
  for (std::int64_t b = 0; b < s.batch; ++b)
    for (std::int64_t t = 0; t < s.tokens;) {
      const auto end = std::min<std::int64_t>(s.tokens, t + 1 + static_cast<std::int64_t>(rng() % longest));
      for (std::int64_t i = t; i < end; ++i) start[b * s.tokens + i] = static_cast<std::int32_t>(t);
      t = end;
    }
  return start;
}

std::string name_of(const AttentionMath& math) {
  static const char* scores[] = {"dot", "cosine", "fidelity"};
  static const char* gates[] = {"relu", "relu2", "relu4", "softmax"};
  static const char* normalizers[] = {"none", "length", "sum", "rms"};
  return std::string(scores[static_cast<int>(math.score)]) + "_" + gates[static_cast<int>(math.gate)] + "_" +
         normalizers[static_cast<int>(math.normalizer)] + (math.length_beta > 0 ? "_beta" : "");
}

double relative_error(const std::vector<float>& a, const std::vector<double>& b) {
  if (a.size() != b.size()) return std::numeric_limits<double>::infinity();
  double error = 0, largest = 1;
  for (std::size_t n = 0; n < a.size(); ++n) {
    if (!std::isfinite(a[n])) return std::numeric_limits<double>::infinity();
    error = std::max(error, std::abs(a[n] - b[n]));
    largest = std::max(largest, std::abs(b[n]));
  }
  return error / largest;
}

}  // namespace tessera::reference
