#pragma once
// Launchers of the kernels, one translation unit a kernel and head size, so that they compile side by side.

#include <stdexcept>
#include <string>

#include "kernels/cuda/attention/attention.h"
#include "kernels/cuda/attention/pipeline.cuh"

namespace tessera::cuda_attention {

/// persistent: as many blocks as the GPU holds, each taking bands in turn; else a block a band. See Schedule.
template <int D>
cudaError_t launch_forward(const Args& a, bool hopper, bool persistent, cudaStream_t stream);
/// The same with Args::carry.
template <int D>
cudaError_t launch_forward_part(const Args& a, bool hopper, bool persistent, cudaStream_t stream);
template <int D>
cudaError_t launch_backward_kv(const Args& a, bool hopper, bool persistent, cudaStream_t stream);
template <int D>
cudaError_t launch_backward_q(const Args& a, bool hopper, bool persistent, cudaStream_t stream);

/// Fills Args::rows from z, o and d_o: 64 * query_tiles rows a head, those past the end with zeros.
cudaError_t launch_row_info(const Args& a, int head_size, cudaStream_t stream);
/// Adds the partial sums of each head, in ascending order, to dscale and dthreshold (either may be null).
cudaError_t launch_head_sums(const Args& a, float* dscale, float* dthreshold, cudaStream_t stream);
/// Does the current device run this library's sm_90a code?
bool runs_hopper_code();

/// Tiles of a band.
template <int D>
int forward_groups(bool hopper);
template <int D>
int backward_q_groups(bool hopper);

/// What a kernel needs beside Shared::kBytes, at most.
constexpr uint32_t kStaticShared = 128;

/// When the blocks of a kernel on the Hopper path may start: after the kernel before in the stream, or as soon as all blocks of that one allow it
/// (let_next_kernel_start in arch.cuh).
enum class Start { after, early };

/// Launches the variant of the arguments: kernels[variant][hopper].
using Kernel = void (*)(Args);
template <class Shared, bool Hopper>
cudaError_t launch(Kernel kernel, const Args& a, int tiles, bool persistent, cudaStream_t stream, Start start) {
  int device = 0, blocks = 0, shared = 0;
  if (const cudaError_t e = cudaGetDevice(&device); e != cudaSuccess) return e;
  if (const cudaError_t e = cudaDeviceGetAttribute(&blocks, cudaDevAttrMultiProcessorCount, device); e != cudaSuccess) return e;
  if (const cudaError_t e = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device); e != cudaSuccess) return e;
  if (Shared::kBytes + kStaticShared > static_cast<uint32_t>(shared)) {
    throw std::runtime_error("CUDA attention: this head size needs " + std::to_string((Shared::kBytes + kStaticShared) / 1024) +
                             " KiB of shared memory a block, the GPU has " + std::to_string(shared / 1024) +
                             " KiB: use head size 64, or a GPU of compute capability 8.0 or 9.0");
  }
  if (const cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Shared::kBytes); e != cudaSuccess) return e;
  const int64_t bands = (tiles + Shared::kGroups - 1) / Shared::kGroups, items = bands * a.batch * a.heads;
  if (items > 1 << 29) return cudaErrorInvalidConfiguration;            // Schedule counts in int
  if (!persistent || items < blocks) blocks = static_cast<int>(items);  // registers leave room for one block on a multiprocessor
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks), config.blockDim = dim3(threads_of(Shared::kGroups, Hopper));
  config.dynamicSmemBytes = Shared::kBytes, config.stream = stream;
  config.attrs = &early, config.numAttrs = Hopper && start == Start::early ? 1 : 0;
  cudaLaunchKernelEx(&config, kernel, a);
  return cudaGetLastError();
}
template <template <int, bool> class Shared, int D>
cudaError_t launch(const Kernel (&kernels)[kVariants][2], const Args& a, int tiles, bool hopper, bool persistent, cudaStream_t stream,
                   Start start = Start::after) {
  static_assert(Shared<D, false>::kBytes + kStaticShared <= cuda_attention_shared_bytes(D), "the preflight must know what the kernels take");
  const Kernel kernel = kernels[variant_of(a.power, a.softmax, a.fidelity, a.bounded, a.length_beta > 0)][hopper];
  return hopper ? launch<Shared<D, true>, true>(kernel, a, tiles, persistent, stream, start)
                : launch<Shared<D, false>, false>(kernel, a, tiles, persistent, stream, start);
}

/// All variants of a kernel for one head size. `l`: variants with length_beta, or those that do the same where offsets are a row's own anyway.
#define TESSERA_VARIANT(kernel, D, v) \
  { kernel<D, v, false>, kernel<D, v, true> }
#define TESSERA_VARIANTS(kernel, D, l0, l1, l2)                                                                                       \
  {                                                                                                                                   \
    TESSERA_VARIANT(kernel, D, 0), TESSERA_VARIANT(kernel, D, 1), TESSERA_VARIANT(kernel, D, 2), TESSERA_VARIANT(kernel, D, 3),       \
        TESSERA_VARIANT(kernel, D, 4), TESSERA_VARIANT(kernel, D, 5), TESSERA_VARIANT(kernel, D, 6), TESSERA_VARIANT(kernel, D, 7),   \
        TESSERA_VARIANT(kernel, D, 8), TESSERA_VARIANT(kernel, D, 9), TESSERA_VARIANT(kernel, D, 10), TESSERA_VARIANT(kernel, D, l0), \
        TESSERA_VARIANT(kernel, D, l1), TESSERA_VARIANT(kernel, D, l2)                                                                \
  }

}  // namespace tessera::cuda_attention
