// Unit-length queries and keys, and rotary positions (Su et al., arXiv 2104.09864; pairs as in GPT-NeoX).

#include <cmath>

#include "kernels/cpu/check.h"
#include "kernels/cpu/ops.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/simd.h"

namespace tessera::cpu {

namespace {

constexpr float kSmallestLength = 1e-6f;  // a shorter vector has no direction to speak of: it becomes zero
constexpr std::int64_t kRowGrain = 16;

/// Rotates the pairs (x[i], x[i + half]) by the angles whose cosines and sines are table[i]; backwards with sign = -1.
void rotate(float* x, const float* table, std::int64_t half, float sign) {
#pragma omp simd
  for (std::int64_t i = 0; i < half; ++i) {
    const float c = table[2 * i], s = sign * table[2 * i + 1];
    const float a = x[i], b = x[i + half];
    x[i] = a * c - b * s;
    x[i + half] = b * c + a * s;
  }
}

/// The arguments, checked, and how to find a row's parts.
struct Packed {
  std::int64_t rows, heads, size;
  float* qkv;
  float* inverse_norm;            // null without unit
  const float* rotary;            // null without rotary
  const std::int32_t* positions;  // null without rotary

  Packed(const char* operation, const QkTransform& a) : rows(0), heads(a.heads) {
    require(a.qkv.shape.rank >= 2 && a.heads > 0, operation, "qkv must be [N, 3*H*D]");
    const std::int64_t width = a.qkv.shape[a.qkv.shape.rank - 1];
    require(width > 0 && width % (3 * heads) == 0, operation, "qkv's last extent must be 3*H*D");
    size = width / (3 * heads);
    rows = a.qkv.numel() / width;
    qkv = elements<float>(operation, "qkv", a.qkv, rows * width);
    inverse_norm = a.unit ? elements<float>(operation, "inverse_norm", a.inverse_norm, rows * 2 * heads) : nullptr;
    rotary = nullptr;
    positions = nullptr;
    if (!a.rotary) return;
    require(size % 2 == 0, operation, "rotary positions need an even head size");
    const std::int64_t table_rows = a.rotary.numel() / size;
    rotary = elements<float>(operation, "rotary", a.rotary, table_rows * size);
    positions = elements<std::int32_t>(operation, "positions", a.positions, rows);
    for (std::int64_t n = 0; n < rows; ++n)
      require(positions[n] >= 0 && positions[n] < table_rows, operation, "a position is outside the rotary table");
  }

  /// Calls body(row, i, offset) for each vector i of a row: H queries, then H keys; offset is the vector's place in qkv.
  template <class Body>
  void for_each_vector(Body&& body) const {
    parallel_ranges(rows, kRowGrain, [&](std::int64_t first, std::int64_t last) {
      for (std::int64_t row = first; row < last; ++row) {
        for (std::int64_t i = 0; i < 2 * heads; ++i) body(row, i, (row * 3 * heads + i) * size);
      }
    });
  }
};

}  // namespace

void qk_transform_forward(const QkTransform& a) {
  const Packed p("qk_transform_forward", a);
  p.for_each_vector([&](std::int64_t row, std::int64_t i, std::int64_t offset) {
    float* x = p.qkv + offset;
    if (p.inverse_norm) {
      const float length = std::sqrt(dot(x, x, p.size));
      const float inverse = length < kSmallestLength ? 0.0f : 1.0f / length;
      p.inverse_norm[row * 2 * p.heads + i] = inverse;
#pragma omp simd
      for (std::int64_t d = 0; d < p.size; ++d) x[d] *= inverse;
    }
    if (p.rotary) rotate(x, p.rotary + p.positions[row] * p.size, p.size / 2, 1.0f);
  });
}

void qk_transform_backward(const QkTransform& transformed, const Tensor& gradients) {
  constexpr const char* kOp = "qk_transform_backward";
  const Packed p(kOp, transformed);
  float* all = elements<float>(kOp, "gradients", gradients, p.rows * 3 * p.heads * p.size);
  p.for_each_vector([&](std::int64_t row, std::int64_t i, std::int64_t offset) {
    float* g = all + offset;
    if (p.inverse_norm) {
      // Rotation keeps inner products, so that the projection may be taken on the rotated side, where q' is at hand.
      const float* x = p.qkv + offset;
      const float along = dot(x, g, p.size);
      const float inverse = p.inverse_norm[row * 2 * p.heads + i];
#pragma omp simd
      for (std::int64_t d = 0; d < p.size; ++d) g[d] = (g[d] - x[d] * along) * inverse;
    }
    if (p.rotary) rotate(g, p.rotary + p.positions[row] * p.size, p.size / 2, -1.0f);
  });
}

}  // namespace tessera::cpu
