#include "kernels/cuda/attention/backward_q.cuh"
#include "kernels/cuda/attention/kernels.h"

namespace tessera::cuda_attention {

template <>
cudaError_t launch_backward_q<64>(const Args& a, bool hopper, bool persistent, cudaStream_t stream) {
  static const Kernel kernels[kVariants][2] = TESSERA_VARIANTS(backward_q_kernel, 64, 0, 3, 6);
  return launch<BackwardQShared, 64>(kernels, a, a.query_tiles + a.by_query.before, hopper, persistent, stream, Start::early);
}
template <>
int backward_q_groups<64>(bool hopper) {
  return hopper ? BackwardQShared<64, true>::kGroups : BackwardQShared<64, false>::kGroups;
}

}  // namespace tessera::cuda_attention
