#include "kernels/cuda/ops.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>
#include <vector>

#include "kernels/cuda/attention/attention.h"
#include "kernels/cuda/check.h"
#include "kernels/cuda/layers.h"
#include "kernels/cuda/linear.h"
#include "kernels/cuda/memory.h"

namespace tessera {
namespace {

using cuda::check;
using cuda::require;

constexpr double kGiB = 1 << 30;
constexpr std::size_t kSumScratch = 64 << 10;  // of add_sum and add_sum_of_squares
/// Left to code: kernels, cuBLASLt's among them, take their memory when they are first called.
constexpr std::size_t kReservedBytes = std::size_t{256} << 20;
constexpr int kLeastCapability = 80;  // bf16 tensor cores

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "asking about a GPU");
  return value;
}

int capability(int device) {
  return attribute(cudaDevAttrComputeCapabilityMajor, device) * 10 + attribute(cudaDevAttrComputeCapabilityMinor, device);
}

std::string name_of_gpu(int device) {
  cudaDeviceProp properties{};
  check(cudaGetDeviceProperties(&properties, device), "asking about a GPU");
  return properties.name;
}

std::string version_text(int version) { return fmt::format("{}.{}", version / 1000, version % 1000 / 10); }

/// Dense bf16 FLOP/s with f32 sums, from NVIDIA's data sheets; 0 where unknown. The first word found in the GPU's name decides.
double peak_flops_of(const std::string& name) {
  constexpr std::pair<const char*, double> kPeaks[] = {{"MIG", 0}, {"A100", 312e12}, {"PCIe", 0}, {"NVL", 0}, {"H100", 989.4e12}, {"H200", 989.4e12}};
  for (const auto& [word, flops] : kPeaks) {
    if (name.find(word) != std::string::npos) return flops;
  }
  return 0;
}

/// Host to device without waiting for either: bytes are copied into pinned slots that follow each other in a ring, and go on from there in
/// the stream's order. A slot is waited for only when all of them are on their way.
class UploadRing {
 public:
  UploadRing() : memory_(cuda::allocate_pinned(kSlots * kSlotBytes)) {
    for (cuda::Event& event : sent_) {
      cudaEvent_t made = nullptr;
      check(cudaEventCreateWithFlags(&made, cudaEventDisableTiming), "creating an event");
      event.reset(made);
    }
  }

  void upload(void* to, const void* host, std::size_t bytes, cudaStream_t stream) {
    for (std::size_t done = 0; done < bytes;) {
      const std::size_t piece = std::min(bytes - done, kSlotBytes);
      check(cudaEventSynchronize(sent_[next_].get()), "waiting for an upload");
      unsigned char* slot = memory_.get() + next_ * kSlotBytes;
      std::memcpy(slot, static_cast<const char*>(host) + done, piece);
      check(cudaMemcpyAsync(static_cast<char*>(to) + done, slot, piece, cudaMemcpyHostToDevice, stream), "uploading");
      check(cudaEventRecord(sent_[next_].get(), stream), "uploading");
      next_ = (next_ + 1) % kSlots;
      done += piece;
    }
  }

 private:
  static constexpr std::size_t kSlots = 64, kSlotBytes = 256 << 10;  // several steps' worth of tokens
  cuda::PinnedMemory memory_;
  std::array<cuda::Event, kSlots> sent_;
  std::size_t next_ = 0;
};

class CudaGraph final : public RecordedWork {
 public:
  CudaGraph(const cuda::Graph& graph, cudaStream_t stream) : stream_(stream) {
    cudaGraphExec_t made = nullptr;
    check(cudaGraphInstantiate(&made, graph.get(), 0), "preparing recorded work");
    graph_.reset(made);
  }
  void replay() override { check(cudaGraphLaunch(graph_.get(), stream_), "replaying recorded work"); }

 private:
  cuda::GraphExec graph_;
  cudaStream_t stream_;
};

class CudaOps final : public Ops {
 public:
  CudaOps(int device, bool batch_invariant) : device_(device), batch_invariant_(batch_invariant) {
    check(cudaSetDevice(device), "choosing a GPU");
    cudaStream_t made = nullptr;
    check(cudaStreamCreateWithFlags(&made, cudaStreamNonBlocking), "creating a stream");
    stream_.reset(made);
    multiprocessors_ = attribute(cudaDevAttrMultiProcessorCount, device);
    name_ = name_of_gpu(device);
    ring_ = std::make_unique<UploadRing>();
    linear_ = std::make_unique<cuda::Linear>(cuda::LinearPolicy{.batch_invariant = batch_invariant});
    // A first kernel: a library without code for this GPU is found out here, not in the middle of a run.
    grow_scratch(kSumScratch);
    const Tensor from(scratch_.get(), DType::f32, {64}), to(static_cast<char*>(scratch_.get()) + from.bytes(), DType::bf16, {64});
    zero(from);
    copy(to, from);
    synchronize();
  }
  ~CudaOps() override { cudaStreamSynchronize(stream_.get()); }

