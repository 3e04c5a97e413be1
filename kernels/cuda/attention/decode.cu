// Generation: attention of one query of each sequence over the cached keys and values, and the copy of new ones into the cache. Bound by the cache's
// memory.
//
// A query's tile list is cut into parts, so that a single sequence fills the GPU: a block takes a part of one (sequence, head), each of its warps a
// tile at a time. A row of a head lies over D/8 lanes of 16 bytes; a warp has 32 keys (D = 128: 16) under way together. Rows of values are read only
// for edges with a weight: of a sparse head hardly any. A second kernel adds the parts in ascending order. Nothing depends on the batch.

#include <algorithm>

#include "kernels/cuda/attention/attention.h"
#include "kernels/cuda/attention/gate.cuh"
#include "kernels/cuda/attention/host.h"
#include "kernels/cuda/check.h"
#include "kernels/cuda/vector.cuh"

namespace tessera {
namespace cuda_attention {
namespace {

using cuda::check_launch;
using cuda::elements;
using cuda::load_piece;
using cuda::pack;
using cuda::Piece;
using cuda::require;
using cuda::store_piece;
using cuda::unpack;

constexpr int kWarps = 4;  // of a block

struct DecodeArgs {
  const bf16 *cache, *qkv;
  bf16* o;
  float* z;                  // or null
  int batch, heads, cached;  // sequences: of the call, and in the cache
  std::int64_t capacity;
  const int *sequences, *positions, *document_start;
  const float *scale, *threshold;
  BandLists lists;  // bands of two query tiles
  const int* group_of_head;
  const std::uint64_t* masks;
  int parts;       // of the longest list
  float* partial;  // [batch, heads, parts, D + 3]: sum of a v; sum of a, top (softmax), visible keys
  bool fidelity, normalize_sum, normalize_length;
  int power;  // 0: softmax
  float epsilon, length_alpha, length_beta;

