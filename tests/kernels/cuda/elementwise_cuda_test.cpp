// Conversions, sums, GELU, the output gate and sums over columns on the GPU.

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

// -- the output gate ----------------------------------------------------------------------------------------------------

TEST(CudaOutputGate, MatchesTheDefinition) {
  TESSERA_NEEDS_GPU();
  for (const std::int64_t count : kCounts) {
    const Doubles u = random_bf16(count, 1, 3), o = random_bf16(count, 2), dy = random_bf16(count, 3);
    Doubles y, d_o, du;
    for (std::int64_t i = 0; i < count; ++i) {
      y.push_back(2 * sigmoid(u[i]) * o[i]);
      d_o.push_back(2 * sigmoid(u[i]) * dy[i]);
      du.push_back(2 * sigmoid(u[i]) * sigmoid(-u[i]) * o[i] * dy[i]);
    }
    const OnDevice dev_u(DType::bf16, {count}, u), dev_o(DType::bf16, {count}, o), dev_dy(DType::bf16, {count}, dy);
    OnDevice to(DType::bf16, {count}), to_o(DType::bf16, {count}), to_u(DType::bf16, {count}), again(DType::bf16, {count});
    gpu().output_gate_forward({.u = dev_u, .o = dev_o, .y = to});
    expect_within_twice(to.doubles(), y, bf16(y), "y", 1e-6);
    gpu().output_gate_backward({.dy = dev_dy, .u = dev_u, .o = dev_o, .d_o = to_o, .du = to_u, .y = again});
    expect_within_twice(to_o.doubles(), d_o, bf16(d_o), "d_o", 1e-6);
    expect_within_twice(to_u.doubles(), du, bf16(du), "du", 1e-6);
    EXPECT_EQ(again.bytes(), to.bytes()) << count;

    // Without y; then every output in the memory of an input.
    OnDevice other_o(DType::bf16, {count}), other_u(DType::bf16, {count});
    gpu().output_gate_backward({.dy = dev_dy, .u = dev_u, .o = dev_o, .d_o = other_o, .du = other_u});
    EXPECT_EQ(other_o.bytes(), to_o.bytes()) << count;
    EXPECT_EQ(other_u.bytes(), to_u.bytes()) << count;
    const OnDevice in_place(DType::bf16, {count}, o);
    gpu().output_gate_forward({.u = dev_u, .o = in_place, .y = in_place});
    EXPECT_EQ(in_place.bytes(), to.bytes()) << count;
    gpu().output_gate_backward({.dy = dev_dy, .u = dev_u, .o = dev_o, .d_o = dev_dy, .du = dev_u, .y = dev_o});
    EXPECT_EQ(dev_dy.bytes(), to_o.bytes()) << count;
    EXPECT_EQ(dev_u.bytes(), to_u.bytes()) << count;
    EXPECT_EQ(dev_o.bytes(), to.bytes()) << count;
  }
}

/// Of every bf16, with o = dy = 1: relative to each value. A gate below 1e-34 is as good as closed.
TEST(CudaOutputGate, EveryArgumentGivesTheFunctionRounded) {
  TESSERA_NEEDS_GPU();
  const Doubles u = all_bf16();
  const auto count = static_cast<std::int64_t>(u.size());
  const OnDevice argument(DType::bf16, {count}, u), ones(DType::bf16, {count}, Doubles(u.size(), 1.0));
  OnDevice y(DType::bf16, {count}), d_o(DType::bf16, {count}), du(DType::bf16, {count});
  gpu().output_gate_backward({.dy = ones, .u = argument, .o = ones, .d_o = d_o, .du = du, .y = y});
  const Doubles values = y.doubles(), slopes = du.doubles();
  for (std::size_t i = 0; i < u.size(); ++i) {
    const double gate = 2 * sigmoid(u[i]), slope = gate * sigmoid(-u[i]);
    ASSERT_NEAR(values[i], gate, 1.01 * kHalfUlp * gate + 1e-34) << u[i];
    ASSERT_NEAR(slopes[i], slope, 1.01 * kHalfUlp * slope + 1e-34) << u[i];
    if (u[i] == 0) {
      ASSERT_EQ(values[i], 1.0);
    }
  }
  EXPECT_EQ(d_o.bytes(), y.bytes());
}

TEST(CudaOutputGate, WhatIsNotANumberAndWrongArguments) {
  TESSERA_NEEDS_GPU();
  const OnDevice u(DType::bf16, {3}, {NAN, INFINITY, -INFINITY}), o(DType::bf16, {3}, {1.0, 1.0, 1.0});
  OnDevice y(DType::bf16, {3}), d_o(DType::bf16, {3}), du(DType::bf16, {3});
  gpu().output_gate_forward({.u = u, .o = o, .y = y});
  EXPECT_TRUE(std::isnan(y.doubles()[0]));
  EXPECT_EQ(y.doubles()[1], 2.0);
  EXPECT_NEAR(y.doubles()[2], 0.0, 1e-34);
  const OnDevice few(DType::bf16, {2}), wide(DType::f32, {3});
  EXPECT_THROW(gpu().output_gate_forward({.u = few, .o = o, .y = y}), std::logic_error);
  EXPECT_THROW(gpu().output_gate_forward({.u = u, .o = wide, .y = y}), std::logic_error);
  EXPECT_THROW(gpu().output_gate_backward({.dy = o, .u = u, .o = o, .d_o = d_o, .du = d_o}), std::logic_error);
  EXPECT_THROW(gpu().output_gate_backward({.dy = o, .u = u, .o = o, .d_o = d_o, .du = du, .y = du}), std::logic_error);
  EXPECT_THROW(gpu().output_gate_backward({.dy = o, .u = u, .o = o, .d_o = wide, .du = du}), std::logic_error);
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
