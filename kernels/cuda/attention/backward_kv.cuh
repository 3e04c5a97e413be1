#pragma once
// Backward kernel for keys and values.   dv_j = sum_i (a_ij / z_i) do_i,   dk_j = c P sum_i ds_ij q_i
//
// A block takes a band of neighbouring key tiles of a head and walks the query tiles whose tile with them is active, ascending. Scores
// are computed transposed, s^T = k q^T and (v do^T), so that weights and gradients feed the two sums as left operands straight from
// registers. What a query contributes (offset, 1/z, delta) arrives with its tile as 16 bytes a row.

#include <cstddef>

#include "kernels/cuda/attention/gate.cuh"

namespace tessera::cuda_attention {

template <int D>
struct BackwardKvShared {
  static constexpr int kGroups = 2, kStages = D == 64 ? 5 : 3;
  static constexpr uint32_t kRows = D / 64 * kTileBytes;  // 64 rows of one tensor
  static constexpr uint32_t kK = 0, kV = kGroups * kRows, kQ = 2 * kGroups * kRows, kDo = kQ + kStages * kRows, kRowTiles = kDo + kStages * kRows,
                            kRing = kRowTiles + kStages * sizeof(RowTile), kBytes = kRing + Ring<kGroups, true, kStages>::kBytes;
};

/// What the queries of a tile contribute, for the columns of one thread.
struct Columns {
  float4 pair[8];
  int2 offsets[8];
  __device__ __forceinline__ void read(uint32_t row_tile, int j, int lane) {
    pair[j] = load_shared4(row_tile + 64 * j + 16 * (lane & 3));
    offsets[j] = load_shared2(row_tile + offsetof(RowTile, offset) + 32 * j + 8 * (lane & 3));
  }
};

template <int D, int Variant, bool Hopper>
__global__ void __launch_bounds__(threads_of(BackwardKvShared<D>::kGroups, Hopper), 1) backward_kv_kernel(const __grid_constant__ Args a) {
  using Shared = BackwardKvShared<D>;
  using Gate = Gates<Variant>;
  using P = Product<Hopper>;
  constexpr int kGroups = Shared::kGroups, kStages = Shared::kStages, kParts = D / 64;
  constexpr uint32_t kRows = Shared::kRows;
  constexpr bool kPrefetch = false;
  extern __shared__ __align__(1024) uint8_t raw[];  // the swizzle counts from multiples of 1024
  const uint32_t base = kept(shared_address(raw));
  const Ring<kGroups, Hopper, kStages> ring{base + Shared::kRing};

  int band, b, h;
  block_of(a, a.by_key, (a.key_tiles + kGroups - 1) / kGroups, false, band, b, h);
  const int lane = threadIdx.x & 31;
  ring.init();

  if (threadIdx.x >= kGroups * kWarpgroup) {  // producer
    if constexpr (Hopper) fewer_registers<producer_registers(kGroups)>();
    if (threadIdx.x >= kGroups * kWarpgroup + 32) return;
    open_loads<Hopper>(ring.own(), 2 * kGroups * kRows, lane);
    for (int w = 0; w < kGroups; ++w) {
      load_rows<Hopper, D>(base + Shared::kK + w * kRows, a.k, &a.map_k, ring.own(), (kGroups * band + w) * kTile, b, h, a.tokens, lane);
      load_rows<Hopper, D>(base + Shared::kV + w * kRows, a.v, &a.map_v, ring.own(), (kGroups * band + w) * kTile, b, h, a.tokens, lane);
    }
    close_loads<Hopper>(ring.own(), lane);

    const int64_t head_tiles = (static_cast<int64_t>(b) * a.heads + h) * a.query_tiles;
    const int skip = a.visit_all ? kHidden : kAbsent;
    static_assert(32 % kGroups == 0, "a band's bits stand in one word");
    const auto keep = [&](Entry& e) {
      const bool inside = e.tile < a.query_tiles;
      const uint32_t bits = inside ? a.active[(head_tiles + e.tile) * a.words + (kGroups * band >> 5)] >> (kGroups * band & 31) : 0;
      const DocumentBounds documents = inside ? document_bounds(a, b, e.tile) : DocumentBounds{};
#pragma unroll
      for (int w = 0; w < kGroups; ++w) {
        const int key = kGroups * band + w;
        if (!inside || key >= a.key_tiles) e.mask[w] = kAbsent;
        e.mask[w] = cut_mask(a, e.mask[w], e.tile, key, documents);
        if (e.mask[w] != kAbsent && !(bits >> w & 1)) e.mask[w] = skip;
      }
    };
    const auto load = [&](int stage, int tile) {
      const uint32_t full = ring.full(stage), rows_to = base + Shared::kRowTiles + stage * sizeof(RowTile);
      load_rows<Hopper, D>(base + Shared::kQ + stage * kRows, a.q, &a.map_q, full, tile * kTile, b, h, a.tokens, lane);
      load_rows<Hopper, D>(base + Shared::kDo + stage * kRows, a.d_o, &a.map_do, full, tile * kTile, b, h, a.tokens, lane);
      const RowTile* rows = a.rows + head_tiles + tile;
      if constexpr (Hopper) {
        if (lane == 0) copy_bulk(rows_to, rows, sizeof(RowTile), full);
      } else {
        for (int n = lane; n < 64; n += 32) copy_async16(rows_to + 16 * n, reinterpret_cast<const uint4*>(rows) + n, true);
      }
    };
    produce(ring, a.by_key, static_cast<int64_t>(a.group_of_head[h]) * (a.by_key.bands + 1) + band, 2 * kRows + sizeof(RowTile), lane, keep, load);
    return;
  }

  if constexpr (Hopper) more_registers<consumer_registers(kGroups)>();
  const int group = uniform(threadIdx.x / kWarpgroup), warp = (threadIdx.x / 32) & 3;
  const int tile = kGroups * band + group, r0 = warp * 16 + lane / 4;
  const int j0 = tile * kTile + r0, j8 = j0 + 8;
  const float scale = kept_float(Gate::kSoftmax ? a.scale[h] * kLog2e : a.scale[h] / gate_bound(a, h, D));
  const bool documents = a.document_start != nullptr;

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
  const uint32_t own_k = base + Shared::kK + group * kRows, own_v = base + Shared::kV + group * kRows;
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
    const uint32_t q_at = base + Shared::kQ + at.stage * kRows, do_at = base + Shared::kDo + at.stage * kRows;
    Acc s, dp;
    P::begin();
    multiply_rows<Hopper, kParts>(s, own_k, q_at, warp, lane);
    P::commit();
    multiply_rows<Hopper, kParts>(dp, own_v, do_at, warp, lane);
    P::commit();
    const uint32_t rows_at = base + Shared::kRowTiles + at.stage * sizeof(RowTile);
    Columns columns;
    if constexpr (kPrefetch) {
#pragma unroll
      for (int j = 0; j < 8; ++j) columns.read(rows_at, j, lane);
    }
    P::template wait<1>();
    P::settle(s);
    if (pending >= 0) ring.release(pending);

    if (mask != TileEntry::kFull) {
      const uint32_t starts = documents ? rows_at + static_cast<uint32_t>(offsetof(RowTile, document_start)) : 0;
      hide(s, key_mask(a, mask, r0, j0, other * kTile, starts), key_mask(a, mask, r0 + 8, j8, other * kTile, starts), lane);
    }
    Frag p;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if constexpr (!kPrefetch) columns.read(rows_at, j, lane);
      const float4 pair = columns.pair[j];
      const int2 offsets = columns.offsets[j];
      float w[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float offset = __int_as_float(e & 1 ? offsets.y : offsets.x);
        w[e] = (e & 1 ? pair.z : pair.x) * edge_weight<Gate>(s[j][e], scale, offset, s[j][e]);
      }
      p[j / 2][2 * (j & 1)] = pack(w[0], w[1]);
      p[j / 2][2 * (j & 1) + 1] = pack(w[2], w[3]);
    }
    P::begin();
    accumulate<Hopper>(dv, p, do_at, lane);
    P::commit();
    P::template wait<1>();
    P::settle(dp);

