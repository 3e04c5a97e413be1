// tessera bench gemm: matrix products at the shapes of a model's layers, forward and backward, in the device's compute type.

#include <fmt/core.h>

#include <iostream>
#include <nlohmann/json.hpp>

#include "trainer/commands/bench.h"
#include "trainer/config.h"

namespace tessera {

namespace {

struct GemmBench : BenchOptions {
  std::int64_t tokens = 4096, width = 512, vocabulary = 8192;
};

struct Layer {
  const char* name;
  std::int64_t in, out;
};

nlohmann::ordered_json measure(Ops& ops, const GemmBench& options) {
  const std::int64_t N = options.tokens, C = options.width;
  nlohmann::ordered_json rows = nlohmann::ordered_json::array();
  for (const Layer& layer : {Layer{"attention.qkv", C, 3 * C}, Layer{"attention.proj", C, C}, Layer{"mlp.up", C, 4 * C}, Layer{"mlp.down", 4 * C, C},
                             Layer{"classifier", C, options.vocabulary}}) {
    BenchMemory memory(ops);
    const Tensor x = memory.random({N, layer.in}, 1), w = memory.random({layer.out, layer.in}, 2), y = memory.random({N, layer.out}, 3);
    const Tensor dx = memory.zeros(x.dtype, {N, layer.in}), dw = memory.zeros(DType::f32, {layer.out, layer.in});
    const auto gflops = [&](auto call) {
      const double ms = time_ms(ops, options.seconds, call);
      return 2.0 * static_cast<double>(N) * static_cast<double>(layer.in) * static_cast<double>(layer.out) / ms * 1e-6;
    };
    LinearForward forward;
    forward.x = x, forward.w = w, forward.y = y;
    LinearBackward input, weight;
    input.dy = weight.dy = y, input.x = weight.x = x, input.w = weight.w = w;
    input.dx = dx;
    weight.dw = dw;
    nlohmann::ordered_json row = {{"layer", layer.name}, {"rows", N}, {"in", layer.in}, {"out", layer.out}};
    row["forward_gflops"] = gflops([&] { ops.linear_forward(forward); });
    row["input_gradient_gflops"] = gflops([&] { ops.linear_backward(input); });
    row["weight_gradient_gflops"] = gflops([&] { ops.linear_backward(weight); });
    rows.push_back(row);
  }
  return rows;
}

}  // namespace

void add_bench_gemm(CLI::App& bench) {
  auto options = std::make_shared<GemmBench>();
  CLI::App* command = bench.add_subcommand("gemm", "Matrix products at a model's shapes (fp32; bf16 on a GPU), in GFLOP/s");
  const CLI::Range size(1, 1 << 24);
  command->add_option("--tokens", options->tokens, "Rows: tokens of a micro-batch")->check(size)->capture_default_str();
  command->add_option("--width", options->width, "Width of the model")->check(size)->capture_default_str();
  command->add_option("--vocabulary", options->vocabulary, "Rows of the classifier")->check(size)->capture_default_str();
  options->add_to(*command);
  command->footer(
      "The weight gradient is fp32 and added to what was there, as in training.\n"
      "Example:\n  tessera bench gemm --tokens 4096 --width 768 --vocabulary 50304");
  command->callback([options] {
    constexpr int kUnit = 8;  // of cuBLASLt's tensor-core products
    if (options->device == "cuda" && (options->width % kUnit != 0 || options->vocabulary % kUnit != 0))
      throw ConfigError(
          fmt::format("--width {}, --vocabulary {}: device cuda computes products of multiples of {}", options->width, options->vocabulary, kUnit));
    const auto ops = options->make_ops();
    const SpeedOfLight light = measure_speed_of_light(*ops, options->seconds);
    const auto rows = measure(*ops, *options);
    if (options->json) {
      std::cout << nlohmann::ordered_json{{"device", ops->device_name()},
                                          {"type", name_of(compute_type(ops->kind()))},
                                          {"timing", timing_of(*ops)},
                                          {"gemm_gflops", light.gemm_gflops},
                                          {"layers", rows}}
                       .dump(2)
                << '\n';
      return;
    }
    std::cout << fmt::format("{}; {}\n\n", ops->device_name(), text_of(light, *ops));
    std::cout << fmt::format("{:<16}{:>8}{:>8}{:>8}{:>12}{:>12}{:>12}  GFLOP/s\n", "layer", "rows", "in", "out", "forward", "d input", "d weight");
    for (const auto& r : rows)
      std::cout << fmt::format("{:<16}{:>8}{:>8}{:>8}{:>12.0f}{:>12.0f}{:>12.0f}\n", r["layer"].get<std::string>(), r["rows"].get<std::int64_t>(),
                               r["in"].get<std::int64_t>(), r["out"].get<std::int64_t>(), r["forward_gflops"].get<double>(),
                               r["input_gradient_gflops"].get<double>(), r["weight_gradient_gflops"].get<double>());
  });
}

}  // namespace tessera
