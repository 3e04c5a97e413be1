#pragma once
// A Communicator over NCCL, for tensors in GPU memory.

#include <cuda_runtime_api.h>

#include <memory>

#include "kernels/comm/communicator.h"
#include "kernels/ops.h"

namespace tessera {

struct NcclOptions {
  /// A collective that has not finished this long after it could have begun ends the job: one message on stderr that says what this rank waited
  /// for and what it had done before, then exit code 1.
  double deadline_seconds = 300;
  /// Ranks may share a GPU (for tests: slow): each then tells NCCL that it is a host of its own.
  bool share_gpu = false;
};

/// To be called before the first CUDA or NCCL call of the process: which GPU this rank takes (its rank among the host's ranks; modulo their number
/// with share_gpu, which also sets NCCL_HOSTID). Throws std::invalid_argument, on every rank alike, when a host has more ranks than GPUs without
/// share_gpu. Collective over `host`.
int choose_gpu(Communicator& host, const NcclOptions& options);

/// Collectives on the device of `ops` (make_cuda_ops) between the ranks of `host`, which stays in use for host values, barrier and abort and
/// must live longer, as must `ops`. Collectives follow `ops`' operations in order; begin_* run beside them on a stream of their own. Sums are in an
/// order that NCCL chooses from the number of ranks and the size: the same each time. Throws std::runtime_error with NCCL's text. Collective.
std::unique_ptr<Communicator> make_nccl_communicator(Communicator& host, Ops& ops, const NcclOptions& options);

}  // namespace tessera
