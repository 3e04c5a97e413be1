#pragma once
// Backward kernel for queries.   dq_i = c P sum_j ds_ij k_j, and the partial sums of dscale and dthreshold of each query tile
//
// A block takes a band of neighbouring query tiles of a head and walks their active key tiles, ascending, as the forward kernel does.
// The gradient of the scale costs nothing: sum_j dx_ij s_ij = <q_i, sum_j dx_ij k_j>, a product of two rows at the end.

#include "kernels/cuda/attention/gate.cuh"

namespace tessera::cuda_attention {

template <int D>
struct BackwardQShared {
  static constexpr int kGroups = 2;
  static constexpr int kStages = D == 64 ? 4 : 3;
  uint8_t q[kGroups][D / 64][kTileBytes];
  uint8_t d_o[kGroups][D / 64][kTileBytes];
  uint8_t k[kStages][D / 64][kTileBytes];
  uint8_t v[kStages][D / 64][kTileBytes];
  Ring<kStages> ring;
  uint64_t own;
  float2 sums[kGroups][4];
};

template <int D, bool Softmax, bool Hopper>
__global__ void __launch_bounds__(threads_of(BackwardQShared<D>::kGroups, Hopper), 1) backward_q_kernel(const __grid_constant__ Args a) {
  using Shared = BackwardQShared<D>;
  constexpr int kGroups = Shared::kGroups, kStages = Shared::kStages, kParts = D / 64;
  extern __shared__ __align__(1024) uint8_t raw[];  // the swizzle counts from multiples of 1024
  Shared& sm = *reinterpret_cast<Shared*>(raw);

  int band, b, h;
  block_of(a, a.by_query, (a.query_tiles + kGroups - 1) / kGroups, true, band, b, h);
  const int lane = threadIdx.x & 31;
  const int64_t head_tiles = (static_cast<int64_t>(b) * a.heads + h) * a.query_tiles;
  ring_init<kGroups, Hopper>(sm.ring, &sm.own);

  if (threadIdx.x >= kGroups * kWarpgroup) {  // producer
    if constexpr (Hopper) fewer_registers<producer_registers(kGroups)>();
    if (threadIdx.x >= kGroups * kWarpgroup + 32) return;
    open_loads<Hopper>(&sm.own, 2 * kGroups * kParts * kTileBytes, lane);
    for (int w = 0; w < kGroups; ++w) {
      load_rows<Hopper, D>(sm.q[w][0], a.q, &a.map_q, &sm.own, (static_cast<int64_t>(kGroups) * band + w) * kTile, b, h, a.tokens, lane);
      load_rows<Hopper, D>(sm.d_o[w][0], a.d_o, &a.map_do, &sm.own, (static_cast<int64_t>(kGroups) * band + w) * kTile, b, h, a.tokens, lane);
    }
    close_loads<Hopper>(&sm.own, lane);

    const int skip = a.visit_all ? kHidden : kAbsent;
    const auto keep = [&](Entry& e) {
#pragma unroll
      for (int w = 0; w < kGroups; ++w) {
        const int query = kGroups * band + w;
        if (e.tile >= a.key_tiles || query >= a.query_tiles) {
          e.mask[w] = kAbsent;
        } else if (e.mask[w] != kAbsent) {
          if (!(a.active[(head_tiles + query) * a.words + (e.tile >> 5)] >> (e.tile & 31) & 1)) e.mask[w] = skip;
        }
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
  RowInfo row0{}, row8{};
  int64_t document_full = 0;
  if (exists) {
    row0 = a.rows[head_tiles * 64 + i0], row8 = a.rows[head_tiles * 64 + i8];
    if (a.document_start)
      document_full =
          a.document_start[static_cast<int64_t>(b) * a.tokens + min(static_cast<int64_t>(tile) * kTile + 63, static_cast<int64_t>(a.tokens) - 1)];
  }
  const bool last_rows = (tile + 1ll) * kTile > a.tokens;

  barrier_wait(&sm.own, 0);
  Acc dq[kParts];
#pragma unroll
  for (int d = 0; d < kParts; ++d) {
#pragma unroll
    for (int j = 0; j < 8; ++j) dq[d][j][0] = dq[d][j][1] = dq[d][j][2] = dq[d][j][3] = 0.f;
  }
  float dx0 = 0, dx8 = 0;

  int pending = -1;  // stage whose products may still be under way
  const auto release = [&](int stage) {
    __syncwarp();
    if (lane == 0) barrier_arrive(&sm.ring.empty[stage]);
  };

  for (Cursor at;; at.next<kStages>()) {
    barrier_wait(&sm.ring.full[at.stage], at.phase);
    const int other = sm.ring.entry[at.stage].tile, mask = sm.ring.entry[at.stage].mask[group];
    if (other < 0) break;
    if (mask == kAbsent) {
      P::template wait<0>();
      if (pending >= 0) release(pending), pending = -1;
      release(at.stage);
      continue;
    }
    Acc s, dp;
    P::begin();
    multiply_rows<Hopper>(s, sm.q[group], sm.k[at.stage], warp, lane);
    P::commit();
    multiply_rows<Hopper>(dp, sm.d_o[group], sm.v[at.stage], warp, lane);
    P::commit();
    P::template wait<1>();
    P::settle(s);
    if (pending >= 0) release(pending);

    const int64_t first_key = static_cast<int64_t>(other) * kTile;
    if (mask >= 0 || mask == kHidden || last_rows || first_key + kTile > a.tokens || first_key < document_full) {
      hide(s, query_mask(a, mask, r0, i0, first_key, row0.document_start), query_mask(a, mask, r0 + 8, i8, first_key, row8.document_start), lane);
    }
    with_gate<Softmax>(a, [&](auto power, auto fidelity) {
      if constexpr (!fidelity.value) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
#pragma unroll
          for (int e = 0; e < 4; ++e) edge_weight<Softmax, false, power.value>(s[j][e], scale, e < 2 ? row0.offset : row8.offset, s[j][e]);
        }
      }
    });
    P::template wait<0>();
    P::settle(dp);

    Frag ds;
    with_gate<Softmax>(a, [&](auto power, auto fidelity) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        float g[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const RowInfo& row = e < 2 ? row0 : row8;
          const float dx =
              edge_gradient<Softmax, fidelity.value, power.value>(s[j][e], scale, row.offset, fmaf(dp[j][e], row.inverse_z, row.minus_delta), g[e]);
          if (e < 2)
            dx0 += dx;
          else
            dx8 += dx;
        }
        ds[j / 2][2 * (j & 1)] = pack(g[0], g[1]);
        ds[j / 2][2 * (j & 1) + 1] = pack(g[2], g[3]);
      }
    });
    P::begin();
    accumulate<Hopper>(dq, ds, sm.k[at.stage], lane);
    P::commit();
    pending = at.stage;
  }
  P::template wait<0>();
#pragma unroll
  for (int d = 0; d < kParts; ++d) P::settle(dq[d]);
  if (!exists) return;

