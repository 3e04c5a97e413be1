#pragma once
// One call of the CPU attention, taken apart: typed addresses, tile counts, lists, and the checks of what the caller gave.

#include <cstdint>
#include <memory>
#include <new>
#include <span>

#include "kernels/attention.h"
#include "kernels/cpu/attention_tile.h"

namespace tessera::cpu {

/// A [B, H, T, D] tensor of floats with strides.
struct Heads {
  float* data;
  std::int64_t batch, head, token;
  float* at(std::int64_t b, std::int64_t h, std::int64_t t) const { return data + b * batch + h * head + t * token; }
};

/// A view of [batch, heads, rows, size] floats, checked.
Heads checked_heads(const char* operation, const char* name, const HeadsView& view, std::int64_t batch, std::int64_t heads, std::int64_t rows,
                    std::int64_t size);

/// The lists of a call, after checks of what every call of the attention has: tiles, heads, head size, math, 1 to map.tokens tokens.
const TileMap& checked_lists(const char* operation, const DeviceTiles* tiles, const AttentionMath& math, std::int64_t heads, std::int64_t tokens,
                             std::int64_t size);

/// The key tiles of a query tile, ascending.
std::span<const TileEntry> query_list(const TileMap& map, std::int64_t head, std::int64_t query_tile);

/// The mask of a listed tile from row `row` on, or null when every edge of the tile is visible.
inline const std::uint64_t* mask_of(const TileMap& map, std::int32_t mask, std::int64_t row) {
  return mask == TileEntry::kFull ? nullptr : map.masks.data() + (static_cast<std::int64_t>(mask) * map.tile_query + row) * map.mask_words;
}

/// Whether tau_h is used: not by softmax, and not with a threshold of each query.
inline bool uses_threshold(const AttentionMath& math) { return math.gate != Gate::softmax && !(math.length_beta > 0); }
/// tau of query i: threshold[head], or that of the query with length_beta, or 0 for softmax.
float tau_of(const AttentionMath& math, std::int64_t size, const float* threshold, std::int64_t head, std::int64_t i);

struct AttentionCall {
  /// Checks everything; throws std::logic_error that names `operation` and the argument.
  AttentionCall(const char* operation, const AttentionForward& a);
  /// `rows`: tokens or keys.
  Heads heads_of(const char* operation, const char* name, const HeadsView& view, std::int64_t rows) const {
    return checked_heads(operation, name, view, batch, heads, rows, size);
  }

  std::int64_t batch, heads, tokens, keys, size;  // size: elements of a head
  std::int64_t tile_query, tile_key, query_tiles, key_tiles, words;
  AttentionMath math;
  bool visit_all;
  const TileMap* map;
  Heads q, k, v, o;
  const float* scale;
  const float* threshold;              // null where tau is not used
  const std::int32_t* document_start;  // or null
  const std::int32_t* positions;       // or null
  float* z;
  std::uint32_t* active_tiles;
  std::uint64_t* counters;  // or null
  float* carry;             // or null
  bool carry_first, carry_last;

  std::span<const TileEntry> query_list(std::int64_t head, std::int64_t query_tile) const { return cpu::query_list(*map, head, query_tile); }
  std::span<const TileEntry> key_list(std::int64_t head, std::int64_t key_tile) const;

  /// The documents that a query tile's queries lie in.
  struct Documents {
    const std::int32_t* start = nullptr;  // of each query, or null without documents
    std::int32_t first = 0, last = 0;     // least and greatest of them
  };
  Documents documents_of(std::int64_t b, std::int64_t query_tile) const;

  /// The tile (query_tile, key_tile), or false when it lies wholly before its queries' documents.
  bool tile(std::int64_t query_tile, std::int64_t key_tile, std::int32_t mask, const Documents& documents, Tile& out) const;

  float tau(std::int64_t head, std::int64_t i) const { return tau_of(math, size, threshold, head, positions ? positions[i] : i); }

  /// Word of the bitmap that holds key tile 0 of a query tile.
  std::uint32_t* bitmap(std::int64_t b, std::int64_t h, std::int64_t query_tile) const {
    return active_tiles + ((b * heads + h) * query_tiles + query_tile) * words;
  }
  bool is_active(std::int64_t b, std::int64_t h, std::int64_t query_tile, std::int64_t key_tile) const {
    return (bitmap(b, h, query_tile)[key_tile / 32] >> (key_tile % 32)) & 1u;
  }
  /// What query `first` of a head and those after it carry from call to call.
  float* carry_of(std::int64_t b, std::int64_t h, std::int64_t first) const {
    return carry + ((b * heads + h) * tokens + first) * (size + kCarryExtra);
  }
  float* z_of(std::int64_t b, std::int64_t h, std::int64_t query_tile) const { return z + (b * heads + h) * tokens + query_tile * tile_query; }
};

/// Memory for every thread's tiles, taken in one piece before the threads start, so that none can fail to get it.
class ThreadScratch {
 public:
  /// `elements` floats a thread, zero-filled.
  ThreadScratch(int threads, std::int64_t elements)
      : stride_(padded(elements)), data_(static_cast<float*>(::operator new (bytes(threads), std::align_val_t{64}))) {
    std::fill_n(data_.get(), stride_ * threads, 0.0f);
  }
  float* of(int thread) const { return data_.get() + stride_ * thread; }

 private:
  struct Free {
    void operator()(float* p) const { ::operator delete (p, std::align_val_t{64}); }
  };
  std::size_t bytes(int threads) const { return static_cast<std::size_t>(stride_) * threads * sizeof(float); }
  std::int64_t stride_;
  std::unique_ptr<float, Free> data_;
};

/// Hands out consecutive, cache-line aligned pieces of a thread's scratch.
class Carver {
 public:
  explicit Carver(float* at) : at_(at) {}
  float* floats(std::int64_t n) {
    float* p = at_;
    at_ += padded(n);
    return p;
  }
  std::int32_t* ints(std::int64_t n) { return reinterpret_cast<std::int32_t*>(floats(n)); }

 private:
  float* at_;
};

}  // namespace tessera::cpu
