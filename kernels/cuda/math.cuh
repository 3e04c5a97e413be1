#pragma once
// Exponentials, sigmoids and GELU in few instructions, exact enough for results that are rounded to the 8 bits of bf16.

#include <cuda_runtime.h>

namespace tessera::cuda {

inline constexpr float kLog2e = 1.44269504088896341f, kLn2 = 0.693147180559945309f;

/// 2^x with a relative error below 2^-21; 0 where that is below the smallest normal float. NaN stays NaN.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// sigmoid(x), and 1 - sigmoid(x) without its cancellation. The bound keeps the power finite and passes NaN.
struct Sigmoid {
  float value, rest;
};
__device__ __forceinline__ Sigmoid sigmoid(float x) {
  const float power = -kLog2e * x, e = exp2_fast(power > 120.0f ? 120.0f : power), s = __fdividef(1.0f, 1.0f + e);
  return {s, e * s};
}

// GELU in the tanh form, 0.5 x (1 + tanh u) with u = sqrt(2/pi) (x + 0.044715 x^3), as x s with s = 1 / (1 + e^(-2u)): that keeps its relative
// precision in the negative tail. tanh.approx would save one instruction of two on the special function unit, which is not what bounds these
// kernels, and its error of 2^-11 against 1 + tanh u is 18 % of gelu(-3).
inline constexpr float kGeluSlope = 1.5957691216057308f;  // 2 sqrt(2/pi)
inline constexpr float kGeluCubic = 0.044715f;

/// log2 of e^(-2u).
__device__ __forceinline__ float gelu_exponent(float x) { return -kGeluSlope * kLog2e * x * fmaf(kGeluCubic * x, x, 1.0f); }

__device__ __forceinline__ float gelu(float x) { return __fdividef(x, 1.0f + exp2_fast(gelu_exponent(x))); }

/// s + x s (1 - s) 2u'(x), with 1 - s = e^(-2u) s. The bound keeps s from 0 and the power finite; the factors go from small to large. So no
/// intermediate overflows up to |x| = 10^12.
__device__ __forceinline__ float gelu_derivative(float x) {
  const float e = exp2_fast(fminf(gelu_exponent(x), 120.0f)), s = __fdividef(1.0f, 1.0f + e);
  return s * fmaf(x * (e * s), kGeluSlope * fmaf(3.0f * kGeluCubic * x, x, 1.0f), 1.0f);
}

}  // namespace tessera::cuda
