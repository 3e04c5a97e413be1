// Token and position embeddings.

#include "kernels/cpu/check.h"
#include "kernels/cpu/ops.h"
#include "kernels/cpu/parallel.h"

namespace tessera::cpu {

namespace {

/// Row numbers of an embedding of `rows` rows, checked.
const std::int32_t* indices(const char* operation, const char* name, const Tensor& t, std::int64_t count, std::int64_t rows) {
  const std::int32_t* index = elements<std::int32_t>(operation, name, t, count);
  for (std::int64_t n = 0; n < count; ++n) {
    if (index[n] < 0 || index[n] >= rows) {
      throw std::logic_error(fmt::format("{}: {}[{}] is {}, and the embedding has {} rows", operation, name, n, index[n], rows));
    }
  }
  return index;
}

}  // namespace

void embedding_forward(const Tensor& out, const Tensor& tokens, const Tensor& positions, const Tensor& wte, const Tensor& wpe) {
  constexpr const char* kOp = "embedding_forward";
  require(wte.shape.rank == 2 && (!wpe || wpe.shape.rank == 2), kOp, "wte and wpe must be matrices");
  const std::int64_t rows = tokens.numel(), columns = wte.shape[1];
  const std::int32_t* token = indices(kOp, "tokens", tokens, rows, wte.shape[0]);
  const std::int32_t* position = wpe ? indices(kOp, "positions", positions, rows, wpe.shape[0]) : nullptr;
  const float* token_rows = elements<float>(kOp, "wte", wte, wte.shape[0] * columns);
  const float* position_rows = optional_elements<float>(kOp, "wpe", wpe, wpe.shape[0] * columns);
  float* to = elements<float>(kOp, "out", out, rows * columns);
  parallel_ranges(rows, 64, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t n = first; n < last; ++n) {
      const float* a = token_rows + token[n] * columns;
      if (position_rows) {
        const float* b = position_rows + position[n] * columns;
#pragma omp simd
        for (std::int64_t i = 0; i < columns; ++i) to[n * columns + i] = a[i] + b[i];
      } else {
        std::copy_n(a, columns, to + n * columns);
      }
    }
  });
}

void embedding_backward(const Tensor& dout, const Tensor& tokens, const Tensor& positions, const Tensor& dwte, const Tensor& dwpe) {
  constexpr const char* kOp = "embedding_backward";
  require(dwte.shape.rank == 2 && (!dwpe || dwpe.shape.rank == 2), kOp, "dwte and dwpe must be matrices");
  const std::int64_t rows = tokens.numel(), columns = dwte.shape[1];
  const std::int32_t* token = indices(kOp, "tokens", tokens, rows, dwte.shape[0]);
  const std::int32_t* position = dwpe ? indices(kOp, "positions", positions, rows, dwpe.shape[0]) : nullptr;
  const float* from = elements<float>(kOp, "dout", dout, rows * columns);
  float* token_rows = elements<float>(kOp, "dwte", dwte, dwte.shape[0] * columns);
  float* position_rows = optional_elements<float>(kOp, "dwpe", dwpe, dwpe.shape[0] * columns);
  // Many rows may share a token, so that threads share out columns: each sums its own, over the rows in order.
  const auto scatter = [&](const std::int32_t* index, float* to, std::int64_t first, std::int64_t last) {
    for (std::int64_t n = 0; n < rows; ++n) {
      float* sum = to + index[n] * columns;
      const float* add = from + n * columns;
#pragma omp simd
      for (std::int64_t i = first; i < last; ++i) sum[i] += add[i];
    }
  };
  parallel_ranges(columns, 64, [&](std::int64_t first, std::int64_t last) {
    scatter(token, token_rows, first, last);
    if (position_rows) scatter(position, position_rows, first, last);
  });
}

}  // namespace tessera::cpu