  __device__ __forceinline__ float* part(int b, int h, int part, int size) const {
    return partial + ((static_cast<std::int64_t>(b) * heads + h) * parts + part) * (size + 3);
  }
};

/// The list of a query's tile, and how it is cut: a tile a warp, until the parts are many. A function of the list alone. A query that is not in the
/// cache has an empty one.
struct List {
  std::int64_t begin = 0, end = 0;
  int group = 0;  // of the band's two tiles
  int part_entries = kWarps;
  bool valid;
  __device__ __forceinline__ List(const DecodeArgs& a, int h, int sequence, int position)
      : valid(position >= 0 && position < a.capacity && sequence >= 0 && sequence < a.cached) {
    if (!valid) return;
    const int place = position / kTile + a.lists.before;
    const std::int64_t at = static_cast<std::int64_t>(a.group_of_head[h]) * (a.lists.bands + 1) + place / 2;
    begin = a.lists.offsets[at], end = a.lists.offsets[at + 1], group = place % 2;
    part_entries = kWarps * static_cast<int>((end - begin + kWarps * kDecodeParts - 1) / (kWarps * kDecodeParts));
  }
  __device__ __forceinline__ int parts() const { return end > begin ? static_cast<int>((end - begin + part_entries - 1) / part_entries) : 0; }
};

/// 2^x with 0 for -infinity on both sides of a difference.
__device__ __forceinline__ float decay(float from, float to) { return from == -INFINITY ? 0.f : exp2f(from - to); }

template <int D, bool Softmax>
__global__ void __launch_bounds__(32 * kWarps) decode_kernel(const __grid_constant__ DecodeArgs a) {
  constexpr int kLanes = D / 8, kKeys = 32 / kLanes, kSteps = 8, kSpan = kKeys * kSteps;  // keys at once
  const int part = blockIdx.x, h = blockIdx.y, b = blockIdx.z;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, key_of_lane = lane / kLanes, column = lane % kLanes * 8;
  const int position = a.positions[b];
  const List list(a, h, a.sequences[b], position);
  const std::int64_t first = list.begin + static_cast<std::int64_t>(part) * list.part_entries, last = min(first + list.part_entries, list.end);
  if (first >= last) return;

  const float c = a.scale[h];
  float offset = 0;
  if (!Softmax) {
    if (a.length_beta > 0)
      offset = -c * a.length_beta * sqrtf(2.f * logf(static_cast<float>(position) + 2.f) / static_cast<float>(D));
    else
      offset = a.fidelity ? -c * a.threshold[h] : -a.threshold[h];
  }
  const float scale = Softmax ? c * kLog2e : c;
  const int document = a.document_start ? a.document_start[b] : 0;
  const bf16* keys = a.cache + (static_cast<std::int64_t>(a.sequences[b]) * a.heads + h) * 2 * a.capacity * D + column;
  const bf16* values = keys + a.capacity * D;
  float q[8];
  unpack(load_piece(a.qkv + static_cast<std::int64_t>(b) * 3 * a.heads * D + h * D + column), q);

  float sum[8] = {}, total = 0, top = -INFINITY;
  int seen = 0;
  for (std::int64_t e = first + warp; e < last; e += kWarps) {
    const int4 entry = __ldg(reinterpret_cast<const int4*>(a.lists.entries + e));
    const int mask = list.group == 0 ? entry.y : entry.z, first_key = entry.x * kTile;
    if (mask == kAbsent || first_key > position) continue;
    std::uint64_t visible = mask < 0 ? ~0ull : __ldg(a.masks + mask * 64ll + position % kTile);
    if (position - first_key < 63) visible &= (2ull << (position - first_key)) - 1;
    if (document > first_key) visible &= document - first_key >= 64 ? 0 : ~0ull << (document - first_key);
    seen += __popcll(visible);
    for (int base = 0; base < kTile; base += kSpan) {
      const std::uint32_t here = static_cast<std::uint32_t>(visible >> base) & (kSpan == 32 ? ~0u : (1u << kSpan % 32) - 1);
      if (here == 0) continue;
      const std::int64_t row = first_key + base;
      Piece<8> k[kSteps];
      float score[kSteps];
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        const int key = i * kKeys + key_of_lane;
        k[i] = here >> key & 1 ? load_piece(keys + (row + key) * D) : Piece<8>{};
      }
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        float x[8];
        unpack(k[i], x);
        score[i] = 0;
#pragma unroll
        for (int d = 0; d < 8; ++d) score[i] = fmaf(q[d], x[d], score[i]);
      }
#pragma unroll
      for (int step = kLanes / 2; step > 0; step /= 2) {
#pragma unroll
        for (int i = 0; i < kSteps; ++i) score[i] += __shfl_xor_sync(0xffffffffu, score[i], step);
      }
      float weight[kSteps];
      if constexpr (Softmax) {
        float highest = top;
#pragma unroll
        for (int i = 0; i < kSteps; ++i) {
          const bool on = here >> (i * kKeys + key_of_lane) & 1;
          weight[i] = on ? scale * (a.fidelity ? score[i] * score[i] : score[i]) : -INFINITY;
          highest = fmaxf(highest, weight[i]);
        }
#pragma unroll
        for (int step = kLanes; step < 32; step *= 2) highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, step));
        const float shrink = decay(top, highest);
        top = highest, total *= shrink;
#pragma unroll
        for (int d = 0; d < 8; ++d) sum[d] *= shrink;
#pragma unroll
        for (int i = 0; i < kSteps; ++i) weight[i] = decay(weight[i], top);
      } else {
#pragma unroll
        for (int i = 0; i < kSteps; ++i) {
          const bool on = here >> (i * kKeys + key_of_lane) & 1;
          const float r = on ? fmaxf(fmaf(scale, a.fidelity ? score[i] * score[i] : score[i], offset), 0.f) : 0.f;
          weight[i] = a.power == 1 ? r : a.power == 2 ? r * r : (r * r) * (r * r);
        }
      }
      Piece<8> v[kSteps];
#pragma unroll
      for (int i = 0; i < kSteps; ++i) v[i] = weight[i] > 0 ? load_piece(values + (row + i * kKeys + key_of_lane) * D) : Piece<8>{};
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        float x[8];
        unpack(v[i], x);
        total += weight[i];
#pragma unroll
        for (int d = 0; d < 8; ++d) sum[d] = fmaf(weight[i], x[d], sum[d]);
      }
    }
  }
  // Over the warp's keys, then over the warps.
