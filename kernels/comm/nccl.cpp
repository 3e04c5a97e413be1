// Communicator over NCCL. How its calls are made: nccl_link.h. Who watches them: nccl_watchdog.h.

#include "kernels/comm/nccl.h"

#include <fmt/format.h>
#include <nccl.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <sstream>
#include <stdexcept>
#include <utility>
#include <vector>

#include "kernels/comm/arguments.h"
#include "kernels/comm/gpu_choice.h"
#include "kernels/comm/nccl_link.h"
#include "kernels/comm/nccl_watchdog.h"
#include "kernels/cuda/check.h"
#include "kernels/cuda/ops.h"

namespace tessera {
namespace {

/// Ranks load their libraries first, each in its own time.
constexpr double kSetUpSeconds = 60;

std::string host_name() {
  char name[256] = "";
  gethostname(name, sizeof name - 1);
  return *name ? name : "localhost";
}

ncclDataType_t nccl_type(DType t) {
  switch (t) {
    case DType::f32: return ncclFloat32;
    case DType::f64: return ncclFloat64;
    case DType::bf16: return ncclBfloat16;
    case DType::i32: return ncclInt32;
    case DType::u32: return ncclUint32;
    case DType::u64: return ncclUint64;
  }
  throw std::logic_error("NCCL: unknown element type");
}

class NcclCommunicator final : public Communicator {
 public:
  NcclCommunicator(Communicator& host, std::unique_ptr<Communicator> owned, Ops& ops, const NcclOptions& options)
      : owned_(std::move(owned)), host_(host), ops_(ops), options_(options), stream_(cuda_stream(ops)), exceptions_(std::uncaught_exceptions()) {
    if (size() == 1) return;
    int device = 0, least = 0, greatest = 0;
    cuda::check(cudaStreamGetDevice(stream_, &device), "device of the operations");
    cuda::check(cudaSetDevice(device), "device of the operations");
    link_ = std::make_shared<comm::NcclLink>();
    try {
      link_->open(host_, std::max(options.deadline_seconds, kSetUpSeconds));
    } catch (...) {
      comm::NcclLink::abort(link_);
      throw;
    }
    cuda::check(cudaDeviceGetStreamPriorityRange(&least, &greatest), "stream priorities");
    cuda::check(cudaStreamCreateWithPriority(&beside_, cudaStreamNonBlocking, greatest), "stream of the collectives");
    watchdog_ = std::make_unique<comm::NcclWatchdog>(link_, rank(), size(), host_name(), device, options.deadline_seconds);
    check_after_waits_ = cuda_check_after_waits(ops_, [this] { watchdog_->check_after_wait(); });
  }
  ~NcclCommunicator() override {
    check_after_waits_.reset();
    if (link_ && std::uncaught_exceptions() > exceptions_) {
      watchdog_.reset();
      comm::NcclLink::abort(link_);  // the others may be waiting elsewhere
    } else if (link_) {
      try {
        host_.barrier();  // a rank that leaves early would look like a failure to the others' watchdogs
        watchdog_.reset();
        link_->close(options_.deadline_seconds);
      } catch (const std::exception& e) {
        fmt::print(stderr, "tessera: rank {} of {}: {}\n", rank(), size(), e.what());
        watchdog_.reset();
        comm::NcclLink::abort(link_);
      }
    }
    if (beside_) cudaStreamDestroy(beside_);
  }
  NcclCommunicator(const NcclCommunicator&) = delete;
  NcclCommunicator& operator=(const NcclCommunicator&) = delete;

  int rank() const override { return host_.rank(); }
  int size() const override { return host_.size(); }
  int local_rank() const override { return host_.local_rank(); }
  int local_size() const override { return host_.local_size(); }

  void all_reduce_sum(const Tensor& x) override {
    comm::check_all_reduce(x);
    run("all_reduce_sum", x, x, false, [&](ncclComm_t comm, cudaStream_t stream) {
      return ncclAllReduce(x.data, x.data, static_cast<std::size_t>(x.numel()), nccl_type(x.dtype), ncclSum, comm, stream);
    });
  }
  void reduce_scatter_sum(const Tensor& in, const Tensor& out) override { reduce_scatter(in, out, false); }
  Ticket begin_reduce_scatter_sum(const Tensor& in, const Tensor& out) override { return reduce_scatter(in, out, true); }
  void all_gather(const Tensor& in, const Tensor& out) override { gather(in, out, false); }
  Ticket begin_all_gather(const Tensor& in, const Tensor& out) override { return gather(in, out, true); }

