// The edge from each token to itself, beside the attention's own (SelfEdge in kernels/ops.h). Bound by memory.
//
// A warp takes a fixed set of tokens, one after another, and a tile of heads: `lanes` lanes a head, 8 elements each. Its heads' sums stay in
// registers (forward: how many edges are open); the warps of a block add theirs in the order of their numbers, and add_partial_sums() adds the
// blocks'. How tokens are dealt depends on the shape alone, not on the GPU. Results are f32 until they are rounded once.

#include <algorithm>
#include <bit>

#include "kernels/cuda/check.h"
#include "kernels/cuda/layers.h"
#include "kernels/cuda/vector.cuh"

namespace tessera::cuda {

namespace {

constexpr int kForwardWarps = 4, kBackwardWarps = 8;  // of a block
constexpr int kForwardBlocks = 2112;                  // at most, a tile of heads: as many as 132 SMs hold
constexpr int kBackwardBlocks = 264;                  // the same: norm_backward_scratch() has room for their sums
constexpr int kLargestHead = 256;
constexpr unsigned kAllLanes = 0xffffffffu;

/// [B, H, T, D] with strides, in elements.
struct View {
  bf16* data;
  std::int64_t batch, head, token;
  __device__ __forceinline__ bf16* at(std::int64_t b, int h, std::int64_t t, int d) const { return data + b * batch + h * head + t * token + d; }
};

struct Args {
  View q, k, v, o;
  View d_o, dq, dk, dv;  // backward
  const float *scale, *bias;
  float *z, *partials;
  unsigned long long* counters;  // forward, optional
  std::int64_t rows, tokens;     // rows: tokens of all sequences
  int heads, size, lanes;        // lanes: size / 8, rounded up to a power of two
  int power;
  bool squared;
};

/// A lane's place: its head, its first element of it, and a token.
struct Place {
  int head, within;
  bool has;    // the head is there and has elements for this lane
  bool first;  // of the head's lanes
  float scale = 0, bias = 0;

  __device__ explicit Place(const Args& a)
      : head(static_cast<int>(blockIdx.y * (32 / a.lanes) + threadIdx.x / a.lanes)),
        within(static_cast<int>(threadIdx.x) % a.lanes * 8),
        has(within < a.size && head < a.heads),
        first(has && within == 0) {
    if (has) scale = a.scale[head], bias = a.bias[head];
  }
  __device__ __forceinline__ Piece<8> load(const View& v, std::int64_t b, std::int64_t t) const {
    return has ? load_piece(v.at(b, head, t, within)) : Piece<8>{};
  }
};

__device__ __forceinline__ float dot(const float (&x)[8], const float (&y)[8]) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) sum += x[i] * y[i];
  return sum;
}

/// max(0, x); a NaN is 0, as in the attention kernels.
__device__ __forceinline__ float opening(const Args& a, const Place& place, float s) {
  return fmaxf(fmaf(place.scale, a.squared ? s * s : s, place.bias), 0.0f);
}
__device__ __forceinline__ float weight_of(const Args& a, float r) { return a.power == 1 ? r : a.power == 2 ? r * r : (r * r) * (r * r); }

