// Tile lists from patterns. A pattern becomes a tree of Covers, one a node; a cover answers, for one tile, which of its edges are
// visible: none, all, or a mask. Three things keep that cheap for millions of tiles:
//   - a pattern that is a function of i - j has one answer for each distance between a tile's corners, remembered in a table;
//   - masks are stored once (MaskPool), so any and all combine two small numbers, and remember the result;
//   - patterns by blocks answer from a table of blocks for the query tile's rows, made once a query tile.

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <map>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <unordered_map>

#include "model/pattern.h"

namespace tessera {
namespace {

using Id = std::int32_t;  // of a mask in the pool, or:
constexpr Id kNone = -2;
constexpr Id kAll = TileEntry::kFull;
constexpr Id kUnknown = -3;

/// All distinct masks met so far. Masks without or with every bit have no number: they are kNone and kAll.
class MaskPool {
 public:
  MaskPool(int tile_query, int tile_key)
      : tile_query(tile_query), tile_key(tile_key), words((tile_key + 63) / 64), size_(static_cast<std::size_t>(tile_query) * words), full_(size_) {
    for (int w = 0; w < words; ++w) {
      const int bits = std::min(64, tile_key - 64 * w);
      for (int r = 0; r < tile_query; ++r) full_[r * words + w] = ~std::uint64_t{0} >> (64 - bits);
    }
  }

  const int tile_query, tile_key, words;

  std::vector<std::uint64_t> blank() const { return std::vector<std::uint64_t>(size_); }
  const std::uint64_t* bits(Id id) const { return masks_.data() + static_cast<std::size_t>(id) * size_; }

  /// Number of visible edges in the first `rows` rows.
  std::int64_t count(Id id, std::int64_t rows) const {
    if (id == kAll) return rows * tile_key;
    if (rows == tile_query) return edges_[id];
    return std::accumulate(bits(id), bits(id) + rows * words, std::int64_t{0}, [](std::int64_t n, std::uint64_t w) { return n + std::popcount(w); });
  }

  Id intern(const std::vector<std::uint64_t>& mask) {
    if (mask == full_) return kAll;
    std::uint64_t hash = 0;
    std::int64_t edges = 0;
    for (auto w : mask) {
      hash = (std::rotl(hash, 23) ^ w) * 0x9e3779b97f4a7c15u;
      edges += std::popcount(w);
    }
    if (edges == 0) return kNone;
    auto [first, last] = by_hash_.equal_range(hash);
    for (auto it = first; it != last; ++it) {
      if (std::equal(mask.begin(), mask.end(), bits(it->second))) return it->second;
    }
    const auto id = static_cast<Id>(edges_.size());
    masks_.insert(masks_.end(), mask.begin(), mask.end());
    edges_.push_back(edges);
    by_hash_.emplace(hash, id);
    return id;
  }

  Id intersection(Id a, Id b) {
    if (a == kNone || b == kNone) return kNone;
    if (a == kAll || a == b) return b;
    if (b == kAll) return a;
    return combined(a, b, intersections_, [](std::uint64_t x, std::uint64_t y) { return x & y; });
  }
  Id unite(Id a, Id b) {
    if (a == kAll || b == kAll) return kAll;
    if (a == kNone || a == b) return b;
    if (b == kNone) return a;
    return combined(a, b, unions_, [](std::uint64_t x, std::uint64_t y) { return x | y; });
  }

 private:
  using Memo = std::unordered_map<std::uint64_t, Id>;

  template <class Op>
  Id combined(Id a, Id b, Memo& memo, Op op) {
    const auto [low, high] = std::minmax(a, b);
    auto [it, fresh] = memo.try_emplace(static_cast<std::uint64_t>(low) << 32 | static_cast<std::uint32_t>(high), kUnknown);
    if (fresh) {
      auto mask = blank();
      for (std::size_t i = 0; i < size_; ++i) mask[i] = op(bits(a)[i], bits(b)[i]);
      it->second = intern(mask);
    }
    return it->second;
  }

