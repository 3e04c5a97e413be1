// Conversions, sums, GELU and sums over columns on the GPU.

#include <cstdint>

#include "ops_cuda.h"

namespace tessera {
namespace {

using namespace cuda_test;

// Around a piece (8 elements), a block (4096), and beyond.
const std::vector<std::int64_t> kCounts{1, 3, 7, 8, 9, 1000, 2048, 2055, 4095, 4096, 4097, 100003};

TEST(CudaConvert, RoundsToNearestEvenAndBack) {
  TESSERA_NEEDS_GPU();
  for (const std::int64_t count : kCounts) {
    Doubles values = random_f32(count, 1, 100);
    // Halfway between two bf16 values, twice; the largest float; numbers that bf16 has only as denormals.
    const Doubles special{1.00390625, 1.01171875, 3.4028234663852886e38, -INFINITY, 1e-40, -0.0};
    for (std::size_t i = 0; i < std::min(special.size(), values.size()); ++i) values[values.size() - 1 - i] = special[i];
    values = f32(values);
    OnDevice wide(DType::f32, {count}, values), narrow(DType::bf16, {count}), back(DType::f32, {count});
    cuda::convert(context(), narrow, wide);
    EXPECT_EQ(narrow.doubles(), bf16(values)) << count;
    cuda::convert(context(), back, narrow);
    EXPECT_EQ(back.doubles(), bf16(values)) << count;
    back.poison();
    cuda::convert(context(), back, wide);
    EXPECT_EQ(back.bytes(), wide.bytes()) << count;
    wide.poison();  // NaN stays NaN
    cuda::convert(context(), narrow, wide);
    for (const double x : narrow.doubles()) ASSERT_TRUE(std::isnan(x));
  }
}

TEST(CudaConvert, TakesSlicesThatBeginAnywhere) {
  TESSERA_NEEDS_GPU();
  const Doubles values = random_f32(5000, 1);
  const OnDevice wide(DType::f32, {5000}, values);
  for (const std::int64_t first : {1, 2, 4, 8, 64, 4097}) {
    const std::int64_t count = 5000 - first - 3;
    OnDevice narrow(DType::bf16, {5000}, Doubles(5000, 7.0));
    cuda::convert(context(), narrow.tensor().slice(first, count), wide.tensor().slice(first, count));
    Doubles wanted(5000, 7.0);
    for (std::int64_t i = first; i < first + count; ++i) wanted[i] = bf16(values[i]);
    EXPECT_EQ(narrow.doubles(), wanted) << first;
  }
  const OnDevice numbers(DType::i32, {5000}), few(DType::bf16, {4999});
  EXPECT_THROW(cuda::convert(context(), numbers, wide), std::logic_error);
  EXPECT_THROW(cuda::convert(context(), few, wide), std::logic_error);
}

TEST(CudaAdd, RoundsOnceAndMayBeInPlace) {
  TESSERA_NEEDS_GPU();
  for (const DType type : {DType::bf16, DType::f32}) {
    for (const std::int64_t count : kCounts) {
      const Doubles a = random_bf16(count, 1), b = random_bf16(count, 2);
      const OnDevice x(type, {count}, a), y(type, {count}, b);
      OnDevice to(type, {count});
      Doubles wanted;
      for (std::int64_t i = 0; i < count; ++i) wanted.push_back(type == DType::bf16 ? bf16(a[i] + b[i]) : static_cast<float>(a[i] + b[i]));
      cuda::add(context(), to, x, y);
      EXPECT_EQ(to.doubles(), wanted) << count;
      cuda::add(context(), x, x, y);
      EXPECT_EQ(x.doubles(), wanted) << count;
      cuda::add(context(), y, to, y);
      for (std::int64_t i = 0; i < count; ++i) wanted[i] = type == DType::bf16 ? bf16(wanted[i] + b[i]) : static_cast<float>(wanted[i] + b[i]);
      EXPECT_EQ(y.doubles(), wanted) << count;
    }
  }
  const OnDevice half(DType::bf16, {8}), whole(DType::f32, {8});
  EXPECT_THROW(cuda::add(context(), half, half, whole), std::logic_error);
}

// -- GELU ---------------------------------------------------------------------------------------------------------------

const double kRoot = std::sqrt(2 / std::acos(-1.0));  // sqrt(2/pi)
double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }
/// 0.5 x (1 + tanh u) = x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3)
double gelu(double x) { return x * sigmoid(2 * kRoot * (x + 0.044715 * x * x * x)); }
double gelu_slope(double x) {
  const double s = sigmoid(2 * kRoot * (x + 0.044715 * x * x * x));
  return s + x * s * (1 - s) * 2 * kRoot * (1 + 3 * 0.044715 * x * x);
}

/// Every bf16 of a magnitude up to a million.
Doubles all_bf16() {
  Doubles v;
  for (std::uint32_t bits = 0; bits < 65536; ++bits) {
    const std::uint32_t wide = bits << 16;
    float x;
    std::memcpy(&x, &wide, sizeof x);
    if (std::abs(x) <= 1e6f) v.push_back(x);
  }
  return v;
}

constexpr double kHalfUlp = 1.0 / 256;  // of a bf16, relative, at most

TEST(CudaGelu, EveryArgumentGivesTheFunctionRounded) {
  TESSERA_NEEDS_GPU();
  const Doubles x = all_bf16();
  const auto count = static_cast<std::int64_t>(x.size());
  const OnDevice in(DType::bf16, {count}, x);
  OnDevice out(DType::bf16, {count});
  cuda::gelu_forward(context(), out, in);
  const Doubles got = out.doubles();
  // One rounding, and what the exponential adds to it. Below 1e-34 the function is as good as zero.
  for (std::size_t i = 0; i < x.size(); ++i) ASSERT_NEAR(got[i], gelu(x[i]), 1.01 * kHalfUlp * std::abs(gelu(x[i])) + 1e-34) << "gelu of " << x[i];
  cuda::gelu_forward(context(), in, in);
  EXPECT_EQ(in.bytes(), out.bytes());
}

TEST(CudaGelu, BackwardMultipliesByTheDerivative) {
  TESSERA_NEEDS_GPU();
  const Doubles x = all_bf16();
  const auto count = static_cast<std::int64_t>(x.size());
  const Doubles d = random_bf16(count, 1);
  const OnDevice in(DType::bf16, {count}, x), gradient(DType::bf16, {count}, d);
  cuda::gelu_backward(context(), gradient, in);
  const Doubles got = gradient.doubles();
  for (std::size_t i = 0; i < x.size(); ++i) {
    const double wanted = d[i] * gelu_slope(x[i]);
    ASSERT_NEAR(got[i], wanted, 1.01 * kHalfUlp * std::abs(wanted) + 2e-6 * std::abs(d[i])) << "derivative at " << x[i];  // it has a zero near -0.75
  }
}

TEST(CudaGelu, TailsAndWhatIsNotANumber) {
  TESSERA_NEEDS_GPU();
  for (const std::int64_t count : kCounts) {
    const Doubles x = random_bf16(count, 1, 3), d = random_bf16(count, 2);
    const OnDevice in(DType::bf16, {count}, x), gradient(DType::bf16, {count}, d);
    OnDevice out(DType::bf16, {count});
    cuda::gelu_forward(context(), out, in);
    cuda::gelu_backward(context(), gradient, in);
    Doubles y, dx;
    for (std::int64_t i = 0; i < count; ++i) y.push_back(gelu(x[i])), dx.push_back(d[i] * gelu_slope(x[i]));
    expect_within_twice(out.doubles(), y, bf16(y), "gelu", 1e-6);
    expect_within_twice(gradient.doubles(), dx, bf16(dx), "gelu backward", 1e-6);
  }
  const OnDevice in(DType::bf16, {2}, {NAN, INFINITY});
  OnDevice out(DType::bf16, {2});
  cuda::gelu_forward(context(), out, in);
  EXPECT_TRUE(std::isnan(out.doubles()[0]));
  EXPECT_EQ(out.doubles()[1], INFINITY);
}

// -- sums over columns --------------------------------------------------------------------------------------------------

TEST(CudaColumnSums, AddEveryRowOnceAndRepeatTheirBits) {
  TESSERA_NEEDS_GPU();
  for (const std::int64_t rows : {1, 3, 65, 1000, 20011}) {
    for (const std::int64_t columns : {8, 24, 264, 1032}) {
      const Doubles whole = random_i32(rows * columns, -8, 8, 1), whole_start = random_i32(columns, -9, 9, 2);
      const OnDevice x(DType::bf16, {rows, columns}, whole);
      OnDevice to(DType::f32, {columns}, whole_start);
      cuda::add_column_sums(context(), to, x);
      const auto sums = [&](const Doubles& v, Doubles wanted) {
        for (std::int64_t i = 0; i < rows * columns; ++i) wanted[i % columns] += v[i];
        return wanted;
      };
      EXPECT_EQ(to.doubles(), sums(whole, whole_start)) << rows << " x " << columns;

      const Doubles values = random_bf16(rows * columns, 3), start = random_f32(columns, 4);
      const OnDevice y(DType::bf16, {rows, columns}, values);
      expect_repeatable(
          [&] {
            to.set(start);
            cuda::add_column_sums(context(), to, y);
            return to.bytes();
          },
          "column sums");
      expect_close(to.doubles(), sums(values, start), 2e-6, "column sums");  // at most some hundred f32 roundings of both signs
    }
  }
  const OnDevice x(DType::bf16, {4, 16}), to(DType::f32, {16}, Doubles(16, 0.0)), odd(DType::f32, {12});
  EXPECT_THROW(cuda::add_column_sums(context(), odd, x), std::logic_error);
  EXPECT_THROW(cuda::add_column_sums(context(), x, x), std::logic_error);
  cuda::Context poor = context();
  poor.scratch_bytes = 4;
  EXPECT_THROW(cuda::add_column_sums(poor, to, x), std::logic_error);
}

TEST(CudaColumnSums, TheScratchOfANormSuffices) {
  for (const std::int64_t columns : {8, 1024, 4096}) EXPECT_GE(cuda::norm_backward_scratch(columns), 128u * columns * sizeof(float));
}

}  // namespace
}  // namespace tessera
