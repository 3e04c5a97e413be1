// Embedding, norms, linear layers and the query-key transform against naive definitions in double.

#include "kernels/cpu/simd.h"
#include "tests/kernels/ops_testing.h"

namespace tessera::testing {
namespace {

double gelu_reference(double x) { return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x))); }

// -- elementwise functions --------------------------------------------------------------------------------------------------

TEST(Simd, ExponentialIsWithinTwoUnitsInTheLastPlace) {
  for (double x = -87; x <= 88; x += 0.00317) {
    const auto f = static_cast<float>(x);
    const double wanted = std::exp(static_cast<double>(f));
    ASSERT_LE(std::abs(cpu::exp_vector(f) - wanted), 4 * kEpsilon * wanted) << f;
  }
  EXPECT_EQ(cpu::exp_vector(0.0f), 1.0f);
  EXPECT_EQ(cpu::exp_vector(1e30f), cpu::exp_vector(88.0f));
  EXPECT_EQ(cpu::exp_vector(-INFINITY), cpu::exp_vector(-87.0f));
  EXPECT_TRUE(std::isnan(cpu::exp_vector(NAN)));
}

TEST(Simd, GeluKeepsItsRelativePrecision) {
  for (double x = -8; x <= 10; x += 0.00173) {
    const auto f = static_cast<float>(x);
    const double u2 = 2 * std::sqrt(2 / M_PI) * (static_cast<double>(f) + 0.044715 * std::pow(f, 3));
    // 1 + tanh u without cancellation: 2 / (1 + e^(-2u)). The exponent carries a few roundings, each of relative size kEpsilon.
    const double wanted = f / (1 + std::exp(-u2));
    ASSERT_LE(std::abs(cpu::gelu(f) - wanted), (8 + 4 * std::abs(u2)) * kEpsilon * std::abs(wanted)) << f;
    constexpr double kStep = 1e-5;
    const double slope = (gelu_reference(f + kStep) - gelu_reference(f - kStep)) / (2 * kStep);
    ASSERT_NEAR(cpu::gelu_derivative(f), slope, 1e-6) << f;
  }
  EXPECT_EQ(cpu::gelu(0.0f), 0.0f);
  EXPECT_EQ(cpu::gelu(1e6f), 1e6f);
  EXPECT_NEAR(cpu::gelu(-1e6f), 0.0f, 1e-30);
  EXPECT_TRUE(std::isnan(cpu::gelu(NAN)));
  EXPECT_TRUE(std::isnan(cpu::gelu_derivative(NAN)));
}

// -- embedding --------------------------------------------------------------------------------------------------------------

TEST(Embedding, ForwardAddsRowsAndBackwardScattersThem) {
  for (const std::int64_t columns : {1, 7, 64, 131}) {
    for (const bool with_positions : {false, true}) {
      constexpr std::int64_t kRows = 53, kVocabulary = 11, kPositions = 17;
      Ints tokens = random_ints({kRows}, 0, kVocabulary - 1, 1), positions = random_ints({kRows}, 0, kPositions - 1, 2);
      Floats wte = random_floats({kVocabulary, columns}, 3), wpe = random_floats({kPositions, columns}, 4), out({kRows, columns}, NAN);
      ops().embedding_forward(out.tensor(), tokens.tensor(), positions.tensor(), wte.tensor(), with_positions ? wpe.tensor() : Tensor());
      for (std::int64_t n = 0; n < kRows; ++n) {
        for (std::int64_t i = 0; i < columns; ++i) {
          const float position = with_positions ? wpe[positions[n] * columns + i] : 0.0f;
          ASSERT_EQ(out[n * columns + i], wte[tokens[n] * columns + i] + position);
        }
      }
      Floats dout = random_floats({kRows, columns}, 5), dwte = random_floats({kVocabulary, columns}, 6),
             dwpe = random_floats({kPositions, columns}, 7);
      std::vector<double> wanted_wte = dwte.doubles(), wanted_wpe = dwpe.doubles();
      for (std::int64_t n = 0; n < kRows; ++n) {
        for (std::int64_t i = 0; i < columns; ++i) {
          wanted_wte[static_cast<std::size_t>(tokens[n] * columns + i)] += dout[n * columns + i];
          if (with_positions) wanted_wpe[static_cast<std::size_t>(positions[n] * columns + i)] += dout[n * columns + i];
        }
      }
      ops().embedding_backward(dout.tensor(), tokens.tensor(), positions.tensor(), dwte.tensor(), with_positions ? dwpe.tensor() : Tensor());
      expect_close(dwte.values, wanted_wte, kRows * kEpsilon, "dwte");
      expect_close(dwpe.values, wanted_wpe, kRows * kEpsilon, "dwpe");
    }
  }
}

