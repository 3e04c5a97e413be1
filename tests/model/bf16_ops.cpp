#include "tests/model/bf16_ops.h"

#include <algorithm>
#include <cmath>
#include <deque>
#include <limits>
#include <stdexcept>
#include <vector>

#include "kernels/bf16.h"

namespace tessera::test {
namespace {

std::uint16_t* bf16(const Tensor& t) {
  if (t.dtype != DType::bf16) throw std::logic_error(std::string("a tensor must be bf16, and is ") + name_of(t.dtype) + " " + t.shape.str());
  return static_cast<std::uint16_t*>(t.data);
}

/// The arguments of one call as fp32 tensors; outputs are rounded into place when the call is over. Empty tensors stay empty.
class Call {
 public:
  ~Call() {
    for (const Buffer& b : buffers_) {
      if (b.to) std::transform(b.values.begin(), b.values.end(), b.to, to_bf16);
    }
  }
  Tensor in(const Tensor& t) { return t ? add(t, true, false) : t; }
  Tensor out(const Tensor& t) { return t ? add(t, false, true) : t; }
  Tensor in_out(const Tensor& t) { return t ? add(t, true, true) : t; }

 private:
  struct Buffer {
    std::vector<float> values;
    std::uint16_t* to;
  };
  Tensor add(const Tensor& t, bool read, bool write) {
    std::uint16_t* data = bf16(t);
    Buffer& b = buffers_.emplace_back(Buffer{std::vector<float>(static_cast<std::size_t>(t.numel()), NAN), write ? data : nullptr});
    if (read) std::transform(data, data + t.numel(), b.values.begin(), from_bf16);
    return {b.values.data(), DType::f32, t.shape};
  }
  std::deque<Buffer> buffers_;
};

/// The same for tensors with strides: fp32 copies [B, H, rows, D].
class HeadsCall {
 public:
  explicit HeadsCall(const AttentionShape& shape) : s_(shape) {}
  ~HeadsCall() {
    for (Buffer& b : buffers_) {
      if (b.write) each(b, [](std::uint16_t& to, float& value) { to = to_bf16(value); });
    }
  }
  HeadsView in(const HeadsView& v, std::int64_t rows) {
    const HeadsView copy = in_out(v, rows);
    buffers_.back().write = false;
    return copy;
  }
  HeadsView in_out(const HeadsView& v, std::int64_t rows) {
    const HeadsView copy = out(v, rows);
    each(buffers_.back(), [](std::uint16_t& from, float& value) { value = from_bf16(from); });
    return copy;
  }
  HeadsView out(const HeadsView& v, std::int64_t rows) {
    if (v.dtype != DType::bf16) throw std::logic_error("attention of tensors that are not bf16");
    Buffer& b = buffers_.emplace_back(Buffer{v, rows, std::vector<float>(static_cast<std::size_t>(s_.batch * s_.heads * rows * s_.head_size)), true});
    return {b.values.data(), DType::f32, s_.heads * rows * s_.head_size, rows * s_.head_size, s_.head_size};
  }

 private:
  struct Buffer {
    HeadsView view;
    std::int64_t rows;
    std::vector<float> values;
    bool write;
  };
  template <class F>
  void each(Buffer& b, F&& f) const {
    auto value = b.values.begin();
    for (std::int64_t n = 0; n < s_.batch; ++n) {
      for (std::int64_t h = 0; h < s_.heads; ++h) {
        for (std::int64_t t = 0; t < b.rows; ++t) {
          auto* row = static_cast<std::uint16_t*>(b.view.data) + n * b.view.batch + h * b.view.head + t * b.view.token;
          for (std::int64_t d = 0; d < s_.head_size; ++d) f(row[d], *value++);
        }
      }
    }
  }
  const AttentionShape s_;
  std::deque<Buffer> buffers_;
};

class Bf16Ops final : public Ops {
 public:
  DeviceKind kind() const override { return DeviceKind::cuda; }
  std::string device_name() const override { return "bf16 on the cpu"; }
  std::size_t memory_available() const override { return cpu_->memory_available(); }
  double peak_flops() const override { return 0; }

