#pragma once
// Matrix products on the CPU. OpenBLAS computes tiles of the output on one thread each; OpenMP spreads the tiles. The tiling depends
// on the shape only, so the bits do not depend on the number of threads, nor on which OpenBLAS build (pthread, openmp) is installed.

#include <cstdint>
#include <functional>
#include <string>

namespace tessera::cpu {

/// A row-major matrix operand: element (r, c) of op(M) is data[r*stride + c], or data[c*stride + r] when transposed.
struct Operand {
  const float* data;
  std::int64_t stride;
  bool transposed = false;
};

/// A finished tile of the output: rows [row, row + rows), columns [column, column + columns).
struct OutputTile {
  std::int64_t row, rows, column, columns;
};

/// C [m, n] = op(A) [m, k] op(B) [k, n] (+ C when `accumulate`), C row-major with `stride` elements a row. `finish`, where given, is
/// called once for each tile of C, from the thread that made it, while the tile is still in its cache.
void gemm(std::int64_t m, std::int64_t n, std::int64_t k, Operand a, Operand b, float* c, std::int64_t stride, bool accumulate,
          const std::function<void(const OutputTile&)>& finish = {});

/// C [m, n] = X [m, k] W [n, k]^T for a few rows, all without gaps between rows. W is read once, as it lies. The bits of an element are a function of
/// its row of X and its row of W, whatever m and n are. `finish` as above.
void few_rows_product(std::int64_t m, std::int64_t n, std::int64_t k, const float* x, const float* w, float* c,
                      const std::function<void(const OutputTile&)>& finish = {});

/// Holds OpenBLAS at one thread a call. Called once before the first gemm().
void hold_blas_at_one_thread();

/// "OpenBLAS 0.3.21 Haswell": version and the kernels chosen for this processor; where it did not know the processor, which to ask for.
std::string blas_name();

}  // namespace tessera::cpu
