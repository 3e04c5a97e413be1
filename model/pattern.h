#pragma once
// Static attention patterns: which keys a query may see, as a pure function of (layer, head, query, key), and the tile lists
// derived from it. Every pattern is intersected with causality (key <= query). Adding a pattern touches this header, pattern.cpp and its test.
//
//   causal                                  j <= i
//   window   {size}                         i - j < size
//   strided  {stride, width}                (i - j) mod stride < width       (Child et al., arXiv 1904.10509)
//   dilated  {window, dilation}             i - j < window * dilation and (i - j) mod dilation == 0
//   global   {tokens}                       j < tokens                       (sinks: the first tokens are visible to all)
//   bigbird  {window, global, random, seed} by blocks of `block` tokens: window blocks back, the first `global` blocks, and `random` blocks
//                                           drawn for each query block by a keyed hash (Zaheer et al., arXiv 2007.14062)
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
  std::int64_t size = 0;                  // window.size | global.tokens | strided.stride | dilated.window | bigbird.window (blocks)
  std::int64_t width = 0;                 // strided.width | dilated.dilation | bigbird.global (blocks)
  std::int64_t random = 0;                // bigbird
  std::int64_t block = 64;                // bigbird
  std::uint64_t seed = 0;                 // bigbird
  std::string file;                       // blocks
  std::shared_ptr<const BlockMask> mask;  // blocks
  std::vector<PatternSpec> children;      // any, all

  bool visible(std::int64_t query, std::int64_t key) const;  // includes key <= query
};

/// A pattern for every layer and head: the last override that covers (layer, head) wins.
struct PatternConfig {
  struct Override {
    int layer_first = 0, layer_last = 1 << 30;  // inclusive
    int head_first = 0, head_last = 1 << 30;    // inclusive
    PatternSpec pattern;
  };
  PatternSpec base;
  std::vector<Override> overrides;

  const PatternSpec& at(int layer, int head) const;
  bool visible(int layer, int head, std::int64_t query, std::int64_t key) const { return at(layer, head).visible(query, key); }
};

/// Canonical text of a pattern, e.g. "any[window{256},global{4}]": equal patterns have equal text.
std::string describe(const PatternSpec& p);

/// Reads a block mask: text, one row a line of '0' and '1', first line "block N". Throws std::invalid_argument naming file and line.
std::shared_ptr<const BlockMask> read_block_mask(const std::string& file);

/// The tile lists of one layer. Exact: tile (a, b) is listed iff it holds a visible edge with query, key < tokens (mask bits beyond are as the
/// pattern says). Time grows with the tiles, not with tokens^2, for every pattern that is a function of i - j or of blocks.
std::shared_ptr<const TileMap> make_tile_map(const PatternConfig& config, int layer, int heads, std::int64_t tokens, int tile_query, int tile_key);

}  // namespace tessera
