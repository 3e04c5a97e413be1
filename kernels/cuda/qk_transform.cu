// Unit-length queries and keys, and rotary positions, in place on the packed projection [N, 3, H, D]; V is not touched. Bound by memory.
//
// A warp takes a row: `lanes` lanes a vector, the lane's elements in two pieces, one of each half of the vector, so that both members of a rotary
// pair are in one lane. A piece is 16 bytes where D is a multiple of 16, else 8. Lengths and rotation are f32; the result is rounded once.

#include <bit>

#include "kernels/cuda/check.h"
#include "kernels/cuda/layers.h"
#include "kernels/cuda/vector.cuh"

namespace tessera::cuda {

namespace {

constexpr float kSmallestLength = 1e-6f;  // a shorter vector has no direction to speak of: it becomes zero
constexpr int kVectorsAtOnce = 4;         // a lane: their reads are in flight together
constexpr int kWarps = 4;                 // of a block
constexpr int kLargestHead = 256;

struct Args {
  bf16* qkv;
  bf16* gradients;                // backward
  float* inverse_norm;            // null without unit
  const float* rotary;            // null without rotary
  const std::int32_t* positions;  // null without rotary
  std::int64_t rows;
  int heads, size, lanes;
};

/// a . b over both halves.
template <int N>
__device__ __forceinline__ float dot(const Piece<N> (&a)[2], const Piece<N> (&b)[2]) {
  float sum = 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float x[N], y[N];
    unpack(a[half], x), unpack(b[half], y);
#pragma unroll
    for (int i = 0; i < N; ++i) sum += x[i] * y[i];
  }
  return sum;
}

template <int N, bool kBackward>
__global__ void __launch_bounds__(32 * kWarps) qk_transform_kernel(Args a) {
  const std::int64_t row = std::int64_t{blockIdx.x} * kWarps + threadIdx.y;
  if (row >= a.rows) return;
  const int lane = static_cast<int>(threadIdx.x), half_size = a.size / 2, vectors = 2 * a.heads;
  const int groups = 32 / a.lanes, group = lane / a.lanes, within = lane % a.lanes * N;
  const bool inside = within < half_size;
  const std::int64_t start = row * 3 * a.heads * a.size + within;
  const std::int64_t position = a.rotary ? a.positions[row] : 0;
  bf16* const data = kBackward ? a.gradients : a.qkv;

  for (int base = group; base - group < vectors; base += kVectorsAtOnce * groups) {
    Piece<N> v[kVectorsAtOnce][2], transformed[kBackward ? kVectorsAtOnce : 1][2];
    float along[kVectorsAtOnce], inverse[kVectorsAtOnce];
#pragma unroll
    for (int k = 0; k < kVectorsAtOnce; ++k) {
      const int vector = base + k * groups;
      const bool has = inside && vector < vectors;
      const std::int64_t at = start + vector * a.size;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        v[k][half] = has ? load_piece<N>(data + at + half * half_size) : Piece<N>{};
        if constexpr (kBackward) {
          transformed[k][half] = has && a.inverse_norm ? load_piece<N>(a.qkv + at + half * half_size) : Piece<N>{};
        }
      }
      if constexpr (kBackward) inverse[k] = has && a.inverse_norm ? a.inverse_norm[row * vectors + vector] : 1.0f;
    }
    // Read after the vectors, so that these need not wait for the position.
    float angle[2 * N];
    if (a.rotary && inside) load_floats(a.rotary + position * a.size + 2 * within, angle);

    if (a.inverse_norm) {
#pragma unroll
      for (int k = 0; k < kVectorsAtOnce; ++k) {
        if constexpr (kBackward)
          along[k] = dot(v[k], transformed[k]);
        else
          along[k] = dot(v[k], v[k]);
      }
      group_sums(along, a.lanes);
    }
#pragma unroll
    for (int k = 0; k < kVectorsAtOnce; ++k) {
      const int vector = base + k * groups;
      if (!inside || vector >= vectors) continue;
      float low[N], high[N];
      unpack(v[k][0], low), unpack(v[k][1], high);
      if (a.inverse_norm) {
        if constexpr (kBackward) {
          // Rotation keeps inner products, so that the projection may be taken on the rotated side, where q' is at hand.
          float q_low[N], q_high[N];
          unpack(transformed[k][0], q_low), unpack(transformed[k][1], q_high);
#pragma unroll
          for (int i = 0; i < N; ++i) {
            low[i] = (low[i] - q_low[i] * along[k]) * inverse[k];
            high[i] = (high[i] - q_high[i] * along[k]) * inverse[k];
          }
        } else {
          inverse[k] = along[k] < kSmallestLength * kSmallestLength ? 0.0f : rsqrtf(along[k]);
          if (within == 0) a.inverse_norm[row * vectors + vector] = inverse[k];
#pragma unroll
          for (int i = 0; i < N; ++i) low[i] *= inverse[k], high[i] *= inverse[k];
        }
      }
      if (a.rotary) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
          const float cosine = angle[2 * i], sine = kBackward ? -angle[2 * i + 1] : angle[2 * i + 1], x = low[i], y = high[i];
          low[i] = x * cosine - y * sine;
          high[i] = y * cosine + x * sine;
        }
      }
      bf16* const to = data + start + vector * a.size;
      store_piece(to, pack(low));
      store_piece(to + half_size, pack(high));
    }
  }
}

