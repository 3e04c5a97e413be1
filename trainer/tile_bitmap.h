#pragma once
// The bitmaps of active tiles that attention leaves (AttentionForward::active_tiles), as bytes.

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/attention.h"

namespace tessera {

/// [rows, bitmap_words(key_tiles)] -> [rows, key_tiles], 1 where a tile is active.
inline std::vector<std::uint8_t> unpack_tiles(std::span<const std::uint32_t> bits, std::int64_t rows, std::int64_t key_tiles) {
  const std::int64_t words = bitmap_words(key_tiles);
  std::vector<std::uint8_t> tiles;
  tiles.reserve(static_cast<std::size_t>(rows * key_tiles));
  for (std::int64_t row = 0; row < rows; ++row)
    for (std::int64_t tile = 0; tile < key_tiles; ++tile) tiles.push_back((bits[row * words + tile / 32] >> (tile % 32)) & 1u);
  return tiles;
}

}  // namespace tessera
