// LayerNorm, RMSNorm and RMSNorm over each attention head (formulas: kernels/cpu/norm.cpp). All of them are bound by memory: a row stays in
// registers from its one read to its one write.
//
// A row of a norm is a team's: one warp up to 1024 columns, more warps beyond. A row of a head norm is a warp's, or one warp's for each tile of
// heads. Backward, each team walks a fixed set of rows with its columns' sums in registers; the teams of a block add theirs in the order of their
// numbers, and add_partial_sums() adds the blocks'. How rows are dealt depends on the shape alone, not on the GPU.

#include <algorithm>
#include <bit>

#include "kernels/cuda/check.h"
#include "kernels/cuda/layers.h"
#include "kernels/cuda/vector.cuh"

namespace tessera::cuda {

namespace {

constexpr int kMostColumns = 65536;   // a team of 1024 threads with 8 pieces each
constexpr int kFewThreads = 192;      // of a block that lets another one beside it
constexpr int kSharedColumns = 3072;  // of the widest row that several teams of such a block have: 2 teams of 96 threads with 4 pieces each
constexpr int kHeadsAtOnce = 4;       // 16-byte pieces in flight a lane
constexpr int kTileColumns = 32 * 8 * kHeadsAtOnce;  // at most, of a tile of heads
constexpr int kLargestHead = 256;

struct NormForwardArgs {
  const bf16 *x, *residual;
  bf16 *residual_out, *y;
  const float *gain, *bias;
  float *mean, *rstd;  // mean: null is rmsnorm
  std::int64_t rows;
  int columns;
  float inverse_columns, epsilon;
};

struct NormBackwardArgs {
  const bf16 *dy, *x;
  bf16* dx;
  const float *gain, *mean, *rstd;  // mean: null is rmsnorm
  float* partials;                  // [1 or 2][blocks][columns]
  std::int64_t rows;
  int columns;
  float inverse_columns;
};

struct HeadNormArgs {
  const bf16 *dy, *x;
  bf16* out;
  const float* gain;
  float *rstd, *partials;
  std::int64_t rows;
  int heads, size, lanes;  // lanes: size / 8, rounded up to a power of two
  float inverse_size, epsilon;
};

/// Waits for the threads of a team of several warps. The barriers' numbers are constants: a number that the compiler does not know reserves all 16,
/// and a multiprocessor's barriers are shared by its blocks.
template <int kTeams>
__device__ __forceinline__ void team_wait() {
  static_assert(kTeams == 1 || kTeams == 3);
  if (kTeams == 1) {
    __syncthreads();
  } else if (threadIdx.y == 0) {
    asm volatile("bar.sync 1, %0;" ::"r"(blockDim.x) : "memory");
  } else if (threadIdx.y == 1) {
    asm volatile("bar.sync 2, %0;" ::"r"(blockDim.x) : "memory");
  } else {
    asm volatile("bar.sync 3, %0;" ::"r"(blockDim.x) : "memory");
  }
}

/// Two sums over a team: the threads of one threadIdx.y. `shared`: a place for each of the block's warps. A block has at most kTeams teams, or more
/// of one warp each.
template <int kTeams>
__device__ float2 team_sum(float2 v, float2* shared) {
  v.x = warp_sum(v.x), v.y = warp_sum(v.y);
  const unsigned warps = blockDim.x / 32, lane = threadIdx.x % 32;
  if (warps == 1) return v;
  float2* of_team = shared + threadIdx.y * warps;
  if (lane == 0) of_team[threadIdx.x / 32] = v;
  team_wait<kTeams>();
  v = lane < warps ? of_team[lane] : make_float2(0, 0);
  team_wait<kTeams>();  // `shared` may be written again
  return make_float2(warp_sum(v.x), warp_sum(v.y));
}

/// The first column of a thread's k-th piece.
__device__ __forceinline__ int column_of(int k) { return static_cast<int>(k * blockDim.x + threadIdx.x) * 8; }

/// One instance serves with and without `residual`, and the sum is rounded before anything reads it: norm(x, residual) and norm(residual_out) are
/// the same bits. The model relies on that when it computes a norm again from the stream it kept.
template <int kPieces, int kMaxThreads>
__global__ void __launch_bounds__(kMaxThreads) norm_forward_kernel(NormForwardArgs a) {
  __shared__ float2 shared[32];
  const std::int64_t row = std::int64_t{blockIdx.x} * blockDim.y + threadIdx.y, start = row * a.columns;
  if (row >= a.rows) return;

  Piece<8> in[kPieces];
#pragma unroll
  for (int k = 0; k < kPieces; ++k) in[k] = column_of(k) < a.columns ? load_piece(a.x + start + column_of(k)) : Piece<8>{};
  if (a.residual) {
    Piece<8> other[kPieces];
#pragma unroll
    for (int k = 0; k < kPieces; ++k) other[k] = column_of(k) < a.columns ? load_piece(a.residual + start + column_of(k)) : Piece<8>{};
#pragma unroll
    for (int k = 0; k < kPieces; ++k) {
      float v[8], w[8];
      unpack(in[k], v), unpack(other[k], w);
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] += w[i];
      in[k] = pack(v);
      if (column_of(k) < a.columns) store_piece(a.residual_out + start + column_of(k), in[k]);
    }
  }

