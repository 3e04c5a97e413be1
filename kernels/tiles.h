#pragma once
// Tile lists: what a static pattern leaves to compute, in the form every attention kernel walks. Made on the host, once,
// from the pattern (model/pattern.h); a kernel knows tiles and bit masks and nothing of patterns.
//
// Query tile a holds queries [a*tile_query, (a+1)*tile_query), key tile b keys [b*tile_key, (b+1)*tile_key).
// A tile without a visible edge is in no list. A tile all of whose edges are visible has mask kFull and needs no edge mask.
// Any other names a bit mask; equal masks are stored once, so a window or strided pattern has a handful of them.
// Bounds at the end of the sequence are the kernel's affair (rows i >= tokens, keys j >= tokens), never a mask's: the
// lists made for a long sequence therefore also serve every shorter one, as prefixes.

#include <cstdint>
#include <vector>

namespace tessera {

struct TileEntry {
  static constexpr std::int32_t kFull = -1;
  std::int32_t tile;  // key tile in a query tile's list, query tile in a key tile's list; ascending in each list
  std::int32_t mask;  // kFull, or the number of a mask
  bool operator==(const TileEntry&) const = default;
};

/// The lists of one distinct head pattern (heads with the same pattern share a group).
struct TileGroup {
  std::vector<std::int64_t> query_offsets;  // [query_tiles + 1]: list of query tile a = query_entries[offsets[a] .. offsets[a+1])
  std::vector<TileEntry> query_entries;
  std::vector<std::int64_t> key_offsets;  // [key_tiles + 1], the transpose
  std::vector<TileEntry> key_entries;
  std::uint64_t visible_edges = 0;  // over all queries and keys of the map, without document masks
};

///
/// Rows of queries and keys need not be those of a whole sequence. A rank that has some query tiles of a sequence, and a buffer of the key tiles that
/// those touch, numbers both by their places there, in ascending order of the sequence; masks do not depend on the place.
struct TileMap {
  std::int64_t tokens = 0;  // queries of the longest sequence the lists serve
  std::int64_t keys = 0;    // and keys; 0: as many
  std::int32_t tile_query = 64;
  std::int32_t tile_key = 64;
  std::int64_t query_tiles = 0;             // ceil(tokens / tile_query)
  std::int64_t key_tiles = 0;               // ceil(key_count() / tile_key)
  std::vector<std::int32_t> group_of_head;  // [heads]
  std::vector<TileGroup> groups;
  /// Mask m, row r, word w: bit k of masks[(m*tile_query + r)*mask_words + w] says whether key 64*w + k of the tile is
  /// visible to query r of the tile.
  std::vector<std::uint64_t> masks;
  std::int32_t mask_words = 1;  // ceil(tile_key / 64)
  /// Mask 0 is always the causal one (key offset <= query offset within the tile) when tile_query == tile_key; a kernel
  /// may compute it instead of loading it.
  bool mask0_is_causal = false;

  std::int64_t key_count() const { return keys > 0 ? keys : tokens; }
  std::int64_t mask_count() const { return static_cast<std::int64_t>(masks.size()) / (static_cast<std::int64_t>(tile_query) * mask_words); }
};

}  // namespace tessera
