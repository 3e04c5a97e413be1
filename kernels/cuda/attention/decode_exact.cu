// Generation with the bits of the whole text's forward pass: the forward kernel itself, over one band of query tiles a head, in which the new token
// stands at its own row and the others are zeros. A row's sums know nothing of its neighbours, and a band's list is that of the whole text, so that
// every sum has the same terms in the same order. (With length_beta the scale that a row's weights are computed on depends on its length: a power of
// two, which changes no bit short of underflow.) Costs a walk of the row's list by one block a head, where decode.cu cuts the list into parts.

#include "kernels/cuda/attention/attention.h"
#include "kernels/cuda/attention/host.h"
#include "kernels/cuda/attention/kernels.h"
#include "kernels/cuda/check.h"
#include "kernels/cuda/vector.cuh"

namespace tessera {
namespace cuda_attention {
namespace {

using cuda::check_launch;
using cuda::load_piece;
using cuda::Piece;
using cuda::require;
using cuda::store_piece;

constexpr int kThreads = 128;

/// Heads of the forward call: n = place in the cache * heads + head.
struct ExactArgs {
  const bf16* qkv;
  bf16* o;
  float* z;  // or null
  const int *sequences, *positions;
  int batch, heads, cached, groups;  // groups: query tiles of a band
  std::int64_t capacity;
  const float *scale, *threshold;
  BandLists lists;
  const int* group_of_head;
  float length_beta;
  // Of the forward call.
  bf16 *q_rows, *o_rows;      // [n, 64 groups, D]
  float* z_rows;              // [n, 64 groups]
  std::int64_t* offsets;      // [n, 2]: the only band's list
  float *scales, *taus;       // [n]
  int *list_of_head, *order;  // [n]