  cudaStream_t stream() const { return stream_.get(); }

  DeviceKind kind() const override { return DeviceKind::cuda; }
  std::string device_name() const override {
    int driver = 0;
    check(cudaDriverGetVersion(&driver), "asking for the driver's version");
    return fmt::format("cuda {} ({}, {} SMs, {:.1f} GiB, driver {})", device_, name_, multiprocessors_, static_cast<double>(memory().total) / kGiB,
                       version_text(driver));
  }
  std::size_t memory_available() const override {
    const std::size_t free = memory().free;
    return free - std::min(free, kReservedBytes);
  }
  double peak_flops() const override { return peak_flops_of(name_); }
  std::size_t shared_bytes() const { return static_cast<std::size_t>(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device_)); }
  std::size_t memory_used() const { return memory().total - memory().free; }

  void* allocate(std::size_t bytes) override {
    require(!recording_, "allocate", "not while work is recorded");
    return cuda::allocate_device(bytes).release();
  }
  void deallocate(void* p) noexcept override { cudaFree(p); }
  void upload(const Tensor& to, const void* host) override {
    require(!recording_, "upload", "not while work is recorded: a replay would send what the host's memory holds by then");
    require(to.data || to.bytes() == 0, "upload", "the tensor has no memory");
    ring_->upload(to.data, host, to.bytes(), stream());
  }
  void download(void* host, const Tensor& from) override {
    require(!recording_, "download", "not while work is recorded");
    require(from.data || from.bytes() == 0, "download", "the tensor has no memory");
    if (from.bytes() > 0) check(cudaMemcpyAsync(host, from.data, from.bytes(), cudaMemcpyDeviceToHost, stream()), "downloading");
    synchronize();
  }
  void copy(const Tensor& to, const Tensor& from) override {
    require(to.numel() == from.numel(), "copy", "the tensors must have the same number of elements");
    if (to.numel() == 0) return;
    require(to.data && from.data, "copy", "a tensor has no memory");
    if (to.dtype == from.dtype) {
      check(cudaMemcpyAsync(to.data, from.data, to.bytes(), cudaMemcpyDeviceToDevice, stream()), "copying");
    } else {
      cuda::convert(context(), to, from);
    }
  }
  void zero(const Tensor& t) override {
    require(t.data || t.bytes() == 0, "zero", "the tensor has no memory");
    if (t.bytes() > 0) check(cudaMemsetAsync(t.data, 0, t.bytes(), stream()), "filling with zeros");
  }
  void synchronize() override {
    require(!recording_, "synchronize", "not while work is recorded");
    check(cudaStreamSynchronize(stream()), "running the operations before this point");
    for (std::size_t i = 0; i < after_waits_.size();) {
      if (const auto known = after_waits_[i].lock()) {
        (*known)();
        ++i;
      } else {
        after_waits_.erase(after_waits_.begin() + static_cast<std::ptrdiff_t>(i));
      }
    }
  }
  void check_after_waits(const std::shared_ptr<std::function<void()>>& check) { after_waits_.push_back(check); }
  void prepare(std::int64_t rows, std::int64_t width) override { grow_scratch(scratch_bytes(DeviceKind::cuda, rows, width)); }

  std::unique_ptr<RecordedWork> record(const std::function<void()>& work) override {
    require(!recording_, "record", "work is being recorded already");
    // Relaxed: kernels that were never called before get their code loaded while recording, which the stricter modes may refuse. What must not be
    // recorded is refused by the operations themselves.
    check(cudaStreamBeginCapture(stream(), cudaStreamCaptureModeRelaxed), "beginning to record");
    recording_ = true;
    const auto end = [&] {
      recording_ = false;
      cudaGraph_t made = nullptr;
      const cudaError_t e = cudaStreamEndCapture(stream(), &made);
      return std::pair(cuda::Graph(made), e);
    };
    try {
      work();
    } catch (...) {
      end();
      cudaGetLastError();  // ending a recording that failed is an error of its own
      throw;
    }
    const auto [graph, e] = end();
    check(e, "recording work");
    scratch_recorded_ = true;
    return std::make_unique<CudaGraph>(graph, stream());
  }

  void embedding_forward(const Tensor& out, const Tensor& tokens, const Tensor& positions, const Tensor& wte, const Tensor& wpe) override {
    cuda::embedding_forward(context(), out, tokens, positions, wte, wpe);
  }
  void embedding_backward(const Tensor& dout, const Tensor& tokens, const Tensor& positions, const Tensor& dwte, const Tensor& dwpe) override {
    cuda::embedding_backward(context(cuda::embedding_backward_scratch(tokens.numel())), dout, tokens, positions, dwte, dwpe);
  }
  void norm_forward(const NormForward& a) override { cuda::norm_forward(context(), a); }
  void norm_backward(const NormBackward& a) override { cuda::norm_backward(context(cuda::norm_backward_scratch(a.gain.numel())), a); }
  void head_norm_forward(const HeadNorm& a) override { cuda::head_norm_forward(context(), a); }
  void head_norm_backward(const HeadNormBackward& a) override { cuda::head_norm_backward(context(cuda::norm_backward_scratch(a.gain.numel())), a); }
  void linear_forward(const LinearForward& a) override { linear_->forward(context(), a); }
  void linear_backward(const LinearBackward& a) override {
    linear_->backward(context(a.dbias ? cuda::norm_backward_scratch(a.dbias.numel()) : 0), a);
  }
  void qk_transform_forward(const QkTransform& a) override { cuda::qk_transform_forward(context(), a); }
  void qk_transform_backward(const QkTransform& transformed, const Tensor& gradients) override {
    cuda::qk_transform_backward(context(), transformed, gradients);
  }
  void output_gate_forward(const OutputGate& a) override { cuda::output_gate_forward(context(), a); }
  void output_gate_backward(const OutputGateBackward& a) override { cuda::output_gate_backward(context(), a); }
  void classifier(const Classifier& a) override { cuda::classifier(context(), *linear_, a); }
  void gelu(const Tensor& y, const Tensor& x) override { cuda::gelu_forward(context(), y, x); }
  void add(const Tensor& to, const Tensor& a, const Tensor& b) override { cuda::add(context(), to, a, b); }

  std::unique_ptr<DeviceTiles> upload_tiles(std::shared_ptr<const TileMap> tiles) override {
    require(!recording_, "upload_tiles", "not while work is recorded");
    auto made = upload_tiles_cuda(std::move(tiles));
    check(cudaStreamSynchronize(cudaStreamLegacy), "uploading tile lists");  // whose copies may still be on their way; ours does not wait for it
    return made;
  }
  void attention_forward(const AttentionForward& a) override { cuda_attention_forward(a, stream()); }
  void attention_backward(const AttentionBackward& a) override { cuda_attention_backward(a, stream()); }
  void self_edge_forward(const SelfEdge& a) override { cuda::self_edge_forward(context(), a); }
  void self_edge_backward(const SelfEdgeBackward& a) override {
    cuda::self_edge_backward(context(cuda::norm_backward_scratch(a.forward.shape.heads)), a);
  }
  void sinks_forward(const Sinks& a) override { cuda::sinks_forward(context(), a); }
  void sinks_backward(const SinksBackward& a) override {
    cuda::sinks_backward(context(cuda::norm_backward_scratch(a.forward.keys.numel() + a.forward.bias.numel())), a);
  }
  void move_rows(const MoveRows& a) override { cuda::move_rows(context(), a); }
  void look_up(const Tensor& out, const Tensor& table, const Tensor& index) override { cuda::look_up(context(), out, table, index); }
  void cache_append(const CacheAppend& a) override { cuda_cache_append(a, stream()); }
  void attention_decode(const AttentionDecode& a) override {
    batch_invariant_ ? cuda_attention_decode_exact(a, stream()) : cuda_attention_decode(a, stream());
  }

  void add_sum(const Tensor& out, const Tensor& x) override { cuda::add_sum(context(kSumScratch), out, x); }
  void add_sum_of_squares(const Tensor& out, const Tensor& x) override { cuda::add_sum_of_squares(context(kSumScratch), out, x); }
  void adamw(const AdamW& a) override { cuda::adamw(context(), a); }
  void update_thresholds(const ThresholdUpdate& a) override { cuda::update_thresholds(context(), a); }

 private:
  struct Memory {
    std::size_t free = 0, total = 0;
  };
  Memory memory() const {
    Memory m;
    check(cudaMemGetInfo(&m.free, &m.total), "asking for free memory");
    return m;
  }

  void grow_scratch(std::size_t bytes) {
    if (bytes <= scratch_bytes_) return;
    require(!recording_, "scratch memory", "an operation needs more than prepare() was told, and none can be had while work is recorded");
    synchronize();
    if (scratch_recorded_) retired_.push_back(std::move(scratch_));
    scratch_recorded_ = false;
    scratch_.reset();
    scratch_bytes_ = 0;
    scratch_ = cuda::allocate_device(bytes);
    scratch_bytes_ = bytes;
  }
  cuda::Context context(std::size_t scratch = 0) {
    grow_scratch(scratch);
    return {stream(), multiprocessors_, scratch_.get(), scratch_bytes_};
  }

  int device_, multiprocessors_ = 0;
  bool batch_invariant_;
  std::string name_;
  cuda::Stream stream_;
  std::unique_ptr<UploadRing> ring_;
  std::unique_ptr<cuda::Linear> linear_;
  cuda::DeviceMemory scratch_;
  std::size_t scratch_bytes_ = 0;
  bool scratch_recorded_ = false;            // a recording may hold scratch_'s address,
  std::vector<cuda::DeviceMemory> retired_;  // so that it is kept when it is outgrown
  bool recording_ = false;
  std::vector<std::weak_ptr<std::function<void()>>> after_waits_;
};

