// Linear layers and the fused classifier on the GPU, against their definitions in double.

#include "kernels/cuda/linear.h"

#include <cstring>
#include <tuple>

#include "ops_cuda.h"

namespace tessera {
namespace {

using namespace cuda_test;
using cuda::Linear;

double gelu(double x) { return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x))); }
double gelu_slope(double x) {
  const double t = std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x));
  return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * std::sqrt(2 / M_PI) * (1 + 3 * 0.044715 * x * x);
}

/// to [n, m] = a [n, k] b [k, m], each with strides of its rows and columns.
struct Strided {
  const Doubles& values;
  std::int64_t row, column;
};
Doubles product(std::int64_t n, std::int64_t m, std::int64_t k, Strided a, Strided b) {
  Doubles to(static_cast<std::size_t>(n * m));
  for (std::int64_t i = 0; i < n; ++i) {
    for (std::int64_t j = 0; j < m; ++j) {
      double sum = 0;
      for (std::int64_t l = 0; l < k; ++l) sum += a.values[i * a.row + l * a.column] * b.values[l * b.row + j * b.column];
      to[i * m + j] = sum;
    }
  }
  return to;
}
/// The bound on a sum of `count` products in f32, relative to its largest element: tensor cores cut off at every sixteenth product.
double sum_error(std::int64_t count) { return (static_cast<double>(count) / 16 + 20) * 0x1p-22; }

/// One a policy; the first has everything in epilogues, the second nothing.
Linear& linear(bool fused) {
  static Linear* const made[2] = {new Linear({false, false}), new Linear({true, true})};
  return *made[fused];
}

struct Size {
  std::int64_t n, k, m;
};
const Size kSizes[] = {{1, 64, 192}, {1, 1024, 8}, {3, 8, 8}, {1000, 136, 264}, {129, 768, 1024}, {4099, 64, 72}};

TEST(CudaLinear, ForwardMatchesTheDefinition) {
  TESSERA_NEEDS_GPU();
  for (const auto& [n, k, m] : kSizes) {
    const Doubles x = random_bf16(n * k, 1), w = random_bf16(m * k, 2, 1 / std::sqrt(static_cast<double>(k))), bias = random_bf16(m, 3);
    const OnDevice dev_x(DType::bf16, {n, k}, x), dev_w(DType::bf16, {m, k}, w), dev_bias(DType::bf16, {m}, bias);
    const Doubles sums = product(n, m, k, {x, k, 1}, {w, 1, k});
    for (const bool with_bias : {false, true}) {
      Doubles z = sums;
      for (std::size_t i = 0; with_bias && i < z.size(); ++i) z[i] += bias[i % m];
      const std::string what = Shape({n, k, m}).str() + (with_bias ? " with bias" : "");
      OnDevice y(DType::bf16, {n, m});
      LinearForward a{.x = dev_x, .w = dev_w, .y = y};
      if (with_bias) a.bias = dev_bias;
      gpu().linear_forward(a);
      expect_within_twice(y.doubles(), z, bf16(z), what);

      Doubles exact(z.size()), rounded(z.size());
      std::transform(z.begin(), z.end(), exact.begin(), gelu);
      std::transform(z.begin(), z.end(), rounded.begin(), [](double v) { return bf16(gelu(bf16(v))); });
      for (const bool fused : {false, true}) {
        OnDevice argument(DType::bf16, {n, m});
        y.poison();
        a.activation = Activation::gelu;
        a.pre_activation = argument;
        linear(fused).forward(context(), a);
        expect_within_twice(y.doubles(), exact, rounded, what + (fused ? " gelu, fused" : " gelu"));
        expect_within_twice(argument.doubles(), z, bf16(z), what + (fused ? " argument, fused" : " argument"));
      }
    }
  }
}