    Frag ds;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if constexpr (!kPrefetch) columns.read(rows_at, j, lane);
      const float4 pair = columns.pair[j];
      const int2 offsets = columns.offsets[j];
      float g[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float da = fmaf(dp[j][e], e & 1 ? pair.z : pair.x, e & 1 ? pair.w : pair.y);
        edge_gradient<Gate>(s[j][e], scale, __int_as_float(e & 1 ? offsets.y : offsets.x), da, g[e]);
      }
      ds[j / 2][2 * (j & 1)] = pack(g[0], g[1]);
      ds[j / 2][2 * (j & 1) + 1] = pack(g[2], g[3]);
    }
    P::begin();
    accumulate<Hopper>(dk, ds, q_at, lane);
    P::commit();
    pending = at.stage;
  }
  P::template wait<0>();
#pragma unroll
  for (int d = 0; d < kParts; ++d) P::settle(dk[d]), P::settle(dv[d]);
  if (tile >= a.key_tiles) return;
  const float bound = gate_bound(a, h, D), dv_scale = power<Gate::kPower>(bound);
  const float dk_scale = a.scale[h] * (Gate::kFidelity ? 2.f : 1.f) * Gate::kPower * slope<Gate::kPower>(bound);
#pragma unroll
  for (int d = 0; d < kParts; ++d) {
    store_product(dk[d], a.dk, b, h, j0, a.tokens, d * 64, lane, dk_scale, dk_scale);
    store_product(dv[d], a.dv, b, h, j0, a.tokens, d * 64, lane, dv_scale, dv_scale);
  }
}

}  // namespace tessera::cuda_attention