  Ticket begin_exchange(const Tensor& in, std::span<const Part> send, const Tensor& out, std::span<const Part> receive) override {
    sent_bytes_ += comm::check_exchange(in, send, out, receive, rank(), size());
    const auto empty = [](const Part& part) { return part.count == 0; };
    if (std::ranges::all_of(send, empty) && std::ranges::all_of(receive, empty)) return 0;
    if (size() == 1) {
      comm::copy_own_part(in, send, out, receive, 0,
                          [&](const Tensor& from, const Tensor& to) { run("exchange", from, to, false, [](auto...) { return ncclSuccess; }); });
      return 0;
    }
    const Tensor& larger = in.numel() > 0 ? in : out;
    return run("exchange", larger, larger, true, [&](ncclComm_t comm, cudaStream_t stream) {
      const ncclDataType_t type = nccl_type(in.dtype);
      const auto failed = [](ncclResult_t code) { return code != ncclSuccess && code != ncclInProgress; };
      ncclResult_t result = ncclGroupStart();
      for (const Part& part : send)
        if (part.count > 0 && !failed(result))
          result = ncclSend(in.slice(part.first, part.count).data, static_cast<std::size_t>(part.count), type, part.rank, comm, stream);
      for (const Part& part : receive)
        if (part.count > 0 && !failed(result))
          result = ncclRecv(out.slice(part.first, part.count).data, static_cast<std::size_t>(part.count), type, part.rank, comm, stream);
      const ncclResult_t ended = ncclGroupEnd();
      return failed(result) ? result : ended;
    });
  }

  void broadcast(const Tensor& x, int root) override {
    comm::check_root(root, size());
    run("broadcast", x, x, false, [&](ncclComm_t comm, cudaStream_t stream) {
      return ncclBroadcast(x.data, x.data, static_cast<std::size_t>(x.numel()), nccl_type(x.dtype), root, comm, stream);
    });
  }

  void wait(Ticket begun) override {
    if (begun == 0) return;
    check_not_recording("wait");
    if (!watchdog_) throw std::logic_error(fmt::format("wait: ticket {} was never given", begun));
    if (const cudaEvent_t done = watchdog_->done(begun)) cuda::check(cudaStreamWaitEvent(stream_, done), "wait for a collective");
  }

  void barrier() override { host_.barrier(); }
  std::int64_t max(std::int64_t value) override { return host_.max(value); }
  std::string broadcast(const std::string& text, int root) override { return host_.broadcast(text, root); }

  std::unique_ptr<Communicator> split(int color, int key) override {
    auto part = host_.split(color, key);
    Communicator& host = *part;
    return std::make_unique<NcclCommunicator>(host, std::move(part), ops_, options_);
  }

  [[noreturn]] void abort(int exit_code, const std::string& message) override {
    host_.abort(exit_code, message);
    std::_Exit(exit_code);
  }

 private:
  Ticket reduce_scatter(const Tensor& in, const Tensor& out, bool beside) {
    comm::check_reduce_scatter(in, out, size());
    comm::check_overlap("reduce_scatter_sum", in, out, rank());
    return run("reduce_scatter_sum", in, out, beside, [&](ncclComm_t comm, cudaStream_t stream) {
      return ncclReduceScatter(in.data, out.data, static_cast<std::size_t>(out.numel()), ncclFloat32, ncclSum, comm, stream);
    });
  }
  Ticket gather(const Tensor& in, const Tensor& out, bool beside) {
    comm::check_all_gather(in, out, size());
    comm::check_overlap("all_gather", out, in, rank());
    return run("all_gather", in, out, beside, [&](ncclComm_t comm, cudaStream_t stream) {
      return ncclAllGather(in.data, out.data, static_cast<std::size_t>(in.numel()), nccl_type(in.dtype), comm, stream);
    });
  }