/// Row r of a product with many rows, and of one with r + 1 or with only that one.
TEST(CudaLinear, BatchInvariantRowsHaveTheSameBitsInAnyCompany) {
  TESSERA_NEEDS_GPU();
  Linear invariant({.batch_invariant = true});
  constexpr std::int64_t kMost = 1024;
  for (const auto& [k, m] :
       {std::pair<std::int64_t, std::int64_t>{64, 192}, {128, 512}, {768, 2304}, {1024, 1024}, {1024, 4096}, {4096, 1024}, {1024, 50304}}) {
    const std::int64_t most = m > 8192 ? 200 : k == 1024 && m == 1024 ? 32768 : kMost;
    const Doubles x = random_bf16(most * k, 1), w = random_bf16(m * k, 2, 1 / std::sqrt(static_cast<double>(k))), bias = random_bf16(m, 3);
    const OnDevice dev_x(DType::bf16, {most, k}, x), dev_w(DType::bf16, {m, k}, w), dev_bias(DType::bf16, {m}, bias);
    for (const bool with_bias : {false, true})
      for (const Activation activation : {Activation::none, Activation::gelu}) {
        if (m > 8192 && (with_bias || activation == Activation::gelu)) continue;
        OnDevice all(DType::bf16, {most, m}), argument(DType::bf16, {most, m});
        LinearForward a{.x = dev_x, .w = dev_w, .y = all, .activation = activation, .pre_activation = argument};
        if (with_bias) a.bias = dev_bias;
        invariant.forward(context(), a);
        const auto expected = all.bytes();
        const auto row_bytes = static_cast<std::size_t>(m) * 2;
        const auto same = [&](std::int64_t first, std::int64_t count) {
          OnDevice y(DType::bf16, {count, m}), z(DType::bf16, {count, m});
          a.x = dev_x.tensor().slice(first * k, count * k).view({count, k}), a.y = y, a.pre_activation = z;
          invariant.forward(context(), a);
          const auto found = y.bytes();
          return std::memcmp(found.data(), expected.data() + static_cast<std::size_t>(first) * row_bytes, found.size()) == 0;
        };
        for (const std::int64_t count : {1, 2, 3, 7, 8, 9, 16, 17, 63, 64, 65, 127, 128, 129, 200, 511, 512, 777, 4099})
          if (count <= most) {
            EXPECT_TRUE(same(0, count)) << count << " rows of [" << k << ", " << m << "]" << (with_bias ? " bias" : "")
                                        << (activation == Activation::gelu ? " gelu" : "");
          }
        EXPECT_TRUE(same(37, 1)) << "row 37 of [" << k << ", " << m << "]";
        EXPECT_TRUE(same(most - 1, 1)) << "the last row of [" << k << ", " << m << "]";
      }
  }
  for (const std::string& line : invariant.describe()) {
    EXPECT_EQ(line.find("no algorithm"), std::string::npos) << line;
    if (line.starts_with("[1, ")) std::printf("%s\n", line.c_str());
  }
}

TEST(CudaLinear, BackwardMatchesTheDefinition) {
  TESSERA_NEEDS_GPU();
  for (const auto& [n, k, m] : kSizes) {
    const std::string what = Shape({n, k, m}).str();
    const Doubles x = random_bf16(n * k, 1), w = random_bf16(m * k, 2, 1 / std::sqrt(static_cast<double>(m))), dy = random_bf16(n * m, 3);
    const Doubles argument = random_bf16(n * k, 4), dw0 = random_f32(m * k, 5), dbias0 = random_f32(m, 6);
    const OnDevice dev_x(DType::bf16, {n, k}, x), dev_w(DType::bf16, {m, k}, w), dev_dy(DType::bf16, {n, m}, dy);
    const OnDevice dev_argument(DType::bf16, {n, k}, argument);
    OnDevice dx(DType::bf16, {n, k});
    const OnDevice dw(DType::f32, {m, k}, dw0), dbias(DType::f32, {m}, dbias0);
    gpu().linear_backward({.dy = dev_dy, .x = dev_x, .w = dev_w, .dx = dx, .dw = dw, .dbias = dbias});
    const Doubles wanted_dx = product(n, k, m, {dy, m, 1}, {w, k, 1});
    expect_within_twice(dx.doubles(), wanted_dx, bf16(wanted_dx), what + " dx");
    // Added to what another layer gave the same input, and rounded once.
    const OnDevice sum(DType::bf16, {n, k}, argument);
    gpu().linear_backward({.dy = dev_dy, .w = dev_w, .dx = sum, .add_dx = true});
    Doubles wanted_sum = wanted_dx;
    for (std::size_t i = 0; i < wanted_sum.size(); ++i) wanted_sum[i] += argument[i];
    expect_within_twice(sum.doubles(), wanted_sum, bf16(wanted_sum), what + " dx, added");
    Doubles wanted_dw = product(m, k, n, {dy, 1, m}, {x, k, 1}), wanted_dbias = dbias0;
    for (std::size_t i = 0; i < wanted_dw.size(); ++i) wanted_dw[i] += dw0[i];
    for (std::size_t i = 0; i < dy.size(); ++i) wanted_dbias[i % m] += dy[i];
    expect_close(dw.doubles(), wanted_dw, sum_error(n), what + " dw");
    expect_close(dbias.doubles(), wanted_dbias, 1e-5, what + " dbias");

    Doubles exact(wanted_dx.size()), rounded(wanted_dx.size());
    for (std::size_t i = 0; i < exact.size(); ++i) {
      exact[i] = wanted_dx[i] * gelu_slope(argument[i]);
      rounded[i] = bf16(bf16(wanted_dx[i]) * gelu_slope(argument[i]));
    }
    for (const bool fused : {false, true}) {
      dx.poison();
      linear(fused).backward(context(), {.dy = dev_dy, .w = dev_w, .dx = dx, .gelu_argument = dev_argument});
      expect_within_twice(dx.doubles(), exact, rounded, what + (fused ? " dx gelu', fused" : " dx gelu'"));
    }
  }
}

