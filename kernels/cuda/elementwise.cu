// Conversions, sums, GELU and the output gate element by element, and sums over columns.

#include <algorithm>

#include "kernels/cuda/check.h"
#include "kernels/cuda/layers.h"
#include "kernels/cuda/math.cuh"
#include "kernels/cuda/vector.cuh"

namespace tessera::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kElements = 8;  // of a piece: 16 bytes of bf16
constexpr int kPieces = 2;    // pieces that a thread has in flight

/// A piece of T as it lies in memory.
template <class T>
struct Raw;
template <>
struct Raw<bf16> {
  Piece<kElements> piece;
  __device__ __forceinline__ explicit Raw(const bf16* p) : piece(load_piece(p)) {}
  __device__ __forceinline__ void values(float (&x)[kElements]) const { unpack(piece, x); }
};
template <>
struct Raw<float> {
  float value[kElements];
  __device__ __forceinline__ explicit Raw(const float* p) { load_floats(p, value); }
  __device__ __forceinline__ void values(float (&x)[kElements]) const {
#pragma unroll
    for (int i = 0; i < kElements; ++i) x[i] = value[i];
  }
};

__device__ __forceinline__ void store_eight(bf16* p, const float (&x)[kElements]) { store_piece(p, pack(x)); }
__device__ __forceinline__ void store_eight(float* p, const float (&x)[kElements]) { store_floats(p, x); }
__device__ __forceinline__ float value(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float value(float x) { return x; }
__device__ __forceinline__ void assign(bf16& to, float x) { to = __float2bfloat16_rn(x); }
__device__ __forceinline__ void assign(float& to, float x) { to = x; }

/// to[i] = f(a[i], b[i]); where f looks at its first argument only, there is no b. `to` may be a or b: a thread reads all its elements before it
/// writes any, and no other thread touches them. aligned: all on 16-byte boundaries.
template <class To, class From, class F>
__global__ void __launch_bounds__(kThreads) map_kernel(To* to, const From* a, const From* b, int64_t count, bool aligned, F f) {
  constexpr int64_t kStep = int64_t{kThreads} * kElements;
  const int64_t first = int64_t{blockIdx.x} * kPieces * kStep + threadIdx.x * kElements, second = first + kStep;
  const auto finish = [&](int64_t at, const Raw<From>& in, const Raw<From>& other) {
    float x[kElements], y[kElements];
    in.values(x);
    other.values(y);
#pragma unroll
    for (int i = 0; i < kElements; ++i) x[i] = f(x[i], y[i]);
    store_eight(to + at, x);
  };
  static_assert(kPieces == 2);
  if (aligned && second + kElements <= count) {
    const Raw<From> a0(a + first), a1(a + second);
    if constexpr (F::kBinary) {
      const Raw<From> b0(b + first), b1(b + second);
      finish(first, a0, b0);
      finish(second, a1, b1);
    } else {
      finish(first, a0, a0);
      finish(second, a1, a1);
    }
    return;
  }
#pragma unroll 1
  for (int p = 0; p < kPieces; ++p) {
#pragma unroll 1
    for (int64_t i = first + p * kStep; i < min(first + p * kStep + kElements, count); ++i) {
      const float x = value(a[i]);
      assign(to[i], f(x, F::kBinary ? value(b[i]) : x));
    }
  }
}

struct Same {
  static constexpr bool kBinary = false;
  __device__ float operator()(float x, float) const { return x; }
};
struct Gelu {
  static constexpr bool kBinary = false;
  __device__ float operator()(float x, float) const { return gelu(x); }
};
struct Sum {
  static constexpr bool kBinary = true;
  __device__ float operator()(float x, float y) const { return x + y; }
};
struct GeluGradient {
  static constexpr bool kBinary = true;
  __device__ float operator()(float d, float x) const { return d * gelu_derivative(x); }
};
struct Gated {
  static constexpr bool kBinary = true;
  __device__ float operator()(float u, float o) const { return 2.0f * sigmoid(u).value * o; }
};

bool on_16_bytes(const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; }

template <class To, class From, class F>
void map(const Context& c, const char* operation, void* to, const void* a, const void* b, std::int64_t count, F f) {
  if (count == 0) return;
  constexpr std::int64_t kBlock = std::int64_t{kThreads} * kElements * kPieces;
  const std::int64_t blocks = (count + kBlock - 1) / kBlock;
  map_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, c.stream>>>(static_cast<To*>(to), static_cast<const From*>(a), static_cast<const From*>(b),
                                                                       count, on_16_bytes(to) && on_16_bytes(a) && on_16_bytes(b), f);
  check_launch(operation);
}

/// A thread reads its elements of every input before it writes any.
__global__ void __launch_bounds__(kThreads)
    output_gate_backward_kernel(const bf16* dy, const bf16* u, const bf16* o, bf16* d_o, bf16* du, bf16* y, int64_t count) {
  const auto element = [](float of_y, float argument, float before, float& to_o, float& to_u, float& again) {
    const Sigmoid s = sigmoid(argument);
    to_o = 2.0f * s.value * of_y;
    to_u = 2.0f * s.value * s.rest * (before * of_y);
    again = Gated{}(argument, before);
  };
  const int64_t at = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kElements;
  if (at + kElements <= count) {
    float of_y[kElements], argument[kElements], before[kElements], to_o[kElements], to_u[kElements], again[kElements];
    const Raw<bf16> first(dy + at), second(u + at), third(o + at);
    first.values(of_y);
    second.values(argument);
    third.values(before);
#pragma unroll
    for (int i = 0; i < kElements; ++i) element(of_y[i], argument[i], before[i], to_o[i], to_u[i], again[i]);
    store_eight(d_o + at, to_o);
    store_eight(du + at, to_u);
    if (y) store_eight(y + at, again);
    return;
  }
#pragma unroll 1
  for (int64_t i = at; i < count; ++i) {
    float to_o, to_u, again;
    element(value(dy[i]), value(u[i]), value(o[i]), to_o, to_u, again);
    assign(d_o[i], to_o);
    assign(du[i], to_u);
    if (y) assign(y[i], again);
  }
}

// -- sums over columns --------------------------------------------------------------------------------------------------

constexpr int kColumns = 32 * kElements;  // of a block
constexpr int kWarps = kThreads / 32;
constexpr int kMaxChunks = 128;
constexpr int kMinChunkRows = 64;
constexpr int kAhead = 4;  // rows that a warp has in flight

/// partial[chunk, column] = the sum of the chunk's rows: each warp adds every eighth row in order, then the warps' sums are added in order.
__global__ void __launch_bounds__(kThreads) column_chunks_kernel(const bf16* x, int64_t rows, int64_t columns, int64_t chunk_rows, float* partial) {
  __shared__ __align__(16) float sums[kWarps][kColumns];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t first_column = int64_t{blockIdx.x} * kColumns, column = first_column + lane * kElements;
  const int64_t end = min(rows, (int64_t{blockIdx.y} + 1) * chunk_rows);
  float sum[kElements] = {};
  if (column < columns) {
    const auto load = [&](int64_t row) { return load_piece(x + row * columns + column); };
    const auto accumulate = [&](const Piece<kElements>& in) {
      float v[kElements];
      unpack(in, v);
#pragma unroll
      for (int i = 0; i < kElements; ++i) sum[i] += v[i];
    };
    int64_t row = int64_t{blockIdx.y} * chunk_rows + warp;
    for (; row + (kAhead - 1) * kWarps < end; row += kAhead * kWarps) {
      Piece<kElements> in[kAhead];
#pragma unroll
      for (int n = 0; n < kAhead; ++n) in[n] = load(row + n * kWarps);
#pragma unroll
      for (int n = 0; n < kAhead; ++n) accumulate(in[n]);
    }
    for (; row < end; row += kWarps) accumulate(load(row));
  }
  store_floats(&sums[warp][lane * kElements], sum);
  __syncthreads();
  if (first_column + threadIdx.x >= columns) return;
  float total = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) total += sums[w][threadIdx.x];
  partial[blockIdx.y * columns + first_column + threadIdx.x] = total;
}

