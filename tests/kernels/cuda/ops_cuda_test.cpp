// The CUDA operation set as a whole: memory, transfers, recorded work.

#include "ops_cuda.h"

namespace tessera {
namespace {

using namespace cuda_test;

TEST(CudaOps, SaysWhyThereIsNoGpu) { EXPECT_EQ(cuda_problem().empty(), has_gpu()) << cuda_problem(); }

}  // namespace
}  // namespace tessera
