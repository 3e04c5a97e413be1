#include "kernels/cuda/attention/forward.cuh"
#include "kernels/cuda/attention/kernels.h"

namespace tessera::cuda_attention {

template <>
cudaError_t launch_forward<128>(const Args& a, bool hopper, cudaStream_t stream) {
  static const Kernel kernels[kVariants][2] = TESSERA_VARIANTS(forward_kernel, 128);
  return launch<ForwardShared<128>>(kernels, a, a.query_tiles, hopper, stream);
}
template <>
int forward_groups<128>() {
  return ForwardShared<128>::kGroups;
}
}  // namespace tessera::cuda_attention