  void* allocate(std::size_t bytes) override { return cpu_->allocate(bytes); }
  void deallocate(void* p) noexcept override { cpu_->deallocate(p); }
  void upload(const Tensor& to, const void* host) override { cpu_->upload(to, host); }
  void download(void* host, const Tensor& from) override { cpu_->download(host, from); }
  void copy(const Tensor& to, const Tensor& from) override { cpu_->copy(to, from); }
  void zero(const Tensor& t) override { cpu_->zero(t); }
  void synchronize() override {}

  void embedding_forward(const Tensor& out, const Tensor& tokens, const Tensor& positions, const Tensor& wte, const Tensor& wpe) override {
    Call c;
    cpu_->embedding_forward(c.out(out), tokens, positions, c.in(wte), c.in(wpe));
  }
  void embedding_backward(const Tensor& dout, const Tensor& tokens, const Tensor& positions, const Tensor& dwte, const Tensor& dwpe) override {
    Call c;
    cpu_->embedding_backward(c.in(dout), tokens, positions, dwte, dwpe);
  }
  void norm_forward(const NormForward& a) override {
    NormForward f = a;
    if (a.residual) {  // what is normalised is the sum as it is kept
      add(a.residual_out, a.x, a.residual);
      f.x = a.residual_out;
      f.residual = f.residual_out = {};
    }
    Call c;
    f.x = c.in(f.x), f.y = c.out(f.y);
    cpu_->norm_forward(f);
  }
  void norm_backward(const NormBackward& a) override {
    Call c;
    NormBackward f = a;
    f.dy = c.in(a.dy), f.x = c.in(a.x), f.dx = c.in_out(a.dx);
    cpu_->norm_backward(f);
  }
  void linear_forward(const LinearForward& a) override {
    Call c;
    cpu_->linear_forward({.x = c.in(a.x),
                          .w = c.in(a.w),
                          .bias = c.in(a.bias),
                          .y = c.out(a.y),
                          .activation = a.activation,
                          .pre_activation = c.out(a.pre_activation)});
  }
  void linear_backward(const LinearBackward& a) override {
    Call c;
    cpu_->linear_backward({.dy = c.in(a.dy),
                           .x = c.in(a.x),
                           .w = c.in(a.w),
                           .dx = a.add_dx ? c.in_out(a.dx) : c.out(a.dx),
                           .add_dx = a.add_dx,
                           .gelu_argument = c.in(a.gelu_argument),
                           .dw = a.dw,
                           .dbias = a.dbias});
  }
  void qk_transform_forward(const QkTransform& a) override {
    Call c;
    QkTransform f = a;
    f.qkv = c.in_out(a.qkv);
    cpu_->qk_transform_forward(f);
  }
  void qk_transform_backward(const QkTransform& a, const Tensor& gradients) override {
    Call c;
    QkTransform f = a;
    f.qkv = c.in(a.qkv);
    cpu_->qk_transform_backward(f, c.in_out(gradients));
  }
  void head_norm_forward(const HeadNorm& a) override {
    Call c;
    HeadNorm f = a;
    f.x = c.in(a.x), f.y = c.out(a.y);
    cpu_->head_norm_forward(f);
  }
  void head_norm_backward(const HeadNormBackward& a) override {
    Call c;
    HeadNormBackward f = a;
    f.dy = c.in(a.dy), f.x = c.in(a.x), f.dx = c.out(a.dx);
    cpu_->head_norm_backward(f);
  }
  void output_gate_forward(const OutputGate& a) override {
    Call c;
    cpu_->output_gate_forward({.u = c.in(a.u), .o = c.in(a.o), .y = c.out(a.y)});
  }
  void output_gate_backward(const OutputGateBackward& a) override {
    Call c;
    cpu_->output_gate_backward({.dy = c.in(a.dy), .u = c.in(a.u), .o = c.in(a.o), .d_o = c.out(a.d_o), .du = c.out(a.du), .y = c.out(a.y)});
  }

