#pragma once
// Forward kernel.   o_i = (1/z_i) sum_j a_ij v_j,  a = gate(c f(q k^T) + offset)
//
// A block takes a band of neighbouring query tiles of a head, one consumer warpgroup each; keys and values stream through a ring of stages
// filled by the producer warp. For each tile: s = q k^T; weights in registers; where any edge of the 64 x 64 tile is active,
// o += a v, which runs while the next tile's scores become weights. No running maximum and no rescaling, except for softmax. The bitmap and
// the counters fall out of the same pass.

#include "kernels/cuda/attention/gate.cuh"

namespace tessera::cuda_attention {

template <int D>
struct ForwardShared {
  static constexpr int kGroups = D == 64 ? 3 : 2, kStages = D == 64 ? 5 : 4;
  static constexpr uint32_t kRows = D / 64 * kTileBytes;  // 64 rows of one tensor
  static constexpr uint32_t kQ = 0, kK = kGroups * kRows, kV = kK + kStages * kRows, kRing = kV + kStages * kRows;
  static constexpr uint32_t kBytes = kRing + Ring<kGroups, true, kStages>::kBytes;
};

template <int D, int Variant, bool Hopper>
__global__ void __launch_bounds__(threads_of(ForwardShared<D>::kGroups, Hopper), 1) forward_kernel(const __grid_constant__ Args a) {
  using Shared = ForwardShared<D>;
  using Gate = Gates<Variant>;
  using P = Product<Hopper>;
  constexpr int kGroups = Shared::kGroups, kStages = Shared::kStages, kParts = D / 64;
  constexpr uint32_t kRows = Shared::kRows;
  extern __shared__ __align__(1024) uint8_t raw[];  // the swizzle counts from multiples of 1024
  const uint32_t base = kept(shared_address(raw));
  const Ring<kGroups, Hopper, kStages> ring{base + Shared::kRing};

  int band, b, h;
  block_of(a, a.by_query, (a.query_tiles + kGroups - 1) / kGroups, true, band, b, h);
  const int lane = threadIdx.x & 31;
  ring.init();

  if (threadIdx.x >= kGroups * kWarpgroup) {  // producer
    if constexpr (Hopper) fewer_registers<producer_registers(kGroups)>();
    if (threadIdx.x >= kGroups * kWarpgroup + 32) return;
    open_loads<Hopper>(ring.own(), kGroups * kRows, lane);
    for (int w = 0; w < kGroups; ++w) {
      load_rows<Hopper, D>(base + Shared::kQ + w * kRows, a.q, &a.map_q, ring.own(), (kGroups * band + w) * kTile, b, h, a.tokens, lane);
    }
    close_loads<Hopper>(ring.own(), lane);

    DocumentBounds documents[kGroups];
#pragma unroll
    for (int w = 0; w < kGroups; ++w) documents[w] = document_bounds(a, b, min(kGroups * band + w, a.query_tiles - 1));
    const auto keep = [&](Entry& e) {
#pragma unroll
      for (int w = 0; w < kGroups; ++w) {
        const int query = kGroups * band + w;
        if (e.tile >= a.key_tiles || query >= a.query_tiles || (e.tile + 1) * kTile <= documents[w].first) e.mask[w] = kAbsent;
        e.mask[w] = cut_mask(a, e.mask[w], query, e.tile, documents[w]);
      }
    };
    const auto load = [&](int stage, int tile) {
      load_rows<Hopper, D>(base + Shared::kK + stage * kRows, a.k, &a.map_k, ring.full(stage), tile * kTile, b, h, a.tokens, lane);
      load_rows<Hopper, D>(base + Shared::kV + stage * kRows, a.v, &a.map_v, ring.full(stage), tile * kTile, b, h, a.tokens, lane);
    };
    produce(ring, a.by_query, static_cast<int64_t>(a.group_of_head[h]) * (a.by_query.bands + 1) + band, 2 * kRows, lane, keep, load);
    return;
  }

  if constexpr (Hopper) more_registers<consumer_registers(kGroups)>();
  const int group = uniform(threadIdx.x / kWarpgroup), warp = (threadIdx.x / 32) & 3, thread = threadIdx.x % kWarpgroup;
  const int tile = kGroups * band + group, r0 = warp * 16 + lane / 4;
  const bool exists = tile < a.query_tiles;
  const int i0 = tile * kTile + r0, i8 = i0 + 8;

  const float bound = gate_bound(a, h, D);
  const float scale = kept_float(Gate::kSoftmax ? a.scale[h] * kLog2e : a.scale[h] / bound);
  float offset0 = 0, offset8 = 0;
  if (!Gate::kSoftmax) offset0 = row_offset(a, h, i0, D) / bound, offset8 = row_offset(a, h, i8, D) / bound;
  int document0 = 0, document8 = 0;
  if (a.document_start && exists) {
    const int* starts = a.document_start + static_cast<int64_t>(b) * a.tokens;
    document0 = starts[min(i0, a.tokens - 1)], document8 = starts[min(i8, a.tokens - 1)];
  }
  uint32_t* const bitmap = kept(a.active + ((static_cast<int64_t>(b) * a.heads + h) * a.query_tiles + tile) * a.words);
  // What a tile is checked for first depends on the tile before; the values never do.
  const bool visit_all = a.visit_all, counting = a.counters != nullptr, quick = uniform(scale > 0 && !visit_all);
  bool likely = true;

  Acc o[kParts];
#pragma unroll
  for (int d = 0; d < kParts; ++d) {
#pragma unroll
    for (int j = 0; j < 8; ++j) o[d][j][0] = o[d][j][1] = o[d][j][2] = o[d][j][3] = 0.f;
  }
  float sum0 = 0, sum8 = 0, top0 = -INFINITY, top8 = -INFINITY, active_edges = 0;
  int visible0 = 0, visible8 = 0, full_tiles = 0, active_tiles = 0, visible_tiles = 0;

  Frag p;         // weights of the tile at stage `held`, whose product with v is to come
  int held = -1;  // -1: none
  const uint32_t own_q = base + Shared::kQ + group * kRows;
  barrier_wait(ring.own(), 0);

  for (Cursor at;; at.next<kStages>()) {
    barrier_wait(ring.full(at.stage), at.phase);
    const int2 entry = load_shared2(ring.entry(at.stage, group));
    const int other = uniform(entry.x), mask = uniform(entry.y);
    if (other < 0) break;
    if (mask == kAbsent) {  // nothing may be held back here, or the producer could wait for it
      if (held >= 0) {
        P::begin();
        accumulate<Hopper>(o, p, base + Shared::kV + held * kRows, lane);
        P::commit();
        P::template wait<0>();
        ring.release(held), held = -1;
      }
      ring.release(at.stage);
      continue;
    }
    Acc s;
    P::begin();
    multiply_rows<Hopper, kParts>(s, own_q, base + Shared::kK + at.stage * kRows, warp, lane);
    P::commit();
    if (held >= 0) {
      P::begin();
      accumulate<Hopper>(o, p, base + Shared::kV + held * kRows, lane);
      P::commit();
      P::template wait<1>();
    } else {
      P::template wait<0>();
    }
    P::settle(s);

    bool visible = true;
    if (mask != TileEntry::kFull) {
      const uint64_t m0 = query_mask(a, mask, r0, i0, other * kTile, document0), m8 = query_mask(a, mask, r0 + 8, i8, other * kTile, document8);
      hide(s, m0, m8, lane);
      visible0 += __popcll(m0), visible8 += __popcll(m8);
      visible = warpgroup_any(m0 | m8, group);
      visible_tiles += visible;
    } else {
      ++full_tiles;
    }
    if (Gate::kSoftmax || (visible && (!quick || likely || warpgroup_any(any_active<Gate::kFidelity>(s, scale, offset0, offset8), group)))) {
      bool active = visible;
      if constexpr (Gate::kSoftmax) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const float f = Gate::kFidelity ? s[j][e] * s[j][e] : s[j][e];
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
        const float2 sum = weigh<Gate>(s, scale, offset0, offset8);
        sum0 += sum.x, sum8 += sum.y;
        active = likely = warpgroup_any(sum.x + sum.y > 0.f, group);
        P::template wait<0>();
      }
      if (held >= 0) ring.release(held), held = -1;
      active_tiles += active;
      if (active && thread == 0) atomicOr(bitmap + (other >> 5), 1u << (other & 31));
      if (active || (visit_all && visible)) {
        round_fragment(p, s);
        if (!Gate::kSoftmax && counting) active_edges += count_positive(p);
        held = at.stage;
        continue;
      }
    } else {
      likely = false;
      P::template wait<0>();
      if (held >= 0) ring.release(held), held = -1;
    }
    ring.release(at.stage);
  }
  if (held >= 0) {
    P::begin();
    accumulate<Hopper>(o, p, base + Shared::kV + held * kRows, lane);
    P::commit();
  }
  P::template wait<0>();
#pragma unroll
  for (int d = 0; d < kParts; ++d) P::settle(o[d]);
  if (!exists) return;

