#include "trainer/preflight.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <map>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <utility>

#include "kernels/device.h"
#include "trainer/collective.h"

#ifdef TESSERA_HAS_CUDA
#include "kernels/comm/nccl.h"
#include "kernels/cuda/attention/attention.h"
#include "kernels/cuda/ops.h"
#endif

namespace tessera {
namespace {

constexpr double kGiB = 1 << 30;
constexpr std::int64_t kProbe = 1000;  // elements a rank

std::string build(const Ops& ops) {
  std::string text = "tessera " TESSERA_VERSION;
#ifdef TESSERA_HAS_CUDA
  if (ops.kind() == DeviceKind::cuda) text += ", " + nccl_versions();
#endif
  return fmt::format("{} for {}", text, name_of(ops.kind()));
}

/// Of this rank's device, as a name that tells it from others on the host.
std::string device_text(Ops& ops) {
#ifdef TESSERA_HAS_CUDA
  if (ops.kind() == DeviceKind::cuda) return fmt::format("GPU {} of host {}", gpu_address(ops), host_name());
#endif
  (void)ops;
  return "host " + host_name();
}

MemoryClaim parse_claim(const std::string& text) {
  MemoryClaim claim;
  std::istringstream in(text);
  in >> claim.planned >> claim.available >> claim.machine >> std::ws;
  std::getline(in, claim.device);
  return claim;
}

/// All ranks throw, or none: `problem` is the same on all.
void stop_on(Communicator& host, const std::string& problem) {
  if (problem.empty()) return;
  const std::string text = "preflight: " + problem;
  if (host.size() == 1) throw std::runtime_error(text);
  throw CommonError(1, text);
}

double sum_of_ones(Communicator& comm) {
  double one = 1;
  comm.all_reduce_sum(Tensor(&one, DType::f64, {1}));
  return one;
}

/// Floats on the device, while a check lasts.
class Probe {
 public:
  Probe(Ops& ops, std::int64_t count) : ops_(ops), tensor_(ops.allocate(static_cast<std::size_t>(count) * sizeof(float)), DType::f32, {count}) {}
  ~Probe() { ops_.deallocate(tensor_.data); }
  Probe(const Probe&) = delete;
  Probe& operator=(const Probe&) = delete;
  const Tensor& tensor() const { return tensor_; }
  void give(const std::vector<float>& values) { ops_.upload(tensor_, values.data()); }
  std::vector<float> take() const {
    std::vector<float> found(static_cast<std::size_t>(tensor_.numel()));
    ops_.download(found.data(), tensor_);
    return found;
  }