__global__ void __launch_bounds__(32 * kForwardWarps) self_edge_forward_kernel(const __grid_constant__ Args a) {
  __shared__ unsigned open_edges[kForwardWarps][32];
  const Place place(a);
  const int group = static_cast<int>(threadIdx.x) / a.lanes;
  unsigned open = 0;
  for (std::int64_t row = std::int64_t{blockIdx.x} * kForwardWarps + threadIdx.y; row < a.rows; row += std::int64_t{gridDim.x} * kForwardWarps) {
    const std::int64_t b = row / a.tokens, t = row % a.tokens, at_z = (b * a.heads + place.head) * a.tokens + t;
    const Piece<8> q_ = place.load(a.q, b, t), k_ = place.load(a.k, b, t), v_ = place.load(a.v, b, t), o_ = place.load(a.o, b, t);
    float before = place.first ? a.z[at_z] : 0.0f, q[8], k[8], v[8], o[8];
    unpack(q_, q), unpack(k_, k), unpack(v_, v), unpack(o_, o);
    float s[1] = {dot(q, k)};
    group_sums(s, a.lanes);
    before = __shfl_sync(kAllLanes, before, group * a.lanes);
    const float r = opening(a, place, s[0]);
    if (!place.has || !(r > 0.0f)) continue;
    const float weight = weight_of(a, r), z = before + weight, inverse = 1.0f / z;
#pragma unroll
    for (int i = 0; i < 8; ++i) o[i] = fmaf(before, o[i], weight * v[i]) * inverse;
    store_piece(a.o.at(b, place.head, t, place.within), pack(o));
    if (place.first) a.z[at_z] = z;
    ++open;
  }
  if (!a.counters) return;
  if (place.first) open_edges[threadIdx.y][group] = open;
  __syncthreads();
  if (threadIdx.y != 0 || !place.first) return;
  unsigned long long sum = 0;
#pragma unroll
  for (int w = 0; w < kForwardWarps; ++w) sum += open_edges[w][group];
  atomicAdd(a.counters + place.head * static_cast<int>(kAttentionCounters) + kActiveEdges, sum);
}

/// to += factor x.
__device__ __forceinline__ void add_multiple(bf16* to, float factor, const float (&x)[8]) {
  float sum[8];
  unpack(load_piece(to), sum);
#pragma unroll
  for (int i = 0; i < 8; ++i) sum[i] = fmaf(factor, x[i], sum[i]);
  store_piece(to, pack(sum));
}

__global__ void __launch_bounds__(32 * kBackwardWarps) self_edge_backward_kernel(const __grid_constant__ Args a) {
  __shared__ float2 sums[kBackwardWarps][32];
  const Place place(a);
  float dbias = 0, dscale = 0;
  for (std::int64_t row = std::int64_t{blockIdx.x} * kBackwardWarps + threadIdx.y; row < a.rows; row += std::int64_t{gridDim.x} * kBackwardWarps) {
    const std::int64_t b = row / a.tokens, t = row % a.tokens;
    const Piece<8> q_ = place.load(a.q, b, t), k_ = place.load(a.k, b, t), v_ = place.load(a.v, b, t), o_ = place.load(a.o, b, t),
                   d_o_ = place.load(a.d_o, b, t);
    const float z = place.has ? a.z[(b * a.heads + place.head) * a.tokens + t] : 1.0f;
    float q[8], k[8], v[8], o[8], d_o[8];
    unpack(q_, q), unpack(k_, k), unpack(v_, v), unpack(o_, o), unpack(d_o_, d_o);
    float products[2] = {dot(q, k), 0};  // <q, k>, <do, v - o'>
#pragma unroll
    for (int i = 0; i < 8; ++i) products[1] += d_o[i] * (v[i] - o[i]);
    group_sums(products, a.lanes);
    const float s = products[0], r = opening(a, place, s), inverse = 1.0f / z;
    if (!place.has || !(r > 0.0f)) continue;
    const float slope = a.power == 1 ? 1.0f : a.power == 2 ? 2.0f * r : 4.0f * (r * r * r);
    const float dx = products[1] * inverse * slope, ds = place.scale * dx * (a.squared ? 2.0f * s : 1.0f);
    add_multiple(a.dv.at(b, place.head, t, place.within), weight_of(a, r) * inverse, d_o);
    add_multiple(a.dq.at(b, place.head, t, place.within), ds, k);
    add_multiple(a.dk.at(b, place.head, t, place.within), ds, q);
    dbias += dx, dscale += dx * (a.squared ? s * s : s);
  }

  const int group = static_cast<int>(threadIdx.x) / a.lanes;
  if (place.first) sums[threadIdx.y][group] = make_float2(dbias, dscale);
  __syncthreads();
  if (threadIdx.y != 0 || !place.first) return;
  float2 sum = sums[0][group];
#pragma unroll
  for (int w = 1; w < kBackwardWarps; ++w) sum.x += sums[w][group].x, sum.y += sums[w][group].y;
  float* to = a.partials + std::int64_t{blockIdx.x} * a.heads + place.head;
  to[0] = sum.x, to[std::int64_t{gridDim.x} * a.heads] = sum.y;
}