TEST(CudaLinear, ActivationsGoIntoTheEpilogue) {
  TESSERA_NEEDS_GPU();
  constexpr std::int64_t kRows = 512, kWidth = 256;
  const OnDevice x(DType::bf16, {kRows, kWidth}, random_bf16(kRows * kWidth, 1)), w(DType::bf16, {kWidth, kWidth}, random_bf16(kWidth * kWidth, 2));
  const OnDevice y(DType::bf16, {kRows, kWidth}), z(DType::bf16, {kRows, kWidth}), dx(DType::bf16, {kRows, kWidth});
  Linear fused;
  fused.forward(context(), {.x = x, .w = w, .y = y, .activation = Activation::gelu, .pre_activation = z});
  fused.backward(context(), {.dy = x, .w = w, .dx = dx, .gelu_argument = z});
  const std::vector<std::string> lines = fused.describe();
  ASSERT_EQ(lines.size(), 2u) << "a product of its own was needed";
  for (const std::string& line : lines) EXPECT_EQ(line.find("no algorithm"), std::string::npos) << line;
}

TEST(CudaLinear, EveryAnswerOfCublasGivesTheSameFunction) {
  TESSERA_NEEDS_GPU();
  constexpr std::int64_t n = 1000, k = 256, m = 512;
  const Doubles dy = random_bf16(n * m, 1), w = random_bf16(m * k, 2, 1 / std::sqrt(static_cast<double>(m))), argument = random_bf16(n * k, 3);
  const OnDevice dev_dy(DType::bf16, {n, m}, dy), dev_w(DType::bf16, {m, k}, w), dev_argument(DType::bf16, {n, k}, argument);
  const Doubles plain = product(n, k, m, {dy, m, 1}, {w, k, 1});
  Doubles exact(plain.size()), rounded(plain.size());
  for (std::size_t i = 0; i < plain.size(); ++i) {
    exact[i] = plain[i] * gelu_slope(argument[i]);
    rounded[i] = bf16(bf16(plain[i]) * gelu_slope(argument[i]));
  }
  OnDevice dx(DType::bf16, {n, k});
  const auto run = [&](Linear& linear, const std::string& what) {
    dx.poison();
    linear.backward(context(), {.dy = dev_dy, .w = dev_w, .dx = dx, .gelu_argument = dev_argument});
    expect_within_twice(dx.doubles(), exact, rounded, what);
  };
  constexpr int kAnswers = 32;
  int runs = 0;
  for (; runs < kAnswers; ++runs) {
    Linear one({.answers = kAnswers, .answer = runs});
    try {
      run(one, "answer " + std::to_string(runs));
    } catch (const std::logic_error&) {  // neither the fused product nor the plain one has so many
      break;
    }
  }
  EXPECT_GE(runs, 1);
  EXPECT_THROW(Linear({.answers = 1, .answer = 1}).backward(context(), {.dy = dev_dy, .w = dev_w, .dx = dx}), std::logic_error);
  // The choice is a matter of the answers alone.
  Linear first({.answers = kAnswers}), second({.answers = kAnswers});
  run(first, "the preferred answer"), run(second, "the preferred answer");
  EXPECT_EQ(first.describe(), second.describe());
}