 private:
  Ops& ops_;
  Tensor tensor_;
};

/// What to do where numbers do not arrive as they were sent.
const char* corrupt(const Ops& ops) {
  return ops.kind() == DeviceKind::cuda
             ? "Connections between devices corrupt data; NCCL_DEBUG=INFO shows which are used, NCCL_P2P_DISABLE=1 avoids those between GPUs of a "
               "host"
             : "MPI corrupts data on its way: is its library the same on every host (mpirun --version)? With OpenMPI, OMPI_MCA_pml=ob1 and "
               "OMPI_MCA_btl=self,tcp leave TCP alone to carry it";
}

/// The collectives of a step over the devices, each rank giving other values. They also make the connections, which take memory, before the run
/// looks at what is free for its own.
void check_device(const PreflightRequest& r) {
  const int rank = r.host.rank(), ranks = r.host.size();
  std::optional<Probe> probe;
  std::vector<float> values(static_cast<std::size_t>(kProbe * ranks)), found;
  for (std::size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(rank + 1) + static_cast<float>(i % kProbe);
  const auto give = [&] {
    if (!probe) probe.emplace(r.ops, std::ssize(values));
    probe->give(values);
    if (probe->take() != values) {
      throw std::runtime_error(
          fmt::format("preflight: {} does not give back what was written to its memory. Take it out of use: {}", device_text(r.ops),
                      r.ops.kind() == DeviceKind::cuda ? "it, or its driver, is faulty (nvidia-smi -q shows its errors)" : "its memory is faulty"));
    }
  };
  const auto compare = [&] {
    for (std::size_t i = 0; i < found.size(); ++i) {
      const double wanted = 0.5 * ranks * (ranks + 1) + static_cast<double>(ranks) * static_cast<double>(i % kProbe);
      if (found[i] != wanted) {
        throw std::runtime_error(fmt::format("preflight: a sum over the {} devices gave {} in place of {} on {}. {}", ranks, found[i], wanted,
                                             device_text(r.ops), corrupt(r.ops)));
      }
    }
  };
  const auto check = [&](const std::function<void(const Tensor&)>& sum) {
    agree(r.host, give);
    try {
      sum(probe->tensor());
      found = probe->take();
    } catch (const std::runtime_error& e) {
      throw std::runtime_error(fmt::format("preflight: a sum over the {} devices failed: {}", ranks, e.what()));
    }
    agree(r.host, compare);
  };
  check([&](const Tensor& x) { r.device.all_reduce_sum(x); });
  check([&](const Tensor& x) {
    const Tensor own = x.slice(rank * kProbe, kProbe);
    r.device.reduce_scatter_sum(x, own);
    r.device.all_gather(own, x);
  });
}

}  // namespace

int launched_ranks() {
  for (const char* name : {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE"})
    if (const char* text = std::getenv(name)) return std::atoi(text);
  return 0;
}

std::string host_name() {
  char name[256] = "";
  gethostname(name, sizeof name - 1);
  return *name ? name : "localhost";
}

std::string machine() {
  std::string boot;
  std::ifstream("/proc/sys/kernel/random/boot_id") >> boot;
  return boot.empty() ? "unknown" : boot;
}

std::string launch_problem(int launched, int found, double sum) {
  if (launched > 0 && launched != found) {
    return fmt::format(
        "the launcher started {} processes, and MPI here knows of {}: mpirun and the MPI library that tessera was built with are not "
        "of the same installation. Start it with that library's own mpirun",
        launched, found);
  }
  if (sum != found) {
    return fmt::format("MPI summed a one from each of {} ranks to {}. Is the same MPI library installed on every host (mpirun --version)?", found,
                       sum);
  }
  return "";
}

std::string build_problem(const std::vector<std::string>& builds, const std::vector<std::string>& hosts) {
  for (std::size_t r = 1; r < builds.size(); ++r) {
    if (builds[r] != builds[0]) {
      return fmt::format("rank {} on host {} is {}, and rank 0 on host {} is {}: install the same build and libraries on every host", r, hosts.at(r),
                         builds[r], hosts.at(0), builds[0]);
    }
  }
  return "";
}

std::string memory_problem(const std::vector<MemoryClaim>& ranks) {
  struct Total {
    std::size_t planned = 0, available = SIZE_MAX;
    int ranks = 0;
  };
  std::map<std::pair<std::string, std::string>, Total> devices;
  for (const MemoryClaim& claim : ranks) {
    Total& t = devices[{claim.device, claim.machine}];
    t.planned += claim.planned;
    t.available = std::min(t.available, claim.available);
    ++t.ranks;
  }
  for (const auto& [key, t] : devices) {
    if (t.planned > t.available) {
      return fmt::format(
          "{} has {:.2f} GiB of memory free, and {} rank{} on it need{} {:.2f} GiB. Use a smaller train.micro_batch, model.context or "
          "model, train.recompute gelu+norm or block, or fewer ranks on this device; or end what else uses its memory",
          key.first, static_cast<double>(t.available) / kGiB, t.ranks, t.ranks == 1 ? "" : "s", t.ranks == 1 ? "s" : "",
          static_cast<double>(t.planned) / kGiB);
    }
  }
  return "";
}

std::string head_size_problem(std::int64_t heads, std::int64_t width, std::size_t needed, const std::string& device, std::size_t has) {
  if (needed <= has) return "";
  return fmt::format(
      "model.heads {} of model.width {} are heads of {}: a block of their attention takes {} KiB of shared memory, and {} has {} KiB. "
      "Use heads of 64 (model.heads {}), or a GPU of compute capability 8.0, 9.0 or 10.0",
      heads, width, width / heads, needed >> 10, device, has >> 10, width / 64);
}

void check_head_size(Communicator& host, Ops& ops, std::int64_t heads, std::int64_t width) {
  std::string mine;
#ifdef TESSERA_HAS_CUDA
  if (ops.kind() == DeviceKind::cuda)
    mine = head_size_problem(heads, width, cuda_attention_shared_bytes(width / heads), device_text(ops) + ", " + ops.device_name() + ",",
                             cuda_shared_bytes(ops));
#endif
  (void)ops, (void)heads, (void)width;
  for (const std::string& problem : all_gather(host, mine)) stop_on(host, problem);  // ranks may have GPUs of several kinds
}

void check_memory(Communicator& host, Ops& ops, std::size_t planned_bytes) {
  std::vector<MemoryClaim> claims;
  for (const std::string& text : all_gather(host, fmt::format("{} {} {} {}", planned_bytes, ops.memory_available(), machine(), device_text(ops))))
    claims.push_back(parse_claim(text));
  stop_on(host, memory_problem(claims));
}

void check_exchange(Communicator& host, Communicator& device, Ops& ops, const std::vector<int>& partners) {
  if (host.max(std::ssize(partners)) < 2) return;
  const auto value = [&](int from, int to, std::int64_t i) { return static_cast<float>(from * host.size() + to + i % kProbe); };
  std::vector<Communicator::Part> parts;  // to and from each other rank
  std::vector<float> mine, wanted, found;
  for (const int other : partners) {
    if (other == host.rank()) continue;
    parts.push_back({other, std::ssize(mine), kProbe});
    for (std::int64_t i = 0; i < kProbe; ++i) {
      mine.push_back(value(host.rank(), other, i));
      wanted.push_back(value(other, host.rank(), i));
    }
  }
  std::optional<Probe> in, out;
  agree(host, [&] {
    in.emplace(ops, std::ssize(mine));
    out.emplace(ops, std::ssize(mine));
    in->give(mine);
    out->give(std::vector<float>(mine.size()));
  });
  try {
    device.exchange(in->tensor(), parts, out->tensor(), parts);
    found = out->take();
  } catch (const std::runtime_error& e) {
    throw std::runtime_error(fmt::format("preflight: an exchange between ranks that share sequences failed: {}", e.what()));
  }
  agree(host, [&] {
    const auto wrong = std::ranges::mismatch(found, wanted).in1 - found.begin();
    if (wrong == std::ssize(found)) return;
    throw std::runtime_error(fmt::format("preflight: rank {} sent {} to rank {} on {}, and {} arrived. {}",
                                         parts[static_cast<std::size_t>(wrong / kProbe)].rank, wanted[static_cast<std::size_t>(wrong)], host.rank(),
                                         device_text(ops), found[static_cast<std::size_t>(wrong)], corrupt(ops)));
  });
}

void preflight(const PreflightRequest& r) {
  stop_on(r.host, launch_problem(launched_ranks(), r.host.size(), sum_of_ones(r.host)));
  stop_on(r.host, build_problem(all_gather(r.host, build(r.ops)), all_gather(r.host, host_name())));
  if (r.heads > 0) check_head_size(r.host, r.ops, r.heads, r.width);
  check_device(r);
  check_exchange(r.host, r.device, r.ops, r.partners);
  check_memory(r.host, r.ops, r.planned_bytes);
}

}  // namespace tessera