  const std::size_t size_;  // words of a mask
  std::vector<std::uint64_t> full_;
  std::vector<std::uint64_t> masks_;
  std::vector<std::int64_t> edges_;
  std::unordered_multimap<std::uint64_t, Id> by_hash_;
  Memo intersections_, unions_;
};

class Cover {
 public:
  explicit Cover(MaskPool& pool) : pool(pool) {}
  virtual ~Cover() = default;
  /// Which edges of query tile a x key tile b are visible. Calls with ascending a are cheapest.
  virtual Id tile(std::int64_t a, std::int64_t b) = 0;

 protected:
  std::int64_t first_query(std::int64_t a) const { return a * pool.tile_query; }
  std::int64_t first_key(std::int64_t b) const { return b * pool.tile_key; }
  MaskPool& pool;
};

/// Patterns that are functions of i - j: the answer depends on the distance between the tile's first query and first key.
class DistanceCover : public Cover {
 public:
  DistanceCover(MaskPool& pool, const PatternSpec& pattern) : Cover(pool), pattern_(pattern), step_(std::gcd(pool.tile_query, pool.tile_key)) {}

  Id tile(std::int64_t a, std::int64_t b) override {
    const std::int64_t distance = first_query(a) - first_key(b);
    if (distance <= -pool.tile_query) return kNone;  // every key comes after every query
    const auto slot = static_cast<std::size_t>((distance + pool.tile_query) / step_);
    if (slot >= memo_.size()) memo_.resize(2 * slot + 64, kUnknown);
    if (memo_[slot] == kUnknown) memo_[slot] = make(distance);
    return memo_[slot];
  }

 private:
  Id make(std::int64_t distance) {
    // Edge (r, k) of the tile has distance + r - k: tile_query + tile_key - 1 different values.
    std::vector<bool> visible(static_cast<std::size_t>(pool.tile_query + pool.tile_key - 1));
    for (std::size_t n = 0; n < visible.size(); ++n) visible[n] = pattern_.visible(distance + static_cast<std::int64_t>(n) - (pool.tile_key - 1), 0);
    auto mask = pool.blank();
    for (int r = 0; r < pool.tile_query; ++r) {
      for (int k = 0; k < pool.tile_key; ++k) {
        if (visible[static_cast<std::size_t>(r - k + pool.tile_key - 1)]) mask[r * pool.words + k / 64] |= std::uint64_t{1} << (k % 64);
      }
    }
    return pool.intern(mask);
  }

  PatternSpec pattern_;
  const std::int64_t step_;
  std::vector<Id> memo_;
};

/// The first `tokens` keys, cut by causality.
class GlobalCover : public Cover {
 public:
  GlobalCover(MaskPool& pool, std::int64_t tokens) : Cover(pool), tokens_(tokens), causal_(pool, PatternSpec{}) {
    auto mask = pool.blank();  // of the one key tile that is cut
    for (int k = 0; k < tokens % pool.tile_key; ++k) {
      for (int r = 0; r < pool.tile_query; ++r) mask[r * pool.words + k / 64] |= std::uint64_t{1} << (k % 64);
    }
    cut_ = pool.intern(mask);
  }

  Id tile(std::int64_t a, std::int64_t b) override {
    if (first_key(b) >= tokens_) return kNone;
    const Id columns = tokens_ - first_key(b) >= pool.tile_key ? kAll : cut_;
    return pool.intersection(columns, causal_.tile(a, b));
  }

 private:
  const std::int64_t tokens_;
  DistanceCover causal_;
  Id cut_;
};

/// bigbird and blocks, cut by causality.
class BlockCover : public Cover {
 public:
  BlockCover(MaskPool& pool, const PatternSpec& pattern)
      : Cover(pool),
        pattern_(pattern),
        block_(pattern.kind == PatternSpec::Kind::bigbird ? pattern.block : pattern.mask->block),
        causal_(pool, PatternSpec{}) {}

  Id tile(std::int64_t a, std::int64_t b) override {
    const Id causal = causal_.tile(a, b);
    if (causal == kNone) return kNone;
    if (a != query_tile_) load_rows(a);
    const std::int64_t k0 = first_key(b), k1 = k0 + pool.tile_key;
    bool none = true, all = true;
    for (const auto& row : rows_) {
      for (std::int64_t c = k0 / block_; c <= (k1 - 1) / block_; ++c) (sees(row, c) ? none : all) = false;
    }
    if (none || all) return none ? kNone : causal;
    return pool.intersection(make(a, k0), causal);
  }

