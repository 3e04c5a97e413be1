#pragma once
// tessera bench: speed of the parts, each a subcommand in a file of its own. Every one prints a table, or JSON with --json.

#include <CLI/CLI.hpp>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "kernels/ops.h"

namespace tessera {

struct Config;

void add_bench_attention(CLI::App& bench);  // bench_attention.cpp
void add_bench_gemm(CLI::App& bench);       // bench_gemm.cpp
void add_bench_step(CLI::App& bench);       // bench_step.cpp
void add_bench_generate(CLI::App& bench);   // bench_generate.cpp
void add_bench_data(CLI::App& bench);       // bench_data.cpp

/// Device and time of a benchmark: options that each of them has.
struct BenchOptions {
  std::string device = "cpu";
  int threads = 0;       // CPU threads; 0: OMP_NUM_THREADS or all cores
  double seconds = 0.5;  // spent on each measurement
  bool json = false;

  void add_to(CLI::App& command);
  /// The device's operations. Throws ConfigError for a device that is not there.
  std::unique_ptr<Ops> make_ops() const;
};

/// Milliseconds of `work` on the host: the shortest of at least three runs, until `seconds` have passed, after one to warm up. The shortest is the
/// one that other work on the machine disturbed least.
double best_ms(double seconds, const std::function<void()>& work);

/// model.vocabulary, or that of the tokenizer where its name says it; otherwise a small one.
std::int64_t vocabulary_for_bench(const Config& config);

/// Milliseconds that `work` takes on the device; it must not wait for it. CPU: best_ms(). GPU: the median of at least three groups of runs, between
/// two waits each and long enough (20 ms) that the waits do not count; the shortest would be the moment before the clocks fell.
double time_ms(Ops& ops, double seconds, const std::function<void()>& work);
/// Which of the two time_ms() takes, for reports.
const char* timing_of(const Ops& ops);

/// What the device can do at best, in this run: what a benchmark's own numbers are to be compared with.
struct SpeedOfLight {
  std::int64_t gemm_size = 0;  // a product of two square matrices of this size in the compute type: fp32 on the CPU, bf16 on a GPU
  double gemm_gflops = 0;
  double copy_gbytes = 0;  // GB/s read and written by a copy from the device's memory to itself
};
SpeedOfLight measure_speed_of_light(Ops& ops, double seconds);
/// "a large bf16 product here: 766000 GFLOP/s (8192^3); a copy: 4270 GB/s read and written"
std::string text_of(const SpeedOfLight& light, const Ops& ops);

/// About a million values from -1 to 1 (`normal`: of the normal distribution), over and over: large inputs are made quickly.
std::vector<float> random_values(std::int64_t count, std::uint64_t seed, bool normal = false);

/// Device memory for the tensors of a benchmark; lives as long as the object.
class BenchMemory {
 public:
  explicit BenchMemory(Ops& ops) : ops_(ops) {}
  BenchMemory(const BenchMemory&) = delete;
  BenchMemory& operator=(const BenchMemory&) = delete;
  ~BenchMemory();
  Tensor zeros(DType dtype, Shape shape);
  /// Copied from the host, rounded to f32 or bf16.
  Tensor from(const std::vector<float>& host, Shape shape, DType dtype = DType::f32);
  /// Values from -1 to 1 of the device's compute type.
  Tensor random(Shape shape, std::uint64_t seed);

 private:
  Ops& ops_;
  std::vector<void*> blocks_;
};

}  // namespace tessera
