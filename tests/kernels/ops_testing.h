#pragma once
// What the tests of the operations share: tensors with memory of their own, random values, comparison with a double reference, and gradients by
// central differences of a naive forward pass in double.

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <functional>
#include <random>
#include <span>
#include <vector>

#include "kernels/ops.h"
#include "kernels/tensor.h"

namespace tessera::testing {

inline constexpr double kEpsilon = 5.96e-8;  // half a unit in the last place of 1.0f: the relative error of one rounding

template <class T>
struct Host {
  std::vector<T> values;
  Shape shape;

  Host() = default;
  explicit Host(Shape s, T fill = T{}) : values(static_cast<std::size_t>(s.numel()), fill), shape(s) {}
  Host(Shape s, std::vector<T> v) : values(std::move(v)), shape(s) {}
  Tensor tensor() { return {values.data(), dtype_of<T>::value, shape}; }
  T& operator[](std::int64_t i) { return values[static_cast<std::size_t>(i)]; }
  const T& operator[](std::int64_t i) const { return values[static_cast<std::size_t>(i)]; }
  std::vector<double> doubles() const { return {values.begin(), values.end()}; }
  bool operator==(const Host&) const = default;
};
using Floats = Host<float>;
using Ints = Host<std::int32_t>;

inline Floats random_floats(Shape shape, std::uint32_t seed, float scale = 1.0f) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal(0.0f, scale);
  Floats f(shape);
  for (float& v : f.values) v = normal(generator);
  return f;
}

inline Ints random_ints(Shape shape, std::int32_t first, std::int32_t last, std::uint32_t seed) {
  std::mt19937 generator(seed);
  std::uniform_int_distribution<std::int32_t> uniform(first, last);
  Ints f(shape);
  for (std::int32_t& v : f.values) v = uniform(generator);
  return f;
}

/// The largest magnitude, at least 1e-30.
inline double magnitude(std::span<const double> x) {
  double m = 1e-30;
  for (const double v : x) m = std::max(m, std::abs(v));
  return m;
}

/// Every element within `tolerance` times the largest magnitude of `wanted`.
inline void expect_close(const std::vector<float>& got, const std::vector<double>& wanted, double tolerance, const char* what) {
  ASSERT_EQ(got.size(), wanted.size()) << what;
  const double limit = tolerance * magnitude(wanted);
  for (std::size_t i = 0; i < got.size(); ++i) {
    ASSERT_LE(std::abs(got[i] - wanted[i]), limit) << what << "[" << i << "]: " << got[i] << " for " << wanted[i];
  }
}

/// d f / d x by central differences in double. With h = 1e-5 the error is about h^2 f''' / 6 + 1e-16 f / h: some 1e-9 of f.
inline std::vector<double> numeric_gradient(const std::function<double(const std::vector<double>&)>& f, std::vector<double> x) {
  constexpr double kStep = 1e-5;
  std::vector<double> gradient(x.size());
  for (std::size_t i = 0; i < x.size(); ++i) {
    const double at = x[i];
    x[i] = at + kStep;
    const double above = f(x);
    x[i] = at - kStep;
    const double below = f(x);
    x[i] = at;
    gradient[i] = (above - below) / (2 * kStep);
  }
  return gradient;
}

inline double inner(std::span<const double> a, std::span<const float> b) {
  double s = 0;
  for (std::size_t i = 0; i < a.size(); ++i) s += a[i] * b[i];
  return s;
}

/// start + added, elementwise, for "added to" outputs.
inline std::vector<double> plus(const Floats& start, const std::vector<double>& added) {
  std::vector<double> sum = added;
  for (std::size_t i = 0; i < sum.size(); ++i) sum[i] += start.values[i];
  return sum;
}

/// z [B, H, T] as calls for some heads at a time have it: [B, count, T] of one stretch of heads after another.
inline Floats in_stretches(const Floats& z, const std::vector<std::int64_t>& counts) {
  const std::int64_t B = z.shape[0], H = z.shape[1], T = z.shape[2];
  Floats to = z;
  std::int64_t next = 0, first = 0;
  for (const std::int64_t count : counts) {
    for (std::int64_t b = 0; b < B; ++b)
      for (std::int64_t n = 0; n < count * T; ++n) to[next++] = z[(b * H + first) * T + n];
    first += count;
  }
  return to;
}

/// One Ops for all tests of a process.
inline Ops& ops() {
  static const std::unique_ptr<Ops> instance = make_cpu_ops(2);
  return *instance;
}

}  // namespace tessera::testing
