#pragma once
// A Communicator over NCCL, for tensors in GPU memory.

#include <cuda_runtime_api.h>

#include <memory>
#include <string>

#include "kernels/comm/communicator.h"
#include "kernels/ops.h"

namespace tessera {

struct NcclOptions {
  /// A collective that has not finished this long after it could have begun ends the job: one message on stderr that says what this rank waited
  /// for and what it had done before, then exit code 1. Waiting for this rank's own earlier operations on the GPU does not count.
  double deadline_seconds = 300;
  /// Ranks may share a GPU (for tests: slow): each then tells NCCL that it is a host of its own.
  bool share_gpu = false;
};

/// To be called before the first NCCL call of the process: which GPU this rank takes (gpu_choice.h: the n-th rank of a host takes its n-th GPU; with
/// share_gpu modulo their number, and NCCL_HOSTID is set unless it is). Throws std::invalid_argument, on every rank alike, when a rank cannot use a
/// GPU, or has none of its own without share_gpu. Collective over `host`.
int choose_gpu(Communicator& host, const NcclOptions& options);

/// Collectives on the device of `ops` (make_cuda_ops) between the ranks of `host`, which stays in use for host values, barrier and abort and
/// must live longer, as must `ops`. Collectives follow `ops`' operations in order; begin_* run beside them on a stream of their own. Sums are in an
/// order that NCCL chooses from the number of ranks and the size: the same each time. Throws std::runtime_error with NCCL's text. Collective.
///
/// Called from one thread. Not while `ops` is recording (std::logic_error): collectives are not part of a RecordedWork. Tensors either coincide as
/// the interface says or do not overlap (std::logic_error). A single rank copies and needs no NCCL.
/// One NCCL communicator serves both streams: NCCL then runs collectives in the order of the calls, the same on every rank, whatever the streams, and
/// they cannot block each other. That does not hold between a communicator and what split() made of it: use one at a time.
std::unique_ptr<Communicator> make_nccl_communicator(Communicator& host, Ops& ops, const NcclOptions& options);

/// "NCCL 2.28.9, CUDA runtime 13.0": what all ranks should have alike.
std::string nccl_versions();

/// The PCI address of the GPU of a cuda Ops: "0000:1A:00.0".
std::string gpu_address(Ops& ops);

}  // namespace tessera