#pragma unroll
  for (int step = kLanes; step < 32; step *= 2) {
    total += __shfl_xor_sync(0xffffffffu, total, step);
#pragma unroll
    for (int d = 0; d < 8; ++d) sum[d] += __shfl_xor_sync(0xffffffffu, sum[d], step);
  }
  __shared__ float sums[kWarps][D], totals[kWarps], tops[kWarps];
  __shared__ int seens[kWarps];
  if (lane < kLanes) {
#pragma unroll
    for (int d = 0; d < 8; ++d) sums[warp][column + d] = sum[d];
  }
  if (lane == 0) totals[warp] = total, tops[warp] = top, seens[warp] = seen;
  __syncthreads();
  float* to = a.part(b, h, part, D);
  float highest = -INFINITY;
  if (Softmax) {
#pragma unroll
    for (int w = 0; w < kWarps; ++w) highest = fmaxf(highest, tops[w]);
  }
  for (int d = threadIdx.x; d < D; d += 32 * kWarps) {
    float x = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) x += Softmax ? sums[w][d] * decay(tops[w], highest) : sums[w][d];
    to[d] = x;
  }
  if (threadIdx.x == 0) {
    float x = 0;
    int n = 0;
    for (int w = 0; w < kWarps; ++w) x += Softmax ? totals[w] * decay(tops[w], highest) : totals[w], n += seens[w];
    to[D] = x, to[D + 1] = highest, to[D + 2] = __int_as_float(n);
  }
}

/// One block a (sequence, head), D threads: the sum of its parts over z.
template <int D, bool Softmax>
__global__ void __launch_bounds__(D) finish_kernel(const __grid_constant__ DecodeArgs a) {
  const int h = blockIdx.x, b = blockIdx.y, d = threadIdx.x;
  const List list(a, h, a.sequences[b], a.positions[b]);
  const int parts = list.parts();
  float highest = -INFINITY, sum = 0, total = 0;
  int seen = 0;
  if (Softmax) {
    for (int n = 0; n < parts; ++n) highest = fmaxf(highest, a.part(b, h, n, D)[D + 1]);
  }
  for (int n = 0; n < parts; ++n) {
    const float* from = a.part(b, h, n, D);
    const float factor = Softmax ? decay(from[D + 1], highest) : 1.f;
    sum += from[d] * factor, total += from[D] * factor, seen += __float_as_int(from[D + 2]);
  }
  const float z = Softmax              ? total
                  : a.normalize_sum    ? a.epsilon + total
                  : a.normalize_length ? powf(static_cast<float>(max(seen, 1)), a.length_alpha)
                                       : 1.f;
  const std::int64_t row = static_cast<std::int64_t>(b) * a.heads + h;
  const float nan = __int_as_float(0x7fffffff);
  a.o[row * D + d] = __float2bfloat16_rn(!list.valid ? nan : (z > 0.f ? sum / z : 0.f) + 0.f);
  if (a.z && d == 0) a.z[row] = !list.valid ? nan : !Softmax ? z : seen == 0 ? 0.f : kLn2 * (highest + log2f(total));
}

