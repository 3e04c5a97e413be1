#include "kernels/cuda/attention/forward.cuh"
#include "kernels/cuda/attention/kernels.h"

namespace tessera::cuda_attention {

template <>
cudaError_t launch_forward<64>(const Args& a, bool hopper, bool persistent, cudaStream_t stream) {
  static const Kernel kernels[kVariants][2] = TESSERA_VARIANTS(forward_kernel, 64, 0, 3, 6);
  return launch<ForwardShared, 64>(kernels, a, a.query_tiles + a.by_query.before, hopper, persistent, stream);
}
template <>
int forward_groups<64>(bool hopper) {
  return hopper ? ForwardShared<64, true>::kGroups : ForwardShared<64, false>::kGroups;
}

}  // namespace tessera::cuda_attention
