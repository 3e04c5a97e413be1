#include "kernels/cuda/attention/backward_q.cuh"
#include "kernels/cuda/attention/kernels.h"

namespace tessera::cuda_attention {

template <>
cudaError_t launch_backward_q<128>(const Args& a, bool hopper, bool persistent, cudaStream_t stream) {
  static const Kernel kernels[kVariants][2] = TESSERA_VARIANTS(backward_q_kernel, 128, 0, 3, 6);
  return launch<BackwardQShared, 128>(kernels, a, a.query_tiles + a.by_query.before, hopper, persistent, stream, Start::early);
}
template <>
int backward_q_groups<128>(bool hopper) {
  return hopper ? BackwardQShared<128, true>::kGroups : BackwardQShared<128, false>::kGroups;
}

}  // namespace tessera::cuda_attention
