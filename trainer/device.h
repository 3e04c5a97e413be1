#pragma once
// The device that a process computes on, and the communicator that moves its memory between ranks.

#include <cstddef>
#include <memory>
#include <string>

#include "kernels/comm/communicator.h"
#include "kernels/ops.h"
#include "trainer/config.h"

namespace tessera {

/// Why this process cannot compute on `device` ("cpu", "cuda"), or "" when it can. To be asked when something is about to compute: a
/// configuration for a GPU may be checked and planned anywhere.
std::string device_problem(const std::string& device);

/// "cpu" or "cuda". Throws std::invalid_argument for another name.
DeviceKind device_kind(const std::string& device);

/// Operations for a process that computes alone, on the first GPU that it sees. threads: of the CPU, 0 for OMP_NUM_THREADS or all cores.
/// batch_invariant: of a GPU, see make_cuda_ops(). Throws ConfigError with device_problem() and what to do.
std::unique_ptr<Ops> make_ops(const std::string& device, int threads = 0, bool batch_invariant = false);
/// The same on every rank of `host`, a GPU each unless parallel.share_gpu. All ranks throw, or none. Collective.
std::unique_ptr<Ops> make_ops(const std::string& device, int threads, const ParallelConfig& parallel, Communicator& host,
                              bool batch_invariant = false);

/// Collectives for memory of `ops` between the ranks of `host`, which both must live longer; nullptr on the CPU, where `host` itself does.
/// Collective.
std::unique_ptr<Communicator> make_device_communicator(const ParallelConfig& parallel, Communicator& host, Ops& ops);

/// What ranks that train together compute with. Host values (agreement, texts, sums of a few numbers) stay with the host's communicator.
class Device {
 public:
  /// `host` must live longer. Throws as make_ops() does. Collective.
  Device(const std::string& device, int threads, const ParallelConfig& parallel, Communicator& host);

  Ops& ops() const { return *ops_; }
  /// For memory of ops().
  Communicator& comm() const { return comm_; }

 private:
  std::unique_ptr<Ops> ops_;
  std::unique_ptr<Communicator> own_;  // none on the CPU; destroyed before the operations with which it orders itself
  Communicator& comm_;
};

/// Bytes in use on the device, by every process on it; 0 where that is not known (the CPU).
std::size_t device_memory_used(Ops& ops);

}  // namespace tessera