CudaOps& cuda_ops(Ops& ops, const char* caller) {
  auto* found = dynamic_cast<CudaOps*>(&ops);
  require(found != nullptr, caller, "these operations are not on a GPU");
  return *found;
}

}  // namespace

std::string cuda_problem() {
  int driver = 0, count = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) {
    cudaGetLastError();
    return "this machine has no NVIDIA driver";
  }
  const cudaError_t e = cudaGetDeviceCount(&count);
  cudaGetLastError();
  if (e == cudaErrorInsufficientDriver) {
    return fmt::format("the NVIDIA driver serves CUDA {}, and this build needs {}; install a newer driver", version_text(driver),
                       version_text(CUDART_VERSION));
  }
  if (e == cudaErrorNoDevice || (e == cudaSuccess && count == 0)) return "no GPU is visible (CUDA_VISIBLE_DEVICES hides those it does not name)";
  if (e != cudaSuccess) return fmt::format("CUDA does not start: {}", cudaGetErrorString(e));
  try {
    for (int device = 0; device < count; ++device) {
      if (capability(device) >= kLeastCapability) return "";
    }
    const int best = capability(0);
    return fmt::format("{} has compute capability {}.{}; 8.0 or more (Ampere, Hopper) is needed", name_of_gpu(0), best / 10, best % 10);
  } catch (const std::runtime_error& error) {
    return error.what();
  }
}

