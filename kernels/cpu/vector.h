#pragma once
// Vector registers through GCC's vector extension, so that the same code runs on any processor; only the fused multiply-add needs to be named.

#include "kernels/cpu/simd.h"

#ifdef __AVX__
#include <immintrin.h>
#endif

namespace tessera::cpu {

template <int lanes>
struct Register {
  typedef float type __attribute__((vector_size(lanes * sizeof(float))));
};
template <int lanes>
using Vector = typename Register<lanes>::type;

#ifdef __AVX512F__
inline constexpr int kLanes = 16;
#else
inline constexpr int kLanes = 8;
#endif

template <int lanes>
[[gnu::always_inline]] inline Vector<lanes> broadcast(float a) {
#ifdef __AVX512F__
  if constexpr (lanes == 16) return _mm512_set1_ps(a);
#endif
#ifdef __AVX__
  if constexpr (lanes == 8) return _mm256_set1_ps(a);
#endif
  Vector<lanes> v;
  for (int l = 0; l < lanes; ++l) v[l] = a;
  return v;
}

/// sum += a b, lane by lane.
template <int lanes>
[[gnu::always_inline]] inline void accumulate(Vector<lanes>& sum, const Vector<lanes>& a, const Vector<lanes>& b) {
#ifdef __AVX512F__
  if constexpr (lanes == 16) {
    sum = _mm512_fmadd_ps(a, b, sum);
    return;
  }
#endif
#if defined(__AVX2__) && defined(__FMA__)
  if constexpr (lanes == 8) {
    sum = _mm256_fmadd_ps(a, b, sum);
    return;
  }
#endif
  for (int l = 0; l < lanes; ++l) sum[l] = multiply_add(a[l], b[l], sum[l]);
}

}  // namespace tessera::cpu
