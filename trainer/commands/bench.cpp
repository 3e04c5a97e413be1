// tessera bench, and what its subcommands share.

#include "trainer/commands/bench.h"

#include <fmt/core.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>
#include <random>

#include "trainer/commands/commands.h"
#include "trainer/config.h"
#include "trainer/device.h"
#include "trainer/statistics.h"

namespace tessera {

namespace {

using Clock = std::chrono::steady_clock;

double ms_since(Clock::time_point start) { return std::chrono::duration<double, std::milli>(Clock::now() - start).count(); }

}  // namespace

void add_bench_command(CLI::App& app) {
  CLI::App* bench = app.add_subcommand("bench", "Speed of the parts: attention, matrix products, a training step, generation, data");
  bench->require_subcommand(1);
  bench->footer(
      "Examples:\n"
      "  tessera bench attention --tokens 4096 --active-share 0.1\n"
      "  tessera bench step --config configs/gpt2-medium-sparse.yaml --device cuda --steps 4\n"
      "  tessera bench gemm --json");
  add_bench_attention(*bench);
  add_bench_gemm(*bench);
  add_bench_step(*bench);
  add_bench_generate(*bench);
  add_bench_data(*bench);
}

void BenchOptions::add_to(CLI::App& command) {
  command.add_option("--device", device, "Device to measure")->check(CLI::IsMember({"cpu", "cuda"}))->capture_default_str();
  command.add_option("--threads", threads, "CPU threads; 0: OMP_NUM_THREADS or all cores")->check(CLI::Range(0, 4096))->capture_default_str();
  command.add_option("--seconds", seconds, "Time spent on each measurement")->check(number_in(0.001, 3600))->capture_default_str();
  command.add_flag("--json", json, "Print JSON");
}

std::unique_ptr<Ops> BenchOptions::make_ops() const { return tessera::make_ops(device, threads); }

std::int64_t vocabulary_for_bench(const Config& c) {
  const std::string& tokenizer = c.data.tokenizer;
  if (c.model.vocabulary > 0) return c.model.vocabulary;
  return tokenizer == "gpt2" || tokenizer.starts_with("gpt2:") ? 50257 : 4096;
}

double best_ms(double seconds, const std::function<void()>& work) {
  work();
  double best = std::numeric_limits<double>::infinity();
  const auto start = Clock::now();
  for (int runs = 0; runs < 3 || ms_since(start) < 1e3 * seconds; ++runs) {
    const auto before = Clock::now();
    work();
    best = std::min(best, ms_since(before));
  }
  return best;
}

double time_ms(Ops& ops, double seconds, const std::function<void()>& work) {
  const auto group = [&](int runs) {
    for (int n = 0; n < runs; ++n) work();
    ops.synchronize();
  };
  if (ops.kind() == DeviceKind::cpu) return best_ms(seconds, [&] { group(1); });
  const auto timed = [&](int runs) {
    const auto start = Clock::now();
    group(runs);
    return ms_since(start) / runs;
  };
  constexpr double kGroupMs = 20;
  group(1);
  const int runs = static_cast<int>(std::clamp(std::ceil(kGroupMs / std::max(1e-3, timed(3))), 1.0, 1000.0));
  std::vector<double> times;
  for (const auto start = Clock::now(); times.size() < 3 || ms_since(start) < 1e3 * seconds;) times.push_back(timed(runs));
  return median(std::move(times)).value();
}

const char* timing_of(const Ops& ops) { return ops.kind() == DeviceKind::cpu ? "shortest run" : "median of groups of runs"; }

SpeedOfLight measure_speed_of_light(Ops& ops, double seconds) {
  const bool gpu = ops.kind() == DeviceKind::cuda;
  SpeedOfLight light;
  light.gemm_size = gpu ? 8192 : 2048;
  {
    const std::int64_t n = light.gemm_size;
    BenchMemory memory(ops);
    LinearForward product;
    product.x = memory.random({n, n}, 1);
    product.w = memory.random({n, n}, 2);
    product.y = memory.zeros(product.x.dtype, {n, n});
    light.gemm_gflops = 2.0 * std::pow(static_cast<double>(n), 3) / time_ms(ops, seconds, [&] { ops.linear_forward(product); }) * 1e-6;
  }
  BenchMemory memory(ops);
  const std::int64_t elements = (gpu ? std::int64_t{1} << 30 : std::int64_t{1} << 26) / 4;  // more than caches hold
  const Tensor from = memory.zeros(DType::f32, {elements}), to = memory.zeros(DType::f32, {elements});
  light.copy_gbytes = 2.0 * static_cast<double>(from.bytes()) / time_ms(ops, seconds, [&] { ops.copy(to, from); }) * 1e-6;
  return light;
}

std::string text_of(const SpeedOfLight& light, const Ops& ops) {
  return fmt::format("a large {} product here: {:.0f} GFLOP/s ({}^3); a copy: {:.0f} GB/s read and written", name_of(compute_type(ops.kind())),
                     light.gemm_gflops, light.gemm_size, light.copy_gbytes);
}

std::vector<float> random_values(std::int64_t count, std::uint64_t seed, bool normal) {
  constexpr std::size_t kPeriod = 1048573;  // a prime: rows of any width differ
  std::mt19937_64 rng(seed);
  std::uniform_real_distribution<float> uniform(-1, 1);
  std::normal_distribution<float> gaussian;
  std::vector<float> values(static_cast<std::size_t>(count));
  for (std::size_t n = 0; n < std::min(kPeriod, values.size()); ++n) values[n] = normal ? gaussian(rng) : uniform(rng);
  for (std::size_t n = kPeriod; n < values.size(); ++n) values[n] = values[n - kPeriod];
  return values;
}

BenchMemory::~BenchMemory() {
  for (void* block : blocks_) ops_.deallocate(block);
}

Tensor BenchMemory::zeros(DType dtype, Shape shape) {
  Tensor t(nullptr, dtype, shape);
  blocks_.reserve(blocks_.size() + 1);
  t.data = ops_.allocate(t.bytes());
  blocks_.push_back(t.data);
  ops_.zero(t);
  return t;
}

Tensor BenchMemory::from(const std::vector<float>& host, Shape shape, DType dtype) {
  if (shape.numel() != static_cast<std::int64_t>(host.size()))
    throw std::logic_error("BenchMemory: " + std::to_string(host.size()) + " floats for " + shape.str());
  const Tensor t = zeros(dtype, shape);
  if (dtype == DType::f32) {
    ops_.upload(t, host.data());
  } else {
    BenchMemory staging(ops_);
    const Tensor exact = staging.from(host, shape);
    ops_.copy(t, exact);
    ops_.synchronize();  // before `exact` goes
  }
  return t;
}

Tensor BenchMemory::random(Shape shape, std::uint64_t seed) { return from(random_values(shape.numel(), seed), shape, compute_type(ops_.kind())); }

}  // namespace tessera
