#include "kernels/cuda/attention/forward.cuh"
#include "kernels/cuda/attention/kernels.h"

namespace tessera::cuda_attention {

template <>
cudaError_t launch_forward_part<128>(const Args& a, bool hopper, bool persistent, cudaStream_t stream) {
  static const Kernel kernels[kVariants][2] = TESSERA_VARIANTS(forward_part_kernel, 128, 0, 3, 6);
  return launch<ForwardShared, 128>(kernels, a, a.query_tiles + a.by_query.before, hopper, persistent, stream);
}

}  // namespace tessera::cuda_attention