  visible0 += full_tiles * kTile, visible8 += full_tiles * kTile, visible_tiles += full_tiles;
  const float unit = power<Gate::kPower>(bound);  // of the weights
  sum0 = quad_sum(sum0) * unit, sum8 = quad_sum(sum8) * unit;
  const auto finish = [&](float sum, float top, int visible, float& z) {
    if constexpr (Gate::kSoftmax) {
      z = sum > 0.f ? top * kLn2 + logf(sum) : 0.f;
      return sum > 0.f ? 1.f / sum : 0.f;
    }
    z = a.normalize_sum ? a.epsilon + sum : a.normalize_length ? powf(static_cast<float>(max(visible, 1)), a.length_alpha) : 1.f;
    return z > 0.f ? unit / z : 0.f;
  };
  float z0, z8;
  const float inverse0 = finish(sum0, top0, visible0, z0), inverse8 = finish(sum8, top8, visible8, z8);
#pragma unroll
  for (int d = 0; d < kParts; ++d) store_product(o[d], a.o, b, h, i0, a.tokens, d * 64, lane, inverse0, inverse8);
  const bool first = (lane & 3) == 0, in0 = first && i0 < a.tokens, in8 = first && i8 < a.tokens;
  float* z = a.z + (static_cast<int64_t>(b) * a.heads + h) * a.tokens;
  if (in0) z[i0] = z0;
  if (in8) z[i8] = z8;

  if (counting) {
    unsigned visible = (in0 ? visible0 : 0) + (in8 ? visible8 : 0), empty = (in0 && !(sum0 > 0.f)) + (in8 && !(sum8 > 0.f));
    visible = __reduce_add_sync(0xffffffffu, visible);
    empty = __reduce_add_sync(0xffffffffu, empty);
    const unsigned active = Gate::kSoftmax ? visible : __reduce_add_sync(0xffffffffu, static_cast<unsigned>(active_edges));
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