TEST(CudaLinear, RemembersAnEndOfShapes) {
  TESSERA_NEEDS_GPU();
  constexpr std::int64_t kRows = static_cast<std::int64_t>(Linear::kMostPlans) + 40, kWidth = 64;
  const OnDevice x(DType::bf16, {kRows, kWidth}, random_bf16(kRows * kWidth, 1)), w(DType::bf16, {kWidth, kWidth}, random_bf16(kWidth * kWidth, 2));
  OnDevice y(DType::bf16, {kRows, kWidth});
  Linear linear;
  const auto forward = [&](std::int64_t rows) {
    linear.forward(context(), {.x = x.tensor().view({rows, kWidth}), .w = w, .y = y.tensor().view({rows, kWidth})});
  };
  y.poison();
  forward(100);
  const auto before = y.bytes();
  for (std::int64_t rows = 1; rows <= kRows; ++rows) forward(rows);
  EXPECT_EQ(linear.describe().size(), 40u);
  y.poison();
  forward(100);
  EXPECT_EQ(y.bytes(), before);
}

TEST(CudaLinear, TenRunsGiveTheSameBits) {
  TESSERA_NEEDS_GPU();
  constexpr std::int64_t kRows = 8192, kWidth = 256, kWide = 1024;  // the sum over rows is split
  const OnDevice x(DType::bf16, {kRows, kWidth}, random_bf16(kRows * kWidth, 1)), w(DType::bf16, {kWide, kWidth}, random_bf16(kWide * kWidth, 2));
  const OnDevice dy(DType::bf16, {kRows, kWide}, random_bf16(kRows * kWide, 3)), bias(DType::bf16, {kWide}, random_bf16(kWide, 4));
  const OnDevice y(DType::bf16, {kRows, kWide}), z(DType::bf16, {kRows, kWide}), dx(DType::bf16, {kRows, kWidth});
  OnDevice dw(DType::f32, {kWide, kWidth}), dbias(DType::f32, {kWide});
  const auto run = [&] {
    dw.set(Doubles(kWide * kWidth, 0.25));
    dbias.set(Doubles(kWide, 0.5));
    gpu().linear_forward({.x = x, .w = w, .bias = bias, .y = y, .activation = Activation::gelu, .pre_activation = z});
    gpu().linear_backward({.dy = dy, .x = x, .w = w, .dx = dx, .gelu_argument = x, .dw = dw, .dbias = dbias});
    std::vector<unsigned char> all;
    for (const OnDevice* t : {&y, &z, &dx, static_cast<const OnDevice*>(&dw), static_cast<const OnDevice*>(&dbias)}) {
      const auto bytes = t->bytes();
      all.insert(all.end(), bytes.begin(), bytes.end());
    }
    return all;
  };
  expect_repeatable(run, "a linear layer");
}

TEST(CudaLinear, WrongArgumentsAreRefused) {
  TESSERA_NEEDS_GPU();
  const OnDevice x(DType::bf16, {4, 16}), w(DType::bf16, {8, 16}), y(DType::bf16, {4, 8}), f32(DType::f32, {4, 8}), large(DType::bf16, {128});
  EXPECT_THROW(gpu().linear_forward({.x = x, .w = w, .y = f32}), std::logic_error);
  EXPECT_THROW(gpu().linear_forward({.x = x, .w = w, .y = x}), std::logic_error);
  EXPECT_THROW(gpu().linear_forward({.x = large.tensor().slice(1, 64), .w = w, .y = y}), std::logic_error);  // not on 16 bytes
  EXPECT_THROW(gpu().linear_forward({.x = x, .w = w, .y = y, .activation = Activation::gelu}), std::logic_error);
  EXPECT_THROW(gpu().linear_backward({.dy = y, .x = x, .w = w, .dw = w}), std::logic_error);  // gradients are f32
  EXPECT_THROW(gpu().linear_backward({.dy = y, .w = w, .dx = x, .add_dx = true, .gelu_argument = x}), std::logic_error);
}

// -- classifier -------------------------------------------------------------------------------------------------------