  __device__ __forceinline__ bool holds(int sequence, int position) const {
    return sequence >= 0 && sequence < cached && position >= 0 && position < capacity;
  }
  __device__ __forceinline__ int place(int position) const { return position / kTile + lists.before; }
  __device__ __forceinline__ int row(int position) const { return place(position) % groups * kTile + position % kTile; }
};

/// One block a head of the forward call.
template <int D>
__global__ void __launch_bounds__(kThreads) prepare_kernel(const __grid_constant__ ExactArgs a) {
  const int h = blockIdx.x, place = blockIdx.y, n = place * a.heads + h;
  __shared__ int found;
  if (threadIdx.x == 0) found = -1;
  __syncthreads();
  for (int b = threadIdx.x; b < a.batch; b += kThreads)
    if (a.sequences[b] == place) found = b;  // one at most: sequences differ
  __syncthreads();
  const int b = found, position = b < 0 ? -1 : a.positions[b];
  const bool holds = b >= 0 && a.holds(place, position);
  const int own = holds ? a.row(position) : -1;
  constexpr int kPieces = D / 8;
  for (int i = threadIdx.x; i < a.groups * kTile * kPieces; i += kThreads) {
    const int row = i / kPieces, column = i % kPieces * 8;
    Piece<8> q{};
    if (row == own) q = load_piece(a.qkv + static_cast<std::int64_t>(b) * 3 * a.heads * D + h * D + column);
    store_piece(a.q_rows + (static_cast<std::int64_t>(n) * a.groups * kTile + row) * D + column, q);
  }
  if (threadIdx.x != 0) return;
  a.list_of_head[n] = n, a.order[n] = 0;
  a.scales[n] = a.scale[h];
  // With length_beta a threshold is a row's own, by row_offset()'s formula; here a head has one row.
  a.taus[n] = a.length_beta > 0 ? a.scale[h] * a.length_beta * sqrtf(2.f * logf(static_cast<float>(max(position, 0)) + 2.f) / static_cast<float>(D))
                                : a.threshold[h];
  const std::int64_t at = static_cast<std::int64_t>(a.group_of_head[h]) * (a.lists.bands + 1) + (holds ? a.place(position) / a.groups : 0);
  a.offsets[2 * n] = holds ? a.lists.offsets[at] : 0, a.offsets[2 * n + 1] = holds ? a.lists.offsets[at + 1] : 0;
}

template <int D>
__global__ void __launch_bounds__(D) gather_kernel(const __grid_constant__ ExactArgs a) {
  const int h = blockIdx.x, b = blockIdx.y, d = threadIdx.x, place = a.sequences[b], position = a.positions[b];
  const bool holds = a.holds(place, position);
  const std::int64_t row = holds ? (static_cast<std::int64_t>(place) * a.heads + h) * a.groups * kTile + a.row(position) : 0;
  const float nan = __int_as_float(0x7fffffff);
  a.o[(static_cast<std::int64_t>(b) * a.heads + h) * D + d] = holds ? a.o_rows[row * D + d] : __float2bfloat16_rn(nan);
  if (a.z && d == 0) a.z[static_cast<std::int64_t>(b) * a.heads + h] = holds ? a.z_rows[row] : nan;
}

template <int D>
void run(const AttentionDecode& a, const CudaTiles& tiles, bool hopper, cudaStream_t stream) {
  const std::int64_t B = a.positions.numel(), H = a.cache.heads, S = a.cache.sequences, n = S * H;
  const int groups = forward_groups<D>(hopper);
  const std::int64_t rows = groups * kTile, capacity = a.cache.capacity;
  require(n <= 1 << 29, "attention_decode", "too many heads of cached sequences");

  // The workspace, in attention_decode_workspace()'s order.
  ExactArgs e{};
  e.q_rows = reinterpret_cast<bf16*>(a.workspace.as<float>());
  e.o_rows = e.q_rows + n * rows * D;
  e.offsets = reinterpret_cast<std::int64_t*>(e.o_rows + n * rows * D);
  e.scales = reinterpret_cast<float*>(e.offsets + 2 * n), e.taus = e.scales + n;
  e.list_of_head = reinterpret_cast<int*>(e.taus + n), e.order = e.list_of_head + n;
  e.z_rows = reinterpret_cast<float*>(e.order + n);
  auto* const bitmap = reinterpret_cast<std::uint32_t*>(e.z_rows + n * rows);

  const BandLists lists = tiles.by_query(groups).lists();
  e.qkv = static_cast<const bf16*>(a.qkv.data), e.o = static_cast<bf16*>(a.o.data);
  e.z = a.z ? a.z.as<float>() : nullptr;
  e.sequences = a.sequences.as<std::int32_t>(), e.positions = a.positions.as<std::int32_t>();
  e.batch = static_cast<int>(B), e.heads = static_cast<int>(H), e.cached = static_cast<int>(S), e.groups = groups, e.capacity = capacity;
  e.scale = a.scale.as<float>(), e.threshold = a.threshold.as<float>();
  e.lists = lists, e.group_of_head = tiles.group_of_head();
  e.length_beta = a.math.gate == Gate::softmax ? 0.f : a.math.length_beta;

  Args f{};
  set_math(f, a.math);
  f.length_beta = 0;  // in the thresholds
  auto* const keys = static_cast<bf16*>(a.cache.data.data);
  f.q = {e.q_rows, 0, rows * D, D}, f.o = {e.o_rows, 0, rows * D, D};
  f.k = {keys, 0, 2 * capacity * D, D}, f.v = {keys + capacity * D, 0, 2 * capacity * D, D};
  f.batch = 1, f.heads = static_cast<int>(n), f.tokens = static_cast<int>(rows), f.keys = static_cast<int>(capacity);
  f.query_tiles = groups, f.key_tiles = (f.keys + kTile - 1) / kTile, f.words = static_cast<int>(bitmap_words(f.key_tiles));
  f.section = section_of(capacity, D, n);
  f.scale = e.scales, f.threshold = e.taus, f.z = e.z_rows, f.active = bitmap;
  f.by_query = {e.offsets, lists.entries, e.order, 1, 0};
  f.group_of_head = e.list_of_head, f.masks = tiles.masks();
  f.mask0_is_causal = false;  // it is read: rows of the band do not stand where the arithmetic would have them
  if (hopper) {
    const AttentionShape shape{1, n, rows, D};
    f.map_q = tensor_map(f.q, shape, rows), f.map_k = tensor_map(f.k, shape, capacity), f.map_v = tensor_map(f.v, shape, capacity);
  }

  prepare_kernel<D><<<dim3(static_cast<unsigned>(H), static_cast<unsigned>(S)), kThreads, 0, stream>>>(e);
  check_launch("attention_decode");
  if (const cudaError_t error = launch_forward<D>(f, hopper, false, stream); error != cudaSuccess)
    throw std::runtime_error(std::string("attention_decode: ") + cudaGetErrorString(error));
  gather_kernel<D><<<dim3(static_cast<unsigned>(H), static_cast<unsigned>(B)), D, 0, stream>>>(e);
  check_launch("attention_decode");
}

}  // namespace
}  // namespace cuda_attention

void cuda_attention_decode_exact(const AttentionDecode& a, cudaStream_t stream, const CudaAttentionOptions& options) {
  using namespace cuda_attention;
  constexpr const char* kOp = "attention_decode";
  const CudaTiles& tiles = check_decode(kOp, a);
  require(!a.document_start, kOp, "document_start is not for the forward pass's bits: a text is one document");
  require(a.cache.sequences <= 65535, kOp, "there must be at most 65,535 cached sequences");
  if (a.positions.numel() == 0) return;
  const bool hopper = choose_path(options.path);
  a.cache.head_size == 64 ? run<64>(a, tiles, hopper, stream) : run<128>(a, tiles, hopper, stream);
}

}  // namespace tessera
