#pragma once
// The CUDA backend of the operation set (kernels/ops.h): bf16 in and out, fp32 sums. All calls are asynchronous on one stream.

#include <cuda_runtime_api.h>

#include <functional>
#include <memory>
#include <string>

#include "kernels/ops.h"

namespace tessera {

/// Why this process cannot compute on a GPU (no driver, no GPU, too old a driver or GPU), or "" when it can. Needs no GPU.
std::string cuda_problem();

/// GPUs that this process sees.
int cuda_device_count();

/// Operations on GPU `device` (0-based, as this process sees them), which becomes the calling thread's current one: an Ops belongs to the thread
/// that made it. Throws std::invalid_argument when there is no such device, std::runtime_error for what CUDA reports. An error of asynchronous work
/// is reported by the next call that meets it, at the latest by download() or synchronize().
/// memory_available() leaves a reserve for kernels' code and does not subtract what is allocated later: prepare(), tile lists, the caller's own.
/// Uploads leave the host's memory free on return, and wait only when 16 MiB or 64 of them are on their way.
///
/// batch_invariant: for generation. A row of linear_forward and attention_decode has the bits that it has among the rows of the whole text's forward
/// pass, in which linear_forward takes one algorithm for any number of rows. Slower, for many rows above all; training takes the fastest. Where
/// cuBLASLt has no such algorithm linear_forward throws std::runtime_error; attention_decode takes no document_start.
std::unique_ptr<Ops> make_cuda_ops(int device, bool batch_invariant = false);

/// The stream that orders the operations of an Ops from make_cuda_ops(). Throws std::logic_error for another Ops.
cudaStream_t cuda_stream(Ops& ops);

/// Has `check` called after each wait of `ops` for the device (download, synchronize), before the waiter goes on, for as long as the returned
/// handle lives: for those whose work on the stream may end with garbage. `check` returns only when all is well.
std::shared_ptr<void> cuda_check_after_waits(Ops& ops, std::function<void()> check);

/// Bytes of shared memory that a block may take on the device of a cuda Ops.
std::size_t cuda_shared_bytes(Ops& ops);

/// Bytes in use on the device of a cuda Ops, by every process (cudaMemGetInfo).
std::size_t cuda_memory_used(Ops& ops);

}  // namespace tessera
