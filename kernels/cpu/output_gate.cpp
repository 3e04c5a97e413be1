// The gate on the attention's output (OutputGate in kernels/ops.h).

#include "kernels/cpu/check.h"
#include "kernels/cpu/ops.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/simd.h"

namespace tessera::cpu {

namespace {

constexpr std::int64_t kGrain = 1 << 14;

/// 2 sigmoid(u) o, from e = exp(-u).
inline float gated(float e, float o) { return 2.0f * o / (1.0f + e); }

}  // namespace

void output_gate_forward(const OutputGate& a) {
  constexpr const char* kOp = "output_gate_forward";
  const std::int64_t count = a.y.numel();
  const float *u = elements<float>(kOp, "u", a.u, count), *o = elements<float>(kOp, "o", a.o, count);
  float* y = elements<float>(kOp, "y", a.y, count);
  parallel_ranges(count, kGrain, [&](std::int64_t first, std::int64_t last) {
#pragma omp simd
    for (std::int64_t i = first; i < last; ++i) y[i] = gated(exp_vector(-u[i]), o[i]);
  });
}

void output_gate_backward(const OutputGateBackward& a) {
  constexpr const char* kOp = "output_gate_backward";
  const std::int64_t count = a.dy.numel();
  const float *dy = elements<float>(kOp, "dy", a.dy, count), *u = elements<float>(kOp, "u", a.u, count), *o = elements<float>(kOp, "o", a.o, count);
  float *d_o = elements<float>(kOp, "d_o", a.d_o, count), *du = elements<float>(kOp, "du", a.du, count);
  float* y = optional_elements<float>(kOp, "y", a.y, count);
  require(count == 0 || (d_o != du && y != d_o && y != du), kOp, "two outputs in one memory");
  parallel_ranges(count, kGrain, [&](std::int64_t first, std::int64_t last) {
    const auto element = [&](std::int64_t i) {
      const float of_y = dy[i], before = o[i], e = exp_vector(-u[i]), s = 1.0f / (1.0f + e);
      d_o[i] = 2.0f * s * of_y;
      du[i] = 2.0f * s * (e * s) * (before * of_y);  // e s = 1 - s, without its cancellation
      return gated(e, before);
    };
    if (y) {
#pragma omp simd
      for (std::int64_t i = first; i < last; ++i) y[i] = element(i);
    } else {
#pragma omp simd
      for (std::int64_t i = first; i < last; ++i) element(i);
    }
  });
}

}  // namespace tessera::cpu
