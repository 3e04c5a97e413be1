#include "kernels/cpu/ops.h"

#include <fmt/format.h>
#include <omp.h>

#include <cstring>

#include "kernels/cpu/attention.h"
#include "kernels/cpu/check.h"
#include "kernels/cpu/gemm.h"
#include "kernels/cpu/parallel.h"

namespace tessera {

namespace {

class CpuOps final : public Ops {
 public:
  explicit CpuOps(int threads) : threads_(threads) {}

  DeviceKind kind() const override { return DeviceKind::cpu; }
  std::string device_name() const override { return fmt::format("cpu ({} thread{}, {})", threads_, threads_ == 1 ? "" : "s", cpu::blas_name()); }
  std::size_t memory_available() const override { return cpu::memory_available(); }
  double peak_flops() const override { return 0; }

  void* allocate(std::size_t bytes) override { return cpu::allocate(bytes); }
  void deallocate(void* p) noexcept override { cpu::deallocate(p); }
  void upload(const Tensor& to, const void* host) override {
    if (to.bytes() > 0) std::memcpy(to.data, host, to.bytes());
  }
  void download(void* host, const Tensor& from) override {
    if (from.bytes() > 0) std::memcpy(host, from.data, from.bytes());
  }
  void copy(const Tensor& to, const Tensor& from) override { cpu::copy(to, from); }
  void zero(const Tensor& t) override { cpu::zero(t); }
  void synchronize() override {}

  void embedding_forward(const Tensor& out, const Tensor& tokens, const Tensor& positions, const Tensor& wte, const Tensor& wpe) override {
    cpu::embedding_forward(out, tokens, positions, wte, wpe);
  }
  void embedding_backward(const Tensor& dout, const Tensor& tokens, const Tensor& positions, const Tensor& dwte, const Tensor& dwpe) override {
    cpu::embedding_backward(dout, tokens, positions, dwte, dwpe);
  }
  void norm_forward(const NormForward& a) override { cpu::norm_forward(a); }
  void norm_backward(const NormBackward& a) override { cpu::norm_backward(a); }
  void linear_forward(const LinearForward& a) override { cpu::linear_forward(a); }
  void linear_backward(const LinearBackward& a) override { cpu::linear_backward(a); }
  void qk_transform_forward(const QkTransform& a) override { cpu::qk_transform_forward(a); }
  void qk_transform_backward(const QkTransform& transformed, const Tensor& gradients) override { cpu::qk_transform_backward(transformed, gradients); }
  void head_norm_forward(const HeadNorm& a) override { cpu::head_norm_forward(a); }
  void head_norm_backward(const HeadNormBackward& a) override { cpu::head_norm_backward(a); }
  void output_gate_forward(const OutputGate& a) override { cpu::output_gate_forward(a); }
  void output_gate_backward(const OutputGateBackward& a) override { cpu::output_gate_backward(a); }
  void classifier(const Classifier& a) override { cpu::classifier(a); }
  void gelu(const Tensor& y, const Tensor& x) override { cpu::gelu(y, x); }
  void add(const Tensor& to, const Tensor& a, const Tensor& b) override {
    const std::int64_t count = to.numel();
    float* out = cpu::elements<float>("add", "to", to, count);
    const float* x = cpu::elements<float>("add", "a", a, count);
    const float* y = cpu::elements<float>("add", "b", b, count);
    cpu::parallel_ranges(count, 1 << 14, [&](std::int64_t first, std::int64_t last) {
#pragma omp simd
      for (std::int64_t i = first; i < last; ++i) out[i] = x[i] + y[i];
    });
  }

  std::unique_ptr<DeviceTiles> upload_tiles(std::shared_ptr<const TileMap> tiles) override { return std::make_unique<DeviceTiles>(std::move(tiles)); }
  void attention_forward(const AttentionForward& a) override { cpu_attention_forward(a); }
  void attention_backward(const AttentionBackward& a) override { cpu_attention_backward(a); }
  void self_edge_forward(const SelfEdge& a) override { cpu::self_edge_forward(a); }
  void self_edge_backward(const SelfEdgeBackward& a) override { cpu::self_edge_backward(a); }
  void sinks_forward(const Sinks& a) override { cpu::sinks_forward(a); }
  void sinks_backward(const SinksBackward& a) override { cpu::sinks_backward(a); }
  void move_rows(const MoveRows& a) override { cpu::move_rows(a); }
  void look_up(const Tensor& out, const Tensor& table, const Tensor& index) override { cpu::look_up(out, table, index); }
  void cache_append(const CacheAppend& a) override { cpu_cache_append(a); }
  void attention_decode(const AttentionDecode& a) override { cpu_attention_decode(a); }

  void add_sum(const Tensor& out, const Tensor& x) override { cpu::add_sum(out, x); }
  void add_sum_of_squares(const Tensor& out, const Tensor& x) override { cpu::add_sum_of_squares(out, x); }
  void adamw(const AdamW& a) override { cpu::adamw(a); }
  void update_thresholds(const ThresholdUpdate& a) override { cpu::update_thresholds(a); }

 private:
  int threads_;
};

}  // namespace

std::unique_ptr<Ops> make_cpu_ops(int threads) {
  if (threads < 0) throw std::invalid_argument(fmt::format("the number of CPU threads must be 0 (all) or more, and is {}", threads));
  cpu::hold_blas_at_one_thread();
  // OpenMP's setting belongs to the calling thread: the one that will call the operations.
  if (threads > 0) omp_set_num_threads(threads);
  return std::make_unique<CpuOps>(omp_get_max_threads());
}

}  // namespace tessera
