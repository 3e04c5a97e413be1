#pragma once
// Backward kernel for queries.   dq_i = c P sum_j ds_ij k_j, and the partial sums of dscale and dthreshold of each query tile
//
// A band is neighbouring query tiles of a head; it walks their active key tiles, ascending, as the forward kernel does.
// On the Hopper path it starts while the dk, dv kernel still runs: it reads nothing of that, and writes nothing that it reads.
// The gradient of the scale costs nothing: sum_j dx_ij s_ij = <q_i, sum_j dx_ij k_j>, a product of two rows at the end.

#include "kernels/cuda/attention/gate.cuh"

namespace tessera::cuda_attention {

template <int D, bool Hopper>
struct BackwardQShared {
  static constexpr int kGroups = 2;
  static constexpr int kStages = D == 64 ? (Hopper ? 8 : 4) : (Hopper ? 4 : 3), kOwn = D == 64 && Hopper ? 2 : 1;
  static constexpr uint32_t kRows = D / 64 * kTileBytes;  // 64 rows of one tensor
  static constexpr uint32_t kOwnBytes = 2 * kGroups * kRows;
  static constexpr uint32_t kQ = 0, kDo = kGroups * kRows, kK = kOwn * kOwnBytes, kV = kK + kStages * kRows, kRing = kV + kStages * kRows;
  using Ring = cuda_attention::Ring<kGroups, Hopper, kStages, kOwn>;
  static constexpr uint32_t kBytes = kRing + Ring::kBytes;
};

template <int D, int Variant, bool Hopper>
__global__ void __launch_bounds__(threads_of(BackwardQShared<D, Hopper>::kGroups, Hopper), 1) backward_q_kernel(const __grid_constant__ Args a) {
  using Shared = BackwardQShared<D, Hopper>;
  using Gate = Gates<Variant>;
  using P = Product<Hopper>;
  constexpr int kGroups = Shared::kGroups, kStages = Shared::kStages, kOwn = Shared::kOwn, kParts = D / 64;
  constexpr uint32_t kRows = Shared::kRows;
  // Two warpgroups a block, not three: registers then allow to compute the next tile's scores while this tile's become gradients.
  constexpr bool kAhead = Hopper && D == 64;
  extern __shared__ __align__(1024) uint8_t raw[];  // the swizzle counts from multiples of 1024
  __shared__ float2 sums[kGroups][4];
  const uint32_t base = kept(shared_address(raw));
  const typename Shared::Ring ring{base + Shared::kRing};
  const Schedule schedule(a, a.by_query, a.query_tiles, kGroups, true);
  const int lane = threadIdx.x & 31;
  ring.init();

  if (threadIdx.x >= kGroups * kWarpgroup) {  // producer
    if constexpr (Hopper) fewer_registers<producer_registers(kGroups)>();
    if (threadIdx.x >= kGroups * kWarpgroup + 32) return;
    const auto load_own = [&](const Item& i, int slot, uint32_t full) {
      for (int w = 0; w < kGroups; ++w) {
        const int row = max(a.by_query.tile(i.band, w, kGroups), 0) * kTile;
        const uint32_t to = base + slot * Shared::kOwnBytes + w * kRows;
        load_rows<Hopper, D>(to + Shared::kQ, a.q, &a.map_q, full, row, i.b, i.h, a.tokens, lane);
        load_rows<Hopper, D>(to + Shared::kDo, a.d_o, &a.map_do, full, row, i.b, i.h, a.tokens, lane);
      }
    };
    const auto walk = [&](const Item& i, Cursor& at, int64_t list) {
      const int64_t head_tiles = (static_cast<int64_t>(i.b) * a.heads + i.h) * a.query_tiles;
      const int first = a.by_query.tile(i.band, 0, kGroups), skip = a.visit_all ? kHidden : kAbsent;
      DocumentBounds documents[kGroups];
#pragma unroll
      for (int w = 0; w < kGroups; ++w) documents[w] = document_bounds(a, i.b, first + w);
      const auto keep = [&](Entry& e) {
#pragma unroll
        for (int w = 0; w < kGroups; ++w) {
          if (e.tile >= a.key_tiles || first + w >= a.query_tiles) e.mask[w] = kAbsent;
          e.mask[w] = cut_mask(a, e.mask[w], first + w, e.tile, documents[w]);
          if (e.mask[w] != kAbsent && !(a.active[(head_tiles + first + w) * a.words + (e.tile >> 5)] >> (e.tile & 31) & 1)) e.mask[w] = skip;
        }
      };
      const auto load = [&](int stage, int tile) {
        load_rows<Hopper, D>(base + Shared::kK + stage * kRows, a.k, &a.map_k, ring.full(stage), tile * kTile, i.b, i.h, a.keys, lane);
        load_rows<Hopper, D>(base + Shared::kV + stage * kRows, a.v, &a.map_v, ring.full(stage), tile * kTile, i.b, i.h, a.keys, lane);
      };
      produce(ring, at, a.by_query, list, 2 * kRows, lane, keep, load);
    };
    produce_items<D>(a, schedule, a.by_query, ring, Shared::kOwnBytes, lane, load_own, walk);
    return;
  }

  if constexpr (Hopper) more_registers<consumer_registers(kGroups)>();
  const int group = uniform(threadIdx.x / kWarpgroup), warp = (threadIdx.x / 32) & 3, thread = threadIdx.x % kWarpgroup;
  const int r0 = warp * 16 + lane / 4;
  Cursor at, own;
  consume_items(ring, own, [&](const Item& item) {
    const int place = a.by_query.tile(item.band, group, kGroups), tile = max(place, 0), i0 = tile * kTile + r0, i8 = i0 + 8;
    const int64_t at_tile = (static_cast<int64_t>(item.b) * a.heads + item.h) * a.query_tiles + tile;
    const bool exists = place >= 0 && place < a.query_tiles;
    const float bound = item.bound, scale = kept_float(item.scale * (Gate::kSoftmax ? kLog2e : inverse_of(bound)));
    struct Row {
      float offset = 0, inverse_z = 0, minus_delta = 0;  // the last over z, too
      int document_start = 0;
    } row0, row8;
    if (exists) {
      const RowTile& rows = a.rows[at_tile];
      const auto read = [&](int r) {
        const int n = RowTile::place(r);
        return Row{rows.offset[n], rows.inverse_z[n], rows.minus_delta[n] * rows.inverse_z[n], rows.document_start[r]};
      };
      row0 = read(r0), row8 = read(r0 + 8);
    }

    const Balance<Gate> balance(a, item.h, bound);

    Acc dq[kParts];
#pragma unroll
    for (int d = 0; d < kParts; ++d) clear(dq[d]);
    float dx0 = 0, dx8 = 0;
    int pending = -1;  // stage whose product may still be under way
    const uint32_t own_q = base + own.stage * Shared::kOwnBytes + Shared::kQ + group * kRows;
    const Left<Hopper, kParts> q{own_q}, d_o{own_q + Shared::kDo};
    const auto k_at = [&](int stage) { return base + Shared::kK + stage * kRows; };
    const auto v_at = [&](int stage) { return base + Shared::kV + stage * kRows; };
    const auto begin_scores = [&](Acc& s, int stage) {
      P::begin();
      q.multiply(s, k_at(stage), warp, lane);
      P::commit();
    };
    const auto begin_gradients = [&](Acc& dp, int stage) {
      P::begin();
      d_o.multiply(dp, v_at(stage), warp, lane);
      P::commit();
    };
    const auto release_pending = [&] {
      if (pending >= 0) ring.release(pending), pending = -1;
    };
    // The tile of `step` at `at`. Goes on to the next and returns whether this warpgroup visits it. kAhead: on entry the scores are in s, on return
    // the next tile's are in `other`, needed or not (under a condition, ptxas would let one product run at a time).
    const auto work = [&](Step& step, Acc& s, Acc& dp, Acc& other) {
      Cursor following = at;
      following.next<kStages>();
      Step next;
      if constexpr (kAhead) {
        begin_gradients(dp, at.stage);
        next = ring.step(following, group);
        begin_scores(other, following.stage);
      } else {
        begin_scores(s, at.stage), begin_gradients(dp, at.stage);
        P::template wait<1>();  // s, and dq of the tile before
        P::settle(s);
        release_pending();
      }

      if (step.mask != TileEntry::kFull) {
        const int first_key = step.tile * kTile;
        hide(s, query_mask(a, step.mask, r0, i0, first_key, row0.document_start),
             query_mask(a, step.mask, r0 + 8, i8, first_key, row8.document_start), lane);
      }
      if constexpr (!Gate::kFidelity) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            float r;
            const float factor = edge_slope<Gate>(s[j][e], scale, e < 2 ? row0.offset : row8.offset, r);
            s[j][e] = balance.mark(factor, r);
          }
        }
      }
      P::template wait<kAhead ? 1 : 0>();  // dp; kAhead: and before it dq of the tile before
      P::settle(dp);
      if constexpr (kAhead) release_pending();

      Frag ds;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        float g[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const Row& row = e < 2 ? row0 : row8;
          float dx = fmaf(dp[j][e], row.inverse_z, row.minus_delta), r;  // dx / P
          if constexpr (Gate::kFidelity) {
            const float factor = edge_slope<Gate>(s[j][e], scale, row.offset, r);
            dx *= factor;
            g[e] = factor != 0.f ? dx * s[j][e] : 0.f;  // a hidden score is NaN; half the factor 2 s is left to the end
          } else {
            g[e] = dx = balance.gradient(s[j][e], dx);
          }
          if (e < 2)
            dx0 += dx;
          else
            dx8 += dx;
        }
        ds[j / 2][2 * (j & 1)] = pack(g[0], g[1]);
        ds[j / 2][2 * (j & 1) + 1] = pack(g[2], g[3]);
      }
      P::begin();
      accumulate<Hopper>(dq, ds, k_at(at.stage), lane);
      P::commit();
      pending = at.stage;
      if constexpr (kAhead) {
        P::template wait<1>();  // the next tile's scores
        P::settle(other);
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
    for (int d = 0; d < kParts; ++d) P::settle(dq[d]);
    ring.release(at.stage), at.next<kStages>();

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
    if constexpr (Hopper) reads_before_copies();
    ring.release_own(own.stage), own.next<kOwn>();
    if (!exists) return;

    const float c = item.scale, factor = Gate::kPower * slope<Gate::kPower>(bound);  // of dx as summed here
    const float dq_scale = c * factor * (Gate::kFidelity ? 2.f : 1.f);
#pragma unroll
    for (int d = 0; d < kParts; ++d) store_product(dq[d], a.dq, item.b, item.h, i0, a.tokens, d * 64, lane, dq_scale, dq_scale);
    const bool inside = !Gate::kSoftmax && (Gate::kFidelity || a.length_beta > 0);
    float dscale = dot0 + dot8, dx = dx0 + dx8;
    if (inside && c != 0.f) dscale += (row0.offset * dx0 + row8.offset * dx8) * bound / c;  // offset = -c tau
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      dscale += __shfl_xor_sync(0xffffffffu, dscale, step);
      dx += __shfl_xor_sync(0xffffffffu, dx, step);
    }
    warpgroup_any(false, group);  // the band before has been summed
    if (lane == 0) sums[group][warp] = make_float2(dscale, dx);
    warpgroup_any(false, group);
    if (thread == 0) {
      float2 total{0.f, 0.f};
      for (int w = 0; w < 4; ++w) total.x += sums[group][w].x, total.y += sums[group][w].y;
      a.partial_scale[at_tile] = total.x * factor;
      a.partial_threshold[at_tile] = -total.y * factor * (Gate::kFidelity ? c : 1.f);
    }
  });
  // Who waits for dq waits for dk, dv, too. One block is enough, the one that starts last: others leave their multiprocessor to the next.
  if (Hopper && blockIdx.x == gridDim.x - 1) await_kernel_before();
}

}  // namespace tessera::cuda_attention
