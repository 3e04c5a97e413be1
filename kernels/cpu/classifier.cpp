// The fused classifier: logits, softmax cross-entropy and both gradients for as many rows at a time as the workspace holds.

#include <cmath>
#include <limits>

#include "kernels/cpu/check.h"
#include "kernels/cpu/gemm.h"
#include "kernels/cpu/ops.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/simd.h"

namespace tessera::cpu {

namespace {

float maximum(const float* x, std::int64_t n) {
  float m = -std::numeric_limits<float>::infinity();
#pragma omp simd reduction(max : m)
  for (std::int64_t i = 0; i < n; ++i) m = x[i] > m ? x[i] : m;
  return m;
}

std::int32_t first_equal(const float* x, float value, std::int64_t n) {
  const float* found = std::find(x, x + n, value);
  return found == x + n ? 0 : static_cast<std::int32_t>(found - x);  // not found: a row of NaN
}

/// x becomes e^(x - shift); returns the sum, of float sums over short pieces in double.
double exponentials(float* x, float shift, std::int64_t n) {
  constexpr std::int64_t kPiece = 512;
  double total = 0;
  for (std::int64_t first = 0; first < n; first += kPiece) {
    const std::int64_t last = std::min(n, first + kPiece);
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (std::int64_t i = first; i < last; ++i) {
      x[i] = exp_vector(x[i] - shift);
      sum += x[i];
    }
    total += sum;
  }
  return total;
}

}  // namespace

void classifier(const Classifier& a) {
  constexpr const char* kOp = "classifier";
  require(a.w.shape.rank == 2 && a.w.numel() > 0, kOp, "w must be [V, C]");
  const std::int64_t padded = a.w.shape[0], columns = a.w.shape[1], vocabulary = a.vocabulary, rows = a.targets.numel();
  require(vocabulary > 0 && vocabulary <= padded, kOp, "the vocabulary must have 1 to V rows");
  const float* x = elements<float>(kOp, "x", a.x, rows * columns);
  const float* w = elements<float>(kOp, "w", a.w, padded * columns);
  const std::int32_t* targets = elements<std::int32_t>(kOp, "targets", a.targets, rows);
  float* losses = elements<float>(kOp, "losses", a.losses, rows);
  std::int32_t* predictions = optional_elements<std::int32_t>(kOp, "predictions", a.predictions, rows);
  float* dx = optional_elements<float>(kOp, "dx", a.dx, rows * columns);
  float* dw = optional_elements<float>(kOp, "dw", a.dw, padded * columns);
  const std::int64_t chunk_rows = a.workspace.numel() / padded;
  require(chunk_rows > 0, kOp, "the workspace must hold at least one row of V logits");
  float* logits = elements<float>(kOp, "workspace", a.workspace, a.workspace.numel());
  for (std::int64_t n = 0; n < rows; ++n) {
    if (targets[n] < -1 || targets[n] >= vocabulary) {
      throw std::logic_error(fmt::format("{}: targets[{}] is {}, and the vocabulary has {} tokens", kOp, n, targets[n], vocabulary));
    }
  }

  for (std::int64_t start = 0; start < rows; start += chunk_rows) {
    const std::int64_t count = std::min(chunk_rows, rows - start);
    gemm(count, vocabulary, columns, {x + start * columns, columns}, {w, columns, true}, logits, padded, false);
    parallel_ranges(count, 1, [&](std::int64_t row, std::int64_t) {
      float* l = logits + row * padded;
      const std::int32_t target = targets[start + row];
      const float highest = maximum(l, vocabulary);
      if (predictions) predictions[start + row] = first_equal(l, highest, vocabulary);
      if (target < 0) {
        losses[start + row] = 0;
        if (dx || dw) std::fill_n(l, vocabulary, 0.0f);
        return;
      }
      const double wanted = l[target];
      const double sum = exponentials(l, highest, vocabulary);
      losses[start + row] = static_cast<float>(std::log(sum) + (highest - wanted));
      if (!dx && !dw) return;
      const auto scale = static_cast<float>(a.gradient_scale / sum);
#pragma omp simd
      for (std::int64_t i = 0; i < vocabulary; ++i) l[i] *= scale;
      l[target] -= a.gradient_scale;
    });
    if (dx) gemm(count, columns, vocabulary, {logits, padded}, {w, columns}, dx + start * columns, columns, false);
    if (dw) gemm(vocabulary, columns, count, {logits, padded, true}, {x + start * columns, columns}, dw, columns, true);
  }
}

}  // namespace tessera::cpu