int cuda_device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  cudaGetLastError();
  return 0;
}

std::unique_ptr<Ops> make_cuda_ops(int device, bool batch_invariant) {
  if (const std::string problem = cuda_problem(); !problem.empty()) throw std::invalid_argument("cannot compute on a GPU: " + problem);
  const int count = cuda_device_count();
  if (device < 0 || device >= count) {
    throw std::invalid_argument(fmt::format("there is no GPU {}: this process sees {}, counted from 0", device, count));
  }
  if (const int found = capability(device); found < kLeastCapability) {
    throw std::invalid_argument(
        fmt::format("GPU {} ({}) has compute capability {}.{}; 8.0 or more is needed", device, name_of_gpu(device), found / 10, found % 10));
  }
  return std::make_unique<CudaOps>(device, batch_invariant);
}

cudaStream_t cuda_stream(Ops& ops) { return cuda_ops(ops, "cuda_stream").stream(); }

std::shared_ptr<void> cuda_check_after_waits(Ops& ops, std::function<void()> check) {
  const auto kept = std::make_shared<std::function<void()>>(std::move(check));
  cuda_ops(ops, "cuda_check_after_waits").check_after_waits(kept);
  return kept;
}

std::size_t cuda_shared_bytes(Ops& ops) { return cuda_ops(ops, "cuda_shared_bytes").shared_bytes(); }
std::size_t cuda_memory_used(Ops& ops) { return cuda_ops(ops, "cuda_memory_used").memory_used(); }

}  // namespace tessera
