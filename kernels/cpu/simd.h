#pragma once
// Elementwise functions that the compiler can turn into vector code: no branches, no calls, no tables. The same bits come out of
// the vector and the scalar form, because each is a fixed sequence of IEEE operations. And a dot product.

#include <bit>
#include <cmath>
#include <cstdint>

namespace tessera::cpu {

/// a * b + c, in one rounding where the processor does that fast (a compile-time property, so bits do not vary within a build).
inline float multiply_add(float a, float b, float c) {
#ifdef __FP_FAST_FMAF
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

/// a . b, in an order that depends on n alone.
inline float dot(const float* a, const float* b, std::int64_t n) {
  float s = 0;
#pragma omp simd reduction(+ : s)
  for (std::int64_t i = 0; i < n; ++i) s += a[i] * b[i];
  return s;
}

/// e^x within 2 units in the last place for -87 <= x <= 88; outside, that of the nearer end; NaN stays NaN.
/// Cody-Waite reduction x = n ln 2 + r, |r| <= ln(2)/2, and the degree-6 minimax polynomial of Cephes' expf.
inline float exp_vector(float x) {
  x = x > 88.0f ? 88.0f : x;  // in this form NaN passes
  x = x < -87.0f ? -87.0f : x;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which then stands in the low bits
  const float shifted = multiply_add(x, 1.44269504088896341f, kRound);
  const float n = shifted - kRound;
  float r = multiply_add(n, -0.693359375f, x);
  r = multiply_add(n, 2.12194440e-4f, r);
  float p = 1.9875691500e-4f;
  p = multiply_add(p, r, 1.3981999507e-3f);
  p = multiply_add(p, r, 8.3334519073e-3f);
  p = multiply_add(p, r, 4.1665795894e-2f);
  p = multiply_add(p, r, 1.6666665459e-1f);
  p = multiply_add(p, r, 5.0000001201e-1f);
  p = multiply_add(p, r * r, r + 1.0f);
  const std::int32_t exponent = std::bit_cast<std::int32_t>(shifted) - std::bit_cast<std::int32_t>(kRound);
  return p * std::bit_cast<float>((exponent + 127) << 23);
}

// GELU in the tanh form: 0.5 x (1 + tanh u), u = sqrt(2/pi) (x + 0.044715 x^3). Because (1 + tanh u)/2 = 1/(1 + e^(-2u)) it is
// x / (1 + e^(-2u)), which keeps its relative precision in the negative tail, where 1 + tanh u cancels.
inline constexpr float kGeluLinear = -1.5957691216057308f;  // -2 sqrt(2/pi)
inline constexpr float kGeluCubic = 0.044715f;

inline float gelu(float x) {
  const float e = exp_vector(kGeluLinear * x * multiply_add(kGeluCubic * x, x, 1.0f));
  return x / (1.0f + e);
}

/// d gelu / dx = s + x s (1 - s) 2 u'(x), s = 1 / (1 + e^(-2u)).
inline float gelu_derivative(float x) {
  const float e = exp_vector(kGeluLinear * x * multiply_add(kGeluCubic * x, x, 1.0f));
  const float s = 1.0f / (1.0f + e);
  const float slope = -kGeluLinear * multiply_add(3.0f * kGeluCubic * x, x, 1.0f);  // 2 u'
  return s * multiply_add(x * slope, e * s, 1.0f);
}

}  // namespace tessera::cpu
