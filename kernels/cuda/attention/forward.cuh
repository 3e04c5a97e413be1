#pragma once
// Forward kernel.   o_i = (1/z_i) sum_j a_ij v_j,  a = gate(c f(q k^T) + offset)
//
// A block takes a band of neighbouring query tiles of a head; queries stay in shared memory, keys and values stream through a ring of stages
// filled by the producer warp. For each tile: s = q k^T; weights in registers; where any edge of the 64 x 64 tile is active,
// o += a v. No running maximum and no rescaling, except for softmax. The bitmap and the counters fall out of the same pass.

#include "kernels/cuda/attention/gate.cuh"
#include "kernels/tiles.h"

namespace tessera::cuda_attention {

template <int D>
struct ForwardShared {
  static constexpr int kGroups = D == 64 ? 3 : 2;
  static constexpr int kStages = D == 64 ? 5 : 4;
  uint8_t q[kGroups][D / 64][kTileBytes];
  uint8_t k[kStages][D / 64][kTileBytes];
  uint8_t v[kStages][D / 64][kTileBytes];
  Ring<kStages> ring;
  uint64_t own;
};

/// One query tile's row of the active-tile bitmap, written by one thread as the keys go by in ascending order.
struct BitmapWriter {
  uint32_t* to;
  int words, at = 0;
  uint32_t bits = 0;
  __device__ __forceinline__ void mark(int tile) {
    advance(tile >> 5);
    bits |= 1u << (tile & 31);
  }
  __device__ __forceinline__ void advance(int word) {
    for (; at < word; ++at, bits = 0) to[at] = bits;
  }
};

template <int D, bool Softmax, bool Hopper>
__global__ void __launch_bounds__(threads_of(ForwardShared<D>::kGroups, Hopper), 1) forward_kernel(const __grid_constant__ Args a) {
  using Shared = ForwardShared<D>;
  constexpr int kGroups = Shared::kGroups, kStages = Shared::kStages, kParts = D / 64;
  extern __shared__ __align__(1024) uint8_t raw[];  // the swizzle counts from multiples of 1024
  Shared& sm = *reinterpret_cast<Shared*>(raw);

  int band, b, h;
  block_of(a, a.by_query, (a.query_tiles + kGroups - 1) / kGroups, true, band, b, h);
  const int lane = threadIdx.x & 31;
  ring_init<kGroups, Hopper>(sm.ring, &sm.own);

  if (threadIdx.x >= kGroups * kWarpgroup) {  // producer
    if constexpr (Hopper) fewer_registers<producer_registers(kGroups)>();
    if (threadIdx.x >= kGroups * kWarpgroup + 32) return;
    open_loads<Hopper>(&sm.own, kGroups * kParts * kTileBytes, lane);
    for (int w = 0; w < kGroups; ++w)
      load_rows<Hopper, D>(sm.q[w][0], a.q, &a.map_q, &sm.own, (static_cast<int64_t>(kGroups) * band + w) * kTile, b, h, a.tokens, lane);
    close_loads<Hopper>(&sm.own, lane);

    int64_t document[kGroups], document_full[kGroups];  // first visible key of the first row, of the last row
#pragma unroll
    for (int w = 0; w < kGroups; ++w) {
      const int64_t i = (static_cast<int64_t>(kGroups) * band + w) * kTile, last = static_cast<int64_t>(a.tokens) - 1;
      const int* starts = a.document_start + static_cast<int64_t>(b) * a.tokens;
      document[w] = a.document_start ? starts[min(i, last)] : 0;
      document_full[w] = a.document_start ? starts[min(i + 63, last)] : 0;
    }
    const auto keep = [&](Entry& e) {
      const int64_t first_key = e.tile * 64ll;
#pragma unroll
      for (int w = 0; w < kGroups; ++w) {
        const int query = kGroups * band + w;
        if (e.tile >= a.key_tiles || query >= a.query_tiles || first_key + kTile <= document[w]) e.mask[w] = kAbsent;
        if (e.mask[w] == TileEntry::kFull && (first_key < document_full[w] || (max(e.tile, query) + 1ll) * kTile > a.tokens)) e.mask[w] = kEdge;
      }
    };
    const auto load = [&](int stage, int tile) {
      load_rows<Hopper, D>(sm.k[stage][0], a.k, &a.map_k, &sm.ring.full[stage], tile * 64ll, b, h, a.tokens, lane);
      load_rows<Hopper, D>(sm.v[stage][0], a.v, &a.map_v, &sm.ring.full[stage], tile * 64ll, b, h, a.tokens, lane);
    };
    const int64_t list = static_cast<int64_t>(a.group_of_head[h]) * (a.by_query.bands + 1) + band;
    produce<kGroups, Hopper>(sm.ring, a.by_query, list, 2 * kParts * kTileBytes, lane, keep, load);
    return;
  }

  if constexpr (Hopper) more_registers<consumer_registers(kGroups)>();
  using P = Product<Hopper>;
  const int group = threadIdx.x / kWarpgroup, warp = (threadIdx.x / 32) & 3, thread = threadIdx.x % kWarpgroup;
  const int tile = kGroups * band + group, r0 = warp * 16 + lane / 4;
  const bool exists = tile < a.query_tiles;
  const int64_t i0 = static_cast<int64_t>(tile) * kTile + r0, i8 = i0 + 8;

  const float scale = Softmax ? a.scale[h] * kLog2e : a.scale[h];
  float offset0 = 0, offset8 = 0;
  if (!Softmax) offset0 = row_offset(a, h, i0, D), offset8 = row_offset(a, h, i8, D);
  int64_t document0 = 0, document8 = 0;
  if (a.document_start && exists) {
    const int* starts = a.document_start + static_cast<int64_t>(b) * a.tokens;
    document0 = starts[min(i0, static_cast<int64_t>(a.tokens) - 1)], document8 = starts[min(i8, static_cast<int64_t>(a.tokens) - 1)];
  }
  const bool rising = scale > 0;

  Acc o[kParts];
#pragma unroll
  for (int d = 0; d < kParts; ++d) {
#pragma unroll
    for (int j = 0; j < 8; ++j) o[d][j][0] = o[d][j][1] = o[d][j][2] = o[d][j][3] = 0.f;
  }
  float sum0 = 0, sum8 = 0, top0 = -INFINITY, top8 = -INFINITY;
  int visible0 = 0, visible8 = 0, active_edges = 0, active_tiles = 0, visible_tiles = 0;
  bool likely = true;  // was the last tile active? Only decides which check comes first, never a value
  BitmapWriter bitmap{a.active + ((static_cast<int64_t>(b) * a.heads + h) * a.query_tiles + tile) * a.words, a.words};

  // The product a v of a tile runs while the next tile's scores become weights: `held` is the stage of that tile, its weights in p.
  Frag p;
  int held = -1;
  const auto release = [&](int stage) {
    __syncwarp();
    if (lane == 0) barrier_arrive(&sm.ring.empty[stage]);
  };
  const auto add_values = [&] {
    P::begin();
    accumulate<Hopper>(o, p, sm.v[held], lane);
    P::commit();
  };

  for (Cursor at;; at.next<kStages>()) {
    barrier_wait(&sm.ring.full[at.stage], at.phase);
    const int other = sm.ring.entry[at.stage].tile, mask = sm.ring.entry[at.stage].mask[group];
    if (other < 0) break;
    if (mask == kAbsent) {  // nothing may be held back here, or the producer could wait for it
      if (held >= 0) {
        add_values();
        P::template wait<0>();
        release(held), held = -1;
      }
      release(at.stage);
      continue;
    }
    Acc s;
    P::begin();
    multiply_rows<Hopper>(s, sm.q[group], sm.k[at.stage], warp, lane);
    P::commit();
    if (held >= 0) {
      add_values();
      P::template wait<1>();
    } else {
      P::template wait<0>();
    }
    P::settle(s);

    bool visible = true;
    if (mask != TileEntry::kFull) {
      const int64_t first_key = static_cast<int64_t>(other) * kTile;
      const uint64_t m0 = query_mask(a, mask, r0, i0, first_key, document0), m8 = query_mask(a, mask, r0 + 8, i8, first_key, document8);
      hide(s, m0, m8, lane);
      visible0 += __popcll(m0), visible8 += __popcll(m8);
      visible = warpgroup_any(m0 | m8, group);
    } else {
      visible0 += 64, visible8 += 64;
    }
    visible_tiles += visible;

    bool active = visible;
    if constexpr (Softmax) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float f = a.fidelity ? s[j][e] * s[j][e] : s[j][e];
          s[j][e] = isnan(f) ? -INFINITY : f * scale;
        }
      }
      float new0 = top0, new8 = top8;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        new0 = fmaxf(new0, fmaxf(s[j][0], s[j][1]));
        new8 = fmaxf(new8, fmaxf(s[j][2], s[j][3]));
      }
      new0 = quad_max(new0), new8 = quad_max(new8);
      const float base0 = new0 == -INFINITY ? 0.f : new0, base8 = new8 == -INFINITY ? 0.f : new8;
      const float decay0 = exp2f(top0 - base0), decay8 = exp2f(top8 - base8);
      top0 = new0, top8 = new8;
      sum0 *= decay0, sum8 *= decay8;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        s[j][0] = exp2f(s[j][0] - base0), s[j][1] = exp2f(s[j][1] - base0);
        s[j][2] = exp2f(s[j][2] - base8), s[j][3] = exp2f(s[j][3] - base8);
        sum0 += s[j][0], sum0 += s[j][1];
        sum8 += s[j][2], sum8 += s[j][3];
      }
      P::template wait<0>();
