// Times the matrix products of a GPT on the GPU through the functions that training calls, with activations in the products' epilogues and apart:
//   tessera_bench_gemm_cuda [rows] [width] [vocabulary]      (GPT-2 Medium on 65,536 tokens unless told otherwise)
// A line a product: milliseconds and TFLOP/s of the products alone (bias gradients and separate activations cost time and count nothing).
//   tessera_bench_gemm_cuda --answers [rows] [width]         (the same)
// Every answer that cuBLASLt has for the products of the MLP and of qkv, fused and plain, each with its attributes: the median of single runs, with
// the caches overwritten before each.

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <string>
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

struct Bench {
  explicit Bench(std::size_t scratch_bytes) : ops(make_cuda_ops(0)), tensor(*ops) {
    c.stream = cuda_stream(*ops), c.scratch_bytes = scratch_bytes, c.scratch = ops->allocate(scratch_bytes);
    TESSERA_CUDA_CHECK(cudaDeviceGetAttribute(&c.multiprocessors, cudaDevAttrMultiProcessorCount, 0));
  }
  std::unique_ptr<Ops> ops;
  Tensors tensor;
  cuda::Context c;
};

/// Milliseconds, the median of single runs with cold caches.
double cold_time(cudaStream_t stream, const Tensor& flush, const std::function<void()>& work) {
  constexpr int kRuns = 9;
  cudaEvent_t begin[kRuns], end[kRuns];
  work();
  for (int i = 0; i < kRuns; ++i) {
    TESSERA_CUDA_CHECK(cudaEventCreate(&begin[i]));
    TESSERA_CUDA_CHECK(cudaEventCreate(&end[i]));
    TESSERA_CUDA_CHECK(cudaMemsetAsync(flush.data, i, flush.bytes(), stream));
    TESSERA_CUDA_CHECK(cudaEventRecord(begin[i], stream));
    work();
    TESSERA_CUDA_CHECK(cudaEventRecord(end[i], stream));
  }
  TESSERA_CUDA_CHECK(cudaStreamSynchronize(stream));
  std::vector<float> times(kRuns);
  for (int i = 0; i < kRuns; ++i) {
    TESSERA_CUDA_CHECK(cudaEventElapsedTime(&times[i], begin[i], end[i]));
    cudaEventDestroy(begin[i]), cudaEventDestroy(end[i]);
  }
  std::nth_element(times.begin(), times.begin() + kRuns / 2, times.end());
  return times[kRuns / 2];
}

int run_answers(std::int64_t rows, std::int64_t width) {
  constexpr int kAnswers = 32;
  const std::int64_t wide = 4 * width;
  Bench bench(cuda::norm_backward_scratch(wide));
  const cuda::Context& c = bench.c;
  std::printf("%s: %lld rows, width %lld\n", bench.ops->device_name().c_str(), static_cast<long long>(rows), static_cast<long long>(width));
  const Tensor x = bench.tensor(rows, wide), y = bench.tensor(rows, wide), z = bench.tensor(rows, wide), w = bench.tensor(wide, width);
  const Tensor dw = bench.tensor(wide, width, DType::f32), flush = bench.tensor(1, 64 << 20, DType::f32);
  const Tensor narrow = x.view({rows * 4, width}).slice(0, rows * width).view({rows, width});
  const Tensor narrow_to = y.view({rows * 4, width}).slice(0, rows * width).view({rows, width});
  const Tensor qkv = z.slice(0, rows * 3 * width).view({rows, 3 * width});
  const Tensor up = w, down = w.view({width, wide}), w_qkv = w.slice(0, 3 * width * width).view({3 * width, width});

  struct Case {
    const char* name;
    std::int64_t in, out;
    std::function<void(cuda::Linear&)> work;
  };
  const Case cases[] = {
      {"mlp out dx gelu', fused", wide, width, [&](cuda::Linear& l) { l.backward(c, {.dy = narrow, .w = down, .dx = y, .gelu_argument = z}); }},
      {"mlp out dx", wide, width, [&](cuda::Linear& l) { l.backward(c, {.dy = narrow, .w = down, .dx = y}); }},
      {"mlp in gelu, fused", width, wide,
       [&](cuda::Linear& l) { l.forward(c, {.x = narrow, .w = up, .y = y, .activation = Activation::gelu, .pre_activation = z}); }},
      {"mlp in", width, wide, [&](cuda::Linear& l) { l.forward(c, {.x = narrow, .w = up, .y = y}); }},
      {"mlp in dx", width, wide, [&](cuda::Linear& l) { l.backward(c, {.dy = x, .w = up, .dx = narrow_to}); }},
      {"mlp in dw", width, wide, [&](cuda::Linear& l) { l.backward(c, {.dy = x, .x = narrow_to, .dw = dw}); }},
      {"mlp out", wide, width, [&](cuda::Linear& l) { l.forward(c, {.x = x, .w = down, .y = narrow_to}); }},
      {"qkv", width, 3 * width, [&](cuda::Linear& l) { l.forward(c, {.x = narrow, .w = w_qkv, .y = qkv}); }},
  };
  for (const Case& one : cases) {
    const double flops = 2.0 * static_cast<double>(rows * one.in) * static_cast<double>(one.out);
    std::printf("\n%s\n", one.name);
    for (int answer = 0; answer < kAnswers; ++answer) {
      // A fused product without this answer would be computed apart, and a plain one throws.
      cuda::Linear linear({.answers = kAnswers, .answer = answer});
      std::string chosen;
      double ms = 0;
      try {
        one.work(linear);
        chosen = linear.describe().front();
        if (linear.describe().size() > 1) break;
        ms = cold_time(c.stream, flush, [&] { one.work(linear); });
      } catch (const std::logic_error&) {
        break;
      } catch (const std::runtime_error& e) {  // an answer that does not run is a finding, too
        std::printf("  %2d  %s\n", answer, e.what());
        continue;
      }
      std::printf("  %2d %8.3f ms %7.1f TFLOP/s  %s\n", answer, ms, flops / ms * 1e-9, chosen.c_str());
      std::fflush(stdout);
    }
  }
  return 0;
}

int run(int argc, char** argv) {
  const auto number = [&](int i, std::int64_t otherwise) { return argc > i ? std::atoll(argv[i]) : otherwise; };
  if (argc > 1 && std::string(argv[1]) == "--answers") return run_answers(number(2, 65536), number(3, 1024));
  const std::int64_t rows = number(1, 65536), width = number(2, 1024), vocabulary = number(3, 50304), wide = 4 * width;
  Bench bench(cuda::norm_backward_scratch(wide));
  Tensors& tensor = bench.tensor;
  const cuda::Context& c = bench.c;
  std::printf("%s: %lld rows, width %lld, vocabulary %lld\n", bench.ops->device_name().c_str(), static_cast<long long>(rows),
              static_cast<long long>(width), static_cast<long long>(vocabulary));
  cuda::Linear fused, apart({.fuse_gelu_forward = false, .fuse_gelu_backward = false});

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