struct Answer {
  Doubles logits, losses, dx, dw;
};
/// In double; with `rounded`, what an implementation stores in bf16 is rounded there: logits, their gradients, dx.
Answer classify(const Doubles& x, const Doubles& w, const Doubles& targets, std::int64_t vocabulary, std::int64_t width, double scale,
                const Doubles& dw0, bool rounded) {
  const auto rows = static_cast<std::int64_t>(targets.size());
  Answer a{product(rows, vocabulary, width, {x, width, 1}, {w, 1, width}), {}, {}, dw0};
  if (rounded) a.logits = bf16(a.logits);
  Doubles gradient(a.logits.size());
  for (std::int64_t n = 0; n < rows; ++n) {
    const double* l = a.logits.data() + n * vocabulary;
    const double highest = *std::max_element(l, l + vocabulary);
    double sum = 0;
    for (std::int64_t v = 0; v < vocabulary; ++v) sum += std::exp(l[v] - highest);
    const auto target = static_cast<std::int64_t>(targets[n]);
    a.losses.push_back(target < 0 ? 0 : std::log(sum) + highest - l[target]);
    for (std::int64_t v = 0; v < vocabulary; ++v) {
      const double g = target < 0 ? 0 : scale * (std::exp(l[v] - highest) / sum - (v == target ? 1 : 0));
      gradient[n * vocabulary + v] = rounded ? bf16(g) : g;
    }
  }
  a.dx = product(rows, width, vocabulary, {gradient, vocabulary, 1}, {w, width, 1});
  if (rounded) a.dx = bf16(a.dx);
  const Doubles added = product(vocabulary, width, rows, {gradient, 1, vocabulary}, {x, width, 1});
  for (std::size_t i = 0; i < added.size(); ++i) a.dw[i] += added[i];
  return a;
}

struct ClassifierSize {
  std::int64_t rows, width, vocabulary, padded, chunk;
};
class CudaClassifier : public ::testing::TestWithParam<ClassifierSize> {};

TEST_P(CudaClassifier, MatchesTheDefinition) {
  TESSERA_NEEDS_GPU();
  const auto [rows, width, vocabulary, padded, chunk] = GetParam();
  const Doubles x = random_bf16(rows * width, 1), dw0 = random_f32(padded * width, 3, 0.01);
  Doubles w = random_bf16(padded * width, 2, 2 / std::sqrt(static_cast<double>(width)));
  std::fill(w.begin() + vocabulary * width, w.end(), 100.0);  // padding that must not be seen
  Doubles targets = random_i32(rows, 0, static_cast<int>(vocabulary) - 1, 4);
  for (std::int64_t n = 2; n < rows; n += 5) targets[n] = -1;
  const double scale = 1.0 / 64;
  const Answer exact = classify(x, w, targets, vocabulary, width, scale, dw0, false),
               rounded = classify(x, w, targets, vocabulary, width, scale, dw0, true);

  const OnDevice dev_x(DType::bf16, {rows, width}, x), dev_w(DType::bf16, {padded, width}, w), dev_targets(DType::i32, {rows}, targets);
  OnDevice losses(DType::f32, {rows}), predictions(DType::i32, {rows}), dx(DType::bf16, {rows, width}), workspace(DType::bf16, {chunk, padded});
  const OnDevice dw(DType::f32, {padded, width}, dw0);
  Classifier a{.x = dev_x, .w = dev_w, .vocabulary = vocabulary, .targets = dev_targets, .losses = losses, .workspace = workspace};
  gpu().classifier(a);
  const std::vector<unsigned char> forward_alone = losses.bytes();
  losses.poison();
  workspace.poison();
  a.predictions = predictions, a.dx = dx, a.dw = dw, a.gradient_scale = static_cast<float>(scale);
  gpu().classifier(a);

  EXPECT_EQ(losses.bytes(), forward_alone);
  const Doubles got_losses = losses.doubles(), got_dx = dx.doubles(), got_dw = dw.doubles(), got_predictions = predictions.doubles();
  expect_within_twice(got_losses, exact.losses, rounded.losses, "losses", 1e-4);  // one logit of many rounded the other way
  expect_within_twice(got_dx, exact.dx, rounded.dx, "dx");
  expect_within_twice(got_dw, exact.dw, rounded.dw, "dw", 1e-6);
  for (std::size_t i = static_cast<std::size_t>(vocabulary * width); i < got_dw.size(); ++i) ASSERT_EQ(got_dw[i], dw0[i]) << "padding of dw";
  for (std::int64_t n = 0; n < rows; ++n) {
    if (targets[n] < 0) {
      EXPECT_EQ(got_losses[n], 0) << n;
      for (std::int64_t i = 0; i < width; ++i) ASSERT_EQ(got_dx[n * width + i], 0) << n;
    }
    const double* l = exact.logits.data() + n * vocabulary;
    const double highest = *std::max_element(l, l + vocabulary), predicted = got_predictions[n];
    ASSERT_TRUE(predicted >= 0 && predicted < static_cast<double>(vocabulary)) << predicted;
    EXPECT_GE(l[static_cast<std::int64_t>(predicted)], highest - std::abs(highest) * 0x1p-7) << "prediction of row " << n;  // two roundings apart
  }
}