  float x[kPieces][8];
#pragma unroll
  for (int k = 0; k < kPieces; ++k) unpack(in[k], x[k]);
  float mean = 0;
  if (a.mean) {
    float sum = 0;
#pragma unroll
    for (int k = 0; k < kPieces; ++k) {
#pragma unroll
      for (int i = 0; i < 8; ++i) sum += x[k][i];
    }
    mean = team_sum<1>(make_float2(sum, 0), shared).x * a.inverse_columns;
  }
  float squares = 0;
#pragma unroll
  for (int k = 0; k < kPieces; ++k) {
    if (column_of(k) >= a.columns) continue;
#pragma unroll
    for (int i = 0; i < 8; ++i) squares += (x[k][i] - mean) * (x[k][i] - mean);
  }
  const float rstd = rsqrtf(team_sum<1>(make_float2(squares, 0), shared).x * a.inverse_columns + a.epsilon);
  if (threadIdx.x == 0) {
    if (a.mean) a.mean[row] = mean;
    a.rstd[row] = rstd;
  }
#pragma unroll
  for (int k = 0; k < kPieces; ++k) {
    const int column = column_of(k);
    if (column >= a.columns) continue;
    float gain[8], bias[8] = {};
    load_floats(a.gain + column, gain);
    if (a.bias) load_floats(a.bias + column, bias);
#pragma unroll
    for (int i = 0; i < 8; ++i) x[k][i] = (x[k][i] - mean) * rstd * gain[i] + bias[i];
    store_piece(a.y + start + column, pack(x[k]));
  }
}

/// Adds the column sums of a block's teams, in the order of their numbers, and writes them. column(k): where a thread's k-th piece lies in `to` and
/// in `shared` (not used by a single team), or -1.
template <int kPieces, class Column>
__device__ void write_partials(float (&sums)[kPieces][8], float* shared, float* to, Column&& column) {
  for (unsigned team = 0; team < blockDim.y; ++team) {
    if (threadIdx.y == team) {
#pragma unroll
      for (int k = 0; k < kPieces; ++k) {
        const int at = column(k);
        if (at < 0) continue;
        if (team > 0) {
          float before[8];
          load_floats(shared + at, before);
#pragma unroll
          for (int i = 0; i < 8; ++i) sums[k][i] += before[i];
        }
        store_floats((team + 1 < blockDim.y ? shared : to) + at, sums[k]);
      }
    }
    __syncthreads();
  }
}

template <int kPieces, bool kBias, int kMaxThreads, int kMinBlocks>
__global__ void __launch_bounds__(kMaxThreads, kMinBlocks) norm_backward_kernel(NormBackwardArgs a) {
  constexpr int kMostTeams = kMaxThreads == kFewThreads ? kFewThreads / 64 : 1;
  __shared__ float2 shared[32];
  __shared__ __align__(16) float shared_columns[kMostTeams > 1 ? kSharedColumns : 4];
  float dgain[kPieces][8] = {}, dbias[kBias ? kPieces : 1][8] = {};

  for (std::int64_t row = std::int64_t{blockIdx.x} * blockDim.y + threadIdx.y; row < a.rows; row += std::int64_t{gridDim.x} * blockDim.y) {
    const std::int64_t start = row * a.columns;
    Piece<8> dy[kPieces], x[kPieces], dx[kPieces];
#pragma unroll
    for (int k = 0; k < kPieces; ++k) {
      const bool inside = column_of(k) < a.columns;
      dy[k] = inside ? load_piece(a.dy + start + column_of(k)) : Piece<8>{};
      x[k] = inside ? load_piece(a.x + start + column_of(k)) : Piece<8>{};
      dx[k] = inside ? load_piece(a.dx + start + column_of(k)) : Piece<8>{};
    }
    const float rstd = a.rstd[row], mean = a.mean ? a.mean[row] : 0.0f;

    float2 sums = make_float2(0, 0);  // of g = dy gain and of g xh
#pragma unroll
    for (int k = 0; k < kPieces; ++k) {
      const int column = column_of(k);
      if (column >= a.columns) continue;
      float gain[8], dy_[8], x_[8];
      load_floats(a.gain + column, gain), unpack(dy[k], dy_), unpack(x[k], x_);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float g = dy_[i] * gain[i], xh = (x_[i] - mean) * rstd;
        sums.x += g;
        sums.y += g * xh;
        dgain[k][i] += dy_[i] * xh;
        if constexpr (kBias) dbias[k][i] += dy_[i];
      }
    }
    sums = team_sum<kMostTeams>(sums, shared);
    const float g_mean = a.mean ? sums.x * a.inverse_columns : 0.0f, gx_mean = sums.y * a.inverse_columns;

#pragma unroll
    for (int k = 0; k < kPieces; ++k) {
      const int column = column_of(k);
      if (column >= a.columns) continue;
      float gain[8], dy_[8], x_[8], dx_[8];
      load_floats(a.gain + column, gain), unpack(dy[k], dy_), unpack(x[k], x_), unpack(dx[k], dx_);
#pragma unroll
      for (int i = 0; i < 8; ++i) dx_[i] += rstd * (dy_[i] * gain[i] - g_mean - (x_[i] - mean) * rstd * gx_mean);
      store_piece(a.dx + start + column, pack(dx_));
    }
  }

