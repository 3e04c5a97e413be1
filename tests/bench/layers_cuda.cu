// Times the CUDA operations that memory bounds, at the size of GPT-2 Medium's micro-batch (65,536 rows x 1024, 16 heads of 64), and prints a line
// each (the optimizer with all its parameters, cross-entropy with a chunk of 10,240 rows): milliseconds (median over the repeats, CUDA events), GB/s
// read and written, and the share of what a copy on the same GPU moves.
//
//   layers_cuda [--rows 65536] [--width 1024] [--heads 16] [--repeats 30] [--only SUBSTRING]

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "../kernels/cuda/device.h"
#include "kernels/cuda/layers.h"

namespace {

using namespace tessera;
using namespace tessera::cuda_test;

/// Uniform in [-scale, scale) + centre: values such as training has, as power (and so the clock) depends on them.
template <class T>
__global__ void fill(T* to, std::int64_t count, std::uint32_t seed, float scale, float centre) {
  for (std::int64_t i = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += std::int64_t{gridDim.x} * blockDim.x) {
    std::uint32_t x = static_cast<std::uint32_t>(i) * 0x9e3779b9u + seed;
    x ^= x >> 16, x *= 0x7feb352du, x ^= x >> 15, x *= 0x846ca68bu, x ^= x >> 16;
    to[i] = T(centre + scale * (static_cast<float>(x) * 0x1p-31f - 1.0f));
  }
}

class Values {
 public:
  Values(DType type, Shape shape, float scale = 1, float centre = 0)
      : memory_(Tensor(nullptr, type, shape).bytes()), tensor_(memory_.get(), type, shape) {
    static std::uint32_t seed = 0;
    ++seed;
    if (type == DType::bf16)
      fill<<<1024, 256>>>(static_cast<Bf16*>(tensor_.data), shape.numel(), seed, scale, centre);
    else
      fill<<<1024, 256>>>(static_cast<float*>(tensor_.data), shape.numel(), seed, scale, centre);
    TESSERA_CUDA_CHECK(cudaGetLastError());
  }
  operator const Tensor&() const { return tensor_; }  // NOLINT: stands for the tensor in descriptors

 private:
  Device<unsigned char> memory_;
  Tensor tensor_;
};

struct Options {
  std::int64_t rows = 65536, width = 1024, heads = 16;
  int repeats = 30;
  std::string only;
};

class Bench {
 public:
  explicit Bench(const Options& o) : options_(o) {
    TESSERA_CUDA_CHECK(cudaEventCreate(&start_));
    TESSERA_CUDA_CHECK(cudaEventCreate(&stop_));
    const std::size_t bytes = static_cast<std::size_t>(o.rows * o.width) * 2 * sizeof(Bf16);
    Device<unsigned char> from(bytes), to(bytes);
    copy_rate_ = 2.0 * bytes / median_ms([&] { TESSERA_CUDA_CHECK(cudaMemcpyAsync(to.get(), from.get(), bytes, cudaMemcpyDeviceToDevice)); });
    std::printf("%-44s %9s %9s %9s\n", "operation", "ms", "GB/s", "of copy");
    std::printf("%-44s %9.4f %9.0f %9.3f\n", "copy", 2.0 * bytes / copy_rate_, copy_rate_ * 1e-6, 1.0);
  }
  ~Bench() {
    cudaEventDestroy(start_);
    cudaEventDestroy(stop_);
  }
  Bench(const Bench&) = delete;
  Bench& operator=(const Bench&) = delete;

  /// `bytes`: what the operation must read and write at least.
  void time(const std::string& name, double bytes, const std::function<void()>& run) {
    if (name.find(options_.only) == std::string::npos) return;
    const double ms = median_ms(run);
    std::printf("%-44s %9.4f %9.0f %9.3f\n", name.c_str(), ms, bytes / ms * 1e-6, bytes / ms / copy_rate_);
    std::fflush(stdout);
  }

