#pragma once
// Which tiles of attention a trained model computes on real text, at several sizes of tiles at once: forward passes over validation sequences on the
// CPU, in fp32, with tiles of 16 x 16. A larger tile, of a whole number of those a side, is active when any of its parts is.

#include <array>
#include <cstdint>
#include <string>
#include <vector>

namespace tessera {

/// Of a square tile of queries and keys.
enum class TileState : std::uint8_t {
  future,      // no key in it comes before a query: not causal
  structural,  // the pattern hides every edge
  skipped,     // visible, and no edge is active: the gate let none through, or they lead into another document
  active
};

inline constexpr std::array<int, 4> kTileSizes = {16, 32, 64, 128};  // queries and keys a side

/// One head's tiles on one sequence.
struct HeadTiles {
  int layer = 0, head = 0;
  std::int64_t tiles = 0;        // a side
  std::vector<TileState> state;  // [tiles, tiles], queries by keys
};

/// Of the causal tiles of one size, the share that is not active.
struct TileMeasurement {
  std::string checkpoint, data;                       // folders
  std::int64_t step = 0, tokens = 0, sequences = 0;   // tokens: of each sequence
  std::array<double, kTileSizes.size()> skip_rate{};  // of all layers, heads and sequences, by kTileSizes
  double edge_sparsity = 0;                           // 1 - active / causal edges, of the same
  /// [layers][heads], by kTileSizes.
  std::vector<std::vector<std::array<double, kTileSizes.size()>>> head_skip_rate;
  std::vector<HeadTiles> first_sequence;  // each head's tiles of 16 x 16 on the first sequence
};

struct MeasureOptions {
  std::int64_t sequences = 4;  // from the start of the validation split, at most
  std::int64_t tokens = 2048;  // a sequence: the context, and at most these
  int threads = 0;
};

/// Of the newest checkpoint of a run. Throws std::invalid_argument when there is none, or not the data that it was trained on or no validation
/// split; std::runtime_error when one of them is damaged.
TileMeasurement measure_tiles(const std::string& run, const MeasureOptions& options);

// Its parts, for tests.

/// The map with tiles `times` as large a side. A state is that of the part that does most: active, skipped, structural, future.
HeadTiles coarser(const HeadTiles& map, int times);
/// Of the map's tiles that are not future: those that are not active, and all.
struct TileTally {
  std::int64_t idle = 0, causal = 0;
};
TileTally tally(const HeadTiles& map);

}  // namespace tessera
