// Token and position embeddings.
//
// The backward pass sorts the rows by token (stable: rows of a token stay in ascending order) and adds each run of equal tokens to its row of
// the gradient. A run of up to kLongRun rows is added up row by row by one warp a slice of columns; a longer one by a block, whose kRowLanes lanes
// take every kRowLanes-th row before their sums are added in a tree. Both orders depend on the tokens alone.

#include <bit>
#include <cub/device/device_radix_sort.cuh>

#include "kernels/cuda/check.h"
#include "kernels/cuda/layers.h"
#include "kernels/cuda/vector.cuh"

namespace tessera::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kElements = 8;  // of a lane
constexpr int kAhead = 4;     // 16-byte loads that a lane has in flight
constexpr int kLongRun = 128;

unsigned blocks_for(std::int64_t items, std::int64_t a_block) { return static_cast<unsigned>((items + a_block - 1) / a_block); }

/// A warp a row. An index outside the table, which callers rule out, reads nothing and gives a row of NaN.
__global__ void __launch_bounds__(kThreads)
    embedding_forward_kernel(bf16* out, const int32_t* tokens, const int32_t* positions, const bf16* wte, const bf16* wpe, int64_t rows,
                             int64_t columns, int64_t vocabulary, int64_t position_rows) {
  const int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (row >= rows) return;
  const int64_t token = tokens[row], position = wpe ? positions[row] : 0;
  const bool valid = token >= 0 && token < vocabulary && (!wpe || (position >= 0 && position < position_rows));
#pragma unroll 4
  for (int64_t column = threadIdx.x % 32 * kElements; column < columns; column += 32 * kElements) {
    Piece<kElements> in{};
    if (!valid) {
#pragma unroll
      for (uint32_t& pair : in.pair) pair = 0xffffffffu;
    } else {
      in = load_piece(wte + token * columns + column);
      if (wpe) {
        float a[kElements], b[kElements];
        unpack(in, a);
        unpack(load_piece(wpe + position * columns + column), b);
#pragma unroll
        for (int i = 0; i < kElements; ++i) a[i] += b[i];
        in = pack(a);
      }
    }
    store_piece(out + row * columns + column, in);
  }
}

// -- backward -------------------------------------------------------------------------------------------------------------

/// The pairs to sort. Indices outside the table, which callers rule out, become `table_rows`: a run that nobody adds.
__global__ void __launch_bounds__(kThreads) pairs_kernel(const int32_t* index, uint32_t rows, uint32_t table_rows, uint32_t* keys, uint32_t* order) {
  const uint32_t n = blockIdx.x * kThreads + threadIdx.x;
  if (n >= rows) return;
  keys[n] = min(static_cast<uint32_t>(index[n]), table_rows);
  order[n] = n;
}

struct Runs {
  const bf16* from;       // [rows, columns]
  const uint32_t* keys;   // ascending
  const uint32_t* order;  // row of each key
  std::int64_t rows, columns;
  uint32_t table_rows;
  float* to;  // [table_rows, columns]

  __device__ __forceinline__ bool is(int64_t at, uint32_t key) const { return at < rows && keys[at] == key; }
  __device__ __forceinline__ bool is_long(int64_t first, uint32_t key) const { return is(first + kLongRun, key); }
};

__device__ __forceinline__ void accumulate(const Piece<kElements>& in, float (&sum)[kElements]) {
  float x[kElements];
  unpack(in, x);
#pragma unroll
  for (int i = 0; i < kElements; ++i) sum[i] += x[i];
}

/// A warp for every sorted pair and slice of 256 columns; those where no short run begins have nothing to do.
__global__ void __launch_bounds__(kThreads) short_runs_kernel(const __grid_constant__ Runs r) {
  const int64_t first = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (first >= r.rows) return;
  const int lane = threadIdx.x % 32;
  const uint32_t key = r.keys[first];
  if (key >= r.table_rows || (first > 0 && r.keys[first - 1] == key) || r.is_long(first, key)) return;
  const int64_t column = int64_t{blockIdx.y} * 32 * kElements + lane * kElements;
  const bool inside = column < r.columns;
  const bf16* from = r.from + (inside ? column : 0);  // loads without conditions, which the compiler would not have in flight together
  float sum[kElements] = {};
  for (int64_t at = first;; at += 32) {
    const bool mine = r.is(at + lane, key);
    const uint32_t row = mine ? r.order[at + lane] : 0;
    const int count = __popc(__ballot_sync(0xffffffffu, mine));
    const auto load = [&](int n) { return load_piece(from + int64_t{__shfl_sync(0xffffffffu, row, n)} * r.columns); };
    int n = 0;
    for (; n + kAhead <= count; n += kAhead) {
      Piece<kElements> in[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) in[i] = load(n + i);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) accumulate(in[i], sum);
    }
    for (; n < count; ++n) accumulate(load(n), sum);
    if (count < 32) break;
  }
  if (!inside) return;
  float* to = r.to + int64_t{key} * r.columns + column;
  float total[kElements];
  load_floats(to, total);