TEST(Embedding, IndicesOutsideTheTableAreRefused) {
  Floats wte({5, 4}), out({2, 4});
  for (const std::int32_t bad : {-1, 5}) {
    Ints tokens({2}, {0, bad});
    EXPECT_THROW(ops().embedding_forward(out.tensor(), tokens.tensor(), {}, wte.tensor(), {}), std::logic_error);
    EXPECT_THROW(ops().embedding_backward(out.tensor(), tokens.tensor(), {}, wte.tensor(), {}), std::logic_error);
  }
}

// -- norms ------------------------------------------------------------------------------------------------------------------

/// y of LayerNorm or RMSNorm over rows of `columns` elements, gain repeating every gain.size() elements; bias may be empty.
std::vector<double> norm_reference(bool centred, const std::vector<double>& x, const std::vector<double>& gain, const std::vector<double>& bias,
                                   std::size_t columns, double epsilon) {
  std::vector<double> y(x.size());
  for (std::size_t row = 0; row < x.size(); row += columns) {
    double mean = 0, square = 0;
    for (std::size_t i = 0; i < columns; ++i) mean += x[row + i] / static_cast<double>(columns);
    if (!centred) mean = 0;
    for (std::size_t i = 0; i < columns; ++i) square += (x[row + i] - mean) * (x[row + i] - mean) / static_cast<double>(columns);
    for (std::size_t i = 0; i < columns; ++i) {
      y[row + i] = (x[row + i] - mean) / std::sqrt(square + epsilon) * gain[(row + i) % gain.size()] + (bias.empty() ? 0.0 : bias[i]);
    }
  }
  return y;
}

struct NormCase {
  NormKind kind;
  bool bias;
};
class Norm : public ::testing::TestWithParam<std::tuple<NormCase, std::pair<int, int>>> {};

TEST_P(Norm, MatchesTheDefinitionAndItsDifferences) {
  const auto [norm, size] = GetParam();
  const NormKind kind = norm.kind;
  const bool with_bias = norm.bias;
  const std::int64_t rows = size.first, columns = size.second;
  const bool layernorm = kind == NormKind::layernorm;
  Floats x = random_floats({rows, columns}, 1), gain = random_floats({columns}, 2), bias = random_floats({columns}, 3);
  for (float& v : x.values) v += 0.5f;
  Floats y({rows, columns}, NAN), mean({rows}, NAN), rstd({rows}, NAN);
  NormForward f{.kind = kind, .x = x.tensor(), .gain = gain.tensor(), .y = y.tensor(), .mean = mean.tensor(), .rstd = rstd.tensor()};
  if (with_bias) f.bias = bias.tensor();
  ops().norm_forward(f);
  const auto reference = [&](const std::vector<double>& x, const std::vector<double>& gain, const std::vector<double>& bias) {
    return norm_reference(layernorm, x, gain, with_bias ? bias : std::vector<double>{}, static_cast<std::size_t>(columns), 1e-5);
  };
  // The roundings of two sums of C terms and of a few products.
  const double tolerance = (static_cast<double>(columns) + 20) * kEpsilon;
  expect_close(y.values, reference(x.doubles(), gain.doubles(), bias.doubles()), tolerance, "y");

  Floats dy = random_floats({rows, columns}, 4), dx = random_floats({rows, columns}, 5), dgain = random_floats({columns}, 6),
         dbias = random_floats({columns}, 7);
  const Floats dx0 = dx, dgain0 = dgain, dbias0 = dbias;
  NormBackward b{.kind = kind,
                 .dy = dy.tensor(),
                 .x = x.tensor(),
                 .gain = gain.tensor(),
                 .mean = mean.tensor(),
                 .rstd = rstd.tensor(),
                 .dx = dx.tensor(),
                 .dgain = dgain.tensor()};
  if (with_bias) b.dbias = dbias.tensor();
  ops().norm_backward(b);
  const auto xs = x.doubles(), gs = gain.doubles(), bs = bias.doubles();
  const auto wrt_x = numeric_gradient([&](const auto& v) { return inner(reference(v, gs, bs), dy.values); }, xs);
  const auto wrt_gain = numeric_gradient([&](const auto& v) { return inner(reference(xs, v, bs), dy.values); }, gs);
  const auto wrt_bias = numeric_gradient([&](const auto& v) { return inner(reference(xs, gs, v), dy.values); }, bs);
  expect_close(dx.values, plus(dx0, wrt_x), 3e-6, "dx");
  expect_close(dgain.values, plus(dgain0, wrt_gain), 3e-6, "dgain");
  expect_close(dbias.values, with_bias ? plus(dbias0, wrt_bias) : dbias0.doubles(), 3e-6, "dbias");
}