 private:
  double median_ms(const std::function<void()>& run) {
    for (int n = 0; n < 5; ++n) run();
    std::vector<float> ms(options_.repeats);
    for (float& t : ms) {
      TESSERA_CUDA_CHECK(cudaEventRecord(start_));
      run();
      TESSERA_CUDA_CHECK(cudaEventRecord(stop_));
      TESSERA_CUDA_CHECK(cudaEventSynchronize(stop_));
      TESSERA_CUDA_CHECK(cudaEventElapsedTime(&t, start_, stop_));
    }
    std::sort(ms.begin(), ms.end());
    return ms[ms.size() / 2];
  }

  Options options_;
  cudaEvent_t start_{}, stop_{};
  double copy_rate_ = 0;  // bytes a millisecond
};

void norms(Bench& bench, const Options& o, const cuda::Context& c) {
  const Shape matrix{o.rows, o.width}, column{o.width}, row{o.rows};
  const double pass = 2.0 * o.rows * o.width;  // bytes of one matrix
  const Values x(DType::bf16, matrix), residual(DType::bf16, matrix), residual_out(DType::bf16, matrix), y(DType::bf16, matrix),
      gain(DType::f32, column), bias(DType::f32, column), mean(DType::f32, row, 0.1f), rstd(DType::f32, row, 0.1f, 1), dgain(DType::f32, column),
      dbias(DType::f32, column);
  const NormForward layernorm{.kind = NormKind::layernorm, .x = x, .gain = gain, .bias = bias, .y = y, .mean = mean, .rstd = rstd};
  NormForward with_residual = layernorm;
  with_residual.residual = residual, with_residual.residual_out = residual_out;
  NormForward rmsnorm = with_residual;
  rmsnorm.kind = NormKind::rmsnorm, rmsnorm.bias = {}, rmsnorm.mean = {};
  bench.time("norm_forward layernorm", 2 * pass, [&] { cuda::norm_forward(c, layernorm); });
  bench.time("norm_forward layernorm, residual", 4 * pass, [&] { cuda::norm_forward(c, with_residual); });
  bench.time("norm_forward rmsnorm, residual", 4 * pass, [&] { cuda::norm_forward(c, rmsnorm); });
  const NormBackward backward{
      .kind = NormKind::layernorm, .dy = x, .x = residual, .gain = gain, .mean = mean, .rstd = rstd, .dx = y, .dgain = dgain, .dbias = dbias};
  NormBackward rms_backward = backward;
  rms_backward.kind = NormKind::rmsnorm, rms_backward.mean = {}, rms_backward.dbias = {};
  bench.time("norm_backward layernorm", 4 * pass, [&] { cuda::norm_backward(c, backward); });
  bench.time("norm_backward rmsnorm", 4 * pass, [&] { cuda::norm_backward(c, rms_backward); });

  const Shape heads{o.rows, o.heads, o.width / o.heads};
  const Values head_gain(DType::f32, {o.heads, o.width / o.heads}), head_rstd(DType::f32, {o.rows, o.heads}, 0.1f, 1),
      head_dgain(DType::f32, {o.heads, o.width / o.heads});
  const auto per_head = [&](const Tensor& t) { return t.view(heads); };
  const HeadNorm head{.x = per_head(x), .gain = head_gain, .y = per_head(y), .rstd = head_rstd};
  const HeadNormBackward head_backward{
      .dy = per_head(x), .x = per_head(residual), .gain = head_gain, .rstd = head_rstd, .dx = per_head(y), .dgain = head_dgain};
  bench.time("head_norm_forward", 2 * pass, [&] { cuda::head_norm_forward(c, head); });
  bench.time("head_norm_backward", 3 * pass, [&] { cuda::head_norm_backward(c, head_backward); });
}

void self_edges(Bench& bench, const Options& o, const cuda::Context& c) {
  const std::int64_t size = o.width / o.heads;
  const double pass = 2.0 * o.rows * o.width;  // bytes of one of q, k, v, o
  const Values qkv(DType::bf16, {o.rows, 3 * o.width}, 0.1f), gradients(DType::bf16, {o.rows, 3 * o.width}), out(DType::bf16, {o.rows, o.width}),
      d_o(DType::bf16, {o.rows, o.width}, 0.01f), scale(DType::f32, {o.heads}), bias(DType::f32, {o.heads}, 0.1f, 2),
      z(DType::f32, {o.heads, o.rows}, 0.1f, 1), dscale(DType::f32, {o.heads}), dbias(DType::f32, {o.heads});
  const auto part = [&](const Tensor& packed, std::int64_t n) {
    return HeadsView{static_cast<Bf16*>(packed.data) + n * o.width, DType::bf16, 0, size, 3 * o.width};
  };
  const auto heads = [&](const Tensor& t) { return HeadsView{t.data, DType::bf16, 0, size, o.width}; };
  const SelfEdge edges{.shape = {1, o.heads, o.rows, size},
                       .q = part(qkv, 0),
                       .k = part(qkv, 1),
                       .v = part(qkv, 2),
                       .o = heads(out),
                       .scale = scale,
                       .bias = bias,
                       .z = z};
  const SelfEdgeBackward backward{.forward = edges,
                                  .d_o = heads(d_o),
                                  .dq = part(gradients, 0),
                                  .dk = part(gradients, 1),
                                  .dv = part(gradients, 2),
                                  .dscale = dscale,
                                  .dbias = dbias};
  bench.time("self_edge_forward", 5 * pass, [&] { cuda::self_edge_forward(c, edges); });
  bench.time("self_edge_backward", 11 * pass, [&] { cuda::self_edge_backward(c, backward); });
}

void sinks(Bench& bench, const Options& o, const cuda::Context& c) {
  const std::int64_t size = o.width / o.heads;
  const double pass = 2.0 * o.rows * o.width;  // bytes of one of q, o
  const Values q(DType::bf16, {o.rows, o.width}, 0.1f), dq(DType::bf16, {o.rows, o.width}), out(DType::bf16, {o.rows, o.width}),
      d_o(DType::bf16, {o.rows, o.width}, 0.01f), scale(DType::f32, {o.heads}), z(DType::f32, {o.heads, o.rows}, 0.1f, 1),
      dscale(DType::f32, {o.heads});
  const auto heads = [&](const Tensor& t) { return HeadsView{t.data, DType::bf16, 0, size, o.width}; };
  for (const std::int64_t count : {1, 2, 4, 8}) {
    const Shape shape{o.heads, count, size};
    const Values keys(DType::f32, shape, 0.1f), values(DType::f32, shape), bias(DType::f32, {o.heads, count}, 0.1f, 2), dkeys(DType::f32, shape),
        dvalues(DType::f32, shape), dbias(DType::f32, {o.heads, count});
    const Sinks call{
        .shape = {1, o.heads, o.rows, size}, .q = heads(q), .o = heads(out), .scale = scale, .keys = keys, .values = values, .bias = bias, .z = z};
    const SinksBackward backward{
        .forward = call, .d_o = heads(d_o), .dq = heads(dq), .dscale = dscale, .dkeys = dkeys, .dvalues = dvalues, .dbias = dbias};
    const std::string name = "sinks_" + std::to_string(count);
    bench.time(name + "_forward", 3 * pass, [&] { cuda::sinks_forward(c, call); });
    bench.time(name + "_backward", 5 * pass, [&] { cuda::sinks_backward(c, backward); });
  }
}

void qk_transforms(Bench& bench, const Options& o, const cuda::Context& c) {
  constexpr std::int64_t kPositions = 1024;
  const std::int64_t size = o.width / o.heads;
  const double pass = 2.0 * o.rows * 2 * o.width;  // bytes of queries and keys
  const Values qkv(DType::bf16, {o.rows, 3 * o.width}), gradients(DType::bf16, {o.rows, 3 * o.width}),
      inverse(DType::f32, {o.rows, 2, o.heads}, 0.1f, 1), table(DType::f32, {kPositions, size / 2, 2});
  std::vector<std::int32_t> position(o.rows);
  for (std::int64_t n = 0; n < o.rows; ++n) position[n] = static_cast<std::int32_t>(n % kPositions);
  const Device<std::int32_t> positions(position);
  for (const int which : {1, 2, 3}) {
    QkTransform t;
    t.qkv = qkv, t.heads = o.heads, t.unit = which & 1;
    if (which & 1) t.inverse_norm = inverse;
    if (which & 2) t.rotary = table, t.positions = {positions.get(), DType::i32, {o.rows}};
    const std::string name = which == 1 ? " unit" : which == 2 ? " rotary" : " unit, rotary";
    bench.time("qk_transform_forward" + name, 2 * pass, [&] { cuda::qk_transform_forward(c, t); });
    bench.time("qk_transform_backward" + name, (which & 1 ? 3 : 2) * pass, [&] { cuda::qk_transform_backward(c, t, gradients); });
  }
}

constexpr std::int64_t kVocabulary = 50257, kPaddedVocabulary = 50304;

/// Tokens of ranks as text has them: as many between n and 2n as between 2n and 4n.
std::vector<std::int32_t> text_tokens(std::int64_t rows, std::int64_t vocabulary) {
  std::mt19937 generator(1);
  std::uniform_real_distribution<double> logarithm(0, std::log(static_cast<double>(vocabulary)));
  std::vector<std::int32_t> tokens(rows);
  for (std::int32_t& t : tokens) t = static_cast<std::int32_t>(std::exp(logarithm(generator))) - 1;
  return tokens;
}

void embeddings(Bench& bench, const Options& o, const cuda::Context& c) {
  const double pass = 2.0 * o.rows * o.width;
  constexpr std::int64_t kPositions = 1024;
  const Values rows(DType::bf16, {o.rows, o.width}), wte(DType::bf16, {kPaddedVocabulary, o.width}), wpe(DType::bf16, {kPositions, o.width}),
      dwte(DType::f32, {kPaddedVocabulary, o.width}), dwpe(DType::f32, {kPositions, o.width});
  std::vector<std::int32_t> position(o.rows), byte(o.rows);
  for (std::int64_t n = 0; n < o.rows; ++n)
    position[n] = static_cast<std::int32_t>(n % kPositions), byte[n] = static_cast<std::int32_t>(n * 7919 % 6);
  const Device<std::int32_t> token_memory(text_tokens(o.rows, kVocabulary)), position_memory(position), byte_memory(byte);
  const auto indices = [&](const Device<std::int32_t>& d) { return Tensor(d.get(), DType::i32, {o.rows}); };
  const Tensor tokens = indices(token_memory), positions = indices(position_memory), bytes = indices(byte_memory);
  bench.time("embedding_forward", pass, [&] { cuda::embedding_forward(c, rows, tokens, positions, wte, wpe); });
  bench.time("embedding_backward text", pass, [&] { cuda::embedding_backward(c, rows, tokens, {}, dwte, {}); });
  bench.time("embedding_backward text, positions", 2 * pass, [&] { cuda::embedding_backward(c, rows, tokens, positions, dwte, dwpe); });
  bench.time("embedding_backward six tokens", pass, [&] { cuda::embedding_backward(c, rows, bytes, {}, dwte, {}); });
}

void elementwise(Bench& bench, const Options& o, const cuda::Context& c) {
  const Shape matrix{o.rows, 4 * o.width};
  const double pass = 2.0 * matrix.numel();
  const Values x(DType::bf16, matrix), y(DType::bf16, matrix), z(DType::bf16, matrix), sums(DType::f32, {4 * o.width});
  bench.time("add", 3 * pass, [&] { cuda::add(c, z, x, y); });
  bench.time("gelu_forward", 2 * pass, [&] { cuda::gelu_forward(c, y, x); });
  bench.time("gelu_backward", 3 * pass, [&] { cuda::gelu_backward(c, y, x); });
  bench.time("output_gate_forward", 3 * pass, [&] { cuda::output_gate_forward(c, {x, y, z}); });
  bench.time("output_gate_backward", 6 * pass, [&] { cuda::output_gate_backward(c, {x, y, z, x, y, z}); });
  bench.time("add_column_sums", pass, [&] { cuda::add_column_sums(c, sums, x); });
  const Values narrow_sums(DType::f32, {o.width});
  const Tensor narrow = static_cast<const Tensor&>(x).view({o.rows, o.width});
  bench.time("add_column_sums, narrow", pass / 4, [&] { cuda::add_column_sums(c, narrow_sums, narrow); });
}

/// The 354 million parameters of GPT-2 Medium.
void optimizer(Bench& bench, const cuda::Context& c) {
  constexpr std::int64_t kParameters = 354871296;
  const Values parameter(DType::f32, {kParameters}), gradient(DType::f32, {kParameters}), m(DType::f32, {kParameters}, 1e-3f),
      v(DType::f32, {kParameters}, 1e-3f, 2e-3f), weights(DType::bf16, {kParameters});
  const Device<double> total(std::vector<double>(2, 1.0));
  const Tensor sum(total.get(), DType::f64, {1}), sumsq(total.get() + 1, DType::f64, {1});
  const AdamW update{.parameter = parameter,
                     .gradient = gradient,
                     .m = m,
                     .v = v,
                     .decayed = kParameters - 300000,
                     .lr = 1e-6f,
                     .weight_decay = 0.1f,
                     .update = 1000,
                     .weights = weights,
                     .gradient_sumsq = sumsq,
                     .clip = 0.5f};
  bench.time("adamw", 30.0 * kParameters, [&] { cuda::adamw(c, update); });
  bench.time("add_sum_of_squares", 4.0 * kParameters, [&] { cuda::add_sum_of_squares(c, sum, gradient); });
  bench.time("convert f32 to bf16", 6.0 * kParameters, [&] { cuda::convert(c, weights, parameter); });
  bench.time("convert bf16 to f32", 6.0 * kParameters, [&] { cuda::convert(c, parameter, weights); });
}

void cross_entropies(Bench& bench, const cuda::Context& c) {
  constexpr std::int64_t kRows = 10240;
  for (const std::int64_t padded : {std::int64_t{256}, kPaddedVocabulary, std::int64_t{100352}, std::int64_t{131072}}) {
    const std::int64_t vocabulary = padded == kPaddedVocabulary ? kVocabulary : padded;
    const Values logits(DType::bf16, {kRows, padded}, 8);
    const Device<std::int32_t> target(text_tokens(kRows, vocabulary)), prediction(kRows);
    const Device<float> loss(kRows);
    const Tensor targets(target.get(), DType::i32, {kRows}), predictions(prediction.get(), DType::i32, {kRows}),
        losses(loss.get(), DType::f32, {kRows});
    const double pass = 2.0 * kRows * padded;
    const std::string name = "cross_entropy of " + std::to_string(padded);
    bench.time(name + ", losses", pass, [&] { cuda::cross_entropy(c, logits, vocabulary, targets, losses, predictions, false, 1); });
    bench.time(name, 2 * pass, [&] { cuda::cross_entropy(c, logits, vocabulary, targets, losses, {}, true, 1e-5f); });
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (!has_gpu()) {
    std::fprintf(stderr, "layers_cuda: no GPU here\n");
    return 1;
  }
  Options o;
  for (int n = 1; n < argc; ++n) {
    const std::string arg = argv[n];
    if (n + 1 < argc && arg == "--rows")
      o.rows = std::stoll(argv[++n]);
    else if (n + 1 < argc && arg == "--width")
      o.width = std::stoll(argv[++n]);
    else if (n + 1 < argc && arg == "--heads")
      o.heads = std::stoll(argv[++n]);
    else if (n + 1 < argc && arg == "--repeats")
      o.repeats = std::stoi(argv[++n]);
    else if (n + 1 < argc && arg == "--only")
      o.only = argv[++n];
    else
      return std::fprintf(stderr, "layers_cuda: unknown option or missing value: %s\n", argv[n]), 2;
  }
  if (o.rows < 1 || o.heads < 1 || o.repeats < 1 || o.width < 8 || o.width % (8 * o.heads) != 0) {
    return std::fprintf(stderr, "layers_cuda: rows, heads and repeats must be at least 1, and width a multiple of 8 x heads\n"), 2;
  }
  const Device<unsigned char> scratch(std::max<std::size_t>(cuda::norm_backward_scratch(4 * o.width), std::size_t{64} << 20));
  cuda::Context c;
  TESSERA_CUDA_CHECK(cudaDeviceGetAttribute(&c.multiprocessors, cudaDevAttrMultiProcessorCount, 0));
  c.scratch = scratch.get(), c.scratch_bytes = scratch.size();
  Bench bench(o);
  norms(bench, o, c);
  self_edges(bench, o, c);
  sinks(bench, o, c);
  qk_transforms(bench, o, c);
  embeddings(bench, o, c);
  elementwise(bench, o, c);
  optimizer(bench, c);
  cross_entropies(bench, c);
}
