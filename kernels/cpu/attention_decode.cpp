// Attention of one new token a sequence against cached keys and values: the forward pass's walk, for one query.

#include <omp.h>

#include <algorithm>

#include "kernels/cpu/attention.h"
#include "kernels/cpu/attention_rows.h"
#include "kernels/cpu/check.h"
#include "kernels/cpu/parallel.h"

namespace tessera {
namespace cpu {
namespace {

/// The cache, checked, and where the rows of a call lie in it.
struct Cache {
  Cache(const char* operation, const KeyValueCache& c, const Tensor& qkv, const Tensor& sequences, const Tensor& positions)
      : heads(c.heads), capacity(c.capacity), size(c.head_size), batch(sequences.numel()) {
    require(c.sequences >= 1 && heads >= 1 && capacity >= 1 && size >= 1, operation, "the cache must have sequences, heads, tokens and a head size");
    data = elements<float>(operation, "cache", c.data, c.sequences * 2 * heads * capacity * size);
    sequence = elements<std::int32_t>(operation, "sequences", sequences, batch);
    position = elements<std::int32_t>(operation, "positions", positions, batch);
    require(batch >= 1 && qkv.numel() > 0 && qkv.numel() % (batch * 3 * heads * size) == 0, operation, "qkv must be [B, T, 3, H, D]");
    tokens = qkv.numel() / (batch * 3 * heads * size);
    packed = elements<float>(operation, "qkv", qkv, qkv.numel());
    for (std::int64_t b = 0; b < batch; ++b) {
      require(sequence[b] >= 0 && sequence[b] < c.sequences, operation, "a sequence is outside the cache");
      require(position[b] >= 0 && position[b] + tokens <= capacity, operation, "a position is outside the cache");
    }
  }
  /// Part 0 (keys) or 1 (values) of row b's cache: [capacity, D] of a head.
  float* of(std::int64_t b, std::int64_t part, std::int64_t head) const { return data + ((sequence[b] * heads + head) * 2 + part) * capacity * size; }
  /// Part 0, 1, 2 (q, k, v) of a new token.
  const float* token(std::int64_t b, std::int64_t t, std::int64_t part, std::int64_t head) const {
    return packed + (((b * tokens + t) * 3 + part) * heads + head) * size;
  }

  std::int64_t heads, capacity, size, batch, tokens;  // tokens: new ones of each sequence
  float* data;
  const float* packed;
  const std::int32_t *sequence, *position;
};

struct DecodeCall {
  DecodeCall(const char* operation, const AttentionDecode& a)
      : cache(operation, a.cache, a.qkv, a.sequences, a.positions),
        map(checked_lists(operation, a.tiles, a.math, cache.heads, cache.capacity, cache.size)),
        math(a.math) {
    require(cache.tokens == 1, operation, "qkv must be [B, 3, H, D]: one token a sequence");
    scale = elements<float>(operation, "scale", a.scale, cache.heads);
    threshold = uses_threshold(math) ? elements<float>(operation, "threshold", a.threshold, cache.heads) : nullptr;
    document_start = optional_elements<std::int32_t>(operation, "document_start", a.document_start, cache.batch);
    o = elements<float>(operation, "o", a.o, cache.batch * cache.heads * cache.size);
    z = optional_elements<float>(operation, "z", a.z, cache.batch * cache.heads);
  }

  Cache cache;
  const TileMap& map;
  AttentionMath math;
  const float* scale;
  const float* threshold;
  const std::int32_t* document_start;  // or null
  float* o;
  float* z;  // or null
};

template <Form form, Gate gate>
void decode_row(const DecodeCall& call, std::int64_t b, std::int64_t h, RowsScratch& s) {
  const Cache& cache = call.cache;
  const std::int64_t size = cache.size, p = cache.position[b], first_key = call.document_start ? call.document_start[b] : 0;
  s.begin(cache.token(b, 0, 0, h), size, 1);
  s.tau[0] = tau_of(call.math, size, call.threshold, h, p);
  const float *keys = cache.of(b, 0, h), *values = cache.of(b, 1, h);
  for (const TileEntry entry : query_list(call.map, h, p / call.map.tile_query)) {
    Tile tile;
    tile.first_query = p;
    tile.queries = 1;
    tile.first_key = std::int64_t{entry.tile} * call.map.tile_key;
    if (tile.first_key > p) break;
    tile.keys = std::min<std::int64_t>(call.map.tile_key, p + 1 - tile.first_key);
    if (first_key >= tile.first_key + tile.keys) continue;
    tile.mask = mask_of(call.map, entry.mask, p % call.map.tile_query);
    tile.mask_words = call.map.mask_words;
    tile.document_start = first_key > tile.first_key ? call.document_start + b : nullptr;
    visit_tile<form, gate>(tile, {keys + tile.first_key * size, size}, {values + tile.first_key * size, size}, call.scale[h], false, s);
  }
  const float z = finish_row(call.math, 0, call.o + (b * cache.heads + h) * size, s);
  if (call.z) call.z[b * cache.heads + h] = z;
}

template <Form form, Gate gate>
void decode(const DecodeCall& call) {
  const ThreadScratch memory(omp_get_max_threads(), RowsScratch::elements(1, call.map.tile_key, call.cache.size));
#pragma omp parallel
  {
    RowsScratch scratch(1, call.map.tile_key, call.cache.size, memory.of(omp_get_thread_num()));
#pragma omp for schedule(dynamic, 1)
    for (std::int64_t item = 0; item < call.cache.batch * call.cache.heads; ++item)
      decode_row<form, gate>(call, item / call.cache.heads, item % call.cache.heads, scratch);
  }
}

}  // namespace
}  // namespace cpu

void cpu_cache_append(const CacheAppend& a) {
  const cpu::Cache cache("cache_append", a.cache, a.qkv, a.sequences, a.positions);
  cpu::parallel_ranges(cache.batch * 2 * cache.heads, 1, [&](std::int64_t item, std::int64_t) {
    const std::int64_t b = item / (2 * cache.heads), part = item / cache.heads % 2, h = item % cache.heads;
    float* to = cache.of(b, part, h) + cache.position[b] * cache.size;
    for (std::int64_t t = 0; t < cache.tokens; ++t) std::copy_n(cache.token(b, t, part + 1, h), cache.size, to + t * cache.size);
  });
}

void cpu_attention_decode(const AttentionDecode& a) {
  const cpu::DecodeCall call("attention_decode", a);
  cpu::with_math(call.math, [&](auto form, auto gate) { cpu::decode<form.value, gate.value>(call); });
}

}  // namespace tessera
