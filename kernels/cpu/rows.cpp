// Rows from place to place.

#include <algorithm>

#include "kernels/cpu/check.h"
#include "kernels/cpu/ops.h"
#include "kernels/cpu/parallel.h"

namespace tessera::cpu {

void move_rows(const MoveRows& a) {
  require(a.to.dtype == DType::f32 && a.from.dtype == DType::f32, "move_rows", "rows must be f32 on the CPU");
  require(a.sequences >= 0 && a.size >= 1, "move_rows", "there must be 0 or more sequences, and 1 or more elements a row");
  require(a.pieces.shape.rank == 2 && a.pieces.shape[1] == 3, "move_rows", "pieces must be [n, 3]");
  const std::int64_t count = a.pieces.shape[0];
  const std::uint64_t* pieces = elements<std::uint64_t>("move_rows", "pieces", a.pieces, 3 * count);
  require((a.to.data && a.from.data) || count * a.sequences == 0, "move_rows", "rows without memory");
  auto* to = static_cast<float*>(a.to.data);
  const auto* from = static_cast<const float*>(a.from.data);
  parallel_ranges(count * a.sequences, 1, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t n = first; n < last; ++n) {
      const std::uint64_t* piece = pieces + 3 * (n / a.sequences);
      const std::int64_t b = n % a.sequences, rows = static_cast<std::int64_t>(piece[2]);
      float* out = to + static_cast<std::int64_t>(piece[a.reversed ? 1 : 0]) * a.to.unit + b * a.to.batch;
      const float* in = from + static_cast<std::int64_t>(piece[a.reversed ? 0 : 1]) * a.from.unit + b * a.from.batch;
      for (std::int64_t r = 0; r < rows; ++r, out += a.to.row, in += a.from.row) {
        if (!a.add) {
          std::copy_n(in, a.size, out);
          continue;
        }
#pragma omp simd
        for (std::int64_t d = 0; d < a.size; ++d) out[d] += in[d];
      }
    }
  });
}

void look_up(const Tensor& out, const Tensor& table, const Tensor& index) {
  const std::int64_t count = out.numel(), size = table.numel();
  auto* to = elements<std::int32_t>("look_up", "out", out, count);
  const auto* from = elements<std::int32_t>("look_up", "table", table, size);
  const auto* at = elements<std::int32_t>("look_up", "index", index, count);
  for (std::int64_t n = 0; n < count; ++n) {
    require(at[n] >= 0 && at[n] < size, "look_up", "an index lies outside the table");
    to[n] = from[at[n]];
  }
}

}  // namespace tessera::cpu
