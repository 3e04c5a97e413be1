#include "kernels/cuda/attention/forward.cuh"
#include "kernels/cuda/attention/kernels.h"

namespace tessera::cuda_attention {

template <>
cudaError_t launch_forward<128>(const Args& a, bool hopper, cudaStream_t stream) {
  using Shared = ForwardShared<128>;
  if (a.softmax) return launch<Shared>(hopper ? forward_kernel<128, true, true> : forward_kernel<128, true, false>, a, a.query_tiles, hopper, stream);
  return launch<Shared>(hopper ? forward_kernel<128, false, true> : forward_kernel<128, false, false>, a, a.query_tiles, hopper, stream);
}
template <>
int forward_groups<128>() {
  return ForwardShared<128>::kGroups;
}
}  // namespace tessera::cuda_attention
