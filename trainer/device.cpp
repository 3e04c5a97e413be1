#include "trainer/device.h"

#include <stdexcept>

#include "trainer/collective.h"

#ifdef TESSERA_HAS_CUDA
#include "kernels/comm/nccl.h"
#include "kernels/cuda/ops.h"
#endif

namespace tessera {
namespace {

void require(const std::string& device) {
  if (const std::string problem = device_problem(device); !problem.empty())
    throw ConfigError("device " + device + ": " + problem + "; or use device cpu");
}

#ifdef TESSERA_HAS_CUDA
NcclOptions nccl_options(const ParallelConfig& parallel) { return {.deadline_seconds = parallel.deadline, .share_gpu = parallel.share_gpu}; }

int own_gpu(const ParallelConfig& parallel, Communicator& host) {
  try {
    return choose_gpu(host, nccl_options(parallel));
  } catch (const std::invalid_argument& e) {  // every rank's, alike: to be said once
    if (host.size() == 1) throw;
    throw CommonError(2, e.what());
  }
}
#endif

}  // namespace

std::unique_ptr<Communicator> make_device_communicator(const ParallelConfig& parallel, Communicator& host, Ops& ops) {
  if (ops.kind() == DeviceKind::cpu) return nullptr;
  // Alone, every collective is one in place, which this one leaves alone; the launcher's would copy through the host.
  if (host.size() == 1) return make_single_communicator();
#ifdef TESSERA_HAS_CUDA
  return make_nccl_communicator(host, ops, nccl_options(parallel));
#else
  (void)parallel;
  throw std::logic_error("operations of a device that this build does not have");
#endif
}

std::string device_problem(const std::string& device) {
  if (device_kind(device) == DeviceKind::cpu) return "";
#ifdef TESSERA_HAS_CUDA
  return cuda_problem();
#else
  return "this build has no CUDA backend; configure it where nvcc is found (-DTESSERA_CUDA=ON)";
#endif
}

DeviceKind device_kind(const std::string& device) {
  if (device == "cpu") return DeviceKind::cpu;
  if (device == "cuda") return DeviceKind::cuda;
  throw std::invalid_argument("device: expected cpu or cuda, found " + device);
}

std::unique_ptr<Ops> make_ops(const std::string& device, int threads, bool batch_invariant) {
  require(device);
#ifdef TESSERA_HAS_CUDA
  if (device == "cuda") return make_cuda_ops(0, batch_invariant);
#endif
  (void)batch_invariant;
  return make_cpu_ops(threads);
}

std::unique_ptr<Ops> make_ops(const std::string& device, int threads, const ParallelConfig& parallel, Communicator& host, bool batch_invariant) {
  agree(host, [&] { require(device); });
  int gpu = 0;
#ifdef TESSERA_HAS_CUDA
  if (device == "cuda") gpu = own_gpu(parallel, host);
#endif
  (void)parallel, (void)gpu, (void)batch_invariant;
  std::unique_ptr<Ops> ops;
  agree(host, [&] {
#ifdef TESSERA_HAS_CUDA
    if (device == "cuda") {
      ops = make_cuda_ops(gpu, batch_invariant);
      return;
    }
#endif
    ops = make_cpu_ops(threads);
  });
  return ops;
}

Device::Device(const std::string& device, int threads, const ParallelConfig& parallel, Communicator& host)
    : ops_(make_ops(device, threads, parallel, host)), own_(make_device_communicator(parallel, host, *ops_)), comm_(own_ ? *own_ : host) {}

std::size_t device_memory_used(Ops& ops) {
#ifdef TESSERA_HAS_CUDA
  if (ops.kind() == DeviceKind::cuda) return cuda_memory_used(ops);
#endif
  (void)ops;
  return 0;
}

}  // namespace tessera