  /// Through logits in bf16, and their gradient in bf16 in the same place.
  void classifier(const Classifier& a) override {
    const std::int64_t V = a.w.shape[0], C = a.w.shape[1], rows = a.targets.numel(), chunk = a.workspace.numel() / V;
    for (std::int64_t first = 0; first < rows; first += chunk) {
      const std::int64_t count = std::min(chunk, rows - first);
      const Tensor x = a.x.slice(first * C, count * C).view({count, C}), logits = a.workspace.view({count, V});
      linear_forward({.x = x, .w = a.w, .bias = {}, .y = logits, .pre_activation = {}});
      for (std::int64_t r = 0; r < count; ++r) cross_entropy(a, bf16(logits) + r * V, first + r);
      if (!a.dx) continue;
      linear_backward(
          {.dy = logits, .x = x, .w = a.w, .dx = a.dx.slice(first * C, count * C).view({count, C}), .gelu_argument = {}, .dw = a.dw, .dbias = {}});
    }
  }
  void gelu(const Tensor& y, const Tensor& x) override {
    Call c;
    cpu_->gelu(c.out(y), c.in(x));
  }
  void add(const Tensor& to, const Tensor& a, const Tensor& b) override {
    Call c;
    cpu_->add(c.out(to), c.in(a), c.in(b));
  }

  std::unique_ptr<DeviceTiles> upload_tiles(std::shared_ptr<const TileMap> tiles) override { return cpu_->upload_tiles(std::move(tiles)); }
  void attention_forward(const AttentionForward& a) override {
    HeadsCall c(a.shape);
    AttentionForward f = a;
    const std::int64_t T = a.shape.tokens, keys = a.key_count();
    f.q = c.in(a.q, T), f.k = c.in(a.k, keys), f.v = c.in(a.v, keys);
    f.o = a.carry && !a.carry_last ? f.q : c.out(a.o, T);  // before the last part o is not touched
    cpu_->attention_forward(f);
  }
  void attention_backward(const AttentionBackward& a) override {
    HeadsCall c(a.forward.shape);
    AttentionBackward g = a;
    AttentionForward& f = g.forward;
    const std::int64_t T = f.shape.tokens, keys = f.key_count();
    f.q = c.in(f.q, T), f.k = c.in(f.k, keys), f.v = c.in(f.v, keys), f.o = c.in(f.o, T);
    g.d_o = c.in(a.d_o, T), g.dq = c.out(a.dq, T), g.dk = c.out(a.dk, keys), g.dv = c.out(a.dv, keys);
    cpu_->attention_backward(g);
  }
  void self_edge_forward(const SelfEdge& a) override {
    HeadsCall c(a.shape);
    SelfEdge f = a;
    const std::int64_t T = a.shape.tokens;
    f.q = c.in(a.q, T), f.k = c.in(a.k, T), f.v = c.in(a.v, T), f.o = c.in_out(a.o, T);
    cpu_->self_edge_forward(f);
  }
  void self_edge_backward(const SelfEdgeBackward& a) override {
    HeadsCall c(a.forward.shape);
    SelfEdgeBackward g = a;
    SelfEdge& f = g.forward;
    const std::int64_t T = f.shape.tokens;
    f.q = c.in(f.q, T), f.k = c.in(f.k, T), f.v = c.in(f.v, T), f.o = c.in(f.o, T);
    g.d_o = c.in(a.d_o, T), g.dq = c.in_out(a.dq, T), g.dk = c.in_out(a.dk, T), g.dv = c.in_out(a.dv, T);
    cpu_->self_edge_backward(g);
  }
  void sinks_forward(const Sinks& a) override {
    HeadsCall c(a.shape);
    Sinks f = a;
    f.q = c.in(a.q, a.shape.tokens), f.o = c.in_out(a.o, a.shape.tokens);
    cpu_->sinks_forward(f);
  }
  void sinks_backward(const SinksBackward& a) override {
    HeadsCall c(a.forward.shape);
    SinksBackward g = a;
    const std::int64_t T = a.forward.shape.tokens;
    g.forward.q = c.in(a.forward.q, T), g.forward.o = c.in(a.forward.o, T);
    g.d_o = c.in(a.d_o, T), g.dq = c.in_out(a.dq, T);
    cpu_->sinks_backward(g);
  }
  void move_rows(const MoveRows& a) override {
    const std::uint64_t* pieces = a.pieces.as<std::uint64_t>();
    const auto get = [](const RowsView& v, std::int64_t at) {
      return v.dtype == DType::f32 ? static_cast<const float*>(v.data)[at] : from_bf16(static_cast<const std::uint16_t*>(v.data)[at]);
    };
    for (std::int64_t p = 0; p < a.pieces.shape[0]; ++p)
      for (std::int64_t b = 0; b < a.sequences; ++b)
        for (std::int64_t r = 0; r < static_cast<std::int64_t>(pieces[3 * p + 2]); ++r)
          for (std::int64_t d = 0; d < a.size; ++d) {
            const std::int64_t to = static_cast<std::int64_t>(pieces[3 * p + (a.reversed ? 1 : 0)]) * a.to.unit + b * a.to.batch + r * a.to.row + d;
            const std::int64_t from =
                static_cast<std::int64_t>(pieces[3 * p + (a.reversed ? 0 : 1)]) * a.from.unit + b * a.from.batch + r * a.from.row + d;
            const float x = get(a.from, from) + (a.add ? get(a.to, to) : 0.0f);
            if (a.to.dtype == DType::f32)
              static_cast<float*>(a.to.data)[to] = x;
            else
              static_cast<std::uint16_t*>(a.to.data)[to] = to_bf16(x);
          }
  }
  void look_up(const Tensor& out, const Tensor& table, const Tensor& index) override { cpu_->look_up(out, table, index); }
  void cache_append(const CacheAppend& a) override {
    Call c;
    CacheAppend f = a;
    f.cache.data = c.in_out(a.cache.data), f.qkv = c.in(a.qkv);
    cpu_->cache_append(f);
  }
  void attention_decode(const AttentionDecode& a) override {
    Call c;
    AttentionDecode f = a;
    f.cache.data = c.in(a.cache.data), f.qkv = c.in(a.qkv), f.o = c.out(a.o);
    cpu_->attention_decode(f);
  }