INSTANTIATE_TEST_SUITE_P(All, Norm,
                         ::testing::Combine(::testing::Values(NormCase{NormKind::layernorm, false}, NormCase{NormKind::layernorm, true},
                                                              NormCase{NormKind::rmsnorm, false}),
                                            ::testing::Values(std::pair{1, 5}, std::pair{3, 64}, std::pair{37, 19}, std::pair{150, 3})));

TEST(Norm, AddsTheResidualInPlaceOrBeside) {
  constexpr std::int64_t kRows = 21, kColumns = 33;
  for (const bool in_place : {false, true}) {
    Floats x = random_floats({kRows, kColumns}, 1), residual = random_floats({kRows, kColumns}, 2), gain = random_floats({kColumns}, 3);
    Floats sum({kRows, kColumns}), apart({kRows, kColumns}), y({kRows, kColumns}), wanted({kRows, kColumns}), rstd({kRows});
    for (std::int64_t i = 0; i < kRows * kColumns; ++i) sum[i] = x[i] + residual[i];
    ops().norm_forward({.x = sum.tensor(), .gain = gain.tensor(), .y = wanted.tensor(), .rstd = rstd.tensor()});
    Tensor out = in_place ? residual.tensor() : apart.tensor();
    ops().norm_forward(
        {.x = x.tensor(), .residual = residual.tensor(), .residual_out = out, .gain = gain.tensor(), .y = y.tensor(), .rstd = rstd.tensor()});
    EXPECT_EQ((in_place ? residual : apart).values, sum.values);
    EXPECT_EQ(y.values, wanted.values);
  }
}

TEST(Norm, ARowOfZerosStaysFinite) {
  Floats x({2, 8}), gain({8}, 1.0f), y({2, 8}, NAN), mean({2}), rstd({2});
  for (const NormKind kind : {NormKind::layernorm, NormKind::rmsnorm}) {
    ops().norm_forward({.kind = kind, .x = x.tensor(), .gain = gain.tensor(), .y = y.tensor(), .mean = mean.tensor(), .rstd = rstd.tensor()});
    EXPECT_EQ(y.values, x.values);
  }
}

TEST(Norm, WrongArgumentsAreRefused) {
  Floats x({4, 8}), gain({8}), y({4, 8}), rstd({4}), short_rstd({3}), bias({8});
  EXPECT_THROW(ops().norm_forward({.x = x.tensor(), .gain = gain.tensor(), .y = y.tensor(), .rstd = short_rstd.tensor()}), std::logic_error);
  EXPECT_THROW(ops().norm_forward({.x = x.tensor(), .gain = gain.tensor(), .y = y.tensor()}), std::logic_error);
  EXPECT_THROW(ops().norm_forward({.x = x.tensor(), .gain = gain.tensor(), .bias = bias.tensor(), .y = y.tensor(), .rstd = rstd.tensor()}),
               std::logic_error);  // a bias belongs to layernorm
  Ints wrong_type({4, 8});
  EXPECT_THROW(ops().norm_forward({.x = wrong_type.tensor(), .gain = gain.tensor(), .y = y.tensor(), .rstd = rstd.tensor()}), std::logic_error);
}

