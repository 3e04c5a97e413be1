#pragma once
// Scores to weights and back, on a warp's share of a 64 x 64 product in registers: masks, gates, their derivatives.
//
// A masked edge is a NaN score: every relu gate and derivative below sends NaN to exactly 0 (fmaxf(NaN, 0) = 0, NaN > 0 is
// false), so that full tiles pay nothing for masks. Softmax turns it into exp(-inf).

#include "kernels/attention.h"
#include "kernels/cuda/attention/pipeline.cuh"

namespace tessera::cuda_attention {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

/// max(0, x), or saturate(x) for bounded scores.
template <bool Bounded>
__device__ __forceinline__ float positive(float scale, float f, float offset) {
  const float x = fmaf(scale, f, offset);
  return Bounded ? __saturatef(x) : fmaxf(x, 0.f);
}

// -- Masks -----------------------------------------------------------------------------------------------------------

/// Bit k: key first_key + k is visible to query i, row r of its tile. `document` is the first visible key.
__device__ __forceinline__ uint64_t query_mask(const Args& a, int mask, int r, int i, int first_key, int document) {
  if (mask == kHidden || i >= a.tokens) return 0;
  uint64_t m = mask < 0 ? ~0ull : mask == 0 && a.mask0_is_causal ? (2ull << r) - 1 : __ldg(a.masks + mask * 64ll + r);
  const int keys = a.keys - first_key, hidden = document - first_key;
  if (keys < 64) m &= (1ull << keys) - 1;
  if (hidden > 0) m &= hidden >= 64 ? 0 : ~0ull << hidden;
  return m;
}

/// Bit q: query first_query + q sees key j, row r of its tile. Document starts (shared memory) are the query tile's, 0: no documents.
__device__ __forceinline__ uint64_t key_mask(const Args& a, int mask, int r, int j, int first_query, uint32_t document_starts) {
  if (mask == kHidden || j >= a.keys) return 0;
  uint64_t m = mask < 0 ? ~0ull : mask == 0 && a.mask0_is_causal ? ~0ull << r : __ldg(a.masks_by_key + mask * 64ll + r);
  const int queries = a.tokens - first_query;
  if (queries < 64) m &= (1ull << queries) - 1;
  if (document_starts) {
    for (int q = 0; q < 64; q += 2) {
      const int2 starts = load_shared2(document_starts + 4 * q);
      if (starts.x > j) m &= ~(1ull << q);
      if (starts.y > j) m &= ~(2ull << q);
    }
  }
  return m;
}

/// Hides what the masks of this thread's two rows do not show.
__device__ __forceinline__ void hide(Acc& s, uint64_t row0, uint64_t row8, int lane) {
  const float nan = __int_as_float(0x7fffffff);
  row0 >>= 2 * (lane & 3), row8 >>= 2 * (lane & 3);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint32_t m0 = static_cast<uint32_t>(row0 >> (32 * half)), m8 = static_cast<uint32_t>(row8 >> (32 * half));
#pragma unroll
    for (int jj = 0; jj < 4; ++jj) {
      const int j = half * 4 + jj;
      if (!(m0 & (1u << (8 * jj)))) s[j][0] = nan;
      if (!(m0 & (2u << (8 * jj)))) s[j][1] = nan;
      if (!(m8 & (1u << (8 * jj)))) s[j][2] = nan;
      if (!(m8 & (2u << (8 * jj)))) s[j][3] = nan;
    }
  }
}

// -- Gates -----------------------------------------------------------------------------------------------------------

template <int P>
__device__ __forceinline__ float power(float r) {
  if constexpr (P == 1) return r;
  if constexpr (P == 2) return r * r;
  const float r2 = r * r;
  return r2 * r2;
}
/// r^(P-1) where r = max(0, x), 0 where r is 0: the factor P is left to the end.
template <int P>
__device__ __forceinline__ float slope(float r) {
  if constexpr (P == 1) return r > 0.f ? 1.f : 0.f;
  if constexpr (P == 2) return r;
  return r * r * r;
}

/// Rounds a product to bf16 as the left operand of the next one: fragment [kk] is columns 16kk .. 16kk+15.
__device__ __forceinline__ void round_fragment(Frag& to, const Acc& from) {
#pragma unroll
  for (int kk = 0; kk < 4; ++kk) {
    to[kk][0] = pack(from[2 * kk][0], from[2 * kk][1]);
    to[kk][1] = pack(from[2 * kk][2], from[2 * kk][3]);
    to[kk][2] = pack(from[2 * kk + 1][0], from[2 * kk + 1][1]);
    to[kk][3] = pack(from[2 * kk + 1][2], from[2 * kk + 1][3]);
  }
}

