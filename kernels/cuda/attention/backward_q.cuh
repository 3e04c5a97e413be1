#pragma once
// Backward kernel for queries.   dq_i = c P sum_j ds_ij k_j, and the partial sums of dscale and dthreshold of each query tile
//
// A block takes a band of neighbouring query tiles of a head and walks their active key tiles, ascending, as the forward kernel does.
// The gradient of the scale costs nothing: sum_j dx_ij s_ij = <q_i, sum_j dx_ij k_j>, a product of two rows at the end.

#include "kernels/cuda/attention/gate.cuh"

namespace tessera::cuda_attention {

template <int D>
struct BackwardQShared {
  static constexpr int kGroups = 2, kStages = D == 64 ? 6 : 4;
  static constexpr uint32_t kRows = D / 64 * kTileBytes;  // 64 rows of one tensor
  static constexpr uint32_t kQ = 0, kDo = kGroups * kRows, kK = 2 * kGroups * kRows, kV = kK + kStages * kRows, kRing = kV + kStages * kRows,
                            kBytes = kRing + Ring<kGroups, true, kStages>::kBytes;
};

template <int D, int Variant, bool Hopper>
__global__ void __launch_bounds__(threads_of(BackwardQShared<D>::kGroups, Hopper), 1) backward_q_kernel(const __grid_constant__ Args a) {
  using Shared = BackwardQShared<D>;
  using Gate = Gates<Variant>;
  using P = Product<Hopper>;
  constexpr int kGroups = Shared::kGroups, kStages = Shared::kStages, kParts = D / 64;
  constexpr uint32_t kRows = Shared::kRows;
  extern __shared__ __align__(1024) uint8_t raw[];  // the swizzle counts from multiples of 1024
  __shared__ float2 sums[kGroups][4];
  const uint32_t base = kept(shared_address(raw));
  const Ring<kGroups, Hopper, kStages> ring{base + Shared::kRing};

  int band, b, h;
  block_of(a, a.by_query, (a.query_tiles + kGroups - 1) / kGroups, true, band, b, h);
  const int lane = threadIdx.x & 31;
  const int64_t head_tiles = (static_cast<int64_t>(b) * a.heads + h) * a.query_tiles;
  ring.init();

  if (threadIdx.x >= kGroups * kWarpgroup) {  // producer
    if constexpr (Hopper) fewer_registers<producer_registers(kGroups)>();
    if (threadIdx.x >= kGroups * kWarpgroup + 32) return;
    open_loads<Hopper>(ring.own(), 2 * kGroups * kRows, lane);
    for (int w = 0; w < kGroups; ++w) {
      load_rows<Hopper, D>(base + Shared::kQ + w * kRows, a.q, &a.map_q, ring.own(), (kGroups * band + w) * kTile, b, h, a.tokens, lane);
      load_rows<Hopper, D>(base + Shared::kDo + w * kRows, a.d_o, &a.map_do, ring.own(), (kGroups * band + w) * kTile, b, h, a.tokens, lane);
    }
    close_loads<Hopper>(ring.own(), lane);

    DocumentBounds documents[kGroups];
#pragma unroll
    for (int w = 0; w < kGroups; ++w) documents[w] = document_bounds(a, b, min(kGroups * band + w, a.query_tiles - 1));
    const int skip = a.visit_all ? kHidden : kAbsent;
    const auto keep = [&](Entry& e) {
#pragma unroll
      for (int w = 0; w < kGroups; ++w) {
        const int query = kGroups * band + w;
        if (e.tile >= a.key_tiles || query >= a.query_tiles) e.mask[w] = kAbsent;
        e.mask[w] = cut_mask(a, e.mask[w], query, e.tile, documents[w]);
        if (e.mask[w] != kAbsent && !(a.active[(head_tiles + query) * a.words + (e.tile >> 5)] >> (e.tile & 31) & 1)) e.mask[w] = skip;
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
  const float scale = kept_float(Gate::kSoftmax ? a.scale[h] * kLog2e : a.scale[h] / gate_bound(a, h, D));
  struct Row {
    float offset = 0, inverse_z = 0, minus_delta = 0;
    int document_start = 0;
  } row0, row8;
  if (exists) {
    const RowTile& rows = a.rows[head_tiles + tile];
    const auto read = [&](int r) {
      const float2 terms = reinterpret_cast<const float2*>(rows.pair)[r];
      return Row{rows.offset[r], terms.x, terms.y, rows.document_start[r]};
    };
    row0 = read(r0), row8 = read(r0 + 8);
  }

  Acc dq[kParts];
#pragma unroll
  for (int d = 0; d < kParts; ++d) {
#pragma unroll
    for (int j = 0; j < 8; ++j) dq[d][j][0] = dq[d][j][1] = dq[d][j][2] = dq[d][j][3] = 0.f;
  }
  float dx0 = 0, dx8 = 0;
  int pending = -1;  // stage whose product may still be under way
  const uint32_t own_q = base + Shared::kQ + group * kRows, own_do = base + Shared::kDo + group * kRows;
  barrier_wait(ring.own(), 0);

  for (Cursor at;; at.next<kStages>()) {
    barrier_wait(ring.full(at.stage), at.phase);
    const int2 entry = load_shared2(ring.entry(at.stage, group));
    const int other = uniform(entry.x), mask = uniform(entry.y);
    if (other < 0) break;
    if (mask == kAbsent) {  // nothing may be held back here, or the producer could wait for it
      P::template wait<0>();
      if (pending >= 0) ring.release(pending), pending = -1;
      ring.release(at.stage);
      continue;
    }
    const uint32_t k_at = base + Shared::kK + at.stage * kRows, v_at = base + Shared::kV + at.stage * kRows;
    Acc s, dp;
    P::begin();
    multiply_rows<Hopper, kParts>(s, own_q, k_at, warp, lane);
    P::commit();
    multiply_rows<Hopper, kParts>(dp, own_do, v_at, warp, lane);
    P::commit();
    P::template wait<1>();
    P::settle(s);
    if (pending >= 0) ring.release(pending);

    if (mask != TileEntry::kFull) {
      hide(s, query_mask(a, mask, r0, i0, other * kTile, row0.document_start), query_mask(a, mask, r0 + 8, i8, other * kTile, row8.document_start), lane);
    }
    if constexpr (!Gate::kFidelity) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) edge_weight<Gate>(s[j][e], scale, e < 2 ? row0.offset : row8.offset, s[j][e]);
      }
    }
    P::template wait<0>();
    P::settle(dp);

    Frag ds;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      float g[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const Row& row = e < 2 ? row0 : row8;
        const float da = fmaf(dp[j][e], row.inverse_z, row.minus_delta);
        const float dx = edge_gradient<Gate>(s[j][e], scale, row.offset, da, g[e]);
        if (e < 2) dx0 += dx;
        else dx8 += dx;
      }
      ds[j / 2][2 * (j & 1)] = pack(g[0], g[1]);
      ds[j / 2][2 * (j & 1) + 1] = pack(g[2], g[3]);
    }
    P::begin();
    accumulate<Hopper>(dq, ds, k_at, lane);
    P::commit();
    pending = at.stage;
  }
  P::template wait<0>();
#pragma unroll
  for (int d = 0; d < kParts; ++d) P::settle(dq[d]);
  if (!exists) return;

