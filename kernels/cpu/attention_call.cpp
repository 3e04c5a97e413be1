#include "kernels/cpu/attention_call.h"

#include <cmath>
#include <limits>

#include "kernels/cpu/check.h"

namespace tessera::cpu {

Heads checked_heads(const char* operation, const char* name, const HeadsView& view, std::int64_t batch, std::int64_t heads, std::int64_t rows,
                    std::int64_t size) {
  if (view.dtype != DType::f32) throw std::logic_error(fmt::format("{}: {} must be f32 on the CPU, and is {}", operation, name, name_of(view.dtype)));
  if (!view.data && batch > 0) throw std::logic_error(fmt::format("{}: {} has no memory", operation, name));
  // A stride matters only where there is a second element along it.
  if ((rows > 1 && view.token < size) || (heads > 1 && view.head < size) || (batch > 1 && view.batch < size))
    throw std::logic_error(fmt::format("{}: {} has strides (batch {}, head {}, token {}) that overlap its {} elements", operation, name, view.batch,
                                       view.head, view.token, size));
  return {static_cast<float*>(view.data), view.batch, view.head, view.token};
}

const TileMap& checked_lists(const char* operation, const DeviceTiles* tiles, const AttentionMath& math, std::int64_t heads, std::int64_t tokens,
                             std::int64_t size) {
  require(tiles != nullptr, operation, "no tile lists were given");
  const TileMap& map = tiles->host();
  const auto tile_fits = [](std::int64_t t) { return t >= 8 && t <= 128 && t % 8 == 0; };
  require(tile_fits(map.tile_query) && tile_fits(map.tile_key), operation, "tile sizes must be multiples of 8 from 8 to 128");
  require(heads >= 1 && tokens >= 1 && tokens <= map.tokens, operation, "the sequence must have 1 to tiles->host().tokens tokens");
  require(tokens <= std::numeric_limits<std::int32_t>::max(), operation, "the sequence has more tokens than an i32 can count");
  require(size >= 8 && size <= 256 && size % 8 == 0, operation, "head_size must be a multiple of 8 from 8 to 256");
  require(std::ssize(map.group_of_head) >= heads, operation, "the tile lists are of fewer heads");
  require(math.length_beta == 0 || math.score == Score::cosine, operation, "length_beta wants score cosine");
  return map;
}

std::span<const TileEntry> query_list(const TileMap& map, std::int64_t head, std::int64_t query_tile) {
  const TileGroup& g = map.groups[map.group_of_head[head]];
  const auto first = g.query_offsets[query_tile], last = g.query_offsets[query_tile + 1];
  return std::span(g.query_entries).subspan(first, last - first);
}

float tau_of(const AttentionMath& math, std::int64_t size, const float* threshold, std::int64_t head, std::int64_t i) {
  if (math.gate == Gate::softmax) return 0.0f;
  if (math.length_beta > 0)
    return static_cast<float>(math.length_beta * std::sqrt(2.0 * std::log(static_cast<double>(i) + 2.0) / static_cast<double>(size)));
  return threshold[head];
}

AttentionCall::AttentionCall(const char* operation, const AttentionForward& a)
    : batch(a.shape.batch),
      heads(a.shape.heads),
      tokens(a.shape.tokens),
      keys(a.key_count()),
      size(a.shape.head_size),
      math(a.math),
      visit_all(a.visit == Visit::all) {
  map = &checked_lists(operation, a.tiles, math, heads, tokens, size);
  require(batch >= 0, operation, "the batch must not be negative");
  require(keys >= 1 && keys <= map->key_count(), operation, "there must be 1 to tiles->host().key_count() keys");
  require(keys <= std::numeric_limits<std::int32_t>::max(), operation, "there are more keys than an i32 can count");
  tile_query = map->tile_query;
  tile_key = map->tile_key;
  query_tiles = (tokens + tile_query - 1) / tile_query;
  key_tiles = (keys + tile_key - 1) / tile_key;
  words = bitmap_words(key_tiles);
  q = heads_of(operation, "q", a.q, tokens);
  k = heads_of(operation, "k", a.k, keys);
  v = heads_of(operation, "v", a.v, keys);
  o = heads_of(operation, "o", a.o, tokens);
  scale = elements<float>(operation, "scale", a.scale, heads);
  threshold = uses_threshold(math) ? elements<float>(operation, "threshold", a.threshold, heads) : nullptr;
  document_start = optional_elements<std::int32_t>(operation, "document_start", a.document_start, batch * tokens);
  positions = optional_elements<std::int32_t>(operation, "positions", a.positions, tokens);
  z = elements<float>(operation, "z", a.z, batch * heads * tokens);
  active_tiles = elements<std::uint32_t>(operation, "active_tiles", a.active_tiles, batch * heads * query_tiles * words);
  carry = optional_elements<float>(operation, "carry", a.carry, batch * heads * tokens * (size + kCarryExtra));
  carry_first = a.carry_first;
  carry_last = a.carry_last;
  counters = optional_elements<std::uint64_t>(operation, "counters", a.counters, heads * kAttentionCounters);
}

std::span<const TileEntry> AttentionCall::key_list(std::int64_t head, std::int64_t key_tile) const {
  const TileGroup& g = map->groups[map->group_of_head[head]];
  const auto first = g.key_offsets[key_tile], last = g.key_offsets[key_tile + 1];
  return std::span(g.key_entries).subspan(first, last - first);
}

AttentionCall::Documents AttentionCall::documents_of(std::int64_t b, std::int64_t query_tile) const {
  Documents d;
  if (!document_start) return d;
  d.start = document_start + b * tokens + query_tile * tile_query;
  const auto queries = std::min(tile_query, tokens - query_tile * tile_query);
  const auto [first, last] = std::minmax_element(d.start, d.start + queries);
  d.first = *first;
  d.last = *last;
  return d;
}

bool AttentionCall::tile(std::int64_t query_tile, std::int64_t key_tile, std::int32_t mask, const Documents& documents, Tile& out) const {
  out.first_query = query_tile * tile_query;
  out.queries = std::min(tile_query, tokens - out.first_query);
  out.first_key = key_tile * tile_key;
  out.keys = std::min(tile_key, keys - out.first_key);
  out.mask_words = map->mask_words;
  out.mask = mask_of(*map, mask, 0);
  out.document_start = documents.last > out.first_key ? documents.start : nullptr;
  return !documents.start || documents.first < out.first_key + out.keys;
}

}  // namespace tessera::cpu
