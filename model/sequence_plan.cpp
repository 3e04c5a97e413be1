#include "model/sequence_plan.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <numeric>
#include <stdexcept>
#include <utility>

#include "model/pattern.h"
#include "model/sequence_balance.h"

namespace tessera {
namespace {

using Layers = std::vector<std::shared_ptr<const TileMap>>;

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

/// Whether a query among the first `rows` of the tile sees a key. A visible key comes no later than its query, so the end of the sequence cuts rows
/// only.
bool has_edge(const TileMap& map, TileEntry entry, std::int64_t rows) {
  if (entry.mask == TileEntry::kFull || rows >= map.tile_query) return rows > 0;
  const std::uint64_t* mask = map.masks.data() + static_cast<std::int64_t>(entry.mask) * map.tile_query * map.mask_words;
  return std::any_of(mask, mask + rows * map.mask_words, [](std::uint64_t w) { return w != 0; });
}

/// Calls visit(entry) for what query tile `a` of the group lists of the first `tokens` tokens of the sequence.
template <class Visit>
void for_each_entry(const TileMap& map, const TileGroup& g, std::int64_t a, std::int64_t tokens, Visit visit) {
  const std::int64_t rows = std::min<std::int64_t>(map.tile_query, tokens - a * map.tile_query);
  const bool cut = rows < map.tile_query && tokens < map.tokens;  // a map of just these tokens has cut the list itself
  for (auto i = g.query_offsets[static_cast<std::size_t>(a)]; i < g.query_offsets[static_cast<std::size_t>(a) + 1]; ++i) {
    const TileEntry entry = g.query_entries[static_cast<std::size_t>(i)];
    if (!cut || has_edge(map, entry, rows)) visit(entry);
  }
}

/// Heads of each group.
std::vector<std::int64_t> heads_of_groups(const TileMap& map) {
  std::vector<std::int64_t> heads(map.groups.size());
  for (auto g : map.group_of_head) ++heads[static_cast<std::size_t>(g)];
  return heads;
}

/// Element [rank * key_tiles + tile]: whether the rank's queries see a key of the tile, in heads of this group.
std::vector<std::uint8_t> touched_tiles(const SequenceSplit& split, const std::vector<std::int32_t>& owners, const TileMap& map, const TileGroup& g) {
  const std::int64_t key_tiles = ceil_div(split.tokens, map.tile_key), query_tiles = ceil_div(split.tokens, map.tile_query);
  std::vector<std::uint8_t> touched(static_cast<std::size_t>(split.ranks() * key_tiles));
  for (std::int64_t a = 0; a < query_tiles; ++a) {
    std::uint8_t* mine = touched.data() + owners[static_cast<std::size_t>(a * map.tile_query / split.block)] * key_tiles;
    for_each_entry(map, g, a, split.tokens, [&](TileEntry e) { mine[e.tile] = 1; });
  }
  return touched;
}

/// Layers that share a map are counted, not planned again.
std::vector<std::pair<const TileMap*, std::int64_t>> distinct(const Layers& layers) {
  std::vector<std::pair<const TileMap*, std::int64_t>> maps;
  for (const auto& layer : layers) {
    const auto it = std::find_if(maps.begin(), maps.end(), [&](const auto& m) { return m.first == layer.get(); });
    if (it == maps.end())
      maps.emplace_back(layer.get(), 1);
    else
      ++it->second;
  }
  return maps;
}

/// Visible tiles of each row of blocks, of all heads of all layers.
std::vector<std::int64_t> tiles_of_rows(std::int64_t tokens, std::int64_t block, const Layers& layers) {
  std::vector<std::int64_t> rows(static_cast<std::size_t>(ceil_div(tokens, block)));
  for (const auto& [map, times] : distinct(layers)) {
    const auto heads = heads_of_groups(*map);
    for (std::size_t n = 0; n < map->groups.size(); ++n) {
      for (std::int64_t a = 0; a * map->tile_query < tokens; ++a) {
        std::int64_t listed = 0;
        for_each_entry(*map, map->groups[n], a, tokens, [&](TileEntry) { ++listed; });
        rows[static_cast<std::size_t>(a * map->tile_query / block)] += listed * heads[n] * times;
      }
    }
  }
  return rows;
}

/// Keys that ranks fetch from others, of all heads of all layers.
std::int64_t fetched_keys(const SequenceSplit& split, const Layers& layers) {
  const auto owners = split.owners();
  std::int64_t fetched = 0;
  for (const auto& [map, times] : distinct(layers)) {
    const auto heads = heads_of_groups(*map);
    const std::int64_t key_tiles = ceil_div(split.tokens, map->tile_key);
    for (std::size_t n = 0; n < map->groups.size(); ++n) {
      const auto touched = touched_tiles(split, owners, *map, map->groups[n]);
      for (int r = 0; r < split.ranks(); ++r) {
        for (std::int64_t b = 0; b < key_tiles; ++b) {
          if (touched[static_cast<std::size_t>(r * key_tiles + b)] == 0 || owners[static_cast<std::size_t>(b * map->tile_key / split.block)] == r)
            continue;
          fetched += std::min<std::int64_t>(map->tile_key, split.tokens - b * map->tile_key) * heads[n] * times;
        }
      }
    }
  }
  return fetched;
}

SequenceSplit balance(SequenceSplit split, int ranks, const Layers& layers) {
  std::int64_t fewest = -1;
  for (auto& blocks : balanced_blocks(ranks, tiles_of_rows(split.tokens, split.block, layers))) {
    SequenceSplit candidate{split.tokens, split.block, std::move(blocks)};
    const std::int64_t fetched = fetched_keys(candidate, layers);
    if (fewest >= 0 && fetched >= fewest) continue;
    fewest = fetched;
    split = std::move(candidate);
  }
  return split;
}

}  // namespace

const char* name_of(SequenceExchange e) {
  constexpr const char* kNames[] = {"needed", "ring", "heads", "auto"};
  return kNames[static_cast<int>(e)];
}

std::int64_t SequenceSplit::tokens_of(int rank) const {
  const auto& mine = blocks.at(static_cast<std::size_t>(rank));
  const std::int64_t whole = static_cast<std::int64_t>(mine.size()) * block;
  return mine.back() == block_count() - 1 ? whole - (block_count() * block - tokens) : whole;
}

std::vector<std::int32_t> SequenceSplit::positions(int rank) const {
  std::vector<std::int32_t> result;
  result.reserve(static_cast<std::size_t>(tokens_of(rank)));
  for (const std::int64_t b : blocks.at(static_cast<std::size_t>(rank)))
    for (std::int64_t t = b * block; t < std::min(tokens, (b + 1) * block); ++t) result.push_back(static_cast<std::int32_t>(t));
  return result;
}

std::vector<std::int32_t> SequenceSplit::owners() const {
  std::vector<std::int32_t> result(static_cast<std::size_t>(block_count()));
  for (int r = 0; r < ranks(); ++r)
    for (auto b : blocks[static_cast<std::size_t>(r)]) result[static_cast<std::size_t>(b)] = r;
  return result;
}

SequenceSplit split_sequence(SequenceLayout layout, std::int64_t tokens, int ranks, const std::vector<std::shared_ptr<const TileMap>>& layers,
                             DeviceKind device) {
  if (tokens < 1) throw std::invalid_argument(fmt::format("a sequence of {} tokens; there must be at least one", tokens));
  if (ranks < 1) throw std::invalid_argument(fmt::format("a sequence over {} ranks; there must be at least one", ranks));
  if (layers.empty()) throw std::invalid_argument("a sequence split for no layer: the tiles are not known");
  const TileMap& first = *layers.front();
  for (const auto& map : layers) {
    if (map->tile_query != first.tile_query || map->tile_key != first.tile_key || map->tokens < tokens)
      throw std::invalid_argument(
          fmt::format("tile maps of {} tokens in tiles of {} x {} and {} tokens in tiles of {} x {} for a sequence of {} tokens: "
                      "layers share one split, so their tiles must be equal and their maps as long",
                      first.tokens, first.tile_query, first.tile_key, map->tokens, map->tile_query, map->tile_key, tokens));
  }

  SequenceSplit split;
  split.tokens = tokens;
  split.block = std::lcm<std::int64_t>(first.tile_query, first.tile_key);
  const int parts = layout == SequenceLayout::zigzag && ranks > 1 ? 2 * ranks : ranks;
  if (split.block_count() < parts) {
    const std::int64_t most = layout == SequenceLayout::zigzag ? std::max<std::int64_t>(1, split.block_count() / 2) : split.block_count();
    throw std::invalid_argument(fmt::format(
        "{} tokens over {} ranks: tiles of {} x {} make {} block{} of {} tokens, and {} needs {}. Possible: at most {} rank{} to a sequence "
        "(parallel.sequence, --sequence), {}{}a sequence of at least {} tokens (model.context, --context){}",
        tokens, ranks, first.tile_query, first.tile_key, split.block_count(), split.block_count() == 1 ? "" : "s", split.block,
        layout == SequenceLayout::zigzag ? "a zigzag layout" : "a layout", parts, most, most == 1 ? "" : "s",
        split.block_count() >= ranks ? "another parallel.layout, " : "", device == DeviceKind::cuda ? "or " : "", (parts - 1) * split.block + 1,
        device == DeviceKind::cuda ? "" : ", or smaller tiles (attention.tile)"));
  }
  if (ranks == 1)
    split.blocks = even_parts(split.block_count(), 1);
  else if (layout == SequenceLayout::contiguous)
    split.blocks = even_parts(split.block_count(), ranks);
  else if (layout == SequenceLayout::zigzag)
    split.blocks = zigzag_parts(split.block_count(), ranks);
  else
    split = balance(std::move(split), ranks, layers);
  return split;
}

namespace {

/// Edges of the first `rows` queries of a tile.
std::int64_t edges_of(const TileMap& map, std::int32_t mask, std::int64_t rows) {
  if (mask == TileEntry::kFull) return rows * map.tile_key;
  const std::uint64_t* bits = map.masks.data() + static_cast<std::int64_t>(mask) * map.tile_query * map.mask_words;
  return std::accumulate(bits, bits + rows * map.mask_words, std::int64_t{0}, [](std::int64_t n, std::uint64_t w) { return n + std::popcount(w); });
}

/// The lists of a group for the query tiles `mine` over the compact buffer, where global tile b is number_of[b].
TileGroup compact_group(const SequenceSplit& split, const TileMap& map, const TileGroup& g, const std::vector<std::int64_t>& mine,
                        const std::vector<std::int32_t>& number_of, const std::vector<std::int64_t>& edges_of_mask, std::int64_t key_tiles) {
  TileGroup result;
  result.query_offsets.reserve(mine.size() + 1);
  result.query_offsets.push_back(0);
  for (const std::int64_t a : mine) {
    const std::int64_t rows = std::min<std::int64_t>(map.tile_query, split.tokens - a * map.tile_query);
    for_each_entry(map, g, a, split.tokens, [&](TileEntry e) {
      result.query_entries.push_back({number_of[static_cast<std::size_t>(e.tile)], e.mask});
      const bool whole = e.mask != TileEntry::kFull && rows == map.tile_query;
      result.visible_edges += static_cast<std::uint64_t>(whole ? edges_of_mask[static_cast<std::size_t>(e.mask)] : edges_of(map, e.mask, rows));
    });
    result.query_offsets.push_back(static_cast<std::int64_t>(result.query_entries.size()));
  }
  fill_key_lists(result, key_tiles);
  return result;
}

}  // namespace

std::vector<NeededKeys> plan_needed(const SequenceSplit& split, const TileMap& map) {
  if (map.tokens < split.tokens || split.block % map.tile_query != 0 || split.block % map.tile_key != 0)
    throw std::invalid_argument(fmt::format("a tile map of {} tokens in tiles of {} x {} for a sequence of {} tokens in blocks of {}", map.tokens,
                                            map.tile_query, map.tile_key, split.tokens, split.block));
  const std::int64_t key_tiles = ceil_div(split.tokens, map.tile_key);
  const auto owners = split.owners();
  const auto owner_of_tile = [&](std::int64_t tile) { return owners[static_cast<std::size_t>(tile * map.tile_key / split.block)]; };
  const int heads = static_cast<int>(map.group_of_head.size());
  std::vector<std::int64_t> edges_of_mask;
  for (std::int32_t m = 0; m < map.mask_count(); ++m) edges_of_mask.push_back(edges_of(map, m, map.tile_query));
  std::vector<std::vector<std::uint8_t>> touched;  // [groups]
  for (const TileGroup& g : map.groups) touched.push_back(touched_tiles(split, owners, map, g));

  std::vector<NeededKeys> plan(static_cast<std::size_t>(split.ranks()));
  for (int r = 0; r < split.ranks(); ++r) {
    NeededKeys& needed = plan[static_cast<std::size_t>(r)];
    const std::int64_t offset = r * key_tiles;
    std::vector<std::int32_t> number_of(static_cast<std::size_t>(key_tiles), -1);
    const auto add = [&](std::int64_t b) {
      number_of[static_cast<std::size_t>(b)] = static_cast<std::int32_t>(needed.tiles.size());
      needed.tiles.push_back(static_cast<std::int32_t>(b));
      needed.keys += std::min<std::int64_t>(map.tile_key, split.tokens - b * map.tile_key);
    };
    for (std::int64_t b = 0; b < key_tiles; ++b)
      if (std::any_of(touched.begin(), touched.end(), [&](const auto& t) { return t[static_cast<std::size_t>(offset + b)] != 0; })) add(b);
    if (needed.tiles.empty()) add(split.blocks[static_cast<std::size_t>(r)].front() * split.block / map.tile_key);

    needed.receive.resize(static_cast<std::size_t>(split.ranks()));
    for (std::int32_t h = 0; h < heads; ++h) {
      const auto& of_group = touched[static_cast<std::size_t>(map.group_of_head[static_cast<std::size_t>(h)])];
      for (const auto b : needed.tiles) {
        if (of_group[static_cast<std::size_t>(offset + b)] == 0) continue;
        const int owner = owner_of_tile(b);
        (owner == r ? needed.own : needed.receive[static_cast<std::size_t>(owner)]).push_back({h, b});
      }
    }

    std::vector<std::int64_t> query_tiles;
    for (const std::int64_t block : split.blocks[static_cast<std::size_t>(r)])
      for (std::int64_t t = block * split.block; t < std::min(split.tokens, (block + 1) * split.block); t += map.tile_query)
        query_tiles.push_back(t / map.tile_query);

    auto lists = std::make_shared<TileMap>();
    lists->tokens = split.tokens_of(r);
    lists->keys = needed.keys;
    lists->tile_query = map.tile_query;
    lists->tile_key = map.tile_key;
    lists->query_tiles = static_cast<std::int64_t>(query_tiles.size());
    lists->key_tiles = static_cast<std::int64_t>(needed.tiles.size());
    lists->group_of_head = map.group_of_head;
    lists->masks = map.masks;
    lists->mask_words = map.mask_words;
    lists->mask0_is_causal = map.mask0_is_causal;
    for (const TileGroup& g : map.groups)
      lists->groups.push_back(compact_group(split, map, g, query_tiles, number_of, edges_of_mask, lists->key_tiles));
    needed.lists = std::move(lists);
  }
  return plan;
}

}  // namespace tessera
