// The small kernels around the backward pass, and the probe for the loaded code's architecture.

#include "kernels/cuda/attention/gate.cuh"
#include "kernels/cuda/attention/kernels.h"

namespace tessera::cuda_attention {
namespace {

/// Its static shared memory tells which form of the library's code the current device loads, without running anything.
__global__ void architecture_probe(int* out) {
#ifdef TESSERA_SM90A
  __shared__ volatile int mark[64];
  mark[threadIdx.x % 64] = 1;
  if (out) *out = mark[0];
#else
  if (out) *out = 0;
#endif
}

/// A warp has 32 of a head's 64 query_tiles rows, the next warp the same of the next head, which lie beside them in memory: their dot products by D/8
/// lanes a row, 16 bytes a lane; then a lane works out one row's terms. The bound on blocks gives ptxas the registers to load ahead.
template <int D>
__global__ void __launch_bounds__(256, 4) row_info_kernel(const __grid_constant__ Args a) {
  // dk, dv, whose blocks wait for this kernel's end before they load anything.
  let_next_kernel_start();
  constexpr int kLanes = D / 8, kRows = 32 / kLanes, kAhead = 4;  // kRows at once; loads of kAhead times as many are under way together
  const int lane = threadIdx.x % 32;
  const unsigned warp = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, rows = warp / a.heads, of_head = 2 * a.query_tiles;
  const int b = static_cast<int>(rows / of_head), h = static_cast<int>(warp % a.heads), i0 = static_cast<int>(rows % of_head) * 32, i = i0 + lane;
  if (b >= a.batch) return;  // the whole warp
  const int64_t bh = static_cast<int64_t>(b) * a.heads + h;
  const float z = a.z[bh * a.tokens + min(i, a.tokens - 1)], c = a.scale[h], tau = a.threshold[h];
  float delta = 0;
  if (a.normalize_sum || a.softmax) {
    const int within = lane / kLanes, column = lane % kLanes * 8;
#pragma unroll
    for (int step = 0; step < kLanes; step += kAhead) {
      uint4 x[kAhead], y[kAhead];
#pragma unroll
      for (int n = 0; n < kAhead; ++n) {
        // Under a condition, loads would wait for one another: rows past the end take up the last one's.
        const int row = min(i0 + (step + n) * kRows + within, a.tokens - 1);
        x[n] = *reinterpret_cast<const uint4*>(a.o.row(b, h, row) + column);
        y[n] = *reinterpret_cast<const uint4*>(a.d_o.row(b, h, row) + column);
      }
#pragma unroll
      for (int n = 0; n < kAhead; ++n) {
        const uint32_t xs[4] = {x[n].x, x[n].y, x[n].z, x[n].w}, ys[4] = {y[n].x, y[n].y, y[n].z, y[n].w};
        float sum = 0;
#pragma unroll
        for (int w = 0; w < 4; ++w) sum = fmaf(low_of(xs[w]), low_of(ys[w]), fmaf(high_of(xs[w]), high_of(ys[w]), sum));
#pragma unroll
        for (int to = kLanes / 2; to > 0; to /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, to, kLanes);
        const float of_row = __shfl_sync(0xffffffffu, sum, lane % kRows * kLanes);
        if (lane / kRows == step + n) delta = of_row;
      }
    }
  }
  float offset = 0, inverse_z = 0;
  int document = 0;
  if (i < a.tokens) {
    if (a.softmax) {
      offset = -z * kLog2e;
      inverse_z = 1.f;
    } else {
      offset = row_offset(a, c, tau, i, D) * inverse_of(gate_bound(a, c, tau, D));
      inverse_z = z > 0.f ? 1.f / z : 0.f;
    }
    if (a.document_start) document = a.document_start[static_cast<int64_t>(b) * a.tokens + i];
  } else {
    delta = 0;
  }
  RowTile& to = a.rows[bh * a.query_tiles + i0 / 64];
  const int r = i0 % 64 + lane, at = RowTile::place(r);
  to.inverse_z[at] = inverse_z, to.minus_delta[at] = -delta, to.offset[at] = offset, to.document_start[r] = document;
}

/// One block a head: thread t sums its stride of (batch, query tile) in ascending order, then a tree.
__global__ void head_sums_kernel(const __grid_constant__ Args a, float* dscale, float* dthreshold) {
  __shared__ float2 sums[256];
  const int h = blockIdx.x, t = threadIdx.x;
  float2 sum{0.f, 0.f};
  for (int64_t n = t; n < static_cast<int64_t>(a.batch) * a.query_tiles; n += 256) {
    const int64_t at = (n / a.query_tiles * a.heads + h) * a.query_tiles + n % a.query_tiles;
    sum.x += a.partial_scale[at], sum.y += a.partial_threshold[at];
  }
  sums[t] = sum;
  for (int step = 128; step > 0; step /= 2) {
    __syncthreads();
    if (t < step) sums[t].x += sums[t + step].x, sums[t].y += sums[t + step].y;
  }
  if (t == 0) {
    if (dscale) dscale[h] += sums[0].x;
    if (dthreshold) dthreshold[h] += sums[0].y;
  }
}

}  // namespace

bool runs_hopper_code() {
  int device = 0, major = 0, minor = 0;
  cudaFuncAttributes attributes{};
  if (cudaGetDevice(&device) != cudaSuccess || cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess ||
      cudaFuncGetAttributes(&attributes, architecture_probe) != cudaSuccess) {
    cudaGetLastError();
    return false;
  }
  return major == 9 && minor == 0 && attributes.sharedSizeBytes > 0;
}

cudaError_t launch_row_info(const Args& a, int head_size, cudaStream_t stream) {
  const int64_t rows = 64ll * a.query_tiles * a.heads * a.batch;
  const auto blocks = static_cast<unsigned>((rows + 255) / 256);
  if (head_size == 64)
    row_info_kernel<64><<<blocks, 256, 0, stream>>>(a);
  else
    row_info_kernel<128><<<blocks, 256, 0, stream>>>(a);
  return cudaGetLastError();
}

cudaError_t launch_head_sums(const Args& a, float* dscale, float* dthreshold, cudaStream_t stream) {
  head_sums_kernel<<<a.heads, 256, 0, stream>>>(a, dscale, dthreshold);
  return cudaGetLastError();
}

}  // namespace tessera::cuda_attention