 private:
  static bool sees(const std::vector<std::uint8_t>& row, std::int64_t column) {  // blocks past the diagonal are never seen
    return column < static_cast<std::int64_t>(row.size()) && row[static_cast<std::size_t>(column)] != 0;
  }

  void load_rows(std::int64_t a) {
    const std::int64_t q0 = first_query(a), q1 = q0 + pool.tile_query;
    const std::int64_t first = q0 / block_, last = (q1 - 1) / block_;
    if (query_tile_ < 0 || first != first_row_ || last != last_row_) {
      rows_.clear();
      for (std::int64_t r = first; r <= last; ++r) rows_.push_back(visible_blocks(pattern_, r));
      first_row_ = first, last_row_ = last;
    }
    query_tile_ = a;
  }

  Id make(std::int64_t a, std::int64_t k0) {
    auto mask = pool.blank();
    std::vector<std::uint64_t> keys(static_cast<std::size_t>(pool.words));
    std::int64_t loaded = -1;
    for (int r = 0; r < pool.tile_query; ++r) {
      const std::int64_t row = (first_query(a) + r) / block_ - first_row_;
      if (row != loaded) {
        std::fill(keys.begin(), keys.end(), 0);
        for (int k = 0; k < pool.tile_key; ++k) {
          if (sees(rows_[static_cast<std::size_t>(row)], (k0 + k) / block_)) keys[k / 64] |= std::uint64_t{1} << (k % 64);
        }
        loaded = row;
      }
      std::copy(keys.begin(), keys.end(), mask.begin() + r * pool.words);
    }
    return pool.intern(mask);
  }

  PatternSpec pattern_;
  const std::int64_t block_;
  DistanceCover causal_;
  std::int64_t query_tile_ = -1, first_row_ = -1, last_row_ = -1;
  std::vector<std::vector<std::uint8_t>> rows_;  // of the blocks that query_tile_ overlaps
};

class CombinedCover : public Cover {
 public:
  CombinedCover(MaskPool& pool, bool any, std::vector<std::unique_ptr<Cover>> children) : Cover(pool), any_(any), children_(std::move(children)) {}

  Id tile(std::int64_t a, std::int64_t b) override {
    Id id = children_.front()->tile(a, b);
    for (std::size_t c = 1; c < children_.size() && id != (any_ ? kAll : kNone); ++c) {
      const Id other = children_[c]->tile(a, b);
      id = any_ ? pool.unite(id, other) : pool.intersection(id, other);
    }
    return id;
  }

