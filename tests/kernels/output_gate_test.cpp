// The gate on the attention's output against its definition in double and differences of that.

#include <cmath>

#include "ops_testing.h"

namespace tessera::testing {
namespace {

using Doubles = std::vector<double>;

Doubles definition(const Doubles& u, const Doubles& o) {
  Doubles y(u.size());
  for (std::size_t i = 0; i < y.size(); ++i) y[i] = 2 / (1 + std::exp(-u[i])) * o[i];
  return y;
}

/// Around the grain of a thread's work (16384), and less than a vector.
const std::vector<Shape> kShapes{{1, 1}, {3, 5}, {1, 16}, {17, 33}, {130, 127}};

TEST(OutputGate, MatchesTheDefinitionAndItsDifferences) {
  for (const Shape& shape : kShapes) {
    SCOPED_TRACE(shape.str());
    Floats u = random_floats(shape, 1, 2.0f), o = random_floats(shape, 2), y(shape, NAN);
    const auto us = u.doubles(), os = o.doubles();
    ops().output_gate_forward({.u = u.tensor(), .o = o.tensor(), .y = y.tensor()});
    expect_close(y.values, definition(us, os), 10 * kEpsilon, "y");

    Floats dy = random_floats(shape, 3), d_o(shape, NAN), du(shape, NAN), again(shape, NAN);
    ops().output_gate_backward({.dy = dy.tensor(), .u = u.tensor(), .o = o.tensor(), .d_o = d_o.tensor(), .du = du.tensor(), .y = again.tensor()});
    EXPECT_EQ(again, y);
    if (shape.numel() > 1000) continue;  // differences take all elements for each
    expect_close(du.values, numeric_gradient([&](const auto& v) { return inner(definition(v, os), dy.values); }, us), 3e-6, "du");
    expect_close(d_o.values, numeric_gradient([&](const auto& v) { return inner(definition(us, v), dy.values); }, os), 3e-6, "d_o");
  }
}

/// Element by element, into tails where a sigmoid or one less it is tiny: relative to each value, not to the largest.
TEST(OutputGate, GradientsKeepTheirRelativePrecision) {
  Floats u({1601, 1}), one({1601, 1}, 1.0f), d_o({1601, 1}), du({1601, 1}), y({1601, 1});
  for (std::int64_t i = 0; i <= 1600; ++i) u[i] = 0.1f * static_cast<float>(i - 800);
  ops().output_gate_backward({.dy = one.tensor(), .u = u.tensor(), .o = one.tensor(), .d_o = d_o.tensor(), .du = du.tensor(), .y = y.tensor()});
  for (std::int64_t i = 0; i <= 1600; ++i) {
    const double x = u[i], s = 1 / (1 + std::exp(-x)), rest = 1 / (1 + std::exp(x));
    ASSERT_NEAR(y[i], 2 * s, 10 * kEpsilon * 2 * s) << x;
    ASSERT_NEAR(d_o[i], 2 * s, 10 * kEpsilon * 2 * s) << x;
    ASSERT_NEAR(du[i], 2 * s * rest, 20 * kEpsilon * 2 * s * rest) << x;
  }
}

TEST(OutputGate, AtZeroItIsTheIdentityAndFarOffFinite) {
  Floats zero({7, 9}), o = random_floats({7, 9}, 1), y({7, 9});
  ops().output_gate_forward({.u = zero.tensor(), .o = o.tensor(), .y = y.tensor()});
  EXPECT_EQ(y, o);

  Floats far({1, 5}, {1e30f, -1e30f, INFINITY, -INFINITY, NAN}), ones({1, 5}, 1.0f), d_o({1, 5}), du({1, 5}), gated({1, 5});
  ops().output_gate_backward(
      {.dy = ones.tensor(), .u = far.tensor(), .o = ones.tensor(), .d_o = d_o.tensor(), .du = du.tensor(), .y = gated.tensor()});
  for (const Floats* f : {&d_o, &gated}) {
    EXPECT_EQ((*f)[0], 2.0f);
    EXPECT_NEAR((*f)[1], 0.0f, 1e-37f);
    EXPECT_EQ((*f)[2], 2.0f);
    EXPECT_NEAR((*f)[3], 0.0f, 1e-37f);
    EXPECT_TRUE(std::isnan((*f)[4]));
  }
  for (std::int64_t i = 0; i < 4; ++i) EXPECT_NEAR(du[i], 0.0f, 1e-36f);
  EXPECT_TRUE(std::isnan(du[4]));
}

TEST(OutputGate, OutputsInTheMemoryOfInputsAndAbsentOnes) {
  const Shape shape{130, 127};
  Floats u = random_floats(shape, 1), o = random_floats(shape, 2), dy = random_floats(shape, 3), y(shape), d_o(shape), du(shape);
  ops().output_gate_forward({.u = u.tensor(), .o = o.tensor(), .y = y.tensor()});
  ops().output_gate_backward({.dy = dy.tensor(), .u = u.tensor(), .o = o.tensor(), .d_o = d_o.tensor(), .du = du.tensor()});

  Floats over_o = o, over_u = u;
  ops().output_gate_forward({.u = u.tensor(), .o = over_o.tensor(), .y = over_o.tensor()});
  ops().output_gate_forward({.u = over_u.tensor(), .o = o.tensor(), .y = over_u.tensor()});
  EXPECT_EQ(over_o, y);
  EXPECT_EQ(over_u, y);

  Floats a = dy, b = u, c = o;
  ops().output_gate_backward({.dy = a.tensor(), .u = b.tensor(), .o = c.tensor(), .d_o = a.tensor(), .du = b.tensor(), .y = c.tensor()});
  EXPECT_EQ(a, d_o);
  EXPECT_EQ(b, du);
  EXPECT_EQ(c, y);
}

TEST(OutputGate, WrongArgumentsAreRefused) {
  Floats u({4, 8}), o({4, 8}), y({4, 8}), few({4, 7}), more({4, 8});
  Ints whole({4, 8});
  EXPECT_THROW(ops().output_gate_forward({.u = few.tensor(), .o = o.tensor(), .y = y.tensor()}), std::logic_error);
  EXPECT_THROW(ops().output_gate_forward({.u = u.tensor(), .o = whole.tensor(), .y = y.tensor()}), std::logic_error);
  EXPECT_THROW(ops().output_gate_forward({.u = u.tensor(), .o = o.tensor()}), std::logic_error);
  const auto refused = [&](auto&& change) {
    OutputGateBackward g{.dy = more.tensor(), .u = u.tensor(), .o = o.tensor(), .d_o = more.tensor(), .du = u.tensor(), .y = y.tensor()};
    ops().output_gate_backward(g);
    change(g);
    EXPECT_THROW(ops().output_gate_backward(g), std::logic_error);
  };
  refused([&](auto& g) { g.du = g.d_o; });
  refused([&](auto& g) { g.y = g.d_o; });
  refused([&](auto& g) { g.y = g.du; });
  refused([&](auto& g) { g.y = few.tensor(); });
  refused([&](auto& g) { g.u = {}; });
}

}  // namespace
}  // namespace tessera::testing