/// to[column] += the chunks' sums: each warp adds every eighth chunk in order, then the warps' sums are added in order.
__global__ void __launch_bounds__(kThreads) add_chunks_kernel(const float* partial, int chunks, int64_t columns, float* to) {
  __shared__ float sums[kWarps][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t column = int64_t{blockIdx.x} * 32 + lane;
  float sum = 0;
  if (column < columns) {
#pragma unroll 4
    for (int n = warp; n < chunks; n += kWarps) sum += partial[n * columns + column];
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || column >= columns) return;
  float total = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) total += sums[w][lane];
  to[column] += total;
}

}  // namespace

void convert(const Context& c, const Tensor& to, const Tensor& from) {
  constexpr const char* kOp = "convert";
  const std::int64_t count = to.numel();
  for (const Tensor* t : {&to, &from}) {
    require(t->dtype == DType::f32 || t->dtype == DType::bf16, kOp, "elements must be f32 or bf16");
    elements(kOp, t == &to ? "to" : "from", *t, t->dtype, count, size_of(t->dtype));
  }
  if (to.dtype == from.dtype) {
    if (count > 0 && to.data != from.data) check(cudaMemcpyAsync(to.data, from.data, to.bytes(), cudaMemcpyDeviceToDevice, c.stream), kOp);
  } else if (to.dtype == DType::bf16) {
    map<bf16, float>(c, kOp, to.data, from.data, nullptr, count, Same{});
  } else {
    map<float, bf16>(c, kOp, to.data, from.data, nullptr, count, Same{});
  }
}

