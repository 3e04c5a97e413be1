#pragma once
// bf16 in pieces of one 16-byte (or 8-byte) access, and sums over lanes whose order depends on the lane numbers alone.

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace tessera::cuda {

using bf16 = __nv_bfloat16;

/// N consecutive bf16 as they lie in memory. Its address is a multiple of its size.
template <int N>
struct alignas(2 * N) Piece {
  static_assert(N == 4 || N == 8);
  uint32_t pair[N / 2];
};

template <int N = 8>
__device__ __forceinline__ Piece<N> load_piece(const bf16* p) {
  if constexpr (N == 8) {
    const uint4 v = *reinterpret_cast<const uint4*>(p);
    return {{v.x, v.y, v.z, v.w}};
  } else {
    const uint2 v = *reinterpret_cast<const uint2*>(p);
    return {{v.x, v.y}};
  }
}
// One instruction by name: a store through a pointer the compiler now and then takes apart into words.
template <int N>
__device__ __forceinline__ void store_piece(bf16* p, const Piece<N>& v) {
  const auto address = __cvta_generic_to_global(p);
  if constexpr (N == 8) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(v.pair[0]), "r"(v.pair[1]), "r"(v.pair[2]), "r"(v.pair[3])
                 : "memory");
  } else {
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(address), "r"(v.pair[0]), "r"(v.pair[1]) : "memory");
  }
}

template <int N>
__device__ __forceinline__ void unpack(const Piece<N>& v, float (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N / 2; ++i) {
    x[2 * i] = __uint_as_float(v.pair[i] << 16);
    x[2 * i + 1] = __uint_as_float(v.pair[i] & 0xffff0000u);
  }
}
/// Rounds to nearest even.
template <int N>
__device__ __forceinline__ Piece<N> pack(const float (&x)[N]) {
  Piece<N> v;
#pragma unroll
  for (int i = 0; i < N / 2; ++i) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(x[2 * i], x[2 * i + 1]);
    v.pair[i] = *reinterpret_cast<const uint32_t*>(&both);
  }
  return v;
}

/// N floats (a multiple of 4) at a 16-byte aligned address.
template <int N>
__device__ __forceinline__ void load_floats(const float* p, float (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; i += 4) {
    const float4 v = *reinterpret_cast<const float4*>(p + i);
    x[i] = v.x, x[i + 1] = v.y, x[i + 2] = v.z, x[i + 3] = v.w;
  }
}
template <int N>
__device__ __forceinline__ void store_floats(float* p, const float (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; i += 4) *reinterpret_cast<float4*>(p + i) = make_float4(x[i], x[i + 1], x[i + 2], x[i + 3]);
}

/// N sums at once over groups of `lanes` lanes (a power of two, aligned), in each of them: a butterfly, so that all get the same bits. All 32 lanes
/// call.
template <int N>
__device__ __forceinline__ void group_sums(float (&x)[N], int lanes) {
  for (int step = lanes / 2; step > 0; step /= 2) {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] += __shfl_xor_sync(0xffffffffu, x[i], step);
  }
}
template <class T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

/// The sum over a block, in each of its threads; `shared` has room for one T a warp. All threads call.
template <class T>
__device__ __forceinline__ T block_sum(T x, T* shared) {
  x = warp_sum(x);
  if (blockDim.x <= 32) return x;
  const unsigned lane = threadIdx.x % 32, warps = (blockDim.x + 31) / 32;
  if (lane == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  x = warp_sum(lane < warps ? shared[lane] : T{});
  __syncthreads();  // `shared` may be used again
  return x;
}

}  // namespace tessera::cuda