#pragma unroll
      for (int d = 0; d < kParts; ++d) {
        P::settle(o[d]);
#pragma unroll
        for (int j = 0; j < 8; ++j) o[d][j][0] *= decay0, o[d][j][1] *= decay0, o[d][j][2] *= decay8, o[d][j][3] *= decay8;
      }
    } else {
      if (active && !likely && rising && !a.visit_all) active = warpgroup_any(any_active(a, s, scale, offset0, offset8), group);
      if (active) {
        float2 sum;
        with_gate(a, [&](auto gate, auto fidelity) { sum = weigh<gate.value, fidelity.value>(s, scale, offset0, offset8); });
        sum0 += sum.x, sum8 += sum.y;
        active = warpgroup_any(sum.x + sum.y > 0.f, group);
      }
      likely = active;
    }
    P::template wait<0>();
    if (held >= 0) release(held), held = -1;
    if (active) {
      ++active_tiles;
      if (thread == 0) bitmap.mark(other);
    }
    if (active || (a.visit_all && visible)) {
      round_fragment(p, s);
      if (!Softmax && a.counters) active_edges += count_positive(p);
      held = at.stage;
    } else {
      release(at.stage);
    }
  }
  if (held >= 0) add_values();
  P::template wait<0>();
#pragma unroll
  for (int d = 0; d < kParts; ++d) P::settle(o[d]);
  if (!exists) return;

  if (thread == 0) {
    bitmap.advance(a.words - 1);
    bitmap.to[a.words - 1] = bitmap.bits;
  }
  sum0 = quad_sum(sum0), sum8 = quad_sum(sum8);
  const auto finish = [&](float sum, float top, int visible, float& z) {
    if constexpr (Softmax) {
      z = sum > 0.f ? top * kLn2 + logf(sum) : 0.f;
      return sum > 0.f ? 1.f / sum : 0.f;
    }
    z = a.normalize_sum ? a.epsilon + sum : a.normalize_length ? powf(static_cast<float>(max(visible, 1)), a.length_alpha) : 1.f;
    return z > 0.f ? 1.f / z : 0.f;
  };
  float z0, z8;
  const float inverse0 = finish(sum0, top0, visible0, z0), inverse8 = finish(sum8, top8, visible8, z8);
