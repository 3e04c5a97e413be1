// Softmax cross-entropy of rows of logits, and its gradient in the logits' place.
//
// A row goes through three passes: its maximum, the sum of its exponentials, its gradient. A block takes rows in turn and keeps a row in shared
// memory meanwhile, so that it crosses the memory bus once each way; where two rows fit, the next one arrives while this one is computed. A row
// that does not fit is read again, from the L2 cache as a rule. Each thread has the same pieces of every row in every pass, and reads nothing that
// another wrote: the one thing that threads exchange is what they found, once a row.
//
// Exponentials are powers of two of y = x log2(e) - offset, with the offset of the maximum rounded once and used everywhere: its error drops out.

#include <algorithm>
#include <cmath>

#include "kernels/cuda/check.h"
#include "kernels/cuda/layers.h"
#include "kernels/cuda/math.cuh"
#include "kernels/cuda/vector.cuh"

namespace tessera::cuda {
namespace {

constexpr int kElements = 8;  // of a piece
constexpr int kMaxThreads = 1024;
constexpr int kPiecesPerThread = 6;  // at least, as far as a row has them
constexpr int kNone = INT32_MAX;

struct Args {
  bf16* logits;
  const std::int32_t* targets;
  float* losses;
  std::int32_t* predictions;  // may be null
  std::int64_t rows;
  std::int64_t row_pieces;  // of 8 columns, with padding
  int vocabulary, pieces;   // pieces that hold a column of the vocabulary
  bool gradient;
  float scale;
};

/// What is known of some pieces of a row.
struct Share {
  float highest;  // of its logits that are numbers
  float sum;      // of 2^(x log2(e) - offset(highest))
  int piece;      // the first that holds the highest; kNone: no number above -infinity
};

__device__ __forceinline__ float offset_of(float highest) { return highest == -INFINITY ? 0.0f : __fmul_rn(highest, kLog2e); }

/// The lanes' shares as one, in each of them. (__fmul_rn: an offset that went into a multiply-add would be another than the sums have.)
__device__ __forceinline__ Share combine_lanes(const Share& s) {
  float highest = s.highest;
#pragma unroll
  for (int step = 16; step > 0; step /= 2) highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, step));
  const bool has_it = s.highest == highest;
  const float factor = has_it ? 1.0f : exp2_fast(__fmul_rn(s.highest, kLog2e) - offset_of(highest));
  return {highest, warp_sum(s.sum * factor), __reduce_min_sync(0xffffffffu, has_it ? s.piece : kNone)};
}

/// The largest element that is a number; NaN if none is.
__device__ __forceinline__ float highest_of(const Piece<kElements>& in) {
  const auto pair = [&](int i) { return *reinterpret_cast<const __nv_bfloat162*>(&in.pair[i]); };
  const __nv_bfloat162 m = __hmax2(__hmax2(pair(0), pair(1)), __hmax2(pair(2), pair(3)));
  return fmaxf(__low2float(m), __high2float(m));
}

/// Piece `at` of a row, with -infinity for padding.
__device__ __forceinline__ Piece<kElements> vocabulary_piece(const Piece<kElements>* row, int at, int vocabulary) {
  Piece<kElements> in = row[at];
  const int valid = vocabulary - at * kElements;
  if (valid < kElements) {
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      constexpr uint32_t kMinusInfinity = 0xff80u;
      if (i >= valid)
        in.pair[i / 2] = i % 2 ? (in.pair[i / 2] & 0x0000ffffu) | kMinusInfinity << 16 : (in.pair[i / 2] & 0xffff0000u) | kMinusInfinity;
    }
  }
  return in;
}

