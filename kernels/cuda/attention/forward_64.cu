#include "kernels/cuda/attention/forward.cuh"
#include "kernels/cuda/attention/kernels.h"

namespace tessera::cuda_attention {

template <>
cudaError_t launch_forward<64>(const Args& a, bool hopper, cudaStream_t stream) {
  using Shared = ForwardShared<64>;
  if (a.softmax) return launch<Shared>(hopper ? forward_kernel<64, true, true> : forward_kernel<64, true, false>, a, a.query_tiles, hopper, stream);
  return launch<Shared>(hopper ? forward_kernel<64, false, true> : forward_kernel<64, false, false>, a, a.query_tiles, hopper, stream);
}
template <>
int forward_groups<64>() {
  return ForwardShared<64>::kGroups;
}
}  // namespace tessera::cuda_attention