TEST(HeadNorm, MatchesTheDefinitionAndItsDifferences) {
  for (const auto& [rows, heads, size] : {std::tuple{1, 1, 4}, std::tuple{29, 3, 5}, std::tuple{70, 2, 16}}) {
    const std::int64_t columns = heads * size;
    Floats x = random_floats({rows, heads, size}, 1), gain = random_floats({heads, size}, 2), y({rows, heads, size}, NAN), rstd({rows, heads});
    ops().head_norm_forward({.x = x.tensor(), .gain = gain.tensor(), .y = y.tensor(), .rstd = rstd.tensor()});
    const auto reference = [&, size = size](const auto& x, const auto& gain) {
      return norm_reference(false, x, gain, {}, static_cast<std::size_t>(size), 1e-5);
    };
    const auto xs = x.doubles(), gs = gain.doubles();
    expect_close(y.values, reference(xs, gs), (size + 20) * kEpsilon, "y");
    Floats dy = random_floats({rows, heads, size}, 3), dx({rows, heads, size}, NAN), dgain = random_floats({heads, size}, 4);
    const Floats dgain0 = dgain;
    ops().head_norm_backward(
        {.dy = dy.tensor(), .x = x.tensor(), .gain = gain.tensor(), .rstd = rstd.tensor(), .dx = dx.tensor(), .dgain = dgain.tensor()});
    expect_close(dx.values, numeric_gradient([&](const auto& v) { return inner(reference(v, gs), dy.values); }, xs), 3e-6, "dx");
    expect_close(dgain.values, plus(dgain0, numeric_gradient([&](const auto& v) { return inner(reference(xs, v), dy.values); }, gs)), 3e-6, "dgain");
    ASSERT_EQ(dgain.values.size(), static_cast<std::size_t>(columns));
  }
}

// -- linear -----------------------------------------------------------------------------------------------------------------

struct LinearSize {
  int n, m, k;
};

class Linear : public ::testing::TestWithParam<LinearSize> {};

TEST_P(Linear, ForwardMatchesTheDefinition) {
  const auto [n, m, k] = GetParam();
  Floats x = random_floats({n, k}, 1), w = random_floats({m, k}, 2), bias = random_floats({m}, 3);
  for (const bool with_bias : {false, true}) {
    for (const bool with_gelu : {false, true}) {
      Floats y({n, m}, NAN), z({n, m}, NAN);
      LinearForward f{.x = x.tensor(), .w = w.tensor(), .y = y.tensor()};
      if (with_bias) f.bias = bias.tensor();
      if (with_gelu) f.activation = Activation::gelu, f.pre_activation = z.tensor();
      ops().linear_forward(f);
      for (std::int64_t i = 0; i < n; ++i) {
        for (std::int64_t j = 0; j < m; ++j) {
          double wanted = with_bias ? bias[j] : 0.0, size = std::abs(wanted);
          for (std::int64_t c = 0; c < k; ++c) {
            wanted += static_cast<double>(x[i * k + c]) * w[j * k + c];
            size += std::abs(static_cast<double>(x[i * k + c]) * w[j * k + c]);
          }
          const double limit = (k + 2) * kEpsilon * size;  // the classical bound of a sum of k products, any order
          ASSERT_NEAR((with_gelu ? z : y)[i * m + j], wanted, limit);
          if (with_gelu) {  // gelu's slope is at most 1.13
            ASSERT_NEAR(y[i * m + j], gelu_reference(wanted), 1.2 * limit + 4e-6 * std::min(1.0, std::abs(wanted)) + 1e-6 * std::abs(wanted));
          }
        }
      }
    }
  }
}

