// The fused classifier: the two or three matrix products around cross_entropy (classifier.cu), for as many rows at a time as the workspace holds.

#include <algorithm>

#include "kernels/cuda/check.h"
#include "kernels/cuda/linear.h"

namespace tessera::cuda {

void classifier(const Context& c, Linear& linear, const Classifier& a) {
  constexpr const char* kOp = "classifier";
  require(a.w.shape.rank == 2 && a.w.numel() > 0, kOp, "w must be [V, C]");
  const std::int64_t padded = a.w.shape[0], columns = a.w.shape[1], rows = a.targets.numel();
  require(padded % 8 == 0 && columns % 8 == 0, kOp, "V and C must be multiples of 8");
  require(a.vocabulary > 0 && a.vocabulary <= padded, kOp, "the vocabulary must have 1 to V rows");
  const void* w = bf16_elements(kOp, "w", a.w, padded * columns);
  auto* x = static_cast<const char*>(bf16_elements(kOp, "x", a.x, rows * columns));
  auto* dx = a.dx ? static_cast<char*>(bf16_elements(kOp, "dx", a.dx, rows * columns)) : nullptr;
  auto* dw = optional_elements<float>(kOp, "dw", a.dw, padded * columns);
  require(a.targets.dtype == DType::i32 && a.losses.dtype == DType::f32 && a.losses.numel() == rows, kOp, "targets must be i32, losses as many f32");
  require(!a.predictions || (a.predictions.dtype == DType::i32 && a.predictions.numel() == rows), kOp, "predictions must be i32, one a row");
  const std::int64_t chunk = a.workspace.numel() / padded;
  require(chunk > 0, kOp, "the workspace must hold at least one row of V logits");
  void* logits = bf16_elements(kOp, "workspace", a.workspace, a.workspace.numel());

  const bool gradient = a.dx || a.dw;
  const std::int64_t row_bytes = columns * static_cast<std::int64_t>(size_of(DType::bf16));
  for (std::int64_t start = 0; start < rows; start += chunk) {
    const std::int64_t count = std::min(chunk, rows - start);
    const char* some = x + start * row_bytes;
    linear.multiply(c, count, padded, columns, {some, false}, {w, true}, logits, DType::bf16);
    cross_entropy(c, a.workspace.view({count, padded}), a.vocabulary, a.targets.slice(start, count), a.losses.slice(start, count),
                  a.predictions ? a.predictions.slice(start, count) : Tensor{}, gradient, a.gradient_scale);
    if (dx) linear.multiply(c, count, columns, padded, {logits, false}, {w, false}, dx + start * row_bytes, DType::bf16);
    if (dw) linear.multiply(c, padded, columns, count, {logits, true}, {some, false}, dw, DType::f32);
  }
}

}  // namespace tessera::cuda
