#include "kernels/cuda/attention/backward_kv.cuh"
#include "kernels/cuda/attention/kernels.h"

namespace tessera::cuda_attention {

template <>
cudaError_t launch_backward_kv<64>(const Args& a, bool hopper, cudaStream_t stream) {
  using Shared = BackwardKvShared<64>;
  if (a.softmax)
    return launch<Shared>(hopper ? backward_kv_kernel<64, true, true> : backward_kv_kernel<64, true, false>, a, a.key_tiles, hopper, stream);
  return launch<Shared>(hopper ? backward_kv_kernel<64, false, true> : backward_kv_kernel<64, false, false>, a, a.key_tiles, hopper, stream);
}

}  // namespace tessera::cuda_attention
