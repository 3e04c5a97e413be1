// The product of a few rows with a matrix, as decoding has it: the matrix is read once, where a general product would first copy it into the
// order that its kernel wants.

#include <algorithm>
#include <cstring>

#include "kernels/cpu/gemm.h"
#include "kernels/cpu/vector.h"

namespace tessera::cpu {
namespace {

constexpr std::int64_t kTaskColumns = 64, kBlockColumns = 4;

/// The sum of a vector's lanes, halves added to halves.
template <int lanes>
float sum_of(const Vector<lanes>& v) {
  float part[lanes];
  std::memcpy(part, &v, sizeof v);
  for (int half = lanes / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) part[l] += part[l + half];
  return part[0];
}

/// rows x columns elements of C. An element's sum: lane l of a register takes k = l, l + kLanes, ...; then the lanes, then the k left over.
template <int rows, int columns>
void block(std::int64_t k, const float* x, const float* w, float* c, std::int64_t c_stride) {
  Vector<kLanes> sum[rows][columns] = {};
  std::int64_t at = 0;
  for (; at + kLanes <= k; at += kLanes) {
    Vector<kLanes> left[rows];
    for (int r = 0; r < rows; ++r) std::memcpy(&left[r], x + r * k + at, sizeof left[r]);
    for (int n = 0; n < columns; ++n) {
      Vector<kLanes> right;
      std::memcpy(&right, w + n * k + at, sizeof right);
      for (int r = 0; r < rows; ++r) accumulate<kLanes>(sum[r][n], left[r], right);
    }
  }
  for (int r = 0; r < rows; ++r)
    for (int n = 0; n < columns; ++n) {
      float total = sum_of<kLanes>(sum[r][n]);
      for (std::int64_t i = at; i < k; ++i) total = multiply_add(x[r * k + i], w[n * k + i], total);
      c[r * c_stride + n] = total;
    }
}

template <int columns>
void block_column(std::int64_t m, std::int64_t k, const float* x, const float* w, float* c, std::int64_t stride) {
  std::int64_t r = 0;
  for (; r + 3 <= m; r += 3) block<3, columns>(k, x + r * k, w, c + r * stride, stride);
  if (m - r == 2) block<2, columns>(k, x + r * k, w, c + r * stride, stride);
  if (m - r == 1) block<1, columns>(k, x + r * k, w, c + r * stride, stride);
}

}  // namespace

void few_rows_product(std::int64_t m, std::int64_t n, std::int64_t k, const float* x, const float* w, float* c,
                      const std::function<void(const OutputTile&)>& finish) {
  const std::int64_t tasks = (n + kTaskColumns - 1) / kTaskColumns;
#pragma omp parallel for schedule(static) if (tasks > 1)
  for (std::int64_t task = 0; task < tasks; ++task) {
    const std::int64_t first = task * kTaskColumns, last = std::min(n, first + kTaskColumns);
    std::int64_t column = first;
    for (; column + kBlockColumns <= last; column += kBlockColumns) block_column<kBlockColumns>(m, k, x, w + column * k, c + column, n);
    for (; column < last; ++column) block_column<1>(m, k, x, w + column * k, c + column, n);
    if (finish) finish({0, m, first, last - first});
  }
}

}  // namespace tessera::cpu
