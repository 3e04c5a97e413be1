#pragma once
// tessera bench: speed of the parts, each a subcommand in a file of its own. Every one prints a table, or JSON with --json.

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "kernels/ops.h"

namespace tessera {

void add_bench_attention(CLI::App& bench);  // bench_attention.cpp
void add_bench_gemm(CLI::App& bench);       // bench_gemm.cpp
void add_bench_step(CLI::App& bench);       // bench_step.cpp
void add_bench_data(CLI::App& bench);       // bench_data.cpp

/// Device and time of a benchmark: options that each of them has.
struct BenchOptions {
  std::string device = "cpu";
  int threads = 0;       // 0: OMP_NUM_THREADS or all cores
  double seconds = 0.5;  // spent on each measurement
  bool json = false;

  void add_to(CLI::App& command);
  /// The device's operations. Throws ConfigError when this build does not have the device.
  std::unique_ptr<Ops> make_ops() const;
};

/// Runs `work` once to warm up, then until `seconds` have passed and at least three times. Returns the shortest time of a run in milliseconds:
/// the one that other work on the machine disturbed least.
double best_ms(double seconds, const std::function<void()>& work);

/// GFLOP/s of one large fp32 matrix product on the device: what a benchmark's own number is to be compared with.
double measure_sgemm_gflops(Ops& ops, double seconds);

/// Device memory for the tensors of a benchmark; lives as long as the object.
class BenchMemory {
 public:
  explicit BenchMemory(Ops& ops) : ops_(ops) {}
  BenchMemory(const BenchMemory&) = delete;
  BenchMemory& operator=(const BenchMemory&) = delete;
  ~BenchMemory();
  Tensor zeros(DType dtype, Shape shape);
  /// f32, copied from the host.
  Tensor from(const std::vector<float>& host, Shape shape);
  /// f32 from -1 to 1.
  Tensor random(Shape shape, std::uint64_t seed);

 private:
  Ops& ops_;
  std::vector<void*> blocks_;
};

}  // namespace tessera
