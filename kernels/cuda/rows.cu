// Rows from place to place. Bound by memory.

#include <type_traits>

#include "kernels/cuda/check.h"
#include "kernels/cuda/layers.h"
#include "kernels/cuda/vector.cuh"

namespace tessera::cuda {

namespace {

constexpr int kThreads = 256;

struct Side {
  void* data;
  std::int64_t unit, batch, row;
};

struct Args {
  Side to, from;
  const std::uint64_t* pieces;
  int to_column, from_column, size;
};

/// Eight elements of a row.
__device__ __forceinline__ void load_eight(const bf16* p, float (&x)[8]) { unpack(load_piece(p), x); }
__device__ __forceinline__ void load_eight(const float* p, float (&x)[8]) { load_floats(p, x); }
__device__ __forceinline__ void store_eight(bf16* p, const float (&x)[8]) { store_piece(p, pack(x)); }
__device__ __forceinline__ void store_eight(float* p, const float (&x)[8]) { store_floats(p, x); }

/// A block a piece and sequence, a thread eight elements at a time.
template <class To, class From, bool kAdd>
__global__ void __launch_bounds__(kThreads) move_rows_kernel(const __grid_constant__ Args a) {
  const std::uint64_t* piece = a.pieces + 3 * std::int64_t{blockIdx.x};
  const int b = static_cast<int>(blockIdx.y), chunks = a.size / 8;
  To* const to = static_cast<To*>(a.to.data) + static_cast<std::int64_t>(piece[a.to_column]) * a.to.unit + b * a.to.batch;
  const From* const from = static_cast<const From*>(a.from.data) + static_cast<std::int64_t>(piece[a.from_column]) * a.from.unit + b * a.from.batch;
  const std::int64_t count = static_cast<std::int64_t>(piece[2]) * chunks;
  for (std::int64_t n = threadIdx.x; n < count; n += kThreads) {
    const std::int64_t row = n / chunks, column = n % chunks * 8;
    const From* const source = from + row * a.from.row + column;
    To* const at = to + row * a.to.row + column;
    if constexpr (!kAdd && std::is_same_v<To, bf16> && std::is_same_v<From, bf16>) {
      store_piece(at, load_piece(source));
      continue;
    }
    float x[8];
    load_eight(source, x);
    if constexpr (kAdd) {
      float y[8];
      load_eight(at, y);
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i] += y[i];
    }
    store_eight(at, x);
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
  require(v.dtype == DType::bf16 || v.dtype == DType::f32, kOp, "rows must be bf16 or f32 on a GPU");
  require(v.data && reinterpret_cast<std::uintptr_t>(v.data) % 16 == 0 && v.batch % 8 == 0 && v.row % 8 == 0 && v.unit % 8 == 0, kOp, name);
  return {v.data, v.unit, v.batch, v.row};
}

template <class To, class From>
auto kernel_of(bool add) {
  return add ? move_rows_kernel<To, From, true> : move_rows_kernel<To, From, false>;
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
  const bool wide = m.from.dtype == DType::f32;
  const auto kernel = m.to.dtype == DType::f32 ? (wide ? kernel_of<float, float>(m.add) : kernel_of<float, bf16>(m.add))
                                               : (wide ? kernel_of<bf16, float>(m.add) : kernel_of<bf16, bf16>(m.add));
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
