#pragma once
// Blocks of a sequence dealt to ranks, for split_sequence (sequence_plan.h). Nothing here knows of patterns: a row of blocks is so many tiles.

#include <cstdint>
#include <vector>

namespace tessera {

using Blocks = std::vector<std::vector<std::int32_t>>;  // [ranks] ascending

/// Neighbouring blocks, as many a part as divides evenly; the first parts have one more where it does not.
Blocks even_parts(std::int64_t blocks, int parts);
/// even_parts over 2 x ranks parts; rank r has the parts r and 2 ranks - 1 - r.
Blocks zigzag_parts(std::int64_t blocks, int ranks);

/// Ways to deal the rows, of so many tiles each, so that no two ranks differ by more than the largest row; at least one, and each rank has a row.
///   - even_parts, where they are so
///   - neighbours, cut where the tiles balance
///   - zigzag_parts, with rows moved from the rank with most tiles to the one with fewest
///   - the longest row to the rank with fewest tiles
/// The first three only where no rank has more than 1/8 above its even share of rows.
std::vector<Blocks> balanced_blocks(int ranks, const std::vector<std::int64_t>& rows);

}  // namespace tessera