/// Asks for this thread's pieces of a row in shared memory, as one group of copies (of none behind the last row).
__device__ __forceinline__ void fetch(const Args& a, int64_t row, Piece<kElements>* to) {
  if (row < a.rows) {
    const auto* from = reinterpret_cast<const Piece<kElements>*>(a.logits) + row * a.row_pieces;
    for (int at = threadIdx.x; at < a.pieces; at += blockDim.x) {
      const auto shared = static_cast<uint32_t>(__cvta_generic_to_shared(to + at));
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(from + at) : "memory");
    }
  }
  asm volatile("cp.async.commit_group;" ::: "memory");
}
/// Waits until at most `Behind` groups of this thread are on their way.
template <int Behind>
__device__ __forceinline__ void wait_for_fetch() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Behind) : "memory");
}

template <int kStages>  // rows in shared memory: 2, 1 or 0
__global__ void __launch_bounds__(kMaxThreads, 1) cross_entropy_kernel(const __grid_constant__ Args a) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  auto* const staged = reinterpret_cast<Piece<kElements>*>(shared_memory);
  // Of the row and of the one before, so that one barrier a row is enough: who writes a row's values has passed the barrier of the row before,
  // and with it everyone has read those of the row before that.
  __shared__ Share shares[2][kMaxThreads / 32];
  __shared__ float wanted_logit[2];

  const int thread = threadIdx.x, threads = blockDim.x, lane = thread % 32, warp = thread / 32, warps = threads / 32;
  if constexpr (kStages == 2) fetch(a, blockIdx.x, staged);
  int turn = 0;
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x, turn ^= 1) {
    auto* const out = reinterpret_cast<Piece<kElements>*>(a.logits) + row * a.row_pieces;
    const Piece<kElements>* in = out;
    if constexpr (kStages == 2) {
      fetch(a, row + gridDim.x, staged + (turn ^ 1) * a.pieces);
      wait_for_fetch<1>();
      in = staged + turn * a.pieces;
    } else if constexpr (kStages == 1) {
      fetch(a, row, staged);
      wait_for_fetch<0>();
      in = staged;
    }
    const int target = a.targets[row], target_piece = target >= 0 ? target / kElements : kNone;

    Share share{-INFINITY, 0.0f, kNone};
#pragma unroll 2
    for (int at = thread; at < a.pieces; at += threads) {
      const float m = highest_of(vocabulary_piece(in, at, a.vocabulary));
      if (m > share.highest) share.highest = m, share.piece = at;
    }
    const float own_offset = offset_of(share.highest);
#pragma unroll 2
    for (int at = thread; at < a.pieces; at += threads) {
      float x[kElements];
      unpack(vocabulary_piece(in, at, a.vocabulary), x);
#pragma unroll
      for (int i = 0; i < kElements; ++i) x[i] = exp2_fast(fmaf(x[i], kLog2e, -own_offset));
      share.sum += ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
    }
    if (target_piece < a.pieces && target_piece % threads == thread) {
      wanted_logit[turn] = __bfloat162float(reinterpret_cast<const bf16*>(in)[target]);
    }
    share = combine_lanes(share);
    if (lane == 0) shares[turn][warp] = share;
    __syncthreads();
    share = combine_lanes(lane < warps ? shares[turn][lane] : Share{-INFINITY, 0.0f, kNone});

    const float offset = offset_of(share.highest);
    if (thread == 0) {  // a target outside the vocabulary, which callers rule out, gives NaN
      const float loss = kLn2 * (log2f(share.sum) - fmaf(wanted_logit[turn], kLog2e, -offset));
      a.losses[row] = target < 0 ? 0.0f : target < a.vocabulary ? loss : NAN;
    }
    if (a.predictions) {
      if (share.piece == kNone) {
        if (thread == 0) a.predictions[row] = 0;
      } else if (share.piece % threads == thread) {
        const auto* x = reinterpret_cast<const bf16*>(in + share.piece);
        int i = 0;
        while (i < kElements - 1 && __bfloat162float(x[i]) != share.highest) ++i;
        a.predictions[row] = share.piece * kElements + i;
      }
    }
    if (!a.gradient) continue;
    const float factor = a.scale / share.sum;
    for (int64_t at = thread; at < a.row_pieces; at += threads) {
      Piece<kElements> g{};
      if (target >= 0 && at < a.pieces) {
        const int piece = static_cast<int>(at);
        float x[kElements];
        unpack(vocabulary_piece(in, piece, a.vocabulary), x);
#pragma unroll
        for (int i = 0; i < kElements; ++i) x[i] = exp2_fast(fmaf(x[i], kLog2e, -offset)) * factor;
        if (piece == target_piece || (piece + 1) * kElements > a.vocabulary) {
#pragma unroll
          for (int i = 0; i < kElements; ++i) {
            const int column = piece * kElements + i;
            if (column == target) x[i] -= a.scale;
            if (column >= a.vocabulary) x[i] = 0.0f;  // also in a row whose sum is not a number
          }
        }
        g = pack(x);
      }
      out[at] = g;
    }
  }
  if constexpr (kStages == 2) wait_for_fetch<0>();
}

