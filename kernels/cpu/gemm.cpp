#include "kernels/cpu/gemm.h"

#include <cblas.h>
#include <fmt/format.h>
#include <omp.h>

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string_view>

namespace tessera::cpu {

namespace {

struct Tiling {
  std::int64_t rows, columns;
};

std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

/// Equal parts of `extent`, at most `limit` each, in multiples of 16 (the width of the widest micro-kernels).
std::int64_t part_of(std::int64_t extent, std::int64_t limit) { return divide_up(divide_up(extent, divide_up(extent, limit)), 16) * 16; }

/// A tile is large enough that packing its operands, k * (rows + columns) elements for k * rows * columns multiply-adds, is a small
/// share of the work, and small enough that most matrices give every core several tiles. A pure function of the shape.
Tiling tiling_of(std::int64_t m, std::int64_t n, std::int64_t k) {
  constexpr std::int64_t kWantedTiles = 8, kSmallestSide = 64, kSmallestWork = 1 << 22;  // multiply-adds: some 50 us
  std::int64_t row_limit = 256, column_limit = 1024;
  for (;;) {
    const Tiling t{part_of(m, row_limit), part_of(n, column_limit)};
    const bool enough = divide_up(m, t.rows) * divide_up(n, t.columns) >= kWantedTiles || t.rows * t.columns * k < 2 * kSmallestWork;
    std::int64_t& limit = t.columns >= t.rows ? column_limit : row_limit;
    const std::int64_t half = std::max(t.rows, t.columns) / 2;
    if (enough || half < kSmallestSide) return t;
    limit = half;
  }
}

}  // namespace

void gemm(std::int64_t m, std::int64_t n, std::int64_t k, Operand a, Operand b, float* c, std::int64_t stride, bool accumulate,
          const std::function<void(const OutputTile&)>& finish) {
  if (m <= 0 || n <= 0) return;
  constexpr std::int64_t kLimit = std::numeric_limits<blasint>::max();
  if (k > kLimit || a.stride > kLimit || b.stride > kLimit || stride > kLimit) {
    throw std::logic_error(fmt::format("gemm: {} x {} x {} is more than OpenBLAS' {}-bit sizes can count", m, n, k, 8 * sizeof(blasint)));
  }
  const Tiling size = tiling_of(m, n, k);
  const std::int64_t tile_rows = size.rows, tile_columns = size.columns;
  const std::int64_t row_tiles = divide_up(m, tile_rows), column_tiles = divide_up(n, tile_columns);

  // Always inside a parallel region: there the openmp build of OpenBLAS stays on the calling thread.
#pragma omp parallel for schedule(dynamic, 1)
  for (std::int64_t tile = 0; tile < row_tiles * column_tiles; ++tile) {
    // Tiles of one column follow each other: cores then share op(B)'s panel in the common cache.
    const std::int64_t row = tile % row_tiles * tile_rows, column = tile / row_tiles * tile_columns;
    const OutputTile out{row, std::min(tile_rows, m - row), column, std::min(tile_columns, n - column)};
    const float* a_tile = a.data + (a.transposed ? row : row * a.stride);
    const float* b_tile = b.data + (b.transposed ? column * b.stride : column);
    cblas_sgemm(CblasRowMajor, a.transposed ? CblasTrans : CblasNoTrans, b.transposed ? CblasTrans : CblasNoTrans, static_cast<blasint>(out.rows),
                static_cast<blasint>(out.columns), static_cast<blasint>(k), 1.0f, a_tile, static_cast<blasint>(a.stride), b_tile,
                static_cast<blasint>(b.stride), accumulate ? 1.0f : 0.0f, c + row * stride + column, static_cast<blasint>(stride));
    if (finish) finish(out);
  }
}

void hold_blas_at_one_thread() {
  const int threads = omp_get_max_threads();
  openblas_set_num_threads(1);
  omp_set_num_threads(threads);  // the openmp build sets OpenMP's number as well
}

std::string blas_name() {
  // openblas_get_config() is "OpenBLAS 0.3.21 NO_LAPACKE DYNAMIC_ARCH ...": the first two words name the version.
  const std::string_view config = openblas_get_config();
  const std::size_t space = config.find(' ');
  const std::size_t end = space == std::string_view::npos ? space : config.find(' ', space + 1);
  const std::string_view core = openblas_get_corename();
  std::string advice;
#if defined(__x86_64__)
  // On a processor younger than itself OpenBLAS may take the kernels that run anywhere, of SSE3.
  if (core == "Prescott" && __builtin_cpu_supports("avx2"))
    advice =
        fmt::format(" for want of a better match: faster with OPENBLAS_CORETYPE={}", __builtin_cpu_supports("avx512vl") ? "SkylakeX" : "Haswell");
#endif
  return fmt::format("{} {}{}", config.substr(0, end), core, advice);
}

}  // namespace tessera::cpu
