#include "kernels/cuda/attention/backward_q.cuh"
#include "kernels/cuda/attention/kernels.h"

namespace tessera::cuda_attention {

template <>
cudaError_t launch_backward_q<64>(const Args& a, bool hopper, cudaStream_t stream) {
  using Shared = BackwardQShared<64>;
  if (a.softmax)
    return launch<Shared>(hopper ? backward_q_kernel<64, true, true> : backward_q_kernel<64, true, false>, a, a.query_tiles, hopper, stream);
  return launch<Shared>(hopper ? backward_q_kernel<64, false, true> : backward_q_kernel<64, false, false>, a, a.query_tiles, hopper, stream);
}
template <>
int backward_q_groups<64>() {
  return BackwardQShared<64>::kGroups;
}
}  // namespace tessera::cuda_attention
