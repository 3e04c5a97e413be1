#pragma once
// Static attention patterns: which keys a query may see, as a pure function of (layer, head, query, key), and the tile lists
// derived from it. Every pattern is intersected with causality (key <= query). Adding a pattern touches this header, pattern.cpp and its test.
//
//   causal                                  j <= i
//   window   {size}                         i - j < size
//   strided  {stride, width}                (i - j) mod stride < width       (Child et al., arXiv 1904.10509)
//   dilated  {window, dilation}             i - j < window * dilation and (i - j) mod dilation == 0
//   global   {tokens}                       j < tokens                       (the first tokens are visible to all)
//   bigbird  {window, global, random, seed} by blocks of `block` tokens: the query's own block and the window - 1 before it, the first
//                                           `global` blocks, and `random` different blocks (all, where there are fewer) drawn for each
//                                           query block among itself and those before it by a keyed hash (Zaheer et al., arXiv 2007.14062)
//   blocks   {file}                         an explicit block mask read from a file
//   any [...]  all [...]                    union, intersection
//
// Prefix property, relied on for shorter sequences and for generation: visible(i, j) never depends on the sequence length.

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "kernels/tiles.h"

namespace tessera {

struct BlockMask {                    // contents of a `blocks` file
  std::int64_t block = 0;             // tokens a side
  std::int64_t rows = 0;              // query blocks = key blocks; queries past the last row see what the last row's do (causally: nothing new)
  std::vector<std::uint8_t> visible;  // [rows, rows]
};

struct PatternSpec {
  enum class Kind { causal, window, strided, dilated, global, bigbird, blocks, any, all };
  Kind kind = Kind::causal;
  std::int64_t size = 0;                    // window.size | global.tokens | strided.stride | dilated.window | bigbird.window (blocks)
  std::int64_t width = 0;                   // strided.width | dilated.dilation | bigbird.global (blocks)
  std::int64_t random = 0;                  // bigbird
  std::int64_t block = 64;                  // bigbird
  std::uint64_t seed = 0;                   // bigbird
  std::string file{};                       // blocks
  std::shared_ptr<const BlockMask> mask{};  // blocks
  std::vector<PatternSpec> children{};      // any, all

  /// The definition. Includes key <= query; expects a pattern that passes check_pattern().
  bool visible(std::int64_t query, std::int64_t key) const;
};

/// Throws std::invalid_argument that names the pattern, the value and what it may be (a stride of 0, an empty any, ...).
void check_pattern(const PatternSpec& p);

/// Patterns by blocks (bigbird, blocks): element b says whether query block `row` sees key block b, 0 <= b <= row. Within the
/// diagonal block causality still decides. Throws std::logic_error for other kinds.
std::vector<std::uint8_t> visible_blocks(const PatternSpec& p, std::int64_t row);

/// A pattern for every layer and head: the last override that covers (layer, head) wins.
struct PatternConfig {
  struct Override {
    int layer_first = 0, layer_last = 1 << 30;  // inclusive
    int head_first = 0, head_last = 1 << 30;    // inclusive
    PatternSpec pattern{};
  };
  PatternSpec base;
  std::vector<Override> overrides;

  const PatternSpec& at(int layer, int head) const;
  bool visible(int layer, int head, std::int64_t query, std::int64_t key) const { return at(layer, head).visible(query, key); }
};

/// Canonical text of a pattern, e.g. "any[global{4},window{256}]": equal patterns have equal text. Children of any and all are
/// sorted, repeated ones dropped; a block mask is named by its file and a hash of its contents.
std::string describe(const PatternSpec& p);

/// Reads a block mask: text, one row a line of '0' and '1', first line "block N". Throws std::invalid_argument naming file and line.
std::shared_ptr<const BlockMask> read_block_mask(const std::string& file);

/// The tile lists of one layer. Exact: tile (a, b) is listed iff it holds a visible edge with query, key < tokens. Its mask is that of the
/// whole tile, whatever `tokens` is, and so is kFull (every edge of the whole tile is visible). The lists for fewer tokens are therefore
/// prefixes of these; only a last, partial query tile may have fewer entries.
/// Time grows with the tiles, not with tokens^2. Throws std::invalid_argument for a pattern, a length or tiles that make no map.
std::shared_ptr<const TileMap> make_tile_map(const PatternConfig& config, int layer, int heads, std::int64_t tokens, int tile_query, int tile_key);

/// Makes the key tiles' lists of a group, the transpose of its query tiles', of which there are query_offsets.size() - 1.
void fill_key_lists(TileGroup& group, std::int64_t key_tiles);

}  // namespace tessera
