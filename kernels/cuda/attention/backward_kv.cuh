#pragma once
// Backward kernel for keys and values.   dv_j = sum_i (a_ij / z_i) do_i,   dk_j = c P sum_i ds_ij q_i
//
// A block takes a band of neighbouring key tiles of a head and walks the query tiles whose tile with them is active, ascending. Scores
// are computed transposed, s^T = k q^T and (v do^T), so that weights and gradients feed the two sums as left operands straight from
// registers. What a query contributes (offset, 1/z, delta) arrives with its tile as 16 bytes a row.

#include "kernels/cuda/attention/gate.cuh"

namespace tessera::cuda_attention {

template <int D>
struct BackwardKvShared {
  static constexpr int kGroups = 2;
  static constexpr int kStages = D == 64 ? 4 : 3;
  uint8_t k[kGroups][D / 64][kTileBytes];
  uint8_t v[kGroups][D / 64][kTileBytes];
  uint8_t q[kStages][D / 64][kTileBytes];
  uint8_t d_o[kStages][D / 64][kTileBytes];
  RowInfo rows[kStages][64];
  Ring<kStages> ring;
  uint64_t own;
};

template <int D, bool Softmax, bool Hopper>
__global__ void __launch_bounds__(threads_of(BackwardKvShared<D>::kGroups, Hopper), 1) backward_kv_kernel(const __grid_constant__ Args a) {
  using Shared = BackwardKvShared<D>;
  constexpr int kGroups = Shared::kGroups, kStages = Shared::kStages, kParts = D / 64;
  extern __shared__ __align__(1024) uint8_t raw[];  // the swizzle counts from multiples of 1024
  Shared& sm = *reinterpret_cast<Shared*>(raw);

  int band, b, h;
  block_of(a, a.by_key, (a.key_tiles + kGroups - 1) / kGroups, false, band, b, h);
  const int lane = threadIdx.x & 31;
  ring_init<kGroups, Hopper>(sm.ring, &sm.own);

  if (threadIdx.x >= kGroups * kWarpgroup) {  // producer
    if constexpr (Hopper) fewer_registers<producer_registers(kGroups)>();
    if (threadIdx.x >= kGroups * kWarpgroup + 32) return;
    open_loads<Hopper>(&sm.own, 2 * kGroups * kParts * kTileBytes, lane);
    for (int w = 0; w < kGroups; ++w) {
      load_rows<Hopper, D>(sm.k[w][0], a.k, &a.map_k, &sm.own, (static_cast<int64_t>(kGroups) * band + w) * kTile, b, h, a.tokens, lane);
      load_rows<Hopper, D>(sm.v[w][0], a.v, &a.map_v, &sm.own, (static_cast<int64_t>(kGroups) * band + w) * kTile, b, h, a.tokens, lane);
    }
    close_loads<Hopper>(&sm.own, lane);

    const int64_t head_tiles = (static_cast<int64_t>(b) * a.heads + h) * a.query_tiles;
    const int skip = a.visit_all ? kHidden : kAbsent;
    const auto keep = [&](Entry& e) {
      const uint32_t* row = a.active + (head_tiles + e.tile) * a.words;
      const bool inside = e.tile < a.query_tiles;
#pragma unroll
      for (int w = 0; w < kGroups; ++w) {
        const int key = kGroups * band + w;
        if (!inside || key >= a.key_tiles) {
          e.mask[w] = kAbsent;
        } else if (e.mask[w] != kAbsent) {
          if (!(row[key >> 5] >> (key & 31) & 1)) e.mask[w] = skip;
        }
      }
    };
    const auto load = [&](int stage, int tile) {
      uint64_t* full = &sm.ring.full[stage];
      load_rows<Hopper, D>(sm.q[stage][0], a.q, &a.map_q, full, tile * 64ll, b, h, a.tokens, lane);
      load_rows<Hopper, D>(sm.d_o[stage][0], a.d_o, &a.map_do, full, tile * 64ll, b, h, a.tokens, lane);
      const RowInfo* rows = a.rows + (head_tiles + tile) * 64;
      if constexpr (Hopper) {
        if (lane == 0) copy_bulk(sm.rows[stage], rows, sizeof(sm.rows[stage]), full);
      } else {
        for (int r = lane; r < 64; r += 32) copy_async16(shared_address(&sm.rows[stage][r]), rows + r, true);
      }
    };
    const int64_t list = static_cast<int64_t>(a.group_of_head[h]) * (a.by_key.bands + 1) + band;
    produce<kGroups, Hopper>(sm.ring, a.by_key, list, 2 * kParts * kTileBytes + sizeof(sm.rows[0]), lane, keep, load);
    return;
  }

  if constexpr (Hopper) more_registers<consumer_registers(kGroups)>();
  using P = Product<Hopper>;
  const int group = threadIdx.x / kWarpgroup, warp = (threadIdx.x / 32) & 3;
  const int tile = kGroups * band + group, r0 = warp * 16 + lane / 4;
  const int64_t j0 = static_cast<int64_t>(tile) * kTile + r0, j8 = j0 + 8;
  const float scale = Softmax ? a.scale[h] * kLog2e : a.scale[h];
  const bool last_keys = (tile + 1ll) * kTile > a.tokens, documents = a.document_start != nullptr;

  barrier_wait(&sm.own, 0);
  Acc dk[kParts], dv[kParts];
#pragma unroll
  for (int d = 0; d < kParts; ++d) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) dk[d][j][e] = dv[d][j][e] = 0.f;
    }
  }

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
    multiply_rows<Hopper>(s, sm.k[group], sm.q[at.stage], warp, lane);
    P::commit();
    multiply_rows<Hopper>(dp, sm.v[group], sm.d_o[at.stage], warp, lane);
    P::commit();
    P::template wait<1>();
    P::settle(s);
    if (pending >= 0) release(pending);

    const int64_t first_query = static_cast<int64_t>(other) * kTile;
    const RowInfo* rows = sm.rows[at.stage];
    if (mask >= 0 || mask == kHidden || last_keys || first_query + kTile > a.tokens || (documents && rows[63].document_start > tile * 64ll)) {
      hide(s, key_mask(a, mask, r0, j0, first_query, rows, documents), key_mask(a, mask, r0 + 8, j8, first_query, rows, documents), lane);
    }
    Frag p;
    with_gate<Softmax>(a, [&](auto power, auto fidelity) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        float w[4];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const RowInfo row = rows[8 * j + 2 * (lane & 3) + e];
          w[e] = row.inverse_z * edge_weight<Softmax, fidelity.value, power.value>(s[j][e], scale, row.offset, s[j][e]);
          w[e + 2] = row.inverse_z * edge_weight<Softmax, fidelity.value, power.value>(s[j][e + 2], scale, row.offset, s[j][e + 2]);
        }
        p[j / 2][2 * (j & 1)] = pack(w[0], w[1]);
        p[j / 2][2 * (j & 1) + 1] = pack(w[2], w[3]);
      }
    });
    P::begin();
    accumulate<Hopper>(dv, p, sm.d_o[at.stage], lane);
    P::commit();
    P::template wait<1>();
    P::settle(dp);

    Frag ds;
    with_gate<Softmax>(a, [&](auto power, auto fidelity) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        float g[4];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const RowInfo row = rows[8 * j + 2 * (lane & 3) + e];
          edge_gradient<Softmax, fidelity.value, power.value>(s[j][e], scale, row.offset, fmaf(dp[j][e], row.inverse_z, row.minus_delta), g[e]);
          edge_gradient<Softmax, fidelity.value, power.value>(s[j][e + 2], scale, row.offset, fmaf(dp[j][e + 2], row.inverse_z, row.minus_delta),
                                                              g[e + 2]);
        }
        ds[j / 2][2 * (j & 1)] = pack(g[0], g[1]);
        ds[j / 2][2 * (j & 1) + 1] = pack(g[2], g[3]);
      }
    });
    P::begin();
    accumulate<Hopper>(dk, ds, sm.q[at.stage], lane);
    P::commit();
    pending = at.stage;
  }
  P::template wait<0>();
#pragma unroll
  for (int d = 0; d < kParts; ++d) P::settle(dk[d]), P::settle(dv[d]);
  if (tile >= a.key_tiles) return;
  const float dk_scale = a.scale[h] * (Softmax ? 1.f : static_cast<float>(a.power)) * (a.fidelity ? 2.f : 1.f);
#pragma unroll
  for (int d = 0; d < kParts; ++d) {
    store_product(dk[d], a.dk, b, h, j0, a.tokens, d * 64, lane, dk_scale, dk_scale);
    store_product(dv[d], a.dv, b, h, j0, a.tokens, d * 64, lane, 1.f, 1.f);
  }
}

}  // namespace tessera::cuda_attention
