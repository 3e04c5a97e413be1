#pragma once
// What the tests of the CUDA operations share: device tensors, values rounded to bf16, and how an error is judged.
//
// The judge: values come in as bf16 (exact in double), the definition is evaluated in double, and the same maths again with one rounding to
// bf16 (PyTorch's way: an operation's output is rounded once, statistics stay f32) where the operation stores bf16. The GPU's largest error over
// a tensor may be twice that of the second evaluation.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "device.h"
#include "kernels/cuda/layers.h"
#include "kernels/cuda/ops.h"

namespace tessera::cuda_test {

#define TESSERA_NEEDS_GPU() \
  if (!has_gpu()) GTEST_SKIP() << "NO GPU: the CUDA operations were not run"

/// One Ops for all tests of a process; never destroyed, as CUDA is gone when static objects go.
inline Ops& gpu() {
  static Ops* const ops = make_cuda_ops(0).release();
  return *ops;
}

/// What launchers of kernels/cuda/layers.h take, for those that Ops does not call directly: the stream of gpu(), 64 MiB of scratch full of NaN.
inline const cuda::Context& context() {
  static const cuda::Context c = [] {
    cuda::Context made;
    made.stream = cuda_stream(gpu());
    TESSERA_CUDA_CHECK(cudaDeviceGetAttribute(&made.multiprocessors, cudaDevAttrMultiProcessorCount, 0));
    made.scratch_bytes = std::size_t{64} << 20;
    TESSERA_CUDA_CHECK(cudaMalloc(&made.scratch, made.scratch_bytes));
    TESSERA_CUDA_CHECK(cudaMemset(made.scratch, 0xff, made.scratch_bytes));
    TESSERA_CUDA_CHECK(cudaDeviceSynchronize());
    return made;
  }();
  return c;
}

// -- values -----------------------------------------------------------------------------------------------------------

using Doubles = std::vector<double>;

/// One rounding to bf16, to nearest even, of a double (through f32, as an operation that sums in f32 rounds).
inline double bf16(double x) { return to_bf16(x); }
inline Doubles bf16(Doubles v) {
  for (double& x : v) x = to_bf16(x);
  return v;
}
inline Doubles f32(Doubles v) {
  for (double& x : v) x = static_cast<float>(x);
  return v;
}

/// Normal values that bf16 (f32) holds exactly.
inline Doubles random_bf16(std::int64_t count, unsigned seed, double scale = 1) {
  std::mt19937 generator(seed);
  std::normal_distribution<double> normal(0, scale);
  Doubles v(static_cast<std::size_t>(count));
  for (double& x : v) x = to_bf16(normal(generator));
  return v;
}
inline Doubles random_f32(std::int64_t count, unsigned seed, double scale = 1) {
  std::mt19937 generator(seed);
  std::normal_distribution<double> normal(0, scale);
  Doubles v(static_cast<std::size_t>(count));
  for (double& x : v) x = static_cast<float>(normal(generator));
  return v;
}
/// Whole numbers from first to last, as what a tensor of i32 is made of.
inline Doubles random_i32(std::int64_t count, int first, int last, unsigned seed) {
  std::mt19937 generator(seed);
  std::uniform_int_distribution<int> uniform(first, last);
  Doubles v(static_cast<std::size_t>(count));
  for (double& x : v) x = uniform(generator);
  return v;
}

/// A tensor with device memory of its own. Without values it is full of 0xff (NaN in every floating type), so that what is left unwritten shows;
/// 256 bytes more of the same stand behind it, and every read checks that they still do.
class OnDevice {
 public:
  OnDevice(DType type, Shape shape) : memory_(Tensor(nullptr, type, shape).bytes() + kGuard), tensor_(memory_.get(), type, shape) {
    TESSERA_CUDA_CHECK(cudaDeviceSynchronize());  // the operations' stream does not wait for the default stream's fills and copies
  }
  OnDevice(DType type, Shape shape, const Doubles& values) : OnDevice(type, shape) { set(values); }

  const Tensor& tensor() const { return tensor_; }
  operator const Tensor&() const { return tensor_; }  // NOLINT: stands for the tensor in descriptors

  /// Converts (exactly, if the values are of the type) and copies.
  void set(const Doubles& values) {
    ASSERT_EQ(static_cast<std::int64_t>(values.size()), tensor_.numel());
    std::vector<unsigned char> bytes(tensor_.bytes());
    for (std::size_t i = 0; i < values.size(); ++i) store(bytes.data() + i * size_of(tensor_.dtype), values[i]);
    TESSERA_CUDA_CHECK(cudaDeviceSynchronize());
    TESSERA_CUDA_CHECK(cudaMemcpy(tensor_.data, bytes.data(), bytes.size(), cudaMemcpyHostToDevice));
    TESSERA_CUDA_CHECK(cudaDeviceSynchronize());
  }
  void poison() {
    TESSERA_CUDA_CHECK(cudaDeviceSynchronize());
    memory_.poison();
    TESSERA_CUDA_CHECK(cudaDeviceSynchronize());
  }