  const auto column = [&](int k) { return column_of(k) < a.columns ? column_of(k) : -1; };
  float* to = a.partials + std::int64_t{blockIdx.x} * a.columns;
  write_partials(dgain, shared_columns, to, column);
  if constexpr (kBias) write_partials(dbias, shared_columns, to + std::int64_t{gridDim.x} * a.columns, column);
}

/// A lane's place in a warp that takes the heads of tile blockIdx.y: kHeadsAtOnce x (32 / lanes) heads, `lanes` lanes a head.
struct HeadPlace {
  int first, step, within;
  bool inside;  // the head, if there is one, has elements for this lane

  __device__ explicit HeadPlace(const HeadNormArgs& a)
      : first(static_cast<int>(blockIdx.y * kHeadsAtOnce * (32 / a.lanes) + threadIdx.x / a.lanes)),
        step(32 / a.lanes),
        within(static_cast<int>(threadIdx.x) % a.lanes * 8),
        inside(within < a.size) {}
  __device__ int head(int k) const { return first + k * step; }
  __device__ bool has(int k, const HeadNormArgs& a) const { return inside && head(k) < a.heads; }
  __device__ int column(int k, const HeadNormArgs& a) const { return head(k) * a.size + within; }
};

__global__ void __launch_bounds__(128) head_norm_forward_kernel(HeadNormArgs a) {
  const std::int64_t row = std::int64_t{blockIdx.x} * blockDim.y + threadIdx.y, start = row * a.heads * a.size;
  if (row >= a.rows) return;
  const HeadPlace place(a);
  float x[kHeadsAtOnce][8], squares[kHeadsAtOnce] = {};
  Piece<8> in[kHeadsAtOnce];
#pragma unroll
  for (int k = 0; k < kHeadsAtOnce; ++k) in[k] = place.has(k, a) ? load_piece(a.x + start + place.column(k, a)) : Piece<8>{};
#pragma unroll
  for (int k = 0; k < kHeadsAtOnce; ++k) {
    unpack(in[k], x[k]);
#pragma unroll
    for (int i = 0; i < 8; ++i) squares[k] += x[k][i] * x[k][i];
  }
  group_sums(squares, a.lanes);
#pragma unroll
  for (int k = 0; k < kHeadsAtOnce; ++k) {
    if (!place.has(k, a)) continue;
    const float rstd = rsqrtf(squares[k] * a.inverse_size + a.epsilon);
    if (place.within == 0) a.rstd[row * a.heads + place.head(k)] = rstd;
    float gain[8];
    load_floats(a.gain + place.column(k, a), gain);
#pragma unroll
    for (int i = 0; i < 8; ++i) x[k][i] = x[k][i] * rstd * gain[i];
    store_piece(a.out + start + place.column(k, a), pack(x[k]));
  }
}

