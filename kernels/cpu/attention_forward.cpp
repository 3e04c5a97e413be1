// Attention, forward: a query tile walks its list of key tiles (attention_rows.h has the steps).

#include <omp.h>

#include "kernels/cpu/attention.h"
#include "kernels/cpu/attention_rows.h"

namespace tessera {
namespace cpu {
namespace {

struct Counts {
  std::uint64_t of[kAttentionCounters] = {};
};

template <Form form, Gate gate>
Counts query_tile(const AttentionCall& call, std::int64_t b, std::int64_t h, std::int64_t at, RowsScratch& s) {
  const std::int64_t first = at * call.tile_query, queries = std::min(call.tile_query, call.tokens - first);
  s.begin(call.q.at(b, h, first), call.q.token, queries);
  for (std::int64_t i = 0; i < queries; ++i) s.tau[i] = call.tau(h, first + i);
  if (call.carry && !call.carry_first) s.resume(call.carry_of(b, h, first), queries);
  std::uint32_t* bitmap = call.bitmap(b, h, at);
  std::fill_n(bitmap, call.words, 0u);

  Counts counts;
  const auto documents = call.documents_of(b, at);
  for (const TileEntry entry : call.query_list(h, at)) {
    if (entry.tile >= call.key_tiles) break;
    Tile tile;
    if (!call.tile(at, entry.tile, entry.mask, documents, tile)) continue;
    const TileEdges edges = visit_tile<form, gate>(tile, {call.k.at(b, h, tile.first_key), call.k.token},
                                                   {call.v.at(b, h, tile.first_key), call.v.token}, call.scale[h], call.visit_all, s);
    counts.of[kVisibleEdges] += edges.visible;
    counts.of[kVisibleTiles] += edges.visible > 0;
    counts.of[kActiveEdges] += edges.active;
    counts.of[kActiveTiles] += edges.active > 0;
    if (edges.active > 0) bitmap[entry.tile / 32] |= 1u << (entry.tile % 32);
  }

  if (call.carry && !call.carry_last) {
    s.suspend(call.carry_of(b, h, first), queries);
    return counts;
  }
  float* z = call.z_of(b, h, at);
  for (std::int64_t i = 0; i < queries; ++i) {
    z[i] = finish_row(call.math, i, call.o.at(b, h, first + i), s);
    counts.of[kEmptyRows] += (gate == Gate::softmax ? s.seen[i] : s.active[i]) == 0;
  }
  return counts;
}

template <Form form, Gate gate>
void forward(const AttentionCall& call) {
  const ThreadScratch memory(omp_get_max_threads(), RowsScratch::elements(call.tile_query, call.tile_key, call.size));
#pragma omp parallel
  {
    RowsScratch scratch(call.tile_query, call.tile_key, call.size, memory.of(omp_get_thread_num()));
#pragma omp for schedule(dynamic, 1)
    for (std::int64_t item = 0; item < call.batch * call.heads * call.query_tiles; ++item) {
      // Within a head from the last query tile on: causal lists are longest there, and the longest go first.
      const std::int64_t head = item / call.query_tiles, at = call.query_tiles - 1 - item % call.query_tiles;
      const auto counts = query_tile<form, gate>(call, head / call.heads, head % call.heads, at, scratch);
      if (call.counters)
        for (int n = 0; n < kAttentionCounters; ++n) {
          std::uint64_t& counter = call.counters[head % call.heads * kAttentionCounters + n];
#pragma omp atomic
          counter += counts.of[n];
        }
    }
  }
}

}  // namespace
}  // namespace cpu

void cpu_attention_forward(const AttentionForward& a) {
  const cpu::AttentionCall call("attention_forward", a);
  cpu::with_math(call.math, [&](auto form, auto gate) { cpu::forward<form.value, gate.value>(call); });
}

}  // namespace tessera
