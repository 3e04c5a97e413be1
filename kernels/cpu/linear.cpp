// Linear layers: three matrix products, with bias and GELU applied to each tile of the output as it is finished.

#include "kernels/cpu/check.h"
#include "kernels/cpu/gemm.h"
#include "kernels/cpu/ops.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/simd.h"

namespace tessera::cpu {

void linear_forward(const LinearForward& a) {
  constexpr const char* kOp = "linear_forward";
  require(a.w.shape.rank == 2 && a.w.numel() > 0, kOp, "w must be a matrix");
  const std::int64_t m = a.w.shape[0], k = a.w.shape[1], n = a.x.numel() / k;
  const float* x = elements<float>(kOp, "x", a.x, n * k);
  const float* w = elements<float>(kOp, "w", a.w, m * k);
  const float* bias = optional_elements<float>(kOp, "bias", a.bias, m);
  float* y = elements<float>(kOp, "y", a.y, n * m);
  const bool with_gelu = a.activation == Activation::gelu;
  float* z = with_gelu ? elements<float>(kOp, "pre_activation", a.pre_activation, n * m) : y;

  const auto finish = [&](const OutputTile& t) {
    for (std::int64_t row = t.row; row < t.row + t.rows; ++row) {
      float* z_row = z + row * m + t.column;
      if (bias) {
        const float* b = bias + t.column;
#pragma omp simd
        for (std::int64_t i = 0; i < t.columns; ++i) z_row[i] += b[i];
      }
      if (with_gelu) {
        float* y_row = y + row * m + t.column;
#pragma omp simd
        for (std::int64_t i = 0; i < t.columns; ++i) y_row[i] = gelu(z_row[i]);
      }
    }
  };
  const auto finish_tile = bias || with_gelu ? finish : std::function<void(const OutputTile&)>{};
  if (n <= kFewRows) {
    few_rows_product(n, m, k, x, w, z, finish_tile);
  } else {
    gemm(n, m, k, {x, k}, {w, k, true}, z, m, false, finish_tile);
  }
}

void linear_backward(const LinearBackward& a) {
  constexpr const char* kOp = "linear_backward";
  const Tensor& shaped = a.dw ? a.dw : a.w;
  require(shaped.shape.rank == 2 && shaped.numel() > 0, kOp, "w (or dw) must be a matrix");
  const std::int64_t m = shaped.shape[0], k = shaped.shape[1], n = a.dy.numel() / m;
  const float* dy = elements<float>(kOp, "dy", a.dy, n * m);

  if (a.dx) {
    const float* w = elements<float>(kOp, "w", a.w, m * k);
    float* dx = elements<float>(kOp, "dx", a.dx, n * k);
    const float* argument = optional_elements<float>(kOp, "gelu_argument", a.gelu_argument, n * k);
    require(!a.add_dx || !argument, kOp, "gelu_argument with add_dx");
    const auto finish = [&](const OutputTile& t) {
      for (std::int64_t row = t.row; row < t.row + t.rows; ++row) {
        const std::int64_t at = row * k + t.column;
#pragma omp simd
        for (std::int64_t i = 0; i < t.columns; ++i) dx[at + i] *= gelu_derivative(argument[at + i]);
      }
    };
    gemm(n, k, m, {dy, m}, {w, k}, dx, k, a.add_dx, argument ? finish : std::function<void(const OutputTile&)>{});
  }
  if (a.dw) {
    const float* x = elements<float>(kOp, "x", a.x, n * k);
    gemm(m, k, n, {dy, m, true}, {x, k}, elements<float>(kOp, "dw", a.dw, m * k), k, true);
  }
  if (a.dbias) {
    float* dbias = elements<float>(kOp, "dbias", a.dbias, m);
    const auto add_row = [&](std::int64_t row, float* sums) {
      const float* from = dy + row * m;
#pragma omp simd
      for (std::int64_t i = 0; i < m; ++i) sums[i] += from[i];
    };
    add_column_sums(n, m, add_row, {dbias});
  }
}

void gelu(const Tensor& y, const Tensor& x) {
  const std::int64_t count = y.numel();
  float* to = elements<float>("gelu", "y", y, count);
  const float* from = elements<float>("gelu", "x", x, count);
  parallel_ranges(count, 1 << 14, [&](std::int64_t first, std::int64_t last) {
#pragma omp simd
    for (std::int64_t i = first; i < last; ++i) to[i] = gelu(from[i]);
  });
}

}  // namespace tessera::cpu