TEST_P(Linear, BackwardMatchesTheDefinition) {
  const auto [n, m, k] = GetParam();
  Floats dy = random_floats({n, m}, 1), x = random_floats({n, k}, 2), w = random_floats({m, k}, 3), argument = random_floats({n, k}, 4);
  const Floats dw0 = random_floats({m, k}, 5), dbias0 = random_floats({m}, 6);
  for (const bool with_gelu : {false, true}) {
    Floats dx({n, k}, NAN), dw = dw0, dbias = dbias0;
    LinearBackward b{.dy = dy.tensor(), .x = x.tensor(), .w = w.tensor(), .dx = dx.tensor(), .dw = dw.tensor(), .dbias = dbias.tensor()};
    if (with_gelu) b.gelu_argument = argument.tensor();
    ops().linear_backward(b);
    for (std::int64_t i = 0; i < n; ++i) {
      for (std::int64_t c = 0; c < k; ++c) {
        double wanted = 0, size = 0;
        for (std::int64_t j = 0; j < m; ++j) {
          wanted += static_cast<double>(dy[i * m + j]) * w[j * k + c];
          size += std::abs(static_cast<double>(dy[i * m + j]) * w[j * k + c]);
        }
        double slope = 1;
        if (with_gelu) {
          const double z = argument[i * k + c];
          slope = (gelu_reference(z + 1e-5) - gelu_reference(z - 1e-5)) / 2e-5;
        }
        ASSERT_NEAR(dx[i * k + c], wanted * slope, ((m + 4) * kEpsilon + 1e-6) * size);
      }
    }
    for (std::int64_t j = 0; j < m; ++j) {
      for (std::int64_t c = 0; c < k; ++c) {
        double wanted = dw0[j * k + c], size = std::abs(wanted);
        for (std::int64_t i = 0; i < n; ++i) {
          wanted += static_cast<double>(dy[i * m + j]) * x[i * k + c];
          size += std::abs(static_cast<double>(dy[i * m + j]) * x[i * k + c]);
        }
        ASSERT_NEAR(dw[j * k + c], wanted, (n + 4) * kEpsilon * size);
      }
      double wanted = dbias0[j], size = std::abs(wanted);
      for (std::int64_t i = 0; i < n; ++i) wanted += dy[i * m + j], size += std::abs(dy[i * m + j]);
      ASSERT_NEAR(dbias[j], wanted, (n + 4) * kEpsilon * size);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Sizes, Linear,
                         ::testing::Values(LinearSize{1, 1, 1}, LinearSize{1, 7, 3}, LinearSize{5, 1, 11}, LinearSize{67, 31, 13},
                                           LinearSize{300, 97, 20}, LinearSize{17, 1100, 5}, LinearSize{16, 130, 300}, LinearSize{260, 270, 300}));

// What a batch of generated texts relies on.
TEST(Linear, OfFewRowsARowHasTheSameBitsInAnyCompany) {
  constexpr std::int64_t kOut = 70, kIn = 61;
  Floats x = random_floats({kFewRows, kIn}, 1), w = random_floats({kOut, kIn}, 2), bias = random_floats({kOut}, 3);
  const auto rows = [&](std::int64_t first, std::int64_t count) {
    Floats y({count, kOut}), z({count, kOut});
    ops().linear_forward({.x = x.tensor().slice(first * kIn, count * kIn).view({count, kIn}),
                          .w = w.tensor(),
                          .bias = bias.tensor(),
                          .y = y.tensor(),
                          .activation = Activation::gelu,
                          .pre_activation = z.tensor()});
    return y.values;
  };
  const auto all = rows(0, kFewRows);
  for (std::int64_t count = 1; count <= kFewRows; ++count)
    for (std::int64_t first = 0; first + count <= kFewRows; ++first) {
      const auto some = rows(first, count);
      ASSERT_TRUE(std::equal(some.begin(), some.end(), all.begin() + first * kOut)) << first << " " << count;
    }
}

TEST(Linear, GeluAloneGivesTheBitsOfTheFusedOne) {
  constexpr std::int64_t kRows = 37, kIn = 24, kOut = 41;
  Floats x = random_floats({kRows, kIn}, 1), w = random_floats({kOut, kIn}, 2), y({kRows, kOut}, NAN), z({kRows, kOut}, NAN),
         again({kRows, kOut}, NAN);
  ops().linear_forward({.x = x.tensor(), .w = w.tensor(), .y = y.tensor(), .activation = Activation::gelu, .pre_activation = z.tensor()});
  ops().gelu(again.tensor(), z.tensor());
  EXPECT_EQ(again.values, y.values);
  EXPECT_THROW(ops().gelu(again.tensor(), x.tensor()), std::logic_error);
}

TEST(Linear, PartsOfTheBackwardMayBeLeftOut) {
  Floats dy = random_floats({9, 6}, 1), x = random_floats({9, 4}, 2), w = random_floats({6, 4}, 3), dx({9, 4}), only_dx({9, 4}), dw({6, 4}),
         only_dw({6, 4});
  ops().linear_backward({.dy = dy.tensor(), .x = x.tensor(), .w = w.tensor(), .dx = dx.tensor(), .dw = dw.tensor()});
  ops().linear_backward({.dy = dy.tensor(), .w = w.tensor(), .dx = only_dx.tensor()});
  ops().linear_backward({.dy = dy.tensor(), .x = x.tensor(), .dw = only_dw.tensor()});
  EXPECT_EQ(dx, only_dx);
  EXPECT_EQ(dw, only_dw);
}

TEST(Linear, GradientsOfAnInputOfTwoLayersAddUp) {
  for (const auto& [n, m, k] : {std::tuple{1, 7, 5}, std::tuple{37, 12, 40}, std::tuple{130, 64, 65}}) {
    Floats dy = random_floats({n, m}, 1), w = random_floats({m, k}, 2), alone({n, k}), dx = random_floats({n, k}, 3);
    const Floats before = dx;
    ops().linear_backward({.dy = dy.tensor(), .w = w.tensor(), .dx = alone.tensor()});
    ops().linear_backward({.dy = dy.tensor(), .w = w.tensor(), .dx = dx.tensor(), .add_dx = true});
    expect_close(dx.values, plus(before, alone.doubles()), (m + 4) * kEpsilon, "dx");
  }
}

TEST(Linear, WrongArgumentsAreRefused) {
  Floats x({4, 3}), w({5, 3}), y({4, 5}), wrong({4, 4});
  EXPECT_THROW(ops().linear_forward({.x = x.tensor(), .w = w.tensor(), .y = wrong.tensor()}), std::logic_error);
  EXPECT_THROW(ops().linear_forward({.x = y.tensor(), .w = w.tensor(), .y = y.tensor()}), std::logic_error);
  EXPECT_THROW(ops().linear_forward({.x = x.tensor(), .w = w.tensor(), .y = y.tensor(), .activation = Activation::gelu}), std::logic_error);
  EXPECT_THROW(ops().linear_backward({.dy = wrong.tensor(), .w = w.tensor(), .dx = x.tensor()}), std::logic_error);
  EXPECT_THROW(ops().linear_backward({.dy = y.tensor(), .w = w.tensor(), .dx = x.tensor(), .add_dx = true, .gelu_argument = x.tensor()}),
               std::logic_error);
}

// -- queries and keys -------------------------------------------------------------------------------------------------------

struct QkCase {
  std::int64_t rows, heads, size;
  bool unit, rotary;
};

/// The transform in double. `table` is [positions, size/2, 2].
std::vector<double> qk_reference(const QkCase& c, std::vector<double> x, const std::vector<double>& table, const Ints& positions) {
  for (std::int64_t n = 0; n < c.rows; ++n) {
    for (std::int64_t i = 0; i < 2 * c.heads; ++i) {
      double* v = x.data() + (n * 3 * c.heads + i) * c.size;
      if (c.unit) {
        double length = 0;
        for (std::int64_t d = 0; d < c.size; ++d) length += v[d] * v[d];
        for (std::int64_t d = 0; d < c.size; ++d) v[d] /= std::sqrt(length);
      }
      for (std::int64_t d = 0; c.rotary && d < c.size / 2; ++d) {
        const double* turn = table.data() + positions[n] * c.size + 2 * d;
        const double a = v[d], b = v[d + c.size / 2];
        v[d] = a * turn[0] - b * turn[1];
        v[d + c.size / 2] = a * turn[1] + b * turn[0];
      }
    }
  }
  return x;
}

class QkTransformTest : public ::testing::TestWithParam<QkCase> {};

TEST_P(QkTransformTest, MatchesTheDefinitionAndItsDifferences) {
  const QkCase c = GetParam();
  constexpr std::int64_t kPositions = 40;
  const std::int64_t width = 3 * c.heads * c.size;
  Floats x = random_floats({c.rows, width}, 1), inverse({c.rows, 2, c.heads}, NAN), table({kPositions, c.size / 2, 2});
  Ints positions = random_ints({c.rows}, 0, kPositions - 1, 2);
  for (std::int64_t p = 0; c.rotary && p < kPositions; ++p) {
    for (std::int64_t d = 0; d < c.size / 2; ++d) {
      const double angle = static_cast<double>(p) * std::pow(10000.0, -2.0 * static_cast<double>(d) / static_cast<double>(c.size));
      table[p * c.size + 2 * d] = static_cast<float>(std::cos(angle));
      table[p * c.size + 2 * d + 1] = static_cast<float>(std::sin(angle));
    }
  }
  const auto xs = x.doubles(), turns = table.doubles();
  QkTransform t{.qkv = x.tensor(), .heads = c.heads, .unit = c.unit};
  if (c.unit) t.inverse_norm = inverse.tensor();
  if (c.rotary) t.rotary = table.tensor(), t.positions = positions.tensor();
  ops().qk_transform_forward(t);
  expect_close(x.values, qk_reference(c, xs, turns, positions), (static_cast<double>(c.size) + 8) * kEpsilon, "qkv");

  Floats g = random_floats({c.rows, width}, 3);
  const Floats dy = g;
  ops().qk_transform_backward(t, g.tensor());
  // The gradient of a short vector is large (1/|q|), so each vector is held against its own size.
  const auto wanted = numeric_gradient([&](const auto& v) { return inner(qk_reference(c, v, turns, positions), dy.values); }, xs);
  for (std::int64_t at = 0; at < c.rows * width; at += c.size) {
    const std::vector<float> got(g.values.begin() + at, g.values.begin() + at + c.size);
    expect_close(got, {wanted.begin() + at, wanted.begin() + at + c.size}, 2e-5, "gradient");
  }
}

INSTANTIATE_TEST_SUITE_P(All, QkTransformTest,
                         ::testing::Values(QkCase{1, 1, 2, true, true}, QkCase{7, 3, 6, true, true}, QkCase{7, 3, 6, true, false},
                                           QkCase{7, 3, 6, false, true}, QkCase{7, 3, 6, false, false}, QkCase{35, 2, 16, true, true},
                                           QkCase{5, 2, 7, true, false}));

TEST(QkTransformTest, AVectorWithoutLengthBecomesZeroWithZeroGradient) {
  constexpr std::int64_t kSize = 4;
  for (const float value : {0.0f, 1e-8f}) {
    Floats x({1, 3 * kSize}, value), inverse({1, 2, 1}, NAN), g({1, 3 * kSize}, 1.0f);
    const QkTransform t{.qkv = x.tensor(), .heads = 1, .unit = true, .inverse_norm = inverse.tensor()};
    ops().qk_transform_forward(t);
    ops().qk_transform_backward(t, g.tensor());
    for (std::int64_t i = 0; i < 2 * kSize; ++i) {
      EXPECT_EQ(x[i], 0.0f);
      EXPECT_EQ(g[i], 0.0f);
    }
    for (std::int64_t i = 2 * kSize; i < 3 * kSize; ++i) {  // values are not touched
      EXPECT_EQ(x[i], value);
      EXPECT_EQ(g[i], 1.0f);
    }
  }
}

TEST(QkTransformTest, WrongArgumentsAreRefused) {
  Floats x({2, 3 * 3}), inverse({2, 2, 1}), table({4, 1, 2});
  Ints positions({2}, {0, 4});
  EXPECT_THROW(ops().qk_transform_forward({.qkv = x.tensor(), .heads = 1, .unit = true}), std::logic_error);
  EXPECT_THROW(ops().qk_transform_forward({.qkv = x.tensor(), .heads = 2}), std::logic_error);
  EXPECT_THROW(ops().qk_transform_forward({.qkv = x.tensor(), .heads = 1, .rotary = table.tensor(), .positions = positions.tensor()}),
               std::logic_error);  // an odd head size
  Floats even({2, 3 * 2});
  EXPECT_THROW(ops().qk_transform_forward({.qkv = even.tensor(), .heads = 1, .rotary = table.tensor(), .positions = positions.tensor()}),
               std::logic_error);  // position 4 of 4
}

}  // namespace
}  // namespace tessera::testing
