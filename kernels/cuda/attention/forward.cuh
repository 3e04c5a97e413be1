#pragma once
// Forward kernel.   o_i = (1/z_i) sum_j a_ij v_j,  a = gate(c f(q k^T) + offset)
//
// A band is neighbouring query tiles of a head, one consumer warpgroup each; keys and values stream through a ring of stages
// filled by the producer warp. For each tile: s = q k^T; weights in registers; where any edge of the 64 x 64 tile is active,
// o += a v, which runs while the next tile's scores become weights. No running maximum and no rescaling, except for softmax. The bitmap and
// the counters fall out of the same pass.

#include "kernels/attention.h"
#include "kernels/cuda/attention/gate.cuh"

namespace tessera::cuda_attention {

template <int D, bool Hopper>
struct ForwardShared {
  static constexpr int kGroups = D == 64 ? 3 : 2, kStages = Hopper ? (D == 64 ? 8 : 5) : 4, kOwn = Hopper ? 2 : 1;
  static constexpr uint32_t kRows = D / 64 * kTileBytes;  // 64 rows of one tensor
  static constexpr uint32_t kOwnBytes = kGroups * kRows;
  static constexpr uint32_t kQ = 0, kK = kOwn * kOwnBytes, kV = kK + kStages * kRows, kOnesAt = kV + kStages * kRows,
                            kRing = kOnesAt + (Hopper ? kOnesBytes : 0);
  using Ring = cuda_attention::Ring<kGroups, Hopper, kStages, kOwn>;
  static constexpr uint32_t kBytes = kRing + Ring::kBytes;
};

/// A query tile's row of the bitmap, written word by word as the walk ascends.
class BitmapRow {
 public:
  __device__ __forceinline__ BitmapRow(uint32_t* row) : row_(row) {}
  __device__ __forceinline__ void set(int tile, bool writes) {
    if (tile >> 5 != at_) flush(tile >> 5, writes);
    word_ |= 1u << (tile & 31);
  }
  __device__ __forceinline__ void flush(int next, bool writes) {
    for (; at_ < next; ++at_, word_ = 0)
      if (writes) row_[at_] = word_;
  }

