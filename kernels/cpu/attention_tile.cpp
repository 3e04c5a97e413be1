#include "kernels/cpu/attention_tile.h"

#include <cstring>

#include "kernels/cpu/vector.h"

namespace tessera::cpu {
namespace {

// A block of kBlockRows x 2 registers of C stays in registers over the whole sum: enough independent sums to hide the latency of the
// multiply-add (2 a cycle x 4 cycles), few enough to leave registers for the operands.
#ifdef __AVX512F__
constexpr int kBlockRows = 8;
#else
constexpr int kBlockRows = 4;
#endif

template <int lanes, int rows, int columns>
[[gnu::always_inline]] inline void block(std::int64_t k, Broadcast a, const float* b, std::int64_t b_stride, float* c, std::int64_t c_stride,
                                         bool add) {
  Vector<lanes> sum[rows][columns] = {};
  for (std::int64_t step = 0; step < k; ++step) {
    Vector<lanes> right[columns];
    for (int n = 0; n < columns; ++n) std::memcpy(&right[n], b + n * lanes, sizeof right[n]);
    for (int m = 0; m < rows; ++m)
      for (int n = 0; n < columns; ++n) accumulate<lanes>(sum[m][n], broadcast<lanes>(a.data[m * a.row]), right[n]);
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

/// to[c*to_stride + r] = from[r*stride + c] for r, c < 8.
inline void transpose_8x8(const float* from, std::int64_t stride, float* to, std::int64_t to_stride) {
#ifdef __AVX__
  __m256 row[8], pair[8], quad[8];
  for (int r = 0; r < 8; ++r) row[r] = _mm256_loadu_ps(from + r * stride);
  for (int r = 0; r < 8; r += 2) {  // columns of two rows side by side
    pair[r] = _mm256_unpacklo_ps(row[r], row[r + 1]);
    pair[r + 1] = _mm256_unpackhi_ps(row[r], row[r + 1]);
  }
  for (int r = 0; r < 8; r += 4)  // of four
    for (int half = 0; half < 2; ++half) {
      quad[r + 2 * half] = _mm256_shuffle_ps(pair[r + half], pair[r + half + 2], 0x44);
      quad[r + 2 * half + 1] = _mm256_shuffle_ps(pair[r + half], pair[r + half + 2], 0xee);
    }
  for (int c = 0; c < 4; ++c) {  // of all eight
    _mm256_storeu_ps(to + c * to_stride, _mm256_permute2f128_ps(quad[c], quad[c + 4], 0x20));
    _mm256_storeu_ps(to + (c + 4) * to_stride, _mm256_permute2f128_ps(quad[c], quad[c + 4], 0x31));
  }
#else
  for (int c = 0; c < 8; ++c)
    for (int r = 0; r < 8; ++r) to[c * to_stride + r] = from[r * stride + c];
#endif
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
  for (std::int64_t r = 0; r < lanes; r += 8) {
    const std::int64_t filled = std::clamp<std::int64_t>(rows - r, 0, 8);
    for (std::int64_t d = 0; d < size; d += 8) {
      if (filled == 8) {
        transpose_8x8(from + r * stride + d, stride, to + d * lanes + r, lanes);
        continue;
      }
      for (std::int64_t column = 0; column < 8; ++column) {
        float* lane = to + (d + column) * lanes + r;
        for (std::int64_t i = 0; i < filled; ++i) lane[i] = from[(r + i) * stride + d + column];
        for (std::int64_t i = filled; i < 8; ++i) lane[i] = 0.0f;
      }
    }
  }
}

}  // namespace tessera::cpu