__global__ void __launch_bounds__(256, 2) head_norm_backward_kernel(HeadNormArgs a) {
  __shared__ __align__(16) float shared_columns[kTileColumns];
  const HeadPlace place(a);
  const int columns = a.heads * a.size;
  float dgain[kHeadsAtOnce][8] = {};

  for (std::int64_t row = std::int64_t{blockIdx.x} * blockDim.y + threadIdx.y; row < a.rows; row += std::int64_t{gridDim.x} * blockDim.y) {
    const std::int64_t start = row * columns;
    Piece<8> dy[kHeadsAtOnce], x[kHeadsAtOnce];
    float rstd[kHeadsAtOnce], along[kHeadsAtOnce] = {};
#pragma unroll
    for (int k = 0; k < kHeadsAtOnce; ++k) {
      const bool has = place.has(k, a);
      dy[k] = has ? load_piece(a.dy + start + place.column(k, a)) : Piece<8>{};
      x[k] = has ? load_piece(a.x + start + place.column(k, a)) : Piece<8>{};
      rstd[k] = has ? a.rstd[row * a.heads + place.head(k)] : 0.0f;
    }
#pragma unroll
    for (int k = 0; k < kHeadsAtOnce; ++k) {
      if (!place.has(k, a)) continue;
      float gain[8], dy_[8], x_[8];
      load_floats(a.gain + place.column(k, a), gain), unpack(dy[k], dy_), unpack(x[k], x_);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float xh = x_[i] * rstd[k];
        along[k] += dy_[i] * gain[i] * xh;
        dgain[k][i] += dy_[i] * xh;
      }
    }
    group_sums(along, a.lanes);
#pragma unroll
    for (int k = 0; k < kHeadsAtOnce; ++k) {
      if (!place.has(k, a)) continue;
      const float mean = along[k] * a.inverse_size;
      float gain[8], dy_[8], x_[8];
      load_floats(a.gain + place.column(k, a), gain), unpack(dy[k], dy_), unpack(x[k], x_);
#pragma unroll
      for (int i = 0; i < 8; ++i) dy_[i] = rstd[k] * (dy_[i] * gain[i] - x_[i] * rstd[k] * mean);
      store_piece(a.out + start + place.column(k, a), pack(dy_));
    }
  }

  const int first = static_cast<int>(blockIdx.y) * kHeadsAtOnce * (32 / a.lanes) * a.size;  // column of the tile
  write_partials(dgain, shared_columns, a.partials + std::int64_t{blockIdx.x} * columns + first,
                 [&](int k) { return place.has(k, a) ? place.column(k, a) - first : -1; });
}