/// k and v of token t of sequence b, 16 bytes a thread; and zeros to the values behind the last token, up to the end of its tile: the exact form
/// reads whole tiles, and a weight of 0 makes 0 of finite values only.
__global__ void append_kernel(const bf16* qkv, bf16* cache, const int* sequences, const int* positions, int batch, int tokens, int heads, int size,
                              int cached, std::int64_t capacity) {
  const int pieces = size / 8;
  std::int64_t n = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int piece = static_cast<int>(n % pieces);
  n /= pieces;
  const std::int64_t rows = static_cast<std::int64_t>(batch) * tokens * 2 * heads;
  const auto value = [&](int sequence, int head, int part, std::int64_t token) {
    return cache + (((static_cast<std::int64_t>(sequence) * heads + head) * 2 + part) * capacity + token) * size + piece * 8;
  };
  if (n >= rows) {
    n -= rows;
    const int behind = static_cast<int>(n % (kTile - 1)) + 1;
    n /= kTile - 1;
    const int head = static_cast<int>(n % heads);
    n /= heads;
    if (n >= batch || positions[n] < 0 || sequences[n] < 0 || sequences[n] >= cached) return;
    const std::int64_t last = positions[n] + tokens - 1, token = last + behind;
    if (last < capacity && token < capacity && token / kTile == last / kTile) store_piece(value(sequences[n], head, 1, token), Piece<8>{});
    return;
  }
  const int part_head = static_cast<int>(n % (2 * heads));  // k of every head, then v, as in qkv
  const int part = part_head / heads, head = part_head % heads;
  n /= 2 * heads;
  const int b = static_cast<int>(n / tokens);
  const std::int64_t token = positions[b] + n % tokens;
  if (token < 0 || token >= capacity || sequences[b] < 0 || sequences[b] >= cached) return;
  store_piece(value(sequences[b], head, part, token), load_piece(qkv + (n * 3 * heads + heads + part_head) * size + piece * 8));
}

template <int D>
void launch_decode(const DecodeArgs& a, cudaStream_t stream) {
  const dim3 grid(a.parts, a.heads, a.batch), rows(a.heads, a.batch);
  if (a.power == 0) {
    decode_kernel<D, true><<<grid, 32 * kWarps, 0, stream>>>(a);
    finish_kernel<D, true><<<rows, D, 0, stream>>>(a);
  } else {
    decode_kernel<D, false><<<grid, 32 * kWarps, 0, stream>>>(a);
    finish_kernel<D, false><<<rows, D, 0, stream>>>(a);
  }
}

}  // namespace

void check_cache(const char* operation, const KeyValueCache& c) {
  require(c.sequences >= 1 && c.heads >= 1 && c.capacity >= 1, operation, "the cache must have sequences, heads and tokens");
  require(c.head_size > 0 && c.head_size % 8 == 0, operation, "the head size must be a multiple of 8");
  cuda::bf16_elements(operation, "cache", c.data, c.sequences * 2 * c.heads * c.capacity * c.head_size);
}

const CudaTiles& check_decode(const char* operation, const AttentionDecode& a) {
  const auto* tiles = dynamic_cast<const CudaTiles*>(a.tiles);
  require(tiles != nullptr, operation, "tiles must come from upload_tiles_cuda");
  require(static_cast<std::int64_t>(tiles->host().group_of_head.size()) == a.cache.heads, operation,
          "the tile map is made for another number of heads");
  require(a.cache.capacity <= tiles->host().tokens, operation, "the cache is longer than the tile map serves");
  check_cache(operation, a.cache);
  const std::int64_t B = a.positions.numel(), H = a.cache.heads, D = a.cache.head_size;
  require(D == 64 || D == 128, operation, "the kernels have head sizes 64 and 128");
  require(B <= 65535 && H <= 65535, operation, "there must be at most 65,535 sequences and heads");
  require(B <= a.cache.sequences, operation, "more rows than cached sequences: each is to be another one");
  require(a.math.length_beta <= 0 || a.math.score == Score::cosine, operation, "length_beta goes with score cosine");
  if (B == 0) return *tiles;
  cuda::bf16_elements(operation, "qkv", a.qkv, B * 3 * H * D), cuda::bf16_elements(operation, "o", a.o, B * H * D);
  cuda::optional_elements<float>(operation, "z", a.z, B * H, 4);
  elements<std::int32_t>(operation, "sequences", a.sequences, B, 4), elements<std::int32_t>(operation, "positions", a.positions, B, 4);
  elements<float>(operation, "scale", a.scale, H, 4), elements<float>(operation, "threshold", a.threshold, H, 4);
  require(a.workspace.numel() >= attention_decode_workspace(a.cache), operation, "the workspace is too small");
  elements<float>(operation, "workspace", a.workspace, a.workspace.numel());
  return *tiles;
}

}  // namespace cuda_attention

