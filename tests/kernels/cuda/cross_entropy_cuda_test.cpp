// Softmax cross-entropy of bf16 logits, in place, on the GPU.

#include "ops_cuda.h"

namespace tessera {
namespace {

using namespace cuda_test;

struct Case {
  std::int64_t rows, padded, vocabulary;
  double spread = 3;  // standard deviation of the logits
};

struct Wanted {
  Doubles losses, gradients, predictions;
};

/// The definition, in double.
Wanted definition(const Case& c, const Doubles& logits, const Doubles& targets, double scale) {
  Wanted w{{}, Doubles(c.rows * c.padded, 0.0), {}};
  for (std::int64_t n = 0; n < c.rows; ++n) {
    const double* x = logits.data() + n * c.padded;
    std::int64_t best = 0;
    for (std::int64_t v = 1; v < c.vocabulary; ++v) best = x[v] > x[best] ? v : best;
    w.predictions.push_back(static_cast<double>(best));
    if (targets[n] < 0) {
      w.losses.push_back(0);
      continue;
    }
    double sum = 0;
    for (std::int64_t v = 0; v < c.vocabulary; ++v) sum += std::exp(x[v] - x[best]);
    const auto target = static_cast<std::int64_t>(targets[n]);
    w.losses.push_back(std::log(sum) + x[best] - x[target]);
    for (std::int64_t v = 0; v < c.vocabulary; ++v) w.gradients[n * c.padded + v] = scale * (std::exp(x[v] - x[best]) / sum - (v == target));
  }
  return w;
}

class CudaCrossEntropy : public ::testing::TestWithParam<Case> {};

TEST_P(CudaCrossEntropy, LossesGradientsAndPredictions) {
  TESSERA_NEEDS_GPU();
  const Case c = GetParam();
  constexpr double kScale = 0.3125;
  Doubles values = random_bf16(c.rows * c.padded, 1, c.spread), targets = random_i32(c.rows, 0, static_cast<int>(c.vocabulary) - 1, 2);
  for (std::int64_t n = 0; n < c.rows; ++n) {
    std::fill(values.begin() + n * c.padded + c.vocabulary, values.begin() + (n + 1) * c.padded, NAN);  // padding takes no part
    if (n % 5 == 3) targets[n] = -1;
    if (n % 7 == 2) targets[n] = static_cast<double>(c.vocabulary - 1);
  }
  const Wanted wanted = definition(c, values, targets, kScale);
  const OnDevice target(DType::i32, {c.rows}, targets);
  OnDevice logits(DType::bf16, {c.rows, c.padded}), losses(DType::f32, {c.rows}), predictions(DType::i32, {c.rows});
  const auto run = [&](bool gradient, bool predict) {
    logits.set(values);
    losses.poison();
    predictions.poison();
    cuda::cross_entropy(context(), logits, c.vocabulary, target, losses, predict ? predictions.tensor() : Tensor{}, gradient, kScale);
  };

  run(true, true);
  const Doubles got = logits.doubles(), loss = losses.doubles();
  EXPECT_EQ(predictions.doubles(), wanted.predictions);
  for (std::int64_t n = 0; n < c.rows; ++n) ASSERT_NEAR(loss[n], wanted.losses[n], 4e-6 * std::max(1.0, wanted.losses[n])) << n;
  expect_within_twice(got, wanted.gradients, bf16(wanted.gradients), "gradient", 1e-6 * kScale);
  for (std::int64_t n = 0; n < c.rows; ++n) {  // and each by its own size: one rounding, and what the exponential adds to it
    for (std::int64_t v = 0; v < c.padded; ++v) {
      const double exact = wanted.gradients[n * c.padded + v];
      const double cancelled = v == static_cast<std::int64_t>(targets[n]) ? 1e-6 * kScale : 0.0;
      ASSERT_NEAR(got[n * c.padded + v], exact, 1.01 / 256 * std::abs(exact) + cancelled + 1e-37) << n << ", " << v;
    }
  }

  const auto gradient_bytes = logits.bytes(), loss_bytes = losses.bytes();
  run(true, false);
  EXPECT_EQ(logits.bytes(), gradient_bytes);
  EXPECT_EQ(losses.bytes(), loss_bytes);
  logits.set(values);
  const auto untouched = logits.bytes();
  run(false, true);
  EXPECT_EQ(logits.bytes(), untouched);
  EXPECT_EQ(losses.bytes(), loss_bytes);
  EXPECT_EQ(predictions.doubles(), wanted.predictions);
}

// 150 rows: more than a GPU has multiprocessors, so that blocks take several. Two rows of 50,304 fit into a multiprocessor's shared memory, one of
// 80,000, none of 131,072.
INSTANTIATE_TEST_SUITE_P(Cases, CudaCrossEntropy,
                         ::testing::Values(Case{1, 8, 1}, Case{3, 8, 8}, Case{1000, 16, 13}, Case{10000, 264, 257}, Case{1000, 512, 512},
                                           Case{257, 4104, 4097}, Case{150, 50304, 50257}, Case{3, 50304, 50257, 20}, Case{150, 80000, 79999},
                                           Case{150, 131072, 131071}),
                         [](const auto& info) {
                           return std::to_string(info.param.rows) + "x" + std::to_string(info.param.vocabulary) + "of" +
                                  std::to_string(info.param.padded) + "spread" + std::to_string(static_cast<int>(info.param.spread));
                         });

TEST(CudaCrossEntropyBits, Repeat) {
  TESSERA_NEEDS_GPU();
  for (const std::int64_t padded : {264, 50304, 80000, 131072}) {
    constexpr std::int64_t kRows = 40;
    const Doubles values = random_bf16(kRows * padded, 1, 3);
    const OnDevice target(DType::i32, {kRows}, random_i32(kRows, -1, static_cast<int>(padded) - 8, 2));
    OnDevice logits(DType::bf16, {kRows, padded}), losses(DType::f32, {kRows});
    expect_repeatable(
        [&] {
          logits.set(values);
          cuda::cross_entropy(context(), logits, padded - 7, target, losses, {}, true, 1e-3f);
          auto all = logits.bytes();
          const auto more = losses.bytes();
          all.insert(all.end(), more.begin(), more.end());
          return all;
        },
        "cross-entropy");
  }
}

TEST(CudaCrossEntropyEdges, HugeLogitsDoNotOverflow) {
  TESSERA_NEEDS_GPU();
  Doubles row(64, -3e4);
  row[0] = 3e4, row[1] = 1e4, row[63] = 3e38;  // the last is padding
  row = bf16(row);
  Doubles values;
  for (int n = 0; n < 3; ++n) values.insert(values.end(), row.begin(), row.end());
  const OnDevice logits(DType::bf16, {3, 64}, values), target(DType::i32, {3}, {0, 1, 2}), losses(DType::f32, {3});
  cuda::cross_entropy(context(), logits, 63, target, losses, {}, true, 1);
  const Doubles got = losses.doubles(), g = logits.doubles();
  for (int n = 0; n < 3; ++n) EXPECT_NEAR(got[n], row[0] - row[n], 1e-6 * row[0]) << n;
  Doubles wanted(3 * 64, 0.0);
  for (int n = 0; n < 3; ++n) wanted[n * 64] += 1, wanted[n * 64 + n] -= 1;
  for (std::size_t i = 0; i < g.size(); ++i) EXPECT_NEAR(g[i], wanted[i], 1e-6) << i;
}

TEST(CudaCrossEntropyEdges, TheLowestIndexWinsATie) {
  TESSERA_NEEDS_GPU();
  for (const std::int64_t padded : {8, 512, 50304, 131072}) {
    const std::int64_t vocabulary = padded - 1, last = vocabulary - 1;
    // Equal maxima in one piece, in pieces of one thread and of others, as zeros of both signs, at the end, everywhere; none.
    const std::vector<std::vector<std::int64_t>> places{{3, 5}, {last / 2, last}, {1, last / 3}, {last}, {0}, {}};
    const auto rows = static_cast<std::int64_t>(places.size()) + 1;
    Doubles values(rows * padded, -1.0), wanted;
    for (std::int64_t n = 0; n + 1 < rows; ++n) {
      for (std::size_t i = 0; i < places[n].size(); ++i) values[n * padded + places[n][i]] = i == 0 ? -0.0 : 0.0;
      wanted.push_back(places[n].empty() ? 0.0 : static_cast<double>(places[n][0]));
      values[n * padded + vocabulary] = 5.0;  // padding
    }
    std::fill(values.end() - padded, values.end(), -INFINITY);
    wanted.push_back(0);
    const OnDevice logits(DType::bf16, {rows, padded}, values), target(DType::i32, {rows}, Doubles(rows, -1.0)), losses(DType::f32, {rows}),
        predictions(DType::i32, {rows});
    cuda::cross_entropy(context(), logits, vocabulary, target, losses, predictions, true, 1);
    EXPECT_EQ(predictions.doubles(), wanted) << padded;
    EXPECT_EQ(losses.doubles(), Doubles(rows, 0.0)) << padded;
    EXPECT_EQ(logits.doubles(), Doubles(rows * padded, 0.0)) << padded;
  }
}

TEST(CudaCrossEntropyEdges, WhatIsNotANumberShows) {
  TESSERA_NEEDS_GPU();
  for (const std::int64_t padded : {64, 50304}) {
    const std::int64_t vocabulary = padded - 3;
    Doubles values(4 * padded, 1.0);
    values[vocabulary / 2] = NAN;
    values[padded + 7] = INFINITY;
    std::fill(values.begin() + 2 * padded, values.begin() + 3 * padded, NAN);
    const OnDevice logits(DType::bf16, {4, padded}, values), target(DType::i32, {4}, {0, 1, 2, static_cast<double>(vocabulary)}),
        losses(DType::f32, {4}), predictions(DType::i32, {4});
    cuda::cross_entropy(context(), logits, vocabulary, target, losses, predictions, true, 1);
    for (const double loss : losses.doubles()) EXPECT_TRUE(std::isnan(loss));  // the last row's target is outside the vocabulary
    EXPECT_EQ(predictions.doubles(), (Doubles{0, 7, 0, 0}));
    const Doubles g = logits.doubles();
    for (std::int64_t n = 0; n < 3; ++n) {
      EXPECT_TRUE(std::isnan(g[n * padded + 7])) << n;
      for (std::int64_t v = vocabulary; v < padded; ++v) EXPECT_EQ(g[n * padded + v], 0) << n;
    }
  }
}

TEST(CudaCrossEntropyEdges, WrongArgumentsAreRefused) {
  TESSERA_NEEDS_GPU();
  const OnDevice logits(DType::bf16, {2, 16}), odd(DType::bf16, {2, 12}), target(DType::i32, {2}, {0, 1}), losses(DType::f32, {2}),
      few(DType::f32, {1});
  EXPECT_THROW(cuda::cross_entropy(context(), logits, 17, target, losses, {}, false, 1), std::logic_error);
  EXPECT_THROW(cuda::cross_entropy(context(), logits, 0, target, losses, {}, false, 1), std::logic_error);
  EXPECT_THROW(cuda::cross_entropy(context(), odd, 12, target, losses, {}, false, 1), std::logic_error);
  EXPECT_THROW(cuda::cross_entropy(context(), logits, 16, target, few, {}, false, 1), std::logic_error);
  EXPECT_THROW(cuda::cross_entropy(context(), logits, 16, losses, losses, {}, false, 1), std::logic_error);
}

}  // namespace
}  // namespace tessera
