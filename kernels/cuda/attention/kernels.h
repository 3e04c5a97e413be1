#pragma once
// Launchers of the kernels, one translation unit a kernel and head size, so that they compile side by side.

#include "kernels/cuda/attention/pipeline.cuh"

namespace tessera::cuda_attention {

template <int D>
cudaError_t launch_forward(const Args& a, bool hopper, cudaStream_t stream);
template <int D>
cudaError_t launch_backward_kv(const Args& a, bool hopper, cudaStream_t stream);
template <int D>
cudaError_t launch_backward_q(const Args& a, bool hopper, cudaStream_t stream);

/// Fills Args::rows from z, o and d_o: 64 * query_tiles rows a head, those past the end with zeros.
cudaError_t launch_row_info(const Args& a, int head_size, cudaStream_t stream);
/// Adds the partial sums of each head, in ascending order, to dscale and dthreshold (either may be null).
cudaError_t launch_head_sums(const Args& a, float* dscale, float* dthreshold, cudaStream_t stream);
/// Does the current device run this library's sm_90a code?
bool runs_hopper_code();

/// Tiles a block takes: the length of its bands.
template <int D>
int forward_groups();
template <int D>
int backward_q_groups();

/// Launches the variant of the arguments: kernels[variant][hopper].
using Kernel = void (*)(Args);
template <class Shared>
cudaError_t launch(const Kernel (&kernels)[kVariants][2], const Args& a, int tiles, bool hopper, cudaStream_t stream) {
  const Kernel kernel = kernels[variant_of(a.power, a.softmax, a.fidelity, a.bounded)][hopper];
  if (const cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Shared::kBytes); e != cudaSuccess) return e;
  const int64_t bands = (tiles + Shared::kGroups - 1) / Shared::kGroups, blocks = bands * a.batch * a.heads;
  kernel<<<static_cast<unsigned>(blocks), threads_of(Shared::kGroups, hopper), Shared::kBytes, stream>>>(a);
  return cudaGetLastError();
}

/// All variants of a kernel for one head size.
#define TESSERA_VARIANT(kernel, D, v) \
  { kernel<D, v, false>, kernel<D, v, true> }
#define TESSERA_VARIANTS(kernel, D)                                                                                                 \
  {                                                                                                                                 \
    TESSERA_VARIANT(kernel, D, 0), TESSERA_VARIANT(kernel, D, 1), TESSERA_VARIANT(kernel, D, 2), TESSERA_VARIANT(kernel, D, 3),     \
        TESSERA_VARIANT(kernel, D, 4), TESSERA_VARIANT(kernel, D, 5), TESSERA_VARIANT(kernel, D, 6), TESSERA_VARIANT(kernel, D, 7), \
        TESSERA_VARIANT(kernel, D, 8), TESSERA_VARIANT(kernel, D, 9), TESSERA_VARIANT(kernel, D, 10)                                \
  }

}  // namespace tessera::cuda_attention
