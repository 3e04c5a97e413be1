// tessera bench, and what its subcommands share.

#include "trainer/commands/bench.h"

#include <limits>
#include <random>

#include "trainer/commands/commands.h"
#include "trainer/config.h"

namespace tessera {

void add_bench_command(CLI::App& app) {
  CLI::App* bench = app.add_subcommand("bench", "Speed of the parts: attention, matrix products, a training step, data");
  bench->require_subcommand(1);
  bench->footer(
      "Examples:\n"
      "  tessera bench attention --tokens 4096 --active-share 0.1\n"
      "  tessera bench gemm --json");
  add_bench_attention(*bench);
  add_bench_gemm(*bench);
  add_bench_step(*bench);
  add_bench_data(*bench);
}

void BenchOptions::add_to(CLI::App& command) {
  command.add_option("--device", device, "Device to measure")->capture_default_str();
  command.add_option("--threads", threads, "CPU threads; 0: OMP_NUM_THREADS or all cores")->check(CLI::Range(0, 4096))->capture_default_str();
  command.add_option("--seconds", seconds, "Time spent on each measurement")->check(CLI::Range(0.001, 3600.0))->capture_default_str();
  command.add_flag("--json", json, "Print JSON");
}

std::unique_ptr<Ops> BenchOptions::make_ops() const {
  load_config("", {"device=" + device});  // throws for a device that is not there
  if (device != "cpu") throw ConfigError("--device " + device + ": tessera bench measures cpu");
  return make_cpu_ops(threads);
}

double best_ms(double seconds, const std::function<void()>& work) {
  using Clock = std::chrono::steady_clock;
  work();
  double best = std::numeric_limits<double>::infinity();
  const auto start = Clock::now();
  for (int runs = 0; runs < 3 || std::chrono::duration<double>(Clock::now() - start).count() < seconds; ++runs) {
    const auto before = Clock::now();
    work();
    best = std::min(best, std::chrono::duration<double, std::milli>(Clock::now() - before).count());
  }
  return best;
}

double measure_sgemm_gflops(Ops& ops, double seconds) {
  constexpr std::int64_t n = 2048;
  BenchMemory memory(ops);
  LinearForward product;
  product.x = memory.random({n, n}, 1);
  product.w = memory.random({n, n}, 2);
  product.y = memory.zeros(DType::f32, {n, n});
  const double ms = best_ms(seconds, [&] {
    ops.linear_forward(product);
    ops.synchronize();
  });
  return 2.0 * n * n * n / ms * 1e-6;
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

Tensor BenchMemory::from(const std::vector<float>& host, Shape shape) {
  const Tensor t = zeros(DType::f32, shape);
  if (t.bytes() != host.size() * sizeof(float)) throw std::logic_error("BenchMemory: " + std::to_string(host.size()) + " floats for " + shape.str());
  ops_.upload(t, host.data());
  return t;
}

Tensor BenchMemory::random(Shape shape, std::uint64_t seed) {
  std::mt19937_64 rng(seed);
  std::uniform_real_distribution<float> uniform(-1, 1);
  std::vector<float> host(static_cast<std::size_t>(shape.numel()));
  for (float& x : host) x = uniform(rng);
  return from(host, shape);
}

}  // namespace tessera
