#include "kernels/cuda/attention/backward_kv.cuh"
#include "kernels/cuda/attention/kernels.h"

namespace tessera::cuda_attention {

template <>
cudaError_t launch_backward_kv<64>(const Args& a, bool hopper, bool persistent, cudaStream_t stream) {
  static const Kernel kernels[kVariants][2] = TESSERA_VARIANTS(backward_kv_kernel, 64, 11, 12, 13);
  return launch<BackwardKvShared, 64>(kernels, a, a.key_tiles, hopper, persistent, stream, Start::early);
}

}  // namespace tessera::cuda_attention