void add(const Context& c, const Tensor& to, const Tensor& a, const Tensor& b) {
  constexpr const char* kOp = "add";
  const std::int64_t count = to.numel();
  require(to.dtype == DType::bf16 || to.dtype == DType::f32, kOp, "elements must be bf16 or f32");
  void* out = elements(kOp, "to", to, to.dtype, count, size_of(to.dtype));
  const void* x = elements(kOp, "a", a, to.dtype, count, size_of(to.dtype));
  const void* y = elements(kOp, "b", b, to.dtype, count, size_of(to.dtype));
  if (to.dtype == DType::bf16)
    map<bf16, bf16>(c, kOp, out, x, y, count, Sum{});
  else
    map<float, float>(c, kOp, out, x, y, count, Sum{});
}

void gelu_forward(const Context& c, const Tensor& y, const Tensor& x) {
  constexpr const char* kOp = "gelu_forward";
  const std::int64_t count = y.numel();
  map<bf16, bf16>(c, kOp, bf16_elements(kOp, "y", y, count), bf16_elements(kOp, "x", x, count), nullptr, count, Gelu{});
}

void gelu_backward(const Context& c, const Tensor& dx, const Tensor& x) {
  constexpr const char* kOp = "gelu_backward";
  const std::int64_t count = dx.numel();
  void* d = bf16_elements(kOp, "dx", dx, count);
  map<bf16, bf16>(c, kOp, d, d, bf16_elements(kOp, "x", x, count), count, GeluGradient{});
}

void output_gate_forward(const Context& c, const OutputGate& a) {
  constexpr const char* kOp = "output_gate_forward";
  const std::int64_t count = a.y.numel();
  map<bf16, bf16>(c, kOp, bf16_elements(kOp, "y", a.y, count), bf16_elements(kOp, "u", a.u, count), bf16_elements(kOp, "o", a.o, count), count,
                  Gated{});
}

void output_gate_backward(const Context& c, const OutputGateBackward& a) {
  constexpr const char* kOp = "output_gate_backward";
  const std::int64_t count = a.dy.numel();
  const auto given = [&](const char* name, const Tensor& t) { return static_cast<bf16*>(bf16_elements(kOp, name, t, count)); };
  const bf16 *dy = given("dy", a.dy), *u = given("u", a.u), *o = given("o", a.o);
  bf16 *d_o = given("d_o", a.d_o), *du = given("du", a.du), *y = a.y ? given("y", a.y) : nullptr;
  if (count == 0) return;
  require(d_o != du && y != d_o && y != du, kOp, "two outputs in one memory");
  constexpr std::int64_t kBlock = std::int64_t{kThreads} * kElements;
  output_gate_backward_kernel<<<static_cast<unsigned>((count + kBlock - 1) / kBlock), kThreads, 0, c.stream>>>(dy, u, o, d_o, du, y, count);
  check_launch(kOp);
}

void add_column_sums(const Context& c, const Tensor& to, const Tensor& x) {
  constexpr const char* kOp = "add_column_sums";
  const std::int64_t columns = to.numel();
  require(columns > 0 && columns % kElements == 0 && x.numel() % columns == 0, kOp, "x must be rows of as many elements as `to`, a multiple of 8");
  const std::int64_t rows = x.numel() / columns;
  auto* out = elements<float>(kOp, "to", to, columns, sizeof(float));
  const auto* in = static_cast<const bf16*>(bf16_elements(kOp, "x", x, rows * columns));
  if (rows == 0) return;
  const std::int64_t wanted = std::clamp<std::int64_t>((rows + kMinChunkRows - 1) / kMinChunkRows, 1, kMaxChunks);
  const std::int64_t chunk_rows = (rows + wanted - 1) / wanted, chunks = (rows + chunk_rows - 1) / chunk_rows;
  require(static_cast<std::size_t>(chunks * columns) * sizeof(float) <= c.scratch_bytes, kOp, "too little scratch");
  auto* partial = static_cast<float*>(c.scratch);
  const dim3 grid(static_cast<unsigned>((columns + kColumns - 1) / kColumns), static_cast<unsigned>(chunks));
  column_chunks_kernel<<<grid, kThreads, 0, c.stream>>>(in, rows, columns, chunk_rows, partial);
  add_chunks_kernel<<<static_cast<unsigned>((columns + 31) / 32), kThreads, 0, c.stream>>>(partial, static_cast<int>(chunks), columns, out);
  check_launch(kOp);
}

}  // namespace tessera::cuda