  void add_sum(const Tensor& out, const Tensor& x) override { cpu_->add_sum(out, x); }
  void add_sum_of_squares(const Tensor& out, const Tensor& x) override { cpu_->add_sum_of_squares(out, x); }
  void adamw(const AdamW& a) override {
    AdamW master = a;
    master.weights = {};
    cpu_->adamw(master);
    const float* from = a.parameter.as<float>();
    std::transform(from, from + a.parameter.numel(), bf16(a.weights), to_bf16);
  }
  void update_thresholds(const ThresholdUpdate& a) override { cpu_->update_thresholds(a); }

 private:
  static void cross_entropy(const Classifier& a, std::uint16_t* logits, std::int64_t n) {
    const std::int32_t target = a.targets.as<std::int32_t>()[n];
    const std::int64_t V = a.w.shape[0];
    std::vector<double> p(static_cast<std::size_t>(V));
    double sum = 0;
    std::int64_t best = 0;
    for (std::int64_t v = 0; v < a.vocabulary; ++v) {
      sum += p[v] = std::exp(static_cast<double>(from_bf16(logits[v])));
      if (p[v] > p[best]) best = v;
    }
    if (a.predictions) a.predictions.as<std::int32_t>()[n] = static_cast<std::int32_t>(best);
    a.losses.as<float>()[n] = target < 0 ? 0.0f : static_cast<float>(std::log(sum / p[target]));
    if (!a.dx) return;
    for (std::int64_t v = 0; v < V; ++v) logits[v] = to_bf16(target < 0 ? 0.0f : a.gradient_scale * static_cast<float>(p[v] / sum - (v == target)));
  }

  std::unique_ptr<Ops> cpu_ = make_cpu_ops(1);
};

}  // namespace

std::unique_ptr<Ops> make_bf16_ops() { return std::make_unique<Bf16Ops>(); }

}  // namespace tessera::test