Args arguments(const char* operation, const QkTransform& t) {
  require(t.qkv.shape.rank >= 2 && t.heads > 0, operation, "qkv must be [N, 3*H*D]");
  const std::int64_t width = t.qkv.shape[t.qkv.shape.rank - 1];
  require(width > 0 && width % (3 * t.heads) == 0, operation, "qkv's last extent must be 3*H*D");
  const std::int64_t size = width / (3 * t.heads);
  require(size % 8 == 0 && size <= kLargestHead, operation, "the head size must be a multiple of 8 up to 256");
  Args a{};
  a.rows = t.qkv.numel() / width, a.heads = static_cast<int>(t.heads), a.size = static_cast<int>(size);
  a.lanes = static_cast<int>(std::bit_ceil(static_cast<unsigned>(size % 16 == 0 ? size / 16 : size / 8)));
  a.qkv = static_cast<bf16*>(bf16_elements(operation, "qkv", t.qkv, a.rows * width));
  if (t.unit) a.inverse_norm = elements<float>(operation, "inverse_norm", t.inverse_norm, a.rows * 2 * t.heads, sizeof(float));
  if (t.rotary) {
    require(t.rotary.numel() % size == 0, operation, "rotary must be [P, D/2, 2]");
    a.rotary = elements<float>(operation, "rotary", t.rotary, t.rotary.numel());
    a.positions = elements<std::int32_t>(operation, "positions", t.positions, a.rows, sizeof(std::int32_t));
  }
  return a;
}

template <bool kBackward>
void launch(const Context& c, const char* operation, const Args& a) {
  if (a.rows == 0 || (!a.inverse_norm && !a.rotary)) return;
  const auto kernel = a.size % 16 == 0 ? qk_transform_kernel<8, kBackward> : qk_transform_kernel<4, kBackward>;
  kernel<<<static_cast<unsigned>((a.rows + kWarps - 1) / kWarps), dim3(32, kWarps), 0, c.stream>>>(a);
  check_launch(operation);
}

}  // namespace

void qk_transform_forward(const Context& c, const QkTransform& t) {
  constexpr const char* kOp = "qk_transform_forward";
  launch<false>(c, kOp, arguments(kOp, t));
}

void qk_transform_backward(const Context& c, const QkTransform& transformed, const Tensor& gradients) {
  constexpr const char* kOp = "qk_transform_backward";
  Args a = arguments(kOp, transformed);
  a.gradients = static_cast<bf16*>(bf16_elements(kOp, "gradients", gradients, transformed.qkv.numel()));
  launch<true>(c, kOp, a);
}

}  // namespace tessera::cuda
