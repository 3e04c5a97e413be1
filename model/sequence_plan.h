#pragma once
// Sequence parallelism, planned on the host, once: which rank of a sequence group holds which tokens, which key tiles its queries may see, who owns
// those, and so what every rank sends and receives. Pure functions of the pattern and the layout; no communication here.
//
// A sequence of T tokens is cut into blocks of lcm(tile_query, tile_key) tokens; only the last may be shorter. A rank holds whole blocks, in
// ascending order: what it computes on is [B, tokens of the rank, ...], and row t of it is token positions(rank)[t] of the sequence. Key tiles are
// numbered over the whole sequence (global) or by their place in the compact buffer that a rank fetches (compact), also ascending. Since masks do not
// depend on the place (kernels/tiles.h) and only the last tile of a sequence can be short, the kernels run on the compact buffer as they do on a
// whole sequence, and visit the same tiles in the same order as one rank would.

#include <cstdint>
#include <memory>
#include <vector>

#include "kernels/device.h"
#include "kernels/tiles.h"

namespace tessera {

enum class SequenceLayout { contiguous, zigzag, balanced };

/// How keys and values reach the queries of other ranks; automatic: whichever moves fewest bytes.
enum class SequenceExchange { needed, ring, heads, automatic };
const char* name_of(SequenceExchange e);  // "needed", ..., "auto"

/// Which rank holds which blocks.
struct SequenceSplit {
  std::int64_t tokens = 0;                        // of the whole sequence
  std::int64_t block = 0;                         // tokens of a block
  std::vector<std::vector<std::int32_t>> blocks;  // [ranks] ascending; each rank has at least one

  int ranks() const { return static_cast<int>(blocks.size()); }
  std::int64_t block_count() const { return (tokens + block - 1) / block; }
  std::int64_t tokens_of(int rank) const;
  /// Index in the sequence of each of the rank's tokens, ascending.
  std::vector<std::int32_t> positions(int rank) const;
  /// The rank that holds each block.
  std::vector<std::int32_t> owners() const;
};

/// Deals the blocks of a sequence to ranks.
///   contiguous  neighbouring blocks, as many each as divides evenly; the first ranks have one more where it does not
///   zigzag      as contiguous over 2 x ranks parts, of which rank r has the parts r and 2 ranks - 1 - r
///   balanced    visible tiles of a rank, of all heads of all layers, differ from any other's by at most those of the largest row of blocks. Of the
///               splits that keep this bound, the one whose ranks fetch fewest keys among: contiguous; neighbouring blocks cut where the tiles
///               balance; zigzag with some blocks moved until they do; and the longest row to the rank with fewest tiles (Graham, 1969), which
///               always keeps it. The others also may not give a rank more than 1/8 above its even share of blocks, since all but attention is
///               paid by tokens. So a window, whose bytes are fewest among neighbours, stays with neighbours, and causal gets zigzag.
/// `layers` are the tile maps of the layers over the whole sequence (equal ones may be the same pointer), with equal tiles; only `balanced` reads
/// their lists. Time grows with the listed tiles.
/// Throws std::invalid_argument, saying which numbers would do, when there are fewer blocks than parts, and for maps that fit no such sequence.
/// `device`: only what an error proposes depends on it (a GPU has tiles of one size).
SequenceSplit split_sequence(SequenceLayout layout, std::int64_t tokens, int ranks, const std::vector<std::shared_ptr<const TileMap>>& layers,
                             DeviceKind device = DeviceKind::cpu);

/// A key tile of one head.
struct HeadTile {
  std::int32_t head, tile;
  bool operator==(const HeadTile&) const = default;
};

/// One layer as one rank sees it, exchange `needed`.
struct NeededKeys {
  // Global numbers of the key tiles in the compact buffer, ascending: what any of its heads needs. Never empty: a rank whose queries see nothing has
  // the first of its own tiles there. What a head does not need of them is neither received nor listed.
  std::vector<std::int32_t> tiles;
  std::int64_t keys = 0;                       // rows of the compact buffer
  std::shared_ptr<const TileMap> lists;        // this rank's queries over the compact buffer
  std::vector<std::vector<HeadTile>> receive;  // [ranks] tiles (global) that other ranks send, by head and then by tile; empty for this rank
  std::vector<HeadTile> own;                   // tiles (global) of this rank that its own queries touch, in the same order
};

/// The plan of one layer for every rank: element r is rank r's. Rank r sends to rank s what element s receives from r.
/// `map` is that of the whole sequence, of at least split.tokens tokens; entries of a longer one without an edge among these tokens are left out.
/// Masks keep their numbers. Throws std::invalid_argument for a map that does not fit the split.
std::vector<NeededKeys> plan_needed(const SequenceSplit& split, const TileMap& map);

}  // namespace tessera