using namespace cuda_attention;

void cuda_attention_decode(const AttentionDecode& a, cudaStream_t stream) {
  constexpr const char* kOp = "attention_decode";
  const CudaTiles& tiles = check_decode(kOp, a);
  const std::int64_t B = a.positions.numel(), H = a.cache.heads, D = a.cache.head_size;
  if (B == 0) return;
  DecodeArgs d{};
  d.cache = static_cast<const bf16*>(a.cache.data.data), d.qkv = static_cast<const bf16*>(a.qkv.data), d.o = static_cast<bf16*>(a.o.data);
  d.z = a.z ? a.z.as<float>() : nullptr;
  d.batch = static_cast<int>(B), d.heads = static_cast<int>(H), d.cached = static_cast<int>(a.cache.sequences);
  d.capacity = a.cache.capacity;
  d.sequences = a.sequences.as<std::int32_t>(), d.positions = a.positions.as<std::int32_t>();
  d.document_start = cuda::optional_elements<std::int32_t>(kOp, "document_start", a.document_start, B, 4);
  d.scale = a.scale.as<float>(), d.threshold = a.threshold.as<float>();
  d.lists = tiles.by_query(2).lists(), d.group_of_head = tiles.group_of_head(), d.masks = tiles.masks();
  d.parts = static_cast<int>(std::clamp<std::int64_t>((tiles.by_query(2).longest() + kWarps - 1) / kWarps, 1, kDecodeParts));
  d.partial = a.workspace.as<float>();
  d.fidelity = a.math.score == Score::fidelity, d.power = gate_power(a.math.gate);
  d.normalize_sum = a.math.normalizer == Normalizer::sum, d.normalize_length = a.math.normalizer == Normalizer::length;
  d.epsilon = a.math.epsilon, d.length_alpha = a.math.length_alpha, d.length_beta = a.math.length_beta;
  D == 64 ? launch_decode<64>(d, stream) : launch_decode<128>(d, stream);
  check_launch(kOp);
}

void cuda_cache_append(const CacheAppend& a, cudaStream_t stream) {
  constexpr const char* kOp = "cache_append";
  check_cache(kOp, a.cache);
  const std::int64_t B = a.positions.numel(), H = a.cache.heads, D = a.cache.head_size;
  if (B == 0) return;
  require(a.qkv.numel() % (B * 3 * H * D) == 0, kOp, "qkv must be [B, T, 3, H, D]");
  const std::int64_t tokens = a.qkv.numel() / (B * 3 * H * D), pieces = (B * tokens * 2 * H + B * H * (kTile - 1)) * (D / 8);
  const auto* qkv = static_cast<const bf16*>(cuda::bf16_elements(kOp, "qkv", a.qkv, a.qkv.numel()));
  const auto* sequences = elements<std::int32_t>(kOp, "sequences", a.sequences, B, 4);
  const auto* positions = elements<std::int32_t>(kOp, "positions", a.positions, B, 4);
  if (tokens == 0) return;
  append_kernel<<<static_cast<unsigned>((pieces + 255) / 256), 256, 0, stream>>>(
      qkv, static_cast<bf16*>(a.cache.data.data), sequences, positions, static_cast<int>(B), static_cast<int>(tokens), static_cast<int>(H),
      static_cast<int>(D), static_cast<int>(a.cache.sequences), a.cache.capacity);
  check_launch(kOp);
}

}  // namespace tessera