 private:
  uint32_t* row_;
  uint32_t word_ = 0;
  int at_ = 0;
};

/// What row i of a head has summed up before this call: D sums of a v, four of a (one of each lane that shares the row; but for softmax all are the
/// whole), top (softmax), and the edges seen. Sums are over gate_bound^P, as in registers, so that going on from them changes no bit.
template <int D>
__device__ __forceinline__ float* carry_row(const Args& a, int b, int h, int i) {
  return a.carry + ((static_cast<int64_t>(b) * a.heads + h) * a.tokens + i) * (D + kCarryExtra);
}
/// Half 0 has elements 0, 1 of a thread's share of a product, half 1 elements 2, 3. Rows past the end take up the last one's, and nobody looks at
/// them: after a load under a condition ptxas would let one product run at a time.
template <int D, int Half, bool Softmax>
__device__ __forceinline__ void resume(const Args& a, int b, int h, int i, int lane, Acc (&o)[D / 64], float& sum, float& top) {
  const float* const row = carry_row<D>(a, b, h, min(i, a.tokens - 1));
#pragma unroll
  for (int n = 0; n < D / 8; ++n) {
    const float2 v = *reinterpret_cast<const float2*>(row + 8 * n + 2 * (lane & 3));
    o[n / 8][n % 8][2 * Half] = a.carry_first ? 0.f : v.x, o[n / 8][n % 8][2 * Half + 1] = a.carry_first ? 0.f : v.y;
  }
  if (a.carry_first) return;
  sum = row[D + (lane & 3)];
  if constexpr (Softmax) top = row[D + 4];
}
template <int D, int Half, bool Softmax>
__device__ __forceinline__ void suspend(const Args& a, int b, int h, int i, int lane, const Acc (&o)[D / 64], float sum, float top, int seen) {
  if (i >= a.tokens) return;
  float* const row = carry_row<D>(a, b, h, i);
#pragma unroll
  for (int n = 0; n < D / 8; ++n)
    *reinterpret_cast<float2*>(row + 8 * n + 2 * (lane & 3)) = make_float2(o[n / 8][n % 8][2 * Half], o[n / 8][n % 8][2 * Half + 1]);
  row[D + (lane & 3)] = sum;
  if ((lane & 3) != 0) return;
  if constexpr (Softmax) row[D + 4] = top;
  row[D + 5] = __int_as_float(seen);
}

/// Carry: of calls over a part of the keys (AttentionForward::carry). A kernel of its own, as the others have no register to spare for it.
template <int D, int Variant, bool Hopper, bool Carry = false>
__global__ void __launch_bounds__(threads_of(ForwardShared<D, Hopper>::kGroups, Hopper), 1) forward_kernel(const __grid_constant__ Args a) {
  using Shared = ForwardShared<D, Hopper>;
  using Gate = Gates<Variant>;
  using P = Product<Hopper>;
  constexpr int kGroups = Shared::kGroups, kStages = Shared::kStages, kOwn = Shared::kOwn, kParts = D / 64;
  constexpr uint32_t kRows = Shared::kRows;
  extern __shared__ __align__(1024) uint8_t raw[];  // the swizzle counts from multiples of 1024
  const uint32_t base = kept(shared_address(raw));
  const typename Shared::Ring ring{base + Shared::kRing};
  const Schedule schedule(a, a.by_query, a.query_tiles, kGroups, true);
  const int lane = threadIdx.x & 31;
  if constexpr (Hopper && !Gate::kSoftmax) fill_ones(base + Shared::kOnesAt);
  ring.init();

  if (threadIdx.x >= kGroups * kWarpgroup) {  // producer
    if constexpr (Hopper) fewer_registers<producer_registers(kGroups)>();
    if (threadIdx.x >= kGroups * kWarpgroup + 32) return;
    const auto load_own = [&](const Item& i, int slot, uint32_t full) {
      for (int w = 0; w < kGroups; ++w) {
        const int row = max(a.by_query.tile(i.band, w, kGroups), 0) * kTile;
        load_rows<Hopper, D>(base + Shared::kQ + slot * Shared::kOwnBytes + w * kRows, a.q, &a.map_q, full, row, i.b, i.h, a.tokens, lane);
      }
    };
    const auto walk = [&](const Item& i, Cursor& at, int64_t list) {
      DocumentBounds documents[kGroups];
#pragma unroll
      for (int w = 0; w < kGroups; ++w) documents[w] = document_bounds(a, i.b, a.by_query.tile(i.band, w, kGroups));
      const auto keep = [&](Entry& e) {
#pragma unroll
        for (int w = 0; w < kGroups; ++w) {
          const int query = a.by_query.tile(i.band, w, kGroups);
          if (e.tile >= a.key_tiles || query >= a.query_tiles || (e.tile + 1) * kTile <= documents[w].first) e.mask[w] = kAbsent;
          e.mask[w] = cut_mask(a, e.mask[w], query, e.tile, documents[w]);
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
  // What a tile is checked for first depends on the tile before; the values never do.
  const bool visit_all = a.visit_all, counting = a.counters != nullptr;
  Cursor at, own;
  consume_items(ring, own, [&](const Item& item) {
    const int b = item.b, h = item.h, place = a.by_query.tile(item.band, group, kGroups), tile = max(place, 0);
    const bool exists = place >= 0 && place < a.query_tiles;
    const int i0 = tile * kTile + r0, i8 = i0 + 8;
    const float bound = item.bound, inverse_bound = inverse_of(bound);
    const float scale = kept_float(item.scale * (Gate::kSoftmax ? kLog2e : inverse_bound));
    float offset0 = 0, offset8 = 0;
    if (!Gate::kSoftmax) {
      offset0 = offset8 = row_offset(a, item.scale, item.threshold, i0, D) * inverse_bound;
      if (a.length_beta > 0) offset8 = row_offset(a, item.scale, item.threshold, i8, D) * inverse_bound;
    }
    int document0 = 0, document8 = 0;
    if (a.document_start && exists) {
      const int* starts = a.document_start + static_cast<int64_t>(b) * a.tokens;
      document0 = starts[min(i0, a.tokens - 1)], document8 = starts[min(i8, a.tokens - 1)];
    }
    BitmapRow bitmap(kept(a.active + ((static_cast<int64_t>(b) * a.heads + h) * a.query_tiles + tile) * a.words));
    const bool quick = uniform(scale > 0 && !visit_all);
    bool likely = true;

    Acc o[kParts];
#pragma unroll
    for (int d = 0; d < kParts; ++d) clear(o[d]);
    float sum0 = 0, sum8 = 0, top0 = -INFINITY, top8 = -INFINITY, active_edges = 0;
    int visible0 = 0, visible8 = 0, full_tiles = 0, active_tiles = 0, visible_tiles = 0;
    if constexpr (Carry) {
      resume<D, 0, Gate::kSoftmax>(a, b, h, i0, lane, o, sum0, top0);
      resume<D, 1, Gate::kSoftmax>(a, b, h, i8, lane, o, sum8, top8);
    }
    float sums[4] = {sum0, sum0, sum8, sum8};  // of weights as rounded for the product, by the tensor cores; softmax has sum0 and sum8

    // While the weights of a tile are worked out from its scores, the tensor cores add the product of the tile before to o and compute the scores of
    // the one behind. One wait a tile is for all of it, and most of the time for nothing.
    struct Half {  // tiles take turns
      Acc s;       // scores
      Frag p;      // weights
    };
    int held = -1;  // stage whose product of weights and values is to come or under way; -1: none
    const Left<Hopper, kParts> q{base + Shared::kQ + own.stage * Shared::kOwnBytes + group * kRows};
    const auto add_held = [&](const Frag& p) {
      if (held < 0) return;
      P::begin();
      const uint32_t v = base + Shared::kV + held * kRows;
      if constexpr (Gate::kSoftmax)
        accumulate<Hopper>(o, p, v, lane);
      else
        accumulate_summing<Hopper>(o, sums, p, v, base + Shared::kOnesAt, lane);
      P::commit();
    };
    const auto begin_scores = [&](Acc& s, int stage) {
      P::begin();
      q.multiply(s, base + Shared::kK + stage * kRows, warp, lane);
      P::commit();
    };
    const auto wait = [&] {
      P::template wait<0>();
      if (held >= 0) ring.release(held), held = -1;
    };
    // The tile of `step` at `at`, whose scores are there. Goes on to the next and returns whether its scores are in `other`.
    const auto work = [&](Step& step, Half& mine, Half& other) {
      Acc& s = mine.s;
      add_held(other.p);
      Cursor following = at;
      following.next<kStages>();
      const Step next = ring.step(following, group);
      const bool on = next.tile >= 0 && next.mask != kAbsent;
      if constexpr (Hopper)
        begin_scores(other.s, following.stage);  // needed or not: under a condition, ptxas would let one product run at a time
      else
        begin_scores(s, at.stage);

      bool visible = true;
      if (step.mask != TileEntry::kFull) {
        const uint64_t m0 = query_mask(a, step.mask, r0, i0, step.tile * kTile, document0),
                       m8 = query_mask(a, step.mask, r0 + 8, i8, step.tile * kTile, document8);
        hide(s, m0, m8, lane);
        visible0 += __popcll(m0), visible8 += __popcll(m8);
        visible = warpgroup_any(m0 | m8, group);
        visible_tiles += visible;
      } else {
        ++full_tiles;
      }
      bool add = false;
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
          weigh<Gate>(s, scale, offset0, offset8);
        }
        round_fragment(mine.p, s);
        if constexpr (!Gate::kSoftmax) {
          bool any;
          if (counting) {
            const float count = count_positive(mine.p);
            active_edges += count, any = count > 0.f;
          } else {
            any = any_positive(mine.p);
          }
          active = likely = warpgroup_any(any, group);
        }
        active_tiles += active;
        if (active) bitmap.set(step.tile, thread == 0);
        add = active || (visit_all && visible);
      } else {
        likely = false;
      }
      wait();
      P::settle(other.s);
      if (add)
        held = at.stage;
      else
        ring.release(at.stage);
      at = following, step = next;
      if (!on) {
        add_held(mine.p);
        wait();
      }
      return on;
    };
    for (;;) {
      // Passes the tiles that are not in this warpgroup's list. No stage may be held back here, or the producer could wait for it.
      Step step = ring.step(at, group);
      for (; step.tile >= 0 && step.mask == kAbsent; step = ring.step(at, group)) ring.release(at.stage), at.next<kStages>();
      if (step.tile < 0) break;
      Half even, odd;
      if constexpr (Hopper) {
        begin_scores(even.s, at.stage);
        wait();
        P::settle(even.s);
        while (work(step, even, odd) && work(step, odd, even)) {
        }
      } else {
        while (work(step, even, even)) {
        }
      }
    }
#pragma unroll
    for (int d = 0; d < kParts; ++d) P::settle(o[d]);
    P::settle(sums);
    if constexpr (!Gate::kSoftmax) sum0 = sums[0], sum8 = sums[2];
    ring.release(at.stage), at.next<kStages>();
    ring.release_own(own.stage), own.next<kOwn>();
    if (!exists) return;

    bitmap.flush(a.words, thread == 0);
    visible0 += full_tiles * kTile, visible8 += full_tiles * kTile, visible_tiles += full_tiles;
    int seen0 = visible0, seen8 = visible8;  // by all parts
    if (Carry && !a.carry_first) {
      if (i0 < a.tokens) seen0 += __float_as_int(carry_row<D>(a, b, h, i0)[D + 5]);
      if (i8 < a.tokens) seen8 += __float_as_int(carry_row<D>(a, b, h, i8)[D + 5]);
    }
    const bool first = (lane & 3) == 0, in0 = first && i0 < a.tokens, in8 = first && i8 < a.tokens;
    unsigned empty = 0;
    if (!Carry || a.carry_last) {
      const float unit = power<Gate::kPower>(bound);  // of the weights
      if constexpr (Gate::kSoftmax) sum0 = quad_sum(sum0), sum8 = quad_sum(sum8);
      sum0 *= unit, sum8 *= unit;
      const auto finish = [&](float sum, float top, int seen, float& z) {
        if constexpr (Gate::kSoftmax) {
          z = sum > 0.f ? top * kLn2 + logf(sum) : 0.f;
          return sum > 0.f ? fast_reciprocal(sum) : 0.f;
        }
        z = a.normalize_sum ? a.epsilon + sum : a.normalize_length ? powf(static_cast<float>(max(seen, 1)), a.length_alpha) : 1.f;
        return z > 0.f ? unit * fast_reciprocal(z) : 0.f;
      };
      float z0, z8;
      const float inverse0 = finish(sum0, top0, seen0, z0), inverse8 = finish(sum8, top8, seen8, z8);
#pragma unroll
      for (int d = 0; d < kParts; ++d) store_product(o[d], a.o, b, h, i0, a.tokens, d * 64, lane, inverse0, inverse8);
      float* z = a.z + (static_cast<int64_t>(b) * a.heads + h) * a.tokens;
      if (in0) z[i0] = z0;
      if (in8) z[i8] = z8;
      empty = (in0 && !(sum0 > 0.f)) + (in8 && !(sum8 > 0.f));
    } else {
      __syncwarp();  // before lane 0 of a row counts on, all have read what was seen
      suspend<D, 0, Gate::kSoftmax>(a, b, h, i0, lane, o, sum0, top0, seen0);
      suspend<D, 1, Gate::kSoftmax>(a, b, h, i8, lane, o, sum8, top8, seen8);
    }

    if (counting) {
      unsigned visible = (in0 ? visible0 : 0) + (in8 ? visible8 : 0);
      visible = __reduce_add_sync(0xffffffffu, visible);
      empty = __reduce_add_sync(0xffffffffu, empty);
      const unsigned active = Gate::kSoftmax ? visible : __reduce_add_sync(0xffffffffu, static_cast<unsigned>(active_edges));
      if (lane == 0) {
        unsigned long long* const counters = a.counters + h * static_cast<int>(kAttentionCounters);
        const auto add = [&](AttentionCounter at, unsigned n) { atomicAdd(counters + at, static_cast<unsigned long long>(n)); };
        add(kActiveEdges, active), add(kVisibleEdges, visible);
        if (warp == 0) add(kActiveTiles, active_tiles), add(kVisibleTiles, visible_tiles);
        if (empty) add(kEmptyRows, empty);
      }
    }
  });
}

template <int D, int Variant, bool Hopper>
constexpr auto forward_part_kernel = forward_kernel<D, Variant, Hopper, true>;

}  // namespace tessera::cuda_attention
