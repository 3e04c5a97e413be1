// Token and position embeddings on the GPU.

#include "ops_cuda.h"

namespace tessera {
namespace {

using namespace cuda_test;

TEST(CudaEmbedding, ForwardIsTheSumOfTwoRowsRoundedOnce) {
  TESSERA_NEEDS_GPU();
  constexpr std::int64_t kVocabulary = 301, kPositions = 77;
  for (const std::int64_t rows : {1, 3, 1000}) {
    for (const std::int64_t columns : {8, 24, 264, 1032}) {
      const Doubles wte = random_bf16(kVocabulary * columns, 1), wpe = random_bf16(kPositions * columns, 2);
      const Doubles tokens = random_i32(rows, 0, kVocabulary - 1, 3), positions = random_i32(rows, 0, kPositions - 1, 4);
      const OnDevice table(DType::bf16, {kVocabulary, columns}, wte), position_table(DType::bf16, {kPositions, columns}, wpe);
      const OnDevice token(DType::i32, {rows}, tokens), position(DType::i32, {rows}, positions);
      OnDevice out(DType::bf16, {rows, columns});
      for (const bool with_positions : {false, true}) {
        out.poison();
        cuda::embedding_forward(context(), out, token, with_positions ? position.tensor() : Tensor{}, table,
                                with_positions ? position_table.tensor() : Tensor{});
        Doubles wanted;
        for (std::int64_t n = 0; n < rows; ++n) {
          const auto t = static_cast<std::int64_t>(tokens[n]), p = static_cast<std::int64_t>(positions[n]);
          for (std::int64_t i = 0; i < columns; ++i) wanted.push_back(bf16(wte[t * columns + i] + (with_positions ? wpe[p * columns + i] : 0.0)));
        }
        EXPECT_EQ(out.doubles(), wanted) << rows << " rows of " << columns;
      }
    }
  }
}

TEST(CudaEmbedding, AnIndexOutsideTheTableShowsAsNaNAndAddsNothing) {
  TESSERA_NEEDS_GPU();
  const Doubles ones(3 * 16, 1.0), zeros(3 * 16, 0.0);
  const OnDevice table(DType::bf16, {3, 16}, ones), token(DType::i32, {5}, {0, -1, 2, 3, 2147483647});
  OnDevice out(DType::bf16, {5, 16});
  cuda::embedding_forward(context(), out, token, {}, table, {});
  const Doubles got = out.doubles();
  for (std::size_t i = 0; i < got.size(); ++i) EXPECT_EQ(std::isnan(got[i]), i / 16 == 1 || i / 16 >= 3) << i;

  const OnDevice gradient(DType::bf16, {5, 16}, Doubles(5 * 16, 1.0)), dwte(DType::f32, {3, 16}, zeros);
  cuda::embedding_backward(context(), gradient, token, {}, dwte, {});
  const Doubles sums = dwte.doubles();
  for (std::size_t i = 0; i < sums.size(); ++i) EXPECT_EQ(sums[i], i / 16 == 1 ? 0.0 : 1.0) << i;
}

// -- backward ---------------------------------------------------------------------------------------------------------

struct Case {
  const char* name;
  Doubles tokens;
  std::int64_t columns, vocabulary;
};

/// Runs of the given lengths of tokens 3, 7, 11, ..., strewn over the rows.
Doubles runs(const std::vector<int>& lengths) {
  Doubles tokens;
  for (std::size_t r = 0; r < lengths.size(); ++r) tokens.insert(tokens.end(), lengths[r], 3.0 + 4.0 * static_cast<double>(r));
  std::shuffle(tokens.begin(), tokens.end(), std::mt19937(7));
  return tokens;
}

std::vector<Case> cases() {
  return {{"one row", {5}, 8, 6},
          {"three rows of one token", {2, 2, 2}, 24, 3},
          {"distinct tokens", runs(std::vector<int>(1000, 1)), 72, 4003},
          {"random tokens", random_i32(1000, 0, 500, 1), 1032, 501},
          {"a byte vocabulary", random_i32(20000, 0, 255, 2), 136, 256},
          {"runs about the limit of a warp", runs({127, 128, 129, 130, 1, 255, 256, 257, 64}), 264, 40},
          {"one token only", Doubles(5000, 0.0), 72, 1},
          {"a frequent token among rare ones", runs({1, 2, 9001, 3, 31, 32, 33, 700}), 200, 64},
          {"a large vocabulary", random_i32(3000, 0, 131071, 3), 16, 131072}};
}

TEST(CudaEmbedding, BackwardAddsEveryRowOnce) {  // whole numbers: sums are exact, whatever their order
  TESSERA_NEEDS_GPU();
  for (const Case& c : cases()) {
    const auto rows = static_cast<std::int64_t>(c.tokens.size());
    const Doubles d = random_i32(rows * c.columns, -8, 8, 4), start = random_i32(c.vocabulary * c.columns, -9, 9, 5);
    constexpr std::int64_t kPositions = 300;
    Doubles positions, position_start = random_i32(kPositions * c.columns, -9, 9, 6);
    for (std::int64_t n = 0; n < rows; ++n) positions.push_back(static_cast<double>(n % kPositions));
    const OnDevice gradient(DType::bf16, {rows, c.columns}, d), token(DType::i32, {rows}, c.tokens), position(DType::i32, {rows}, positions);
    const OnDevice dwte(DType::f32, {c.vocabulary, c.columns}, start), dwpe(DType::f32, {kPositions, c.columns}, position_start);
    cuda::embedding_backward(context(), gradient, token, position, dwte, dwpe);
    Doubles wanted = start;
    for (std::int64_t n = 0; n < rows; ++n) {
      for (std::int64_t i = 0; i < c.columns; ++i) {
        wanted[static_cast<std::int64_t>(c.tokens[n]) * c.columns + i] += d[n * c.columns + i];
        position_start[n % kPositions * c.columns + i] += d[n * c.columns + i];
      }
    }
    EXPECT_EQ(dwte.doubles(), wanted) << c.name;
    EXPECT_EQ(dwpe.doubles(), position_start) << c.name;
  }
}

TEST(CudaEmbedding, BackwardMatchesASumInDoubleAndRepeatsItsBits) {
  TESSERA_NEEDS_GPU();
  for (const Case& c : cases()) {
    const auto rows = static_cast<std::int64_t>(c.tokens.size());
    const Doubles d = random_bf16(rows * c.columns, 4), start = random_f32(c.vocabulary * c.columns, 5);
    const OnDevice gradient(DType::bf16, {rows, c.columns}, d), token(DType::i32, {rows}, c.tokens);
    OnDevice dwte(DType::f32, {c.vocabulary, c.columns});
    const auto run = [&] {
      dwte.set(start);
      cuda::embedding_backward(context(), gradient, token, {}, dwte, {});
      return dwte.bytes();
    };
    expect_repeatable(run, c.name);
    Doubles wanted = start;
    for (std::int64_t n = 0; n < rows; ++n) {
      for (std::int64_t i = 0; i < c.columns; ++i) wanted[static_cast<std::int64_t>(c.tokens[n]) * c.columns + i] += d[n * c.columns + i];
    }
    expect_close(dwte.doubles(), wanted, 2e-6, c.name);  // at most some hundred f32 roundings a sum, of both signs
  }
}

TEST(CudaEmbedding, WrongArgumentsAreRefused) {
  TESSERA_NEEDS_GPU();
  const OnDevice out(DType::bf16, {4, 16}), token(DType::i32, {4}, {0, 1, 2, 3}), table(DType::bf16, {4, 16}), sums(DType::f32, {4, 16});
  const OnDevice narrow(DType::bf16, {4, 8}), odd(DType::bf16, {4, 12}), odd_out(DType::bf16, {4, 12});
  EXPECT_THROW(cuda::embedding_forward(context(), sums, token, {}, table, {}), std::logic_error);
  EXPECT_THROW(cuda::embedding_forward(context(), out, token, token, table, narrow), std::logic_error);
  EXPECT_THROW(cuda::embedding_forward(context(), odd_out, token, {}, odd, {}), std::logic_error);
  EXPECT_THROW(cuda::embedding_backward(context(), out, token, {}, table, {}), std::logic_error);
  cuda::Context poor = context();
  poor.scratch_bytes = 1000;
  EXPECT_THROW(cuda::embedding_backward(poor, out, token, {}, sums, {}), std::logic_error);
}

}  // namespace
}  // namespace tessera
