#pragma once
// Backward kernel for keys and values.   dv_j = sum_i (a_ij / z_i) do_i,   dk_j = c P sum_i ds_ij q_i
//
// A band is neighbouring key tiles of a head; it walks the query tiles whose tile with them is active, ascending. Scores
// are computed transposed, s^T = k q^T and (v do^T), so that weights and gradients feed the two sums as left operands straight from
// registers. What a query contributes (1/z, delta, offset) arrives with its tile and is read once: a lane needs the terms of 16 columns, and
// shared memory, which also feeds the products, has no bandwidth to spare.

#include <cstddef>

#include "kernels/cuda/attention/gate.cuh"

namespace tessera::cuda_attention {

template <int D, bool Hopper>
struct BackwardKvShared {
  static constexpr int kGroups = 2, kStages = D == 64 ? (Hopper ? 8 : 3) : (Hopper ? 4 : 2), kOwn = D == 64 && Hopper ? 2 : 1;
  static constexpr uint32_t kRows = D / 64 * kTileBytes;  // 64 rows of one tensor
  static constexpr uint32_t kOwnBytes = 2 * kGroups * kRows;
  static constexpr uint32_t kK = 0, kV = kGroups * kRows, kQ = kOwn * kOwnBytes, kDo = kQ + kStages * kRows, kRowTiles = kDo + kStages * kRows,
                            kRing = kRowTiles + kStages * sizeof(RowTile);
  using Ring = cuda_attention::Ring<kGroups, Hopper, kStages, kOwn>;
  static constexpr uint32_t kBytes = kRing + Ring::kBytes;
};

/// One term of the query rows that are this thread's columns. Read ahead, all at once, where registers allow, else when j comes to them.
template <bool Ahead>
struct Columns {
  float4 four[4];
  uint32_t at_lane;
  __device__ __forceinline__ void read(uint32_t array, int lane) {
    at_lane = array + 16 * (lane & 3);
    if constexpr (Ahead) {
#pragma unroll
      for (int n = 0; n < 4; ++n) four[n] = load_shared4(at_lane + 64 * n);
    }
  }
  __device__ __forceinline__ void come_to(int j) {
    if (!Ahead && j % 2 == 0) four[j / 2] = load_shared4(at_lane + 32 * j);
  }
  __device__ __forceinline__ float at(int j, int e) const {
    const float4& v = four[j / 2];
    return j & 1 ? (e & 1 ? v.w : v.z) : (e & 1 ? v.y : v.x);
  }
};

template <int D, int Variant, bool Hopper>
__global__ void __launch_bounds__(threads_of(BackwardKvShared<D, Hopper>::kGroups, Hopper), 1) backward_kv_kernel(const __grid_constant__ Args a) {
  using Shared = BackwardKvShared<D, Hopper>;
  using Gate = Gates<Variant>;
  using P = Product<Hopper>;
  constexpr int kGroups = Shared::kGroups, kStages = Shared::kStages, kOwn = Shared::kOwn, kParts = D / 64;
  constexpr uint32_t kRows = Shared::kRows;
  // Where registers allow, the next tile's scores are computed while this tile's become weights. Head size 128: dp waits for the weights, which
  // leaves its registers to them: with both, ptxas runs one product at a time.
  constexpr bool kAhead = Hopper && D == 64, kLate = D == 128;
  constexpr bool kTerms = !kAhead && !kLate;        // the rows' terms are read at once
  extern __shared__ __align__(1024) uint8_t raw[];  // the swizzle counts from multiples of 1024
  const uint32_t base = kept(shared_address(raw));
  const typename Shared::Ring ring{base + Shared::kRing};
  const Schedule schedule(a, a.by_key, a.key_tiles, kGroups, false);
  const int lane = threadIdx.x & 31;
  ring.init();

  if (threadIdx.x >= kGroups * kWarpgroup) {  // producer
    if constexpr (Hopper) fewer_registers<producer_registers(kGroups)>();
    if (threadIdx.x >= kGroups * kWarpgroup + 32) return;
    if constexpr (Hopper) await_kernel_before();    // the rows' terms, which dq reads as well; consumers wait for what is loaded behind this
    if constexpr (Hopper) let_next_kernel_start();  // dq needs nothing of dk, dv: its blocks take the multiprocessors that have no more bands here
    const auto load_own = [&](const Item& i, int slot, uint32_t full) {
      for (int w = 0; w < kGroups; ++w) {
        const int row = (kGroups * i.band + w) * kTile;
        const uint32_t to = base + slot * Shared::kOwnBytes + w * kRows;
        load_rows<Hopper, D>(to + Shared::kK, a.k, &a.map_k, full, row, i.b, i.h, a.keys, lane);
        load_rows<Hopper, D>(to + Shared::kV, a.v, &a.map_v, full, row, i.b, i.h, a.keys, lane);
      }
    };
    const auto walk = [&](const Item& i, Cursor& at, int64_t list) {
      const int64_t head_tiles = (static_cast<int64_t>(i.b) * a.heads + i.h) * a.query_tiles;
      const int first = kGroups * i.band, skip = a.visit_all ? kHidden : kAbsent;
      static_assert(32 % kGroups == 0, "a band's bits stand in one word");
      const auto keep = [&](Entry& e) {
        const bool inside = e.tile < a.query_tiles;
        const uint32_t bits = inside ? a.active[(head_tiles + e.tile) * a.words + (first >> 5)] >> (first & 31) : 0;
        const DocumentBounds documents = inside ? document_bounds(a, i.b, e.tile) : DocumentBounds{};
#pragma unroll
        for (int w = 0; w < kGroups; ++w) {
          if (!inside || first + w >= a.key_tiles) e.mask[w] = kAbsent;
          e.mask[w] = cut_mask(a, e.mask[w], e.tile, first + w, documents);
          if (e.mask[w] != kAbsent && !(bits >> w & 1)) e.mask[w] = skip;
        }
      };
      const auto load = [&](int stage, int tile) {
        const uint32_t full = ring.full(stage), rows_to = base + Shared::kRowTiles + stage * sizeof(RowTile);
        load_rows<Hopper, D>(base + Shared::kQ + stage * kRows, a.q, &a.map_q, full, tile * kTile, i.b, i.h, a.tokens, lane);
        load_rows<Hopper, D>(base + Shared::kDo + stage * kRows, a.d_o, &a.map_do, full, tile * kTile, i.b, i.h, a.tokens, lane);
        const RowTile* rows = a.rows + head_tiles + tile;
        if constexpr (Hopper) {
          if (lane == 0) copy_bulk(rows_to, rows, sizeof(RowTile), full);
        } else {
          for (int n = lane; n < 64; n += 32) copy_async16(rows_to + 16 * n, reinterpret_cast<const uint4*>(rows) + n, true);
        }
      };
      produce(ring, at, a.by_key, list, 2 * kRows + sizeof(RowTile), lane, keep, load);
    };
    produce_items<D>(a, schedule, a.by_key, ring, Shared::kOwnBytes, lane, load_own, walk);
    return;
  }

  if constexpr (Hopper) more_registers<consumer_registers(kGroups)>();
  const int group = uniform(threadIdx.x / kWarpgroup), warp = (threadIdx.x / 32) & 3;
  const int r0 = warp * 16 + lane / 4;
  Cursor at, own;
  consume_items(ring, own, [&](const Item& item) {
    const int tile = kGroups * item.band + group, j0 = tile * kTile + r0, j8 = j0 + 8;
    const float bound = item.bound, scale = kept_float(item.scale * (Gate::kSoftmax ? kLog2e : inverse_of(bound)));
    const float offset = Gate::kRowOffsets ? 0.f : kept_float(row_offset(a, item.scale, item.threshold, 0, D) * inverse_of(bound));

    const Balance<Gate> balance(a, item.h, bound);

    Acc dk[kParts], dv[kParts];
#pragma unroll
    for (int d = 0; d < kParts; ++d) clear(dk[d]), clear(dv[d]);
    int pending = -1;  // stage whose products may still be under way
    const uint32_t own_k = base + own.stage * Shared::kOwnBytes + Shared::kK + group * kRows;
    const Left<Hopper, kParts> k{own_k}, v{own_k + Shared::kV};
    const auto q_at = [&](int stage) { return base + Shared::kQ + stage * kRows; };
    const auto do_at = [&](int stage) { return base + Shared::kDo + stage * kRows; };
    const auto begin_scores = [&](Acc& s, int stage) {
      P::begin();
      k.multiply(s, q_at(stage), warp, lane);
      P::commit();
    };
    const auto begin_gradients = [&](Acc& dp, int stage) {
      P::begin();
      v.multiply(dp, do_at(stage), warp, lane);
      P::commit();
    };
    const auto release_pending = [&] {
      if (pending >= 0) ring.release(pending), pending = -1;
    };
    // The tile of `step` at `at`. Goes on to the next and returns whether this warpgroup visits it. kAhead: on entry the scores are in s, on return
    // the next tile's are in `other`, needed or not (under a condition, ptxas would let one product run at a time). Products run in the order
    // dp, the next tile's scores, dv, dk.
    const auto work = [&](Step& step, Acc& s, Acc& dp, Acc& other) {
      Cursor following = at;
      following.next<kStages>();
      Step next;
      if constexpr (kAhead) {
        begin_gradients(dp, at.stage);
        next = ring.step(following, group);
        begin_scores(other, following.stage);
      } else {
        begin_scores(s, at.stage);
        if constexpr (!kLate) begin_gradients(dp, at.stage);
      }
      const uint32_t rows_at = base + Shared::kRowTiles + at.stage * sizeof(RowTile);
      Columns<kTerms> inverse_z, minus_delta, offsets;
      inverse_z.read(rows_at + offsetof(RowTile, inverse_z), lane);
      if constexpr (Gate::kRowOffsets) offsets.read(rows_at + offsetof(RowTile, offset), lane);
      if constexpr (!kAhead) {
        P::template wait<kLate ? 0 : 1>();  // s, and dk of the tile before
        P::settle(s);
        release_pending();
      }

      if (step.mask != TileEntry::kFull) {
        const uint32_t starts = a.document_start ? rows_at + static_cast<uint32_t>(offsetof(RowTile, document_start)) : 0;
        hide(s, key_mask(a, step.mask, r0, j0, step.tile * kTile, starts), key_mask(a, step.mask, r0 + 8, j8, step.tile * kTile, starts), lane);
      }
      Frag p;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        inverse_z.come_to(j);
        if constexpr (Gate::kRowOffsets) offsets.come_to(j);
        float w[4];
#pragma unroll
        for (int e = 0; e < 4; ++e)
          w[e] = edge_weight<Gate>(s[j][e], scale, Gate::kRowOffsets ? offsets.at(j, e) : offset, inverse_z.at(j, e), balance);
        p[j / 2][2 * (j & 1)] = pack(w[0], w[1]);
        p[j / 2][2 * (j & 1) + 1] = pack(w[2], w[3]);
      }
      P::begin();
      if constexpr (kLate) v.multiply(dp, do_at(at.stage), warp, lane);
      accumulate<Hopper>(dv, p, do_at(at.stage), lane);
      P::commit();
      minus_delta.read(rows_at + offsetof(RowTile, minus_delta), lane);
      P::template wait<kAhead ? 2 : kLate ? 0 : 1>();  // dp
      P::settle(dp);

      Frag ds;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        minus_delta.come_to(j);
        float g[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) g[e] = balance.gradient(s[j][e], dp[j][e] + minus_delta.at(j, e));
        ds[j / 2][2 * (j & 1)] = pack(g[0], g[1]);
        ds[j / 2][2 * (j & 1) + 1] = pack(g[2], g[3]);
      }
      P::begin();
      accumulate<Hopper>(dk, ds, q_at(at.stage), lane);
      P::commit();
      pending = at.stage;
      if constexpr (kAhead) {
        P::template wait<0>();  // keeping dk under way into the next tile takes registers that spill, and was no faster
        P::settle(other);
        release_pending();
      } else {
        next = ring.step(following, group);
      }
      at = following, step = next;
      return step.tile >= 0 && step.mask != kAbsent;
    };
    for (;;) {
      // Passes the tiles that are not in this warpgroup's list. No stage may be held back here, or the producer could wait for it.
      Step step = ring.step(at, group);
      for (; step.tile >= 0 && step.mask == kAbsent; step = ring.step(at, group)) ring.release(at.stage), at.next<kStages>();
      if (step.tile < 0) break;
      Acc even, dp;
      if constexpr (kAhead) {
        Acc odd;
        begin_scores(even, at.stage);
        P::template wait<0>();
        P::settle(even);
        while (work(step, even, dp, odd) && work(step, odd, dp, even)) {
        }
      } else {
        while (work(step, even, dp, even)) {
        }
      }
      P::template wait<0>();
      release_pending();
    }
#pragma unroll
    for (int d = 0; d < kParts; ++d) P::settle(dk[d]), P::settle(dv[d]);
    ring.release(at.stage), at.next<kStages>();
    ring.release_own(own.stage), own.next<kOwn>();
    if (tile >= a.key_tiles) return;
    const float dv_scale = power<Gate::kPower>(bound);
    const float dk_scale = item.scale * (Gate::kFidelity ? 2.f : 1.f) * Gate::kPower * slope<Gate::kPower>(bound);
#pragma unroll
    for (int d = 0; d < kParts; ++d) {
      store_product(dk[d], a.dk, item.b, item.h, j0, a.keys, d * 64, lane, dk_scale, dk_scale);
      store_product(dv[d], a.dv, item.b, item.h, j0, a.keys, d * 64, lane, dv_scale, dv_scale);
    }
  });
}

}  // namespace tessera::cuda_attention