  const float power = (Softmax ? 1.f : static_cast<float>(a.power)), c = a.scale[h], dq_scale = c * power * (a.fidelity ? 2.f : 1.f);
#pragma unroll
  for (int d = 0; d < kParts; ++d) store_product(dq[d], a.dq, b, h, i0, a.tokens, d * 64, lane, dq_scale, dq_scale);

  // dscale: sum_j dx f(s), with f(s) less the threshold where that stands inside the scale.
  float dot0 = 0, dot8 = 0;
#pragma unroll
  for (int d = 0; d < kParts; ++d) {
    Frag part;
    load_fragment(part, shared_address(sm.q[group][d]), warp, lane);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const uint32_t w0 = part[j / 2][2 * (j & 1)], w8 = part[j / 2][2 * (j & 1) + 1];
      dot0 = fmaf(low_of(w0), dq[d][j][0], fmaf(high_of(w0), dq[d][j][1], dot0));
      dot8 = fmaf(low_of(w8), dq[d][j][2], fmaf(high_of(w8), dq[d][j][3], dot8));
    }
  }
  const bool inside = !Softmax && (a.fidelity || a.length_beta > 0);
  float dscale = dot0 + dot8, dx = dx0 + dx8;
  if (inside && c != 0.f) dscale += (row0.offset * dx0 + row8.offset * dx8) / c;  // offset = -c tau
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    dscale += __shfl_xor_sync(0xffffffffu, dscale, step);
    dx += __shfl_xor_sync(0xffffffffu, dx, step);
  }
  if (lane == 0) sm.sums[group][warp] = make_float2(dscale, dx);
  warpgroup_any(false, group);
  if (thread == 0) {
    float2 total{0.f, 0.f};
    for (int w = 0; w < 4; ++w) total.x += sm.sums[group][w].x, total.y += sm.sums[group][w].y;
    a.partial_scale[head_tiles + tile] = total.x * power;
    a.partial_threshold[head_tiles + tile] = -total.y * power * (a.fidelity ? c : 1.f);
  }
}

}  // namespace tessera::cuda_attention