INSTANTIATE_TEST_SUITE_P(All, CudaClassifier,
                         ::testing::Values(ClassifierSize{1, 64, 136, 136, 1}, ClassifierSize{3, 8, 5, 8, 8}, ClassifierSize{37, 64, 130, 192, 8},
                                           ClassifierSize{100, 136, 1000, 1024, 33}, ClassifierSize{1000, 16, 257, 264, 1},
                                           ClassifierSize{9, 16, 50257, 50304, 4}));

TEST(CudaClassifierTies, TheLowestIndexWins) {
  TESSERA_NEEDS_GPU();
  constexpr std::int64_t kRows = 40, kWidth = 8, kVocabulary = 3001, kPadded = 3008;  // logits are whole numbers up to 8: many ties
  const Doubles x = random_i32(kRows * kWidth, -1, 1, 1), w = random_i32(kPadded * kWidth, -1, 1, 2);
  const Doubles logits = product(kRows, kVocabulary, kWidth, {x, kWidth, 1}, {w, 1, kWidth});
  Doubles wanted;
  for (std::int64_t n = 0; n < kRows; ++n) {
    const auto row = logits.begin() + n * kVocabulary;
    wanted.push_back(static_cast<double>(std::max_element(row, row + kVocabulary) - row));
  }
  const OnDevice dev_x(DType::bf16, {kRows, kWidth}, x), dev_w(DType::bf16, {kPadded, kWidth}, w), targets(DType::i32, {kRows}, Doubles(kRows, 7));
  const OnDevice losses(DType::f32, {kRows}), predictions(DType::i32, {kRows}), workspace(DType::bf16, {16, kPadded});
  gpu().classifier(
      {.x = dev_x, .w = dev_w, .vocabulary = kVocabulary, .targets = targets, .losses = losses, .predictions = predictions, .workspace = workspace});
  EXPECT_EQ(predictions.doubles(), wanted);
}

TEST(CudaClassifierBits, TenRunsGiveTheSameOnes) {
  TESSERA_NEEDS_GPU();
  constexpr std::int64_t kRows = 777, kWidth = 64, kVocabulary = 1000, kPadded = 1024;
  const OnDevice x(DType::bf16, {kRows, kWidth}, random_bf16(kRows * kWidth, 1)), w(DType::bf16, {kPadded, kWidth}, random_bf16(kPadded * kWidth, 2));
  const OnDevice targets(DType::i32, {kRows}, random_i32(kRows, -1, kVocabulary - 1, 3));
  const OnDevice losses(DType::f32, {kRows}), predictions(DType::i32, {kRows}), dx(DType::bf16, {kRows, kWidth}),
      workspace(DType::bf16, {256, kPadded});
  OnDevice dw(DType::f32, {kPadded, kWidth});
  const auto run = [&] {
    dw.set(Doubles(kPadded * kWidth, 1));
    gpu().classifier({.x = x,
                      .w = w,
                      .vocabulary = kVocabulary,
                      .targets = targets,
                      .losses = losses,
                      .predictions = predictions,
                      .dx = dx,
                      .dw = dw,
                      .gradient_scale = 0.001f,
                      .workspace = workspace});
    std::vector<unsigned char> all;
    for (const OnDevice* t : {&losses, &predictions, &dx, static_cast<const OnDevice*>(&dw)}) {
      const auto bytes = t->bytes();
      all.insert(all.end(), bytes.begin(), bytes.end());
    }
    return all;
  };
  expect_repeatable(run, "the classifier");
}

}  // namespace
}  // namespace tessera