View view_of(const char* operation, const char* name, const HeadsView& v) {
  check_heads(operation, name, v);
  return {static_cast<bf16*>(v.data), v.batch, v.head, v.token};
}

Args arguments(const char* operation, const SelfEdge& e) {
  const AttentionShape& s = e.shape;
  require(s.batch >= 0 && s.heads >= 1 && s.tokens >= 1, operation, "there must be heads and tokens");
  require(s.head_size >= 8 && s.head_size % 8 == 0 && s.head_size <= kLargestHead, operation, "the head size must be a multiple of 8 up to 256");
  require(e.gate != Gate::softmax, operation, "softmax has no threshold that could close the edge");
  Args a{};
  a.q = view_of(operation, "q", e.q), a.k = view_of(operation, "k", e.k), a.v = view_of(operation, "v", e.v), a.o = view_of(operation, "o", e.o);
  a.scale = elements<float>(operation, "scale", e.scale, s.heads, sizeof(float));
  a.bias = elements<float>(operation, "bias", e.bias, s.heads, sizeof(float));
  a.z = elements<float>(operation, "z", e.z, s.batch * s.heads * s.tokens, sizeof(float));
  a.counters = reinterpret_cast<unsigned long long*>(
      optional_elements<std::uint64_t>(operation, "counters", e.counters, s.heads * kAttentionCounters, sizeof(std::uint64_t)));
  a.rows = s.batch * s.tokens, a.tokens = s.tokens, a.heads = static_cast<int>(s.heads), a.size = static_cast<int>(s.head_size);
  a.lanes = static_cast<int>(std::bit_ceil(static_cast<unsigned>(a.size / 8)));
  a.power = gate_power(e.gate), a.squared = e.score == Score::fidelity;
  return a;
}

/// `blocks` of tokens, and the tiles of heads.
dim3 grid(const Args& a, std::int64_t blocks) {
  const int tile = 32 / a.lanes;
  return {static_cast<unsigned>(blocks), static_cast<unsigned>((a.heads + tile - 1) / tile)};
}

}  // namespace

void self_edge_forward(const Context& c, const SelfEdge& e) {
  constexpr const char* kOp = "self_edge_forward";
  const Args a = arguments(kOp, e);
  if (a.rows == 0) return;
  const std::int64_t blocks = std::min<std::int64_t>(kForwardBlocks, (a.rows + kForwardWarps - 1) / kForwardWarps);
  self_edge_forward_kernel<<<grid(a, blocks), dim3(32, kForwardWarps), 0, c.stream>>>(a);
  check_launch(kOp);
}

void self_edge_backward(const Context& c, const SelfEdgeBackward& g) {
  constexpr const char* kOp = "self_edge_backward";
  Args a = arguments(kOp, g.forward);
  a.d_o = view_of(kOp, "d_o", g.d_o);
  a.dq = view_of(kOp, "dq", g.dq), a.dk = view_of(kOp, "dk", g.dk), a.dv = view_of(kOp, "dv", g.dv);
  auto* dbias = elements<float>(kOp, "dbias", g.dbias, a.heads, sizeof(float));
  auto* dscale = optional_elements<float>(kOp, "dscale", g.dscale, a.heads, sizeof(float));
  require(c.scratch && c.scratch_bytes >= norm_backward_scratch(a.heads), kOp, "needs norm_backward_scratch(heads) bytes of scratch");
  a.partials = static_cast<float*>(c.scratch);
  if (a.rows == 0) return;
  const std::int64_t blocks = std::min<std::int64_t>(kBackwardBlocks, (a.rows + kBackwardWarps - 1) / kBackwardWarps);
  self_edge_backward_kernel<<<grid(a, blocks), dim3(32, kBackwardWarps), 0, c.stream>>>(a);
  check_launch(kOp);
  add_partial_sums(c, a.partials, static_cast<int>(blocks), a.heads, dbias, dscale);
}

}  // namespace tessera::cuda
