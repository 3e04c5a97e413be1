// LayerNorm (Ba et al., arXiv 1607.06450), RMSNorm (Zhang & Sennrich, arXiv 1910.07467), and RMSNorm over each attention head.
// With xh = (x - mean) rstd and g = dy gain:  dx = rstd (g - mean(g) - xh mean(g xh));  rmsnorm: mean = 0 and no mean(g).

#include <cmath>

#include "kernels/cpu/check.h"
#include "kernels/cpu/ops.h"
#include "kernels/cpu/parallel.h"

namespace tessera::cpu {

namespace {

constexpr std::int64_t kRowGrain = 16;

struct Extents {
  std::int64_t rows, columns;
};
Extents extents_of(const char* operation, const Tensor& x, const Tensor& gain) {
  const std::int64_t columns = gain.numel();
  require(columns > 0 && x.numel() % columns == 0, operation, "x must be rows of as many elements as gain has");
  return {x.numel() / columns, columns};
}

float sum(const float* x, std::int64_t n) {
  float s = 0;
#pragma omp simd reduction(+ : s)
  for (std::int64_t i = 0; i < n; ++i) s += x[i];
  return s;
}

float sum_of_squares(const float* x, float mean, std::int64_t n) {
  float s = 0;
#pragma omp simd reduction(+ : s)
  for (std::int64_t i = 0; i < n; ++i) s += (x[i] - mean) * (x[i] - mean);
  return s;
}

/// Writes y = (x - mean) rstd gain and returns rstd.
float normalize(const float* x, float mean, const float* gain, float epsilon, std::int64_t n, float* y) {
  const float rstd = 1.0f / std::sqrt(sum_of_squares(x, mean, n) / static_cast<float>(n) + epsilon);
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) y[i] = (x[i] - mean) * rstd * gain[i];
  return rstd;
}

/// One row of the backward pass: dx (added to or written) and dgain, dbias (added to; dbias may be null).
template <bool kAdd, bool kCentred>
void normalize_backward(const float* dy, const float* x, float mean, float rstd, const float* gain, std::int64_t n, float* dx, float* dgain,
                        float* dbias) {
  float g_sum = 0, gx_sum = 0;
#pragma omp simd reduction(+ : g_sum, gx_sum)
  for (std::int64_t i = 0; i < n; ++i) {
    const float g = dy[i] * gain[i];
    const float xh = (x[i] - mean) * rstd;
    if constexpr (kCentred) g_sum += g;
    gx_sum += g * xh;
  }
  const float g_mean = kCentred ? g_sum / static_cast<float>(n) : 0.0f;
  const float gx_mean = gx_sum / static_cast<float>(n);
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) {
    const float xh = (x[i] - mean) * rstd;
    const float d = rstd * (dy[i] * gain[i] - g_mean - xh * gx_mean);
    dx[i] = kAdd ? dx[i] + d : d;
    dgain[i] += dy[i] * xh;
  }
  if (!dbias) return;
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) dbias[i] += dy[i];
}

}  // namespace

void norm_forward(const NormForward& a) {
  constexpr const char* kOp = "norm_forward";
  const Extents e = extents_of(kOp, a.x, a.gain);
  const std::int64_t rows = e.rows, columns = e.columns;
  const bool layernorm = a.kind == NormKind::layernorm;
  const auto* x = elements<float>(kOp, "x", a.x, rows * columns);
  const auto* residual = optional_elements<float>(kOp, "residual", a.residual, rows * columns);
  auto* residual_out = residual ? elements<float>(kOp, "residual_out", a.residual_out, rows * columns) : nullptr;
  const auto* gain = elements<float>(kOp, "gain", a.gain, columns);
  const auto* bias = optional_elements<float>(kOp, "bias", a.bias, columns);
  auto* y = elements<float>(kOp, "y", a.y, rows * columns);
  auto* mean = layernorm ? elements<float>(kOp, "mean", a.mean, rows) : nullptr;
  auto* rstd = elements<float>(kOp, "rstd", a.rstd, rows);
  require(layernorm || !bias, kOp, "rmsnorm has no bias");

  parallel_ranges(rows, kRowGrain, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t row = first; row < last; ++row) {
      const float* in = x + row * columns;
      if (residual) {
        float* total = residual_out + row * columns;
        const float* other = residual + row * columns;
#pragma omp simd
        for (std::int64_t i = 0; i < columns; ++i) total[i] = in[i] + other[i];
        in = total;
      }
      const float centre = layernorm ? sum(in, columns) / static_cast<float>(columns) : 0.0f;
      float* out = y + row * columns;
      rstd[row] = normalize(in, centre, gain, a.epsilon, columns, out);
      if (layernorm) mean[row] = centre;
      if (bias) {
#pragma omp simd
        for (std::int64_t i = 0; i < columns; ++i) out[i] += bias[i];
      }
    }
  });
}