/// Does any of this thread's scores make an active edge? Needs scale > 0: x rises with f(s), and rounding keeps the order.
template <bool Fidelity>
__device__ __forceinline__ bool any_active(const Acc& s, float scale, float offset0, float offset8) {
  float top0 = -INFINITY, top8 = -INFINITY;
  if constexpr (Fidelity) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      top0 = fmaxf(top0, fmaxf(fabsf(s[j][0]), fabsf(s[j][1])));
      top8 = fmaxf(top8, fmaxf(fabsf(s[j][2]), fabsf(s[j][3])));
    }
    top0 *= top0, top8 *= top8;
    if (isinf(top0)) top0 = -INFINITY;  // every edge hidden
    if (isinf(top8)) top8 = -INFINITY;
  } else {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      top0 = fmaxf(top0, fmaxf(s[j][0], s[j][1]));
      top8 = fmaxf(top8, fmaxf(s[j][2], s[j][3]));
    }
  }
  return fmaxf(fmaf(scale, top0, offset0), fmaf(scale, top8, offset8)) > 0.f;
}

/// Weights of a tile: s becomes a = max(0, x)^P (over gate_bound^P) in fp32.
template <class Gate>
__device__ __forceinline__ void weigh(Acc& s, float scale, float offset0, float offset8) {
#pragma unroll
  for (int j = 0; j < 8; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float f = Gate::kFidelity ? s[j][e] * s[j][e] : s[j][e];
      s[j][e] = power<Gate::kPower>(positive<Gate::kBounded>(scale, f, e < 2 ? offset0 : offset8));
    }
  }
}

/// Backward: max(0, x)^(P-1), for softmax the weight.
template <class Gate>
__device__ __forceinline__ float edge_slope(float s, float scale, float offset, float& r) {
  const float f = Gate::kFidelity ? s * s : s;
  if constexpr (Gate::kSoftmax) {
    const float x = fmaf(scale, f, offset);
    r = 1.f;
    return isnan(x) ? 0.f : exp2f(x);
  } else {
    r = positive<Gate::kBounded>(scale, f, offset);
    return slope<Gate::kPower>(r);
  }
}

/// AttentionBackward::balance of a head: what joins an edge's dx, over the factor that dk, dq and dthreshold get at the end, where max(0, x) / bound
/// is positive and below `reach`. The pass over scores that has it negates the edge's factor (none is negative), for the pass over gradients to see;
/// an edge whose factor has underflowed to 0 goes without.
template <class Gate>
struct Balance {
  float m = 0, reach = 0;
  __device__ __forceinline__ Balance(const Args& a, int head, float bound) {
    if constexpr (Gate::kBalances) {
      const float factor = Gate::kPower * slope<Gate::kPower>(bound);
      if (a.balance && factor > 0.f) m = __ldg(a.balance + head) / factor;
      m = kept_float(m), reach = kept_float(kBalanceReach * inverse_of(bound));
    }
  }
  __device__ __forceinline__ float mark(float factor, float r) const {
    if constexpr (!Gate::kBalances) return factor;
    return __uint_as_float(__float_as_uint(factor) | (__float_as_uint(r - reach) & 0x80000000u));
  }
  /// dx of an edge with factor `marked`.
  __device__ __forceinline__ float gradient(float marked, float da) const {
    if constexpr (!Gate::kBalances) return marked * da;
    return fabsf(marked) * da + (marked < 0.f ? m : 0.f);
  }
};

/// The weight over z. s becomes what turns da z into the gradient of s / (c P); fidelity leaves half its factor 2 s to the end.
template <class Gate>
__device__ __forceinline__ float edge_weight(float& s, float scale, float offset, float inverse_z, const Balance<Gate>& balance) {
  float r;
  const float factor = edge_slope<Gate>(s, scale, offset, r) * inverse_z;
  s = !Gate::kFidelity ? balance.mark(factor, r) : factor != 0.f ? factor * s : 0.f;  // a hidden score is NaN
  return factor * r;
}

/// Is any weight of a rounded fragment positive? None is negative.
__device__ __forceinline__ bool any_positive(const Frag& p) {
  uint32_t any = 0;
#pragma unroll
  for (int kk = 0; kk < 4; ++kk) any |= p[kk][0] | p[kk][1] | p[kk][2] | p[kk][3];
  return any != 0;
}

/// Positive weights among a rounded fragment: exact, since 16 ones fit bf16 and their sums fit fp32.
__device__ __forceinline__ float count_positive(const Frag& p) {
  const __nv_bfloat162 zero = __float2bfloat162_rn(0.f);
  __nv_bfloat162 part[4];
#pragma unroll
  for (int kk = 0; kk < 4; ++kk) {
    const auto positive = [&](int e) { return __hgt2(reinterpret_cast<const __nv_bfloat162&>(p[kk][e]), zero); };
    part[kk] = __hadd2(__hadd2(positive(0), positive(1)), __hadd2(positive(2), positive(3)));
  }
  const __nv_bfloat162 n = __hadd2(__hadd2(part[0], part[1]), __hadd2(part[2], part[3]));
  const uint32_t bits = reinterpret_cast<const uint32_t&>(n);
  return low_of(bits) + high_of(bits);
}

}  // namespace tessera::cuda_attention