#pragma unroll
  for (int d = 0; d < kParts; ++d) store_product(o[d], a.o, b, h, i0, a.tokens, d * 64, lane, inverse0, inverse8);
  const bool first = (lane & 3) == 0, in0 = first && i0 < a.tokens, in8 = first && i8 < a.tokens;
  const int64_t z_at = (static_cast<int64_t>(b) * a.heads + h) * a.tokens;
  if (in0) a.z[z_at + i0] = z0;
  if (in8) a.z[z_at + i8] = z8;

  if (a.counters) {
    unsigned visible = (in0 ? visible0 : 0) + (in8 ? visible8 : 0), empty = (in0 && !(sum0 > 0.f)) + (in8 && !(sum8 > 0.f));
    visible = __reduce_add_sync(0xffffffffu, visible);
    empty = __reduce_add_sync(0xffffffffu, empty);
    const unsigned active = Softmax ? visible : __reduce_add_sync(0xffffffffu, static_cast<unsigned>(active_edges));
    if (lane == 0) {
      unsigned long long* counters = a.counters + h * 5ll;
      atomicAdd(counters + 0, static_cast<unsigned long long>(active));
      atomicAdd(counters + 1, static_cast<unsigned long long>(visible));
      if (warp == 0) atomicAdd(counters + 2, static_cast<unsigned long long>(active_tiles));
      if (warp == 0) atomicAdd(counters + 3, static_cast<unsigned long long>(visible_tiles));
      if (empty) atomicAdd(counters + 4, static_cast<unsigned long long>(empty));
    }
  }
}

}  // namespace tessera::cuda_attention