void norm_backward(const NormBackward& a) {
  constexpr const char* kOp = "norm_backward";
  const Extents e = extents_of(kOp, a.x, a.gain);
  const std::int64_t rows = e.rows, columns = e.columns;
  const bool layernorm = a.kind == NormKind::layernorm;
  const auto* dy = elements<float>(kOp, "dy", a.dy, rows * columns);
  const auto* x = elements<float>(kOp, "x", a.x, rows * columns);
  const auto* gain = elements<float>(kOp, "gain", a.gain, columns);
  const auto* mean = layernorm ? elements<float>(kOp, "mean", a.mean, rows) : nullptr;
  const auto* rstd = elements<float>(kOp, "rstd", a.rstd, rows);
  auto* dx = elements<float>(kOp, "dx", a.dx, rows * columns);
  auto* dgain = elements<float>(kOp, "dgain", a.dgain, columns);
  auto* dbias = optional_elements<float>(kOp, "dbias", a.dbias, columns);

  std::vector<float*> out{dgain};
  if (dbias) out.push_back(dbias);
  add_column_sums(
      rows, columns,
      [&](std::int64_t row, float* sums) {
        const std::int64_t at = row * columns;
        float* bias_sums = dbias ? sums + columns : nullptr;
        if (layernorm) {
          normalize_backward<true, true>(dy + at, x + at, mean[row], rstd[row], gain, columns, dx + at, sums, bias_sums);
        } else {
          normalize_backward<true, false>(dy + at, x + at, 0.0f, rstd[row], gain, columns, dx + at, sums, bias_sums);
        }
      },
      out);
}

void head_norm_forward(const HeadNorm& a) {
  constexpr const char* kOp = "head_norm_forward";
  require(a.gain.shape.rank == 2, kOp, "gain must be [H, D]");
  const Extents e = extents_of(kOp, a.x, a.gain);
  const std::int64_t rows = e.rows, columns = e.columns, heads = a.gain.shape[0], size = a.gain.shape[1];
  const auto* x = elements<float>(kOp, "x", a.x, rows * columns);
  const auto* gain = elements<float>(kOp, "gain", a.gain, columns);
  auto* y = elements<float>(kOp, "y", a.y, rows * columns);
  auto* rstd = elements<float>(kOp, "rstd", a.rstd, rows * heads);
  parallel_ranges(rows, kRowGrain, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t i = first * heads; i < last * heads; ++i) {
      rstd[i] = normalize(x + i * size, 0.0f, gain + i % heads * size, a.epsilon, size, y + i * size);
    }
  });
}

void head_norm_backward(const HeadNormBackward& a) {
  constexpr const char* kOp = "head_norm_backward";
  require(a.gain.shape.rank == 2, kOp, "gain must be [H, D]");
  const Extents e = extents_of(kOp, a.x, a.gain);
  const std::int64_t rows = e.rows, columns = e.columns, heads = a.gain.shape[0], size = a.gain.shape[1];
  const auto* dy = elements<float>(kOp, "dy", a.dy, rows * columns);
  const auto* x = elements<float>(kOp, "x", a.x, rows * columns);
  const auto* gain = elements<float>(kOp, "gain", a.gain, columns);
  const auto* rstd = elements<float>(kOp, "rstd", a.rstd, rows * heads);
  auto* dx = elements<float>(kOp, "dx", a.dx, rows * columns);
  auto* dgain = elements<float>(kOp, "dgain", a.dgain, columns);
  add_column_sums(rows, columns,
                  [&](std::int64_t row, float* sums) {
                    for (std::int64_t h = 0; h < heads; ++h) {
                      const std::int64_t at = (row * heads + h) * size;
                      normalize_backward<false, false>(dy + at, x + at, 0.0f, rstd[row * heads + h], gain + h * size, size, dx + at, sums + h * size,
                                                       nullptr);
                    }
                  },
                  {dgain});
}

}  // namespace tessera::cpu