#pragma unroll
  for (int i = 0; i < kElements; ++i) total[i] += sum[i];
  store_floats(to, total);
}

constexpr int kLongThreads = 512;
constexpr int kColumnLanes = 8;  // times 16 bytes: whole 128-byte lines
constexpr int kSliceColumns = kColumnLanes * kElements;
constexpr int kRowLanes = kLongThreads / kColumnLanes;

/// A block for every kLongRun-th sorted pair and slice of 64 columns: the one at a long run's first such pair adds that run.
__global__ void __launch_bounds__(kLongThreads) long_runs_kernel(const __grid_constant__ Runs r) {
  const int64_t at = int64_t{blockIdx.x} * kLongRun;
  const uint32_t key = r.keys[at];
  if (key >= r.table_rows || (at > 0 && r.keys[at - kLongRun] == key)) return;
  int64_t first = max(at - kLongRun + 1, int64_t{0});
  for (int64_t high = at; first < high;) {  // the run's first pair is in [first, high]
    const int64_t middle = (first + high) / 2;
    if (r.keys[middle] == key)
      high = middle;
    else
      first = middle + 1;
  }
  if (!r.is_long(first, key)) return;
  int64_t end = first + kLongRun + 1;
  for (int64_t high = r.rows; end < high;) {  // the first pair behind the run is in [end, high]
    const int64_t middle = (end + high) / 2;
    if (r.keys[middle] == key)
      end = middle + 1;
    else
      high = middle;
  }

  __shared__ __align__(16) float sums[kLongThreads / 32][kSliceColumns];
  const int row_lane = threadIdx.x / kColumnLanes, column_lane = threadIdx.x % kColumnLanes;
  const int64_t slice = int64_t{blockIdx.y} * kSliceColumns, column = slice + column_lane * kElements;
  float sum[kElements] = {};
  if (column < r.columns) {
    const auto load = [&](int64_t pair) { return load_piece(r.from + int64_t{r.order[pair]} * r.columns + column); };
    int64_t n = first + row_lane;
    for (; n + (kAhead - 1) * kRowLanes < end; n += kAhead * kRowLanes) {
      Piece<kElements> in[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) in[i] = load(n + i * kRowLanes);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) accumulate(in[i], sum);
    }
    for (; n < end; n += kRowLanes) accumulate(load(n), sum);
  }
#pragma unroll
  for (int i = 0; i < kElements; ++i) {  // over the warp's four row lanes
    sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], kColumnLanes);
    sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], 2 * kColumnLanes);
  }
  if (threadIdx.x % 32 < kColumnLanes) store_floats(&sums[threadIdx.x / 32][column_lane * kElements], sum);
  __syncthreads();
  if (threadIdx.x >= kSliceColumns || slice + threadIdx.x >= r.columns) return;
  float total = 0;
#pragma unroll
  for (int w = 0; w < kLongThreads / 32; ++w) total += sums[w][threadIdx.x];
  r.to[int64_t{key} * r.columns + slice + threadIdx.x] += total;
}

/// Of one array of 4-byte keys or row numbers; the next starts on a boundary of 256 bytes.
std::size_t array_bytes(std::int64_t rows) { return (static_cast<std::size_t>(rows) * 4 + 255) / 256 * 256; }

/// The sorter's own memory: per 8-bit digit a histogram and a counter, and 256 counters a tile of some thousand pairs.
std::size_t sorter_bytes(std::int64_t rows) { return static_cast<std::size_t>(rows) + (std::size_t{1} << 20); }

