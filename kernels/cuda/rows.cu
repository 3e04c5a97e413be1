// Rows from place to place. Bound by memory.

#include "kernels/cuda/check.h"
#include "kernels/cuda/layers.h"
#include "kernels/cuda/vector.cuh"

namespace tessera::cuda {

namespace {

constexpr int kThreads = 256;

struct Side {
  bf16* data;
  std::int64_t unit, batch, row;
};

struct Args {
  Side to, from;
  const std::uint64_t* pieces;
  int to_column, from_column, size;
};

/// A block a piece and sequence, a thread 16 bytes at a time.
template <bool kAdd>
__global__ void __launch_bounds__(kThreads) move_rows_kernel(const __grid_constant__ Args a) {
  const std::uint64_t* piece = a.pieces + 3 * std::int64_t{blockIdx.x};
  const int b = static_cast<int>(blockIdx.y), chunks = a.size / 8;
  bf16* const to = a.to.data + static_cast<std::int64_t>(piece[a.to_column]) * a.to.unit + b * a.to.batch;
  const bf16* const from = a.from.data + static_cast<std::int64_t>(piece[a.from_column]) * a.from.unit + b * a.from.batch;
  const std::int64_t count = static_cast<std::int64_t>(piece[2]) * chunks;
  for (std::int64_t n = threadIdx.x; n < count; n += kThreads) {
    const std::int64_t row = n / chunks, column = n % chunks * 8;
    const Piece<8> moved = load_piece(from + row * a.from.row + column);
    bf16* const at = to + row * a.to.row + column;
    if constexpr (kAdd) {
      float x[8], y[8];
      unpack(moved, x), unpack(load_piece(at), y);
#pragma unroll
      for (int i = 0; i < 8; ++i) y[i] += x[i];
      store_piece(at, pack(y));
    } else {
      store_piece(at, moved);
    }
  }
}

__global__ void look_up_kernel(std::int32_t* out, const std::int32_t* table, const std::int32_t* index, std::int64_t count, std::int64_t size) {
  const std::int64_t n = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (n >= count) return;
  const std::int32_t at = index[n];
  out[n] = at >= 0 && at < size ? table[at] : INT32_MAX;  // as a document's start: nothing is visible
}

Side side(const char* name, const RowsView& v) {
  constexpr const char* kOp = "move_rows";
  require(v.dtype == DType::bf16, kOp, "rows must be bf16 on a GPU");
  require(v.data && reinterpret_cast<std::uintptr_t>(v.data) % 16 == 0 && v.batch % 8 == 0 && v.row % 8 == 0 && v.unit % 8 == 0, kOp, name);
  return {static_cast<bf16*>(v.data), v.unit, v.batch, v.row};
}

}  // namespace

void move_rows(const Context& c, const MoveRows& m) {
  constexpr const char* kOp = "move_rows";
  require(m.pieces.shape.rank == 2 && m.pieces.shape[1] == 3, kOp, "pieces must be [n, 3]");
  require(m.sequences >= 0 && m.sequences <= 65535, kOp, "there must be 0 to 65,535 sequences");
  require(m.size >= 8 && m.size % 8 == 0, kOp, "a row must be a multiple of 8 elements");
  const std::int64_t count = m.pieces.shape[0];
  if (count * m.sequences == 0) return;
  Args a{};
  a.pieces = elements<std::uint64_t>(kOp, "pieces", m.pieces, 3 * count, 8);
  a.to = side("to: address and strides must be multiples of 16 bytes", m.to);
  a.from = side("from: address and strides must be multiples of 16 bytes", m.from);
  a.to_column = m.reversed ? 1 : 0, a.from_column = m.reversed ? 0 : 1;
  a.size = static_cast<int>(m.size);
  const auto kernel = m.add ? move_rows_kernel<true> : move_rows_kernel<false>;
  kernel<<<dim3(static_cast<unsigned>(count), static_cast<unsigned>(m.sequences)), kThreads, 0, c.stream>>>(a);
  check_launch(kOp);
}

void look_up(const Context& c, const Tensor& out, const Tensor& table, const Tensor& index) {
  constexpr const char* kOp = "look_up";
  const std::int64_t count = out.numel(), size = table.numel();
  auto* to = elements<std::int32_t>(kOp, "out", out, count, 4);
  const auto* from = elements<std::int32_t>(kOp, "table", table, size, 4);
  const auto* at = elements<std::int32_t>(kOp, "index", index, count, 4);
  if (count == 0) return;
  look_up_kernel<<<static_cast<unsigned>((count + kThreads - 1) / kThreads), kThreads, 0, c.stream>>>(to, from, at, count, size);
  check_launch(kOp);
}

}  // namespace tessera::cuda