template <int kStages>
void launch(const Context& c, const Args& a, int threads) {
  constexpr const char* kOp = "cross_entropy";
  const auto shared = static_cast<std::size_t>(kStages) * a.pieces * sizeof(Piece<kElements>);
  const auto kernel = cross_entropy_kernel<kStages>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)), kOp);
  int resident = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, threads, shared), kOp);
  const std::int64_t blocks = std::min(a.rows, std::int64_t{std::max(resident, 1)} * std::max(c.multiprocessors, 1));
  kernel<<<static_cast<unsigned>(blocks), threads, shared, c.stream>>>(a);
  check_launch(kOp);
}

/// Dynamic shared memory that a block of cross_entropy_kernel may have on this GPU.
std::size_t shared_memory_limit() {
  constexpr const char* kOp = "cross_entropy";
  int device = 0, limit = 0;
  cudaFuncAttributes attributes{};
  check(cudaGetDevice(&device), kOp);
  check(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), kOp);
  check(cudaFuncGetAttributes(&attributes, cross_entropy_kernel<2>), kOp);
  return static_cast<std::size_t>(limit) - attributes.sharedSizeBytes;
}

}  // namespace

void cross_entropy(const Context& c, const Tensor& logits, std::int64_t vocabulary, const Tensor& targets, const Tensor& losses,
                   const Tensor& predictions, bool gradient, float gradient_scale) {
  constexpr const char* kOp = "cross_entropy";
  const std::int64_t rows = targets.numel(), columns = logits.shape[1];
  require(logits.shape.rank == 2 && columns % kElements == 0 && columns < kNone, kOp, "logits must be [rows, V], V a multiple of 8");
  require(vocabulary > 0 && vocabulary <= columns, kOp, "the vocabulary must have 1 to V columns");
  Args a{};
  a.logits = static_cast<bf16*>(bf16_elements(kOp, "logits", logits, rows * columns));
  a.targets = elements<std::int32_t>(kOp, "targets", targets, rows, sizeof(std::int32_t));
  a.losses = elements<float>(kOp, "losses", losses, rows, sizeof(float));
  a.predictions = optional_elements<std::int32_t>(kOp, "predictions", predictions, rows, sizeof(std::int32_t));
  a.rows = rows, a.row_pieces = columns / kElements;
  a.vocabulary = static_cast<int>(vocabulary), a.pieces = static_cast<int>((vocabulary + kElements - 1) / kElements);
  a.gradient = gradient, a.scale = gradient_scale;
  if (rows == 0) return;
  const int threads =
      std::clamp((a.pieces / kPiecesPerThread + 31) / 32 * 32, 32, kMaxThreads);  // by the vocabulary alone: it sets the order of sums
  const std::size_t row_bytes = static_cast<std::size_t>(a.pieces) * sizeof(Piece<kElements>), limit = shared_memory_limit();
  if (2 * row_bytes <= limit)
    launch<2>(c, a, threads);
  else if (row_bytes <= limit)
    launch<1>(c, a, threads);
  else
    launch<0>(c, a, threads);
}

}  // namespace tessera::cuda