  /// Issues call(comm, stream) behind the operations so far: on their stream, or beside them.
  template <class Call>
  Ticket run(const char* name, const Tensor& in, const Tensor& out, bool beside, Call&& call) {
    check_not_recording(name);
    if (in.numel() == 0) return 0;
    if (size() == 1) {
      if (in.data != out.data) cuda::check(cudaMemcpyAsync(out.data, in.data, in.bytes(), cudaMemcpyDeviceToDevice, stream_), name);
      return 0;
    }
    const comm::Collective c = watchdog_->begin(name, in.numel(), in.dtype);
    const cudaStream_t stream = beside ? beside_ : stream_;
    cuda::check(cudaEventRecord(c.ready, stream_), name);
    if (beside) cuda::check(cudaStreamWaitEvent(beside_, c.ready), name);
    link_->call(name, [&] { return call(link_->get(), stream); });
    cuda::check(cudaEventRecord(c.done, stream), name);
    watchdog_->issued();
    return c.number;
  }

  void check_not_recording(const char* name) const {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    cuda::check(cudaStreamIsCapturing(stream_, &status), name);
    if (status != cudaStreamCaptureStatusNone) throw std::logic_error(fmt::format("{}: collectives cannot be recorded", name));
  }

  const std::unique_ptr<Communicator> owned_;  // of one that split() made
  Communicator& host_;
  Ops& ops_;
  const NcclOptions options_;
  const cudaStream_t stream_;
  const int exceptions_;  // in flight when this was made
  cudaStream_t beside_ = nullptr;
  std::shared_ptr<comm::NcclLink> link_;  // neither this nor the watchdog for a single rank
  std::unique_ptr<comm::NcclWatchdog> watchdog_;
  std::shared_ptr<void> check_after_waits_;
};

/// What this rank sees, as lines of text for the others.
std::string visible_gpus() {
  std::string boot;  // two hosts may bear the same name
  std::ifstream("/proc/sys/kernel/random/boot_id") >> boot;
  std::string problem = cuda_problem(), lines;
  try {
    for (int device = 0; problem.empty() && device < cuda_device_count(); ++device) {
      char address[32] = "";
      cuda::check(cudaDeviceGetPCIBusId(address, sizeof address, device), "PCI address of a GPU");
      lines += fmt::format("{}\n", address);
    }
  } catch (const std::exception& e) {
    problem = e.what();
  }
  for (char& c : problem) c = c == '\n' ? ' ' : c;
  return fmt::format("{}\n{}\n{}\n{}", host_name(), boot, problem, lines);
}

VisibleGpus parse_visible_gpus(const std::string& text) {
  std::istringstream in(text);
  VisibleGpus v;
  std::string boot;
  std::getline(in, v.host);
  std::getline(in, boot);
  std::getline(in, v.problem);
  v.machine = v.host + ' ' + boot;
  for (std::string address; std::getline(in, address);) v.addresses.push_back(address);
  return v;
}

}  // namespace

int choose_gpu(Communicator& host, const NcclOptions& options) {
  if (options.share_gpu) setenv("NCCL_HOSTID", fmt::format("tessera-rank-{}", host.rank()).c_str(), 0);
  const std::string mine = visible_gpus();
  std::vector<VisibleGpus> ranks;
  for (int r = 0; r < host.size(); ++r) ranks.push_back(parse_visible_gpus(host.broadcast(mine, r)));
  return choose_gpus(ranks, options.share_gpu)[static_cast<std::size_t>(host.rank())];
}

std::unique_ptr<Communicator> make_nccl_communicator(Communicator& host, Ops& ops, const NcclOptions& options) {
  return std::make_unique<NcclCommunicator>(host, nullptr, ops, options);
}

std::string nccl_versions() {
  int nccl = 0, cuda = 0;
  comm::check_nccl(ncclGetVersion(&nccl), "version");
  cuda::check(cudaRuntimeGetVersion(&cuda), "version");
  return fmt::format("NCCL {}.{}.{}, CUDA runtime {}.{}", nccl / 10000, nccl / 100 % 100, nccl % 100, cuda / 1000, cuda / 10 % 100);
}

std::string gpu_address(Ops& ops) {
  int device = 0;
  char address[32] = "";
  cuda::check(cudaStreamGetDevice(cuda_stream(ops), &device), "device of the operations");
  cuda::check(cudaDeviceGetPCIBusId(address, sizeof address, device), "PCI address of a GPU");
  return address;
}

}  // namespace tessera