  const float bound = gate_bound(a, h, D), c = a.scale[h], factor = Gate::kPower * slope<Gate::kPower>(bound);  // of dx as summed here
  const float dq_scale = c * factor * (Gate::kFidelity ? 2.f : 1.f);
#pragma unroll
  for (int d = 0; d < kParts; ++d) store_product(dq[d], a.dq, b, h, i0, a.tokens, d * 64, lane, dq_scale, dq_scale);

  // dscale: sum_j dx f(s), with f(s) less the threshold where that stands inside the scale.
  float dot0 = 0, dot8 = 0;
#pragma unroll
  for (int d = 0; d < kParts; ++d) {
    Frag part;
    load_fragment(part, own_q + d * kTileBytes, warp, lane);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const uint32_t w0 = part[j / 2][2 * (j & 1)], w8 = part[j / 2][2 * (j & 1) + 1];
      dot0 = fmaf(low_of(w0), dq[d][j][0], fmaf(high_of(w0), dq[d][j][1], dot0));
      dot8 = fmaf(low_of(w8), dq[d][j][2], fmaf(high_of(w8), dq[d][j][3], dot8));
    }
  }
  const bool inside = !Gate::kSoftmax && (Gate::kFidelity || a.length_beta > 0);
  float dscale = dot0 + dot8, dx = dx0 + dx8;
  if (inside && c != 0.f) dscale += (row0.offset * dx0 + row8.offset * dx8) * bound / c;  // offset = -c tau
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    dscale += __shfl_xor_sync(0xffffffffu, dscale, step);
    dx += __shfl_xor_sync(0xffffffffu, dx, step);
  }
  if (lane == 0) sums[group][warp] = make_float2(dscale, dx);
  warpgroup_any(false, group);
  if (thread == 0) {
    float2 total{0.f, 0.f};
    for (int w = 0; w < 4; ++w) total.x += sums[group][w].x, total.y += sums[group][w].y;
    a.partial_scale[head_tiles + tile] = total.x * factor;
    a.partial_threshold[head_tiles + tile] = -total.y * factor * (Gate::kFidelity ? c : 1.f);
  }
}

}  // namespace tessera::cuda_attention