/// 32 columns a block: 32 warps take every 32nd row of partials, then warp w adds column w over the warps.
__global__ void __launch_bounds__(1024) add_partials_kernel(const float* partials, int count, int columns, float* first, float* second) {
  __shared__ float sums[32][33];
  const int column = static_cast<int>(blockIdx.x * 32 + threadIdx.x);
  const float* from = partials + std::int64_t{blockIdx.y} * count * columns;
  float sum = 0;
  if (column < columns) {
#pragma unroll 4
    for (int n = static_cast<int>(threadIdx.y); n < count; n += 32) sum += from[std::int64_t{n} * columns + column];
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  sum = warp_sum(sums[threadIdx.x][threadIdx.y]);
  const int mine = static_cast<int>(blockIdx.x * 32 + threadIdx.y);
  if (threadIdx.x == 0 && mine < columns) (blockIdx.y == 0 ? first : second)[mine] += sum;
}

int divide_up(std::int64_t a, std::int64_t b) { return static_cast<int>((a + b - 1) / b); }

/// How a row of `columns` is dealt to a team.
struct Team {
  int threads, pieces;

  explicit Team(int columns) {
    const int all = columns / 8, most = all <= 4 * 256 ? 4 : 8;
    threads = divide_up(divide_up(all, most), 32) * 32;
    pieces = most == 8 ? 8 : divide_up(all, threads);
  }
};

struct Extents {
  std::int64_t rows;
  int columns;

  Extents(const char* operation, const Tensor& x, const Tensor& gain) {
    const std::int64_t width = gain.numel();
    require(width > 0 && width % 8 == 0 && width <= kMostColumns, operation, "the width must be a multiple of 8 up to 65536");
    require(x.numel() % width == 0, operation, "x must be rows of as many elements as gain has");
    rows = x.numel() / width, columns = static_cast<int>(width);
  }
  std::int64_t count() const { return rows * columns; }
};

template <int kPieces, int kMaxThreads>
void launch_forward(const Context& c, const NormForwardArgs& a, int threads) {
  const int teams = threads == 32 ? 4 : 1;
  norm_forward_kernel<kPieces, kMaxThreads><<<divide_up(a.rows, teams), dim3(threads, teams), 0, c.stream>>>(a);
}

/// Returns the number of blocks.
template <int kPieces, int kMaxThreads, int kMinBlocks>
int launch_backward(const Context& c, const NormBackwardArgs& a, int threads, bool bias) {
  const int teams = std::max(1, kFewThreads / threads);
  const int blocks = static_cast<int>(std::min<std::int64_t>(kPartialBlocks, divide_up(a.rows, teams)));
  const auto kernel =
      bias ? norm_backward_kernel<kPieces, true, kMaxThreads, kMinBlocks> : norm_backward_kernel<kPieces, false, kMaxThreads, kMinBlocks>;
  kernel<<<blocks, dim3(threads, teams), 0, c.stream>>>(a);
  return blocks;
}

void require_scratch(const Context& c, const char* operation, std::int64_t width) {
  require(c.scratch && c.scratch_bytes >= norm_backward_scratch(width), operation, "needs norm_backward_scratch(width) bytes of scratch");
}

HeadNormArgs head_arguments(const char* operation, const Extents& e, const Tensor& gain) {
  require(gain.shape.rank == 2, operation, "gain must be [H, D]");
  require(gain.shape[1] % 8 == 0 && gain.shape[1] <= kLargestHead, operation, "the head size must be a multiple of 8 up to 256");
  HeadNormArgs a{};
  a.gain = elements<float>(operation, "gain", gain, e.columns);
  a.rows = e.rows, a.heads = static_cast<int>(gain.shape[0]), a.size = static_cast<int>(gain.shape[1]);
  a.lanes = static_cast<int>(std::bit_ceil(static_cast<unsigned>(a.size / 8)));
  a.inverse_size = 1.0f / static_cast<float>(a.size);
  return a;
}

unsigned head_tiles(const HeadNormArgs& a) { return static_cast<unsigned>(divide_up(a.heads, kHeadsAtOnce * (32 / a.lanes))); }

}  // namespace

std::size_t norm_backward_scratch(std::int64_t width) { return std::size_t{2} * kPartialBlocks * static_cast<std::size_t>(width) * sizeof(float); }

void add_partial_sums(const Context& c, const float* partials, int count, int columns, float* to, float* second) {
  add_partials_kernel<<<dim3(divide_up(columns, 32), second ? 2 : 1), dim3(32, 32), 0, c.stream>>>(partials, count, columns, to, second);
  check_launch("add_partial_sums");
}

void norm_forward(const Context& c, const NormForward& f) {
  constexpr const char* kOp = "norm_forward";
  const Extents e(kOp, f.x, f.gain);
  const bool layernorm = f.kind == NormKind::layernorm;
  require(layernorm || !f.bias, kOp, "rmsnorm has no bias");
  NormForwardArgs a{};
  a.x = static_cast<const bf16*>(bf16_elements(kOp, "x", f.x, e.count()));
  if (f.residual) {
    a.residual = static_cast<const bf16*>(bf16_elements(kOp, "residual", f.residual, e.count()));
    a.residual_out = static_cast<bf16*>(bf16_elements(kOp, "residual_out", f.residual_out, e.count()));
  }
  a.y = static_cast<bf16*>(bf16_elements(kOp, "y", f.y, e.count()));
  a.gain = elements<float>(kOp, "gain", f.gain, e.columns);
  a.bias = optional_elements<float>(kOp, "bias", f.bias, e.columns);
  a.mean = layernorm ? elements<float>(kOp, "mean", f.mean, e.rows, sizeof(float)) : nullptr;
  a.rstd = elements<float>(kOp, "rstd", f.rstd, e.rows, sizeof(float));
  a.rows = e.rows, a.columns = e.columns, a.inverse_columns = 1.0f / static_cast<float>(e.columns), a.epsilon = f.epsilon;
  if (a.rows == 0) return;

  const Team team(a.columns);
  switch (team.pieces) {
    case 1: launch_forward<1, 256>(c, a, team.threads); break;
    case 2: launch_forward<2, 256>(c, a, team.threads); break;
    case 3: launch_forward<3, 256>(c, a, team.threads); break;
    case 4: launch_forward<4, 256>(c, a, team.threads); break;
    default: launch_forward<8, 1024>(c, a, team.threads);
  }
  check_launch(kOp);
}

