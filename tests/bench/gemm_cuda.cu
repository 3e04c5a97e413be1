// Times the matrix products of a GPT on the GPU through the functions that training calls, with activations in the products' epilogues and apart:
//   tessera_bench_gemm_cuda [rows] [width] [vocabulary]      (GPT-2 Medium on 65,536 tokens unless told otherwise)
// A line a product: milliseconds and TFLOP/s of the products alone (bias gradients and separate activations cost time and count nothing).

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <vector>

#include "../kernels/cuda/device.h"
#include "kernels/cuda/linear.h"
#include "kernels/cuda/ops.h"

namespace {

using namespace tessera;

/// bf16 tensors full of random values (zeros would use less power, and run faster than a training step does).
class Tensors {
 public:
  explicit Tensors(Ops& ops) : ops_(ops), block_(1 << 22) {
    std::mt19937 generator(1);
    std::normal_distribution<float> normal(0, 0.5f);
    for (cuda_test::Bf16& x : block_) x = __float2bfloat16_rn(normal(generator));
  }
  Tensor operator()(std::int64_t rows, std::int64_t columns, DType type = DType::bf16) {
    const Tensor t(ops_.allocate(static_cast<std::size_t>(rows * columns) * size_of(type)), type, {rows, columns});
    ops_.zero(t);
    const auto block = static_cast<std::int64_t>(block_.size());
    for (std::int64_t at = 0; type == DType::bf16 && at < t.numel(); at += block) {
      ops_.upload(t.slice(at, std::min(block, t.numel() - at)), block_.data());
    }
    return t;
  }

 private:
  Ops& ops_;
  std::vector<cuda_test::Bf16> block_;
};

void time(const char* name, cudaStream_t stream, double flops, const std::function<void()>& work) {
  constexpr int kRuns = 20;
  cudaEvent_t begin, end;
  TESSERA_CUDA_CHECK(cudaEventCreate(&begin));
  TESSERA_CUDA_CHECK(cudaEventCreate(&end));
  for (int i = 0; i < 3; ++i) work();
  TESSERA_CUDA_CHECK(cudaEventRecord(begin, stream));
  for (int i = 0; i < kRuns; ++i) work();
  TESSERA_CUDA_CHECK(cudaEventRecord(end, stream));
  TESSERA_CUDA_CHECK(cudaEventSynchronize(end));
  float ms = 0;
  TESSERA_CUDA_CHECK(cudaEventElapsedTime(&ms, begin, end));
  std::printf("%-44s %8.3f ms %8.1f TFLOP/s\n", name, ms / kRuns, flops * kRuns / ms * 1e-9);
  std::fflush(stdout);
}

int run(int argc, char** argv) {
  const auto number = [&](int i, std::int64_t otherwise) { return argc > i ? std::atoll(argv[i]) : otherwise; };
  const std::int64_t rows = number(1, 65536), width = number(2, 1024), vocabulary = number(3, 50304), wide = 4 * width;
  const std::unique_ptr<Ops> ops = make_cuda_ops(0);
  std::printf("%s: %lld rows, width %lld, vocabulary %lld\n", ops->device_name().c_str(), static_cast<long long>(rows), static_cast<long long>(width),
              static_cast<long long>(vocabulary));
  Tensors tensor(*ops);
  cuda::Context c{cuda_stream(*ops), 0, nullptr, cuda::norm_backward_scratch(wide)};
  TESSERA_CUDA_CHECK(cudaDeviceGetAttribute(&c.multiprocessors, cudaDevAttrMultiProcessorCount, 0));
  c.scratch = ops->allocate(c.scratch_bytes);
  cuda::Linear fused({true, true}), apart({false, false});

  const Tensor x = tensor(rows, wide), y = tensor(rows, wide), z = tensor(rows, wide), w = tensor(wide, width), bias = tensor(1, wide);
  const Tensor dw = tensor(wide, width, DType::f32), dbias = tensor(1, wide, DType::f32);
  struct Layer {
    const char* name;
    std::int64_t in, out;
  };
  const Layer layers[] = {{"qkv", width, 3 * width}, {"attention out", width, width}, {"mlp in", width, wide}, {"mlp out", wide, width}};
  for (const auto& [name, in, out] : layers) {
    const double flops = 2.0 * static_cast<double>(rows * in) * static_cast<double>(out);
    const auto line = [&](const char* what, const std::function<void()>& work) { time((std::string(name) + what).c_str(), c.stream, flops, work); };
    const Tensor xs = x.view({rows, in}), ys = y.view({rows, out}), ws = w.view({out, in}), zs = z.view({rows, out}), dx = z.view({rows, in});
    const Tensor b = bias.view({out});
    line("", [&] { fused.forward(c, {.x = xs, .w = ws, .y = ys}); });
    line(" + bias", [&] { fused.forward(c, {.x = xs, .w = ws, .bias = b, .y = ys}); });
    if (out == wide) {
      const LinearForward plain{.x = xs, .w = ws, .y = ys, .activation = Activation::gelu, .pre_activation = zs};
      LinearForward biased = plain;
      biased.bias = b;
      line(" gelu, fused", [&] { fused.forward(c, plain); });
      line(" gelu, apart", [&] { apart.forward(c, plain); });
      line(" + bias gelu, fused", [&] { fused.forward(c, biased); });
      line(" + bias gelu, apart", [&] { apart.forward(c, biased); });
    }
    line(" dx", [&] { fused.backward(c, {.dy = ys, .w = ws, .dx = dx}); });
    if (in == wide) {
      line(" dx gelu', fused", [&] { fused.backward(c, {.dy = ys, .w = ws, .dx = dx, .gelu_argument = xs}); });
      line(" dx gelu', apart", [&] { apart.backward(c, {.dy = ys, .w = ws, .dx = dx, .gelu_argument = xs}); });
    }
    line(" dw", [&] { fused.backward(c, {.dy = ys, .x = xs, .dw = dw.view({out, in})}); });
    line(" dw and dbias", [&] { fused.backward(c, {.dy = ys, .x = xs, .dw = dw.view({out, in}), .dbias = dbias.view({out})}); });
  }

  const std::int64_t chunk = std::min(rows, static_cast<std::int64_t>(logits_bytes(DeviceKind::cuda)) / (2 * vocabulary));
  const Tensor wte = tensor(vocabulary, width), dwte = tensor(vocabulary, width, DType::f32), logits = tensor(chunk, vocabulary);
  const Tensor targets = tensor(1, rows, DType::i32), losses = tensor(1, rows, DType::f32);
  const double flops = 2.0 * static_cast<double>(rows * width) * static_cast<double>(vocabulary);
  Classifier classifier{.x = x.view({rows, width}), .w = wte, .vocabulary = vocabulary, .targets = targets, .losses = losses, .workspace = logits};
  time("classifier, losses", c.stream, flops, [&] { cuda::classifier(c, fused, classifier); });
  classifier.dx = z.view({rows, width}), classifier.dw = dwte, classifier.gradient_scale = 1e-6f;
  time("classifier, losses and gradients", c.stream, 3 * flops, [&] { cuda::classifier(c, fused, classifier); });

  std::printf("\nWhat cuBLASLt chose:\n");
  for (const std::string& line : fused.describe()) std::printf("  %s\n", line.c_str());
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(argc, argv);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "tessera_bench_gemm_cuda: %s\n", e.what());
    return 1;
  }
}