 private:
  const bool any_;
  std::vector<std::unique_ptr<Cover>> children_;
};

bool function_of_distance(const PatternSpec& p) {
  using Kind = PatternSpec::Kind;
  if (p.kind == Kind::any || p.kind == Kind::all) return std::all_of(p.children.begin(), p.children.end(), function_of_distance);
  return p.kind != Kind::global && p.kind != Kind::bigbird && p.kind != Kind::blocks;
}

std::unique_ptr<Cover> make_cover(MaskPool& pool, const PatternSpec& p) {
  using Kind = PatternSpec::Kind;
  if (function_of_distance(p)) return std::make_unique<DistanceCover>(pool, p);
  if (p.kind == Kind::global) return std::make_unique<GlobalCover>(pool, p.size);
  if (p.kind == Kind::bigbird || p.kind == Kind::blocks) return std::make_unique<BlockCover>(pool, p);
  std::vector<std::unique_ptr<Cover>> children;
  for (const auto& child : p.children) children.push_back(make_cover(pool, child));
  return std::make_unique<CombinedCover>(pool, p.kind == Kind::any, std::move(children));
}

}  // namespace

// A counting sort, which keeps query tiles ascending.
void fill_key_lists(TileGroup& g, std::int64_t key_tiles) {
  g.key_offsets.assign(static_cast<std::size_t>(key_tiles) + 1, 0);
  for (const auto& e : g.query_entries) ++g.key_offsets[static_cast<std::size_t>(e.tile) + 1];
  std::partial_sum(g.key_offsets.begin(), g.key_offsets.end(), g.key_offsets.begin());
  auto next = g.key_offsets;
  g.key_entries.resize(g.query_entries.size());
  for (std::size_t a = 0; a + 1 < g.query_offsets.size(); ++a) {
    for (auto i = g.query_offsets[a]; i < g.query_offsets[a + 1]; ++i) {
      const auto& e = g.query_entries[static_cast<std::size_t>(i)];
      g.key_entries[static_cast<std::size_t>(next[static_cast<std::size_t>(e.tile)]++)] = {static_cast<std::int32_t>(a), e.mask};
    }
  }
}

std::shared_ptr<const TileMap> make_tile_map(const PatternConfig& config, int layer, int heads, std::int64_t tokens, int tile_query, int tile_key) {
  if (tokens < 1) throw std::invalid_argument(fmt::format("tile lists for {} tokens; there must be at least one", tokens));
  if (heads < 1) throw std::invalid_argument(fmt::format("tile lists for {} heads; there must be at least one", heads));
  if (tile_query < 1 || tile_key < 1)
    throw std::invalid_argument(fmt::format("tiles of {} queries x {} keys; both must be at least 1", tile_query, tile_key));

  auto map = std::make_shared<TileMap>();
  map->tokens = tokens;
  map->tile_query = tile_query;
  map->tile_key = tile_key;
  map->query_tiles = (tokens + tile_query - 1) / tile_query;
  map->key_tiles = (tokens + tile_key - 1) / tile_key;

  MaskPool pool(tile_query, tile_key);
  map->mask_words = pool.words;
  std::vector<Id> number;  // of a pool's mask among the map's masks, in the order of first use
  const auto number_of = [&](Id id) {
    if (id < 0) return id;
    if (static_cast<std::size_t>(id) >= number.size()) number.resize(static_cast<std::size_t>(id) + 1, kUnknown);
    if (number[static_cast<std::size_t>(id)] == kUnknown) {
      number[static_cast<std::size_t>(id)] = static_cast<Id>(map->mask_count());
      map->masks.insert(map->masks.end(), pool.bits(id), pool.bits(id) + tile_query * pool.words);
    }
    return number[static_cast<std::size_t>(id)];
  };
  if (tile_query == tile_key && tile_query > 1) {  // a tile of one edge has no mask but the full one
    number_of(DistanceCover(pool, PatternSpec{}).tile(0, 0));
    map->mask0_is_causal = true;
  }

  std::map<std::string, std::int32_t> group_of_pattern;
  std::vector<std::unique_ptr<Cover>> covers;
  for (int h = 0; h < heads; ++h) {
    const PatternSpec& pattern = config.at(layer, h);
    check_pattern(pattern);
    const auto [it, fresh] = group_of_pattern.try_emplace(describe(pattern), static_cast<std::int32_t>(covers.size()));
    if (fresh) covers.push_back(make_cover(pool, pattern));
    map->group_of_head.push_back(it->second);
  }
  map->groups.resize(covers.size());
  for (auto& g : map->groups) g.query_offsets.push_back(0);

  for (std::int64_t a = 0; a < map->query_tiles; ++a) {
    const std::int64_t rows = std::min<std::int64_t>(tile_query, tokens - a * tile_query);
    const std::int64_t last_key_tile = (a * tile_query + rows - 1) / tile_key;
    for (std::size_t n = 0; n < covers.size(); ++n) {
      TileGroup& g = map->groups[n];
      for (std::int64_t b = 0; b <= last_key_tile; ++b) {
        const Id id = covers[n]->tile(a, b);
        if (id == kNone) continue;
        const std::int64_t edges = pool.count(id, rows);  // key <= query < tokens: rows alone are cut by the end of the sequence
        if (edges == 0) continue;
        g.query_entries.push_back({static_cast<std::int32_t>(b), number_of(id)});
        g.visible_edges += static_cast<std::uint64_t>(edges);
      }
      g.query_offsets.push_back(static_cast<std::int64_t>(g.query_entries.size()));
    }
  }
  for (auto& g : map->groups) fill_key_lists(g, map->key_tiles);
  return map;
}

}  // namespace tessera