void norm_backward(const Context& c, const NormBackward& b) {
  constexpr const char* kOp = "norm_backward";
  const Extents e(kOp, b.x, b.gain);
  const bool layernorm = b.kind == NormKind::layernorm;
  NormBackwardArgs a{};
  a.dy = static_cast<const bf16*>(bf16_elements(kOp, "dy", b.dy, e.count()));
  a.x = static_cast<const bf16*>(bf16_elements(kOp, "x", b.x, e.count()));
  a.dx = static_cast<bf16*>(bf16_elements(kOp, "dx", b.dx, e.count()));
  a.gain = elements<float>(kOp, "gain", b.gain, e.columns);
  a.mean = layernorm ? elements<float>(kOp, "mean", b.mean, e.rows, sizeof(float)) : nullptr;
  a.rstd = elements<float>(kOp, "rstd", b.rstd, e.rows, sizeof(float));
  auto* dgain = elements<float>(kOp, "dgain", b.dgain, e.columns, sizeof(float));
  auto* dbias = optional_elements<float>(kOp, "dbias", b.dbias, e.columns, sizeof(float));
  require_scratch(c, kOp, e.columns);
  a.partials = static_cast<float*>(c.scratch), a.rows = e.rows, a.columns = e.columns, a.inverse_columns = 1.0f / static_cast<float>(e.columns);
  if (a.rows == 0) return;

  const Team team(a.columns);
  const bool bias = dbias != nullptr;
  int blocks = 0;
  switch (team.pieces) {
    case 1: blocks = launch_backward<1, kFewThreads, 2>(c, a, team.threads, bias); break;
    case 2: blocks = launch_backward<2, kFewThreads, 2>(c, a, team.threads, bias); break;
    case 3: blocks = launch_backward<3, kFewThreads, 2>(c, a, team.threads, bias); break;
    case 4:
      blocks = team.threads <= kFewThreads ? launch_backward<4, kFewThreads, 2>(c, a, team.threads, bias)
                                           : launch_backward<4, 256, 1>(c, a, team.threads, bias);
      break;
    default: blocks = launch_backward<8, 1024, 1>(c, a, team.threads, bias);
  }
  check_launch(kOp);
  add_partial_sums(c, a.partials, blocks, a.columns, dgain, dbias);
}

void head_norm_forward(const Context& c, const HeadNorm& f) {
  constexpr const char* kOp = "head_norm_forward";
  const Extents e(kOp, f.x, f.gain);
  HeadNormArgs a = head_arguments(kOp, e, f.gain);
  a.x = static_cast<const bf16*>(bf16_elements(kOp, "x", f.x, e.count()));
  a.out = static_cast<bf16*>(bf16_elements(kOp, "y", f.y, e.count()));
  a.rstd = elements<float>(kOp, "rstd", f.rstd, e.rows * a.heads, sizeof(float));
  a.epsilon = f.epsilon;
  if (a.rows == 0) return;
  constexpr int kTeams = 4;
  head_norm_forward_kernel<<<dim3(divide_up(a.rows, kTeams), head_tiles(a)), dim3(32, kTeams), 0, c.stream>>>(a);
  check_launch(kOp);
}

void head_norm_backward(const Context& c, const HeadNormBackward& b) {
  constexpr const char* kOp = "head_norm_backward";
  const Extents e(kOp, b.x, b.gain);
  HeadNormArgs a = head_arguments(kOp, e, b.gain);
  a.dy = static_cast<const bf16*>(bf16_elements(kOp, "dy", b.dy, e.count()));
  a.x = static_cast<const bf16*>(bf16_elements(kOp, "x", b.x, e.count()));
  a.out = static_cast<bf16*>(bf16_elements(kOp, "dx", b.dx, e.count()));
  a.rstd = elements<float>(kOp, "rstd", b.rstd, e.rows * a.heads, sizeof(float));
  auto* dgain = elements<float>(kOp, "dgain", b.dgain, e.columns, sizeof(float));
  require_scratch(c, kOp, e.columns);
  a.partials = static_cast<float*>(c.scratch);
  if (a.rows == 0) return;
  constexpr int kTeams = 8;
  const int blocks = static_cast<int>(std::min<std::int64_t>(kPartialBlocks, divide_up(a.rows, kTeams)));
  head_norm_backward_kernel<<<dim3(blocks, head_tiles(a)), dim3(32, kTeams), 0, c.stream>>>(a);
  check_launch(kOp);
  add_partial_sums(c, a.partials, blocks, e.columns, dgain, nullptr);
}

}  // namespace tessera::cuda