  /// After all work on the device.
  std::vector<unsigned char> bytes() const {
    TESSERA_CUDA_CHECK(cudaDeviceSynchronize());
    std::vector<unsigned char> all = memory_.host();
    for (std::size_t i = tensor_.bytes(); i < all.size(); ++i) {
      if (all[i] != 0xff) {
        ADD_FAILURE() << "byte " << i - tensor_.bytes() << " behind a tensor " << tensor_.shape.str() << " of " << tessera::name_of(tensor_.dtype)
                      << " was written";
        break;
      }
    }
    all.resize(tensor_.bytes());
    return all;
  }
  Doubles doubles() const {
    const std::vector<unsigned char> from = bytes();
    Doubles v(static_cast<std::size_t>(tensor_.numel()));
    for (std::size_t i = 0; i < v.size(); ++i) v[i] = load(from.data() + i * size_of(tensor_.dtype));
    return v;
  }

 private:
  static constexpr std::size_t kGuard = 256;

  template <class T>
  static void put(unsigned char* to, T value) {
    std::memcpy(to, &value, sizeof value);
  }
  template <class T>
  static T get(const unsigned char* from) {
    T value;
    std::memcpy(&value, from, sizeof value);
    return value;
  }
  void store(unsigned char* to, double x) const {
    switch (tensor_.dtype) {
      case DType::f32: return put(to, static_cast<float>(x));
      case DType::f64: return put(to, x);
      case DType::bf16: return put(to, __float2bfloat16_rn(static_cast<float>(x)));
      case DType::i32: return put(to, static_cast<std::int32_t>(x));
      case DType::u32: return put(to, static_cast<std::uint32_t>(x));
      case DType::u64: return put(to, static_cast<std::uint64_t>(x));
    }
  }
  double load(const unsigned char* from) const {
    switch (tensor_.dtype) {
      case DType::f32: return get<float>(from);
      case DType::f64: return get<double>(from);
      case DType::bf16: return __bfloat162float(get<Bf16>(from));
      case DType::i32: return get<std::int32_t>(from);
      case DType::u32: return get<std::uint32_t>(from);
      case DType::u64: return static_cast<double>(get<std::uint64_t>(from));
    }
    return 0;
  }

  Device<unsigned char> memory_;
  Tensor tensor_;
};

/// The bytes of several, one after another.
inline std::vector<unsigned char> joined(const std::vector<const OnDevice*>& tensors) {
  std::vector<unsigned char> all;
  for (const OnDevice* t : tensors) {
    const auto bytes = t->bytes();
    all.insert(all.end(), bytes.begin(), bytes.end());
  }
  return all;
}

// -- judging ----------------------------------------------------------------------------------------------------------

/// The largest |got - exact|; infinite where an element is not finite, and its index.
struct Worst {
  double error = 0;
  std::size_t at = 0;
};
inline Worst worst(const Doubles& got, const Doubles& exact) {
  Worst w;
  for (std::size_t i = 0; i < exact.size(); ++i) {
    const double e = std::abs(got[i] - exact[i]), error = std::isfinite(e) ? e : std::numeric_limits<double>::infinity();
    if (error > w.error) w = {error, i};
  }
  return w;
}

/// The judge (top of the file). `floor`: an absolute error that is always allowed, for outputs that the rounded evaluation happens to hit exactly.
inline void expect_within_twice(const Doubles& got, const Doubles& exact, const Doubles& rounded, const std::string& what, double floor = 0) {
  ASSERT_EQ(got.size(), exact.size()) << what;
  ASSERT_EQ(rounded.size(), exact.size()) << what;
  const Worst w = worst(got, exact);
  const double limit = std::max(2 * worst(rounded, exact).error, floor);
  EXPECT_LE(w.error, limit) << what << "[" << w.at << "]: " << got[w.at] << " for " << exact[w.at] << "; the bf16 evaluation has " << rounded[w.at];
}

/// Every element within `relative` of the largest magnitude of `exact`: for outputs in f32.
inline void expect_close(const Doubles& got, const Doubles& exact, double relative, const std::string& what) {
  ASSERT_EQ(got.size(), exact.size()) << what;
  double magnitude = 1e-30;
  for (const double x : exact) magnitude = std::max(magnitude, std::abs(x));
  const Worst w = worst(got, exact);
  EXPECT_LE(w.error, relative * magnitude) << what << "[" << w.at << "]: " << got[w.at] << " for " << exact[w.at];
}

/// `run` sets up its memory, calls the operation and returns the bytes of what came out: ten runs, the same bits.
inline void expect_repeatable(const std::function<std::vector<unsigned char>()>& run, const std::string& what) {
  const std::vector<unsigned char> first = run();
  for (int i = 1; i < 10; ++i) ASSERT_TRUE(run() == first) << what << ": run " << i << " gave other bits";
}

}  // namespace tessera::cuda_test
