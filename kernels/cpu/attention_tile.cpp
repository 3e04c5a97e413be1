#include "kernels/cpu/attention_tile.h"

#include <cstring>

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#endif

namespace tessera::cpu {
namespace {

// Vector registers through GCC's vector extension, so that the same code runs on any processor; only the fused multiply-add needs
// to be named. A block of kBlockRows x 2 registers of C stays in registers over the whole sum: enough independent sums to hide the
// latency of the multiply-add (2 a cycle x 4 cycles), few enough to leave registers for the operands.
template <int lanes>
struct Register {
  typedef float type __attribute__((vector_size(lanes * sizeof(float))));
};
template <int lanes>
using Vector = typename Register<lanes>::type;

#ifdef __AVX512F__
constexpr int kLanes = 16, kBlockRows = 8;
#else
constexpr int kLanes = 8, kBlockRows = 4;
#endif

template <int lanes>
[[gnu::always_inline]] inline void accumulate(Vector<lanes>& sum, float a, const Vector<lanes>& b) {
#ifdef __AVX512F__
  if constexpr (lanes == 16) {
    sum = _mm512_fmadd_ps(_mm512_set1_ps(a), b, sum);
    return;
  }
#endif
#if defined(__AVX2__) && defined(__FMA__)
  if constexpr (lanes == 8) {
    sum = _mm256_fmadd_ps(_mm256_set1_ps(a), b, sum);
    return;
  }
#endif
  for (int l = 0; l < lanes; ++l) sum[l] = multiply_add(a, b[l], sum[l]);
}

template <int lanes, int rows, int columns>
[[gnu::always_inline]] inline void block(std::int64_t k, Broadcast a, const float* b, std::int64_t b_stride, float* c, std::int64_t c_stride,
                                         bool add) {
  Vector<lanes> sum[rows][columns] = {};
  for (std::int64_t step = 0; step < k; ++step) {
    Vector<lanes> right[columns];
    for (int n = 0; n < columns; ++n) std::memcpy(&right[n], b + n * lanes, sizeof right[n]);
    for (int m = 0; m < rows; ++m)
      for (int n = 0; n < columns; ++n) accumulate<lanes>(sum[m][n], a.data[m * a.row], right[n]);
    a.data += a.step;
    b += b_stride;
  }
  for (int m = 0; m < rows; ++m)
    for (int n = 0; n < columns; ++n) {
      float* to = c + m * c_stride + n * lanes;
      if (add) {
        Vector<lanes> before;
        std::memcpy(&before, to, sizeof before);
        sum[m][n] += before;
      }
      std::memcpy(to, &sum[m][n], sizeof sum[m][n]);
    }
}

template <int lanes, int columns>
void panel(std::int64_t m, std::int64_t k, Broadcast a, const float* b, std::int64_t b_stride, float* c, std::int64_t c_stride, bool add) {
  for (; m >= kBlockRows; m -= kBlockRows, a.data += kBlockRows * a.row, c += kBlockRows * c_stride)
    block<lanes, kBlockRows, columns>(k, a, b, b_stride, c, c_stride, add);
  for (; m >= 2; m -= 2, a.data += 2 * a.row, c += 2 * c_stride) block<lanes, 2, columns>(k, a, b, b_stride, c, c_stride, add);
  if (m) block<lanes, 1, columns>(k, a, b, b_stride, c, c_stride, add);
}

}  // namespace

void product(std::int64_t m, std::int64_t n, std::int64_t k, Broadcast a, const float* b, std::int64_t b_stride, float* c, std::int64_t c_stride,
             bool add) {
  std::int64_t at = 0;
  for (; at + 2 * kLanes <= n; at += 2 * kLanes) panel<kLanes, 2>(m, k, a, b + at, b_stride, c + at, c_stride, add);
  for (; at + kLanes <= n; at += kLanes) panel<kLanes, 1>(m, k, a, b + at, b_stride, c + at, c_stride, add);
  for (; at < n; at += 8) panel<8, 1>(m, k, a, b + at, b_stride, c + at, c_stride, add);
}

void transpose(const float* from, std::int64_t stride, std::int64_t rows, std::int64_t size, float* to, std::int64_t lanes) {
  // By 8 x 8 blocks, whose rows and columns fit the nearest cache together whatever the strides.
  for (std::int64_t r = 0; r < lanes; r += 8) {
    const std::int64_t filled = std::clamp<std::int64_t>(rows - r, 0, 8);
    for (std::int64_t d = 0; d < size; d += 8)
      for (std::int64_t column = 0; column < 8; ++column) {
        float* lane = to + (d + column) * lanes + r;
        for (std::int64_t i = 0; i < filled; ++i) lane[i] = from[(r + i) * stride + d + column];
        for (std::int64_t i = filled; i < 8; ++i) lane[i] = 0.0f;
      }
  }
}

}  // namespace tessera::cpu
