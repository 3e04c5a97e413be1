#pragma once
// What self_edge.cu and sinks.cu share: queries whose o and z get more edges than the attention gave them.
//
// A warp takes a fixed set of tokens, one after another, and a tile of heads: `lanes` lanes a head, 8 elements each. How tokens are dealt depends on
// the shape alone, not on the GPU.

#include <algorithm>
#include <bit>

#include "kernels/cuda/check.h"
#include "kernels/cuda/layers.h"
#include "kernels/cuda/vector.cuh"

namespace tessera::cuda {

inline constexpr int kAddedForwardWarps = 4, kAddedBackwardWarps = 8;  // of a block
inline constexpr int kAddedForwardBlocks = 2112;                       // at most, a tile of heads: 16 on each of an H100's or H200's 132 SMs

/// [B, H, T, D] with strides, in elements.
struct View {
  bf16* data;
  std::int64_t batch, head, token;
  __device__ __forceinline__ bf16* at(std::int64_t b, int h, std::int64_t t, int d) const { return data + b * batch + h * head + t * token + d; }
};

struct AddedEdges {
  View q, o;
  View d_o, dq;  // backward
  const float* scale;
  float *z, *partials;
  std::int64_t rows, tokens;  // rows: tokens of all sequences
  int heads, size, lanes;     // lanes: size / 8, rounded up to a power of two
  int power;
  bool squared;

  __device__ __forceinline__ float f(float s) const { return squared ? s * s : s; }
  __device__ __forceinline__ float slope(float s) const { return squared ? 2.0f * s : 1.0f; }
  /// max(0, x); a NaN is 0, as in the attention kernels.
  __device__ __forceinline__ float opening(float head_scale, float bias, float s) const { return fmaxf(fmaf(head_scale, f(s), bias), 0.0f); }
  __device__ __forceinline__ float weight_of(float r) const { return power == 1 ? r : power == 2 ? r * r : (r * r) * (r * r); }
  __device__ __forceinline__ float weight_slope(float r) const { return power == 1 ? 1.0f : power == 2 ? 2.0f * r : 4.0f * (r * r * r); }
};

/// A lane's place: its head, and its first element of it.
struct Place {
  int head, within;
  bool has;    // the head is there and has elements for this lane
  bool first;  // of the head's lanes
  float scale = 0;

  __device__ explicit Place(const AddedEdges& a)
      : head(static_cast<int>(blockIdx.y * (32 / a.lanes) + threadIdx.x / a.lanes)),
        within(static_cast<int>(threadIdx.x) % a.lanes * 8),
        has(within < a.size && head < a.heads),
        first(has && within == 0) {
    if (has) scale = a.scale[head];
  }
  /// Of the block's threads the one that stores a sum of the head's.
  __device__ __forceinline__ bool is_writer() const { return first && threadIdx.y == 0; }
  __device__ __forceinline__ Piece<8> load(const View& v, std::int64_t b, std::int64_t t) const {
    return has ? load_piece(v.at(b, head, t, within)) : Piece<8>{};
  }
};

__device__ __forceinline__ float dot(const float (&x)[8], const float (&y)[8]) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) sum += x[i] * y[i];
  return sum;
}
/// What the first lane of this lane's head has. All lanes call.
__device__ __forceinline__ float of_first_lane(const AddedEdges& a, float x) {
  return __shfl_sync(0xffffffffu, x, static_cast<int>(threadIdx.x) / a.lanes * a.lanes);
}
/// to += factor x
__device__ __forceinline__ void add_multiple(float (&to)[8], float factor, const float (&x)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) to[i] = fmaf(factor, x[i], to[i]);
}

/// The sum over the block's warps, in the order of their numbers, of one number a head, which the head's first lane has. Whole in warp 0's first
/// lanes (is_writer()). All threads call; `shared` may be used again afterwards.
template <int kWarps, class T>
__device__ __forceinline__ T sum_over_warps(const AddedEdges& a, const Place& place, T (&shared)[kWarps][32], T x) {
  const int group = static_cast<int>(threadIdx.x) / a.lanes;
  if (place.first) shared[threadIdx.y][group] = x;
  __syncthreads();
  T sum = 0;
  if (place.is_writer()) {
    sum = shared[0][group];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) sum += shared[w][group];
  }
  __syncthreads();
  return sum;
}

inline View view_of(const char* operation, const char* name, const HeadsView& v) {
  check_heads(operation, name, v);
  return {static_cast<bf16*>(v.data), v.batch, v.head, v.token};
}

/// Fills in what SelfEdge and Sinks both have, checked.
template <class Call>
void take_arguments(AddedEdges& a, const char* operation, const Call& e) {
  const AttentionShape& s = e.shape;
  require(s.batch >= 0 && s.heads >= 1 && s.tokens >= 1, operation, "there must be heads and tokens");
  require(s.head_size >= 8 && s.head_size % 8 == 0 && s.head_size <= 256, operation, "the head size must be a multiple of 8 up to 256");
  require(e.gate != Gate::softmax, operation, "softmax has no threshold that could close the edge");
  a.q = view_of(operation, "q", e.q), a.o = view_of(operation, "o", e.o);
  a.scale = elements<float>(operation, "scale", e.scale, s.heads, sizeof(float));
  a.z = elements<float>(operation, "z", e.z, s.batch * s.heads * s.tokens, sizeof(float));
  a.rows = s.batch * s.tokens, a.tokens = s.tokens, a.heads = static_cast<int>(s.heads), a.size = static_cast<int>(s.head_size);
  a.lanes = static_cast<int>(std::bit_ceil(static_cast<unsigned>(a.size / 8)));
  a.power = gate_power(e.gate), a.squared = e.score == Score::fidelity;
}

/// Blocks of tokens, and the tiles of heads.
inline dim3 added_grid(const AddedEdges& a, int most, int warps) {
  const int tile = 32 / a.lanes;
  return {static_cast<unsigned>(std::min<std::int64_t>(most, (a.rows + warps - 1) / warps)), static_cast<unsigned>((a.heads + tile - 1) / tile)};
}

}  // namespace tessera::cuda