void add_rows(const Context& c, const char* operation, const bf16* from, const std::int32_t* index, std::int64_t rows, const Tensor& to) {
  const std::int64_t table_rows = to.shape[0], columns = to.shape[1];
  auto* arrays = static_cast<char*>(c.scratch);
  const auto array = [&](int n) { return reinterpret_cast<std::uint32_t*>(arrays + n * array_bytes(rows)); };
  cub::DoubleBuffer<std::uint32_t> keys(array(0), array(1)), order(array(2), array(3));
  void* sorter = array(4);
  const auto count = static_cast<std::uint32_t>(rows), limit = static_cast<std::uint32_t>(table_rows);
  pairs_kernel<<<blocks_for(rows, kThreads), kThreads, 0, c.stream>>>(index, count, limit, keys.Current(), order.Current());

  const int bits = std::bit_width(limit);
  std::size_t needed = 0;
  check(cub::DeviceRadixSort::SortPairs(nullptr, needed, keys, order, count, 0, bits, c.stream), operation);
  require(needed <= sorter_bytes(rows), operation, "the sorter wants more scratch than embedding_backward_scratch() gives it");
  check(cub::DeviceRadixSort::SortPairs(sorter, needed, keys, order, count, 0, bits, c.stream), operation);

  const Runs runs{from, keys.Current(), order.Current(), rows, columns, limit, static_cast<float*>(to.data)};
  short_runs_kernel<<<dim3(blocks_for(rows, kWarps), blocks_for(columns, 32 * kElements)), kThreads, 0, c.stream>>>(runs);
  if (rows > kLongRun) {
    long_runs_kernel<<<dim3(blocks_for(rows, kLongRun), blocks_for(columns, kSliceColumns)), kLongThreads, 0, c.stream>>>(runs);
  }
  check_launch(operation);
}

}  // namespace

void embedding_forward(const Context& c, const Tensor& out, const Tensor& tokens, const Tensor& positions, const Tensor& wte, const Tensor& wpe) {
  constexpr const char* kOp = "embedding_forward";
  require(wte.shape.rank == 2 && (!wpe || (wpe.shape.rank == 2 && wpe.shape[1] == wte.shape[1])), kOp, "wte and wpe must be matrices of one width");
  const std::int64_t rows = tokens.numel(), columns = wte.shape[1], position_rows = wpe ? wpe.shape[0] : 0;
  require(columns % kElements == 0, kOp, "the width must be a multiple of 8");
  const auto* token = elements<std::int32_t>(kOp, "tokens", tokens, rows, sizeof(std::int32_t));
  const auto* position = wpe ? elements<std::int32_t>(kOp, "positions", positions, rows, sizeof(std::int32_t)) : nullptr;
  const auto* token_rows = static_cast<const bf16*>(bf16_elements(kOp, "wte", wte, wte.numel()));
  const auto* position_row = wpe ? static_cast<const bf16*>(bf16_elements(kOp, "wpe", wpe, wpe.numel())) : nullptr;
  auto* to = static_cast<bf16*>(bf16_elements(kOp, "out", out, rows * columns));
  if (rows == 0 || columns == 0) return;
  embedding_forward_kernel<<<blocks_for(rows, kWarps), kThreads, 0, c.stream>>>(to, token, position, token_rows, position_row, rows, columns,
                                                                                wte.shape[0], position_rows);
  check_launch(kOp);
}

void embedding_backward(const Context& c, const Tensor& dout, const Tensor& tokens, const Tensor& positions, const Tensor& dwte, const Tensor& dwpe) {
  constexpr const char* kOp = "embedding_backward";
  require(dwte.shape.rank == 2 && (!dwpe || (dwpe.shape.rank == 2 && dwpe.shape[1] == dwte.shape[1])), kOp,
          "dwte and dwpe must be matrices of one width");
  constexpr std::int64_t kMost = INT32_MAX;  // rows and table rows, as 32-bit numbers
  const std::int64_t rows = tokens.numel(), columns = dwte.shape[1];
  require(columns % kElements == 0, kOp, "the width must be a multiple of 8");
  require(rows <= kMost && dwte.shape[0] <= kMost && (!dwpe || dwpe.shape[0] <= kMost), kOp, "rows are counted in 31 bits");
  const auto* token = elements<std::int32_t>(kOp, "tokens", tokens, rows, sizeof(std::int32_t));
  const auto* position = dwpe ? elements<std::int32_t>(kOp, "positions", positions, rows, sizeof(std::int32_t)) : nullptr;
  const auto* from = static_cast<const bf16*>(bf16_elements(kOp, "dout", dout, rows * columns));
  elements<float>(kOp, "dwte", dwte, dwte.numel());
  optional_elements<float>(kOp, "dwpe", dwpe, dwpe.numel());
  if (rows == 0 || columns == 0) return;
  require(c.scratch_bytes >= embedding_backward_scratch(rows), kOp, "needs embedding_backward_scratch(rows) bytes of scratch");
  add_rows(c, kOp, from, token, rows, dwte);
  if (dwpe) add_rows(c, kOp, from, position, rows, dwpe);
}

std::size_t embedding_backward_scratch(std::int64_t rows) { return 4 * array_bytes(rows) + sorter_bytes(rows); }

}  // namespace tessera::cuda
