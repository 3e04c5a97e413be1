// The edge from each token to itself, beside the attention's own (SelfEdge in kernels/ops.h). Bound by memory.
//
// A warp's heads have their sums in registers (forward: how many edges are open); the warps of a block add theirs in the order of their numbers, and
// add_partial_sums() adds the blocks'. Results are f32 until they are rounded once.

#include "kernels/cuda/added_edges.cuh"

namespace tessera::cuda {

namespace {

constexpr int kForwardWarps = kAddedForwardWarps, kBackwardWarps = kAddedBackwardWarps;

struct Args : AddedEdges {
  View k, v;
  View dk, dv;  // backward
  const float* bias;
  unsigned long long* counters;  // forward, optional
};

__global__ void __launch_bounds__(32 * kForwardWarps) self_edge_forward_kernel(const __grid_constant__ Args a) {
  __shared__ unsigned long long sums[kForwardWarps][32];
  const Place place(a);
  const float bias = place.has ? a.bias[place.head] : 0.0f;
  unsigned long long open = 0;
  for (std::int64_t row = std::int64_t{blockIdx.x} * kForwardWarps + threadIdx.y; row < a.rows; row += std::int64_t{gridDim.x} * kForwardWarps) {
    const std::int64_t b = row / a.tokens, t = row % a.tokens, at_z = (b * a.heads + place.head) * a.tokens + t;
    const Piece<8> q_ = place.load(a.q, b, t), k_ = place.load(a.k, b, t), v_ = place.load(a.v, b, t), o_ = place.load(a.o, b, t);
    float before = place.first ? a.z[at_z] : 0.0f, q[8], k[8], v[8], o[8];
    unpack(q_, q), unpack(k_, k), unpack(v_, v), unpack(o_, o);
    float s[1] = {dot(q, k)};
    group_sums(s, a.lanes);
    before = of_first_lane(a, before);
    const float r = a.opening(place.scale, bias, s[0]);
    if (!place.has || !(r > 0.0f)) continue;
    const float weight = a.weight_of(r), z = before + weight, inverse = 1.0f / z;
#pragma unroll
    for (int i = 0; i < 8; ++i) o[i] = fmaf(before, o[i], weight * v[i]) * inverse;
    store_piece(a.o.at(b, place.head, t, place.within), pack(o));
    if (place.first) a.z[at_z] = z;
    ++open;
  }
  if (!a.counters) return;
  open = sum_over_warps(a, place, sums, open);
  if (place.is_writer()) atomicAdd(a.counters + place.head * static_cast<int>(kAttentionCounters) + kActiveEdges, open);
}

/// to += factor x, in memory.
__device__ __forceinline__ void add_to_memory(bf16* to, float factor, const float (&x)[8]) {
  float sum[8];
  unpack(load_piece(to), sum);
  add_multiple(sum, factor, x);
  store_piece(to, pack(sum));
}

__global__ void __launch_bounds__(32 * kBackwardWarps) self_edge_backward_kernel(const __grid_constant__ Args a) {
  __shared__ float sums[kBackwardWarps][32];
  const Place place(a);
  const float bias = place.has ? a.bias[place.head] : 0.0f;
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
    const float s = products[0], r = a.opening(place.scale, bias, s), inverse = 1.0f / z;
    if (!place.has || !(r > 0.0f)) continue;
    const float dx = products[1] * inverse * a.weight_slope(r), ds = place.scale * dx * a.slope(s);
    add_to_memory(a.dv.at(b, place.head, t, place.within), a.weight_of(r) * inverse, d_o);
    add_to_memory(a.dq.at(b, place.head, t, place.within), ds, k);
    add_to_memory(a.dk.at(b, place.head, t, place.within), ds, q);
    dbias += dx, dscale += dx * a.f(s);
  }

  dbias = sum_over_warps(a, place, sums, dbias), dscale = sum_over_warps(a, place, sums, dscale);
  if (!place.is_writer()) return;
  float* to = a.partials + std::int64_t{blockIdx.x} * a.heads + place.head;
  to[0] = dbias, to[std::int64_t{gridDim.x} * a.heads] = dscale;
}

Args arguments(const char* operation, const SelfEdge& e) {
  Args a{};
  take_arguments(a, operation, e);
  a.k = view_of(operation, "k", e.k), a.v = view_of(operation, "v", e.v);
  a.bias = elements<float>(operation, "bias", e.bias, a.heads, sizeof(float));
  a.counters = reinterpret_cast<unsigned long long*>(
      optional_elements<std::uint64_t>(operation, "counters", e.counters, a.heads * kAttentionCounters, sizeof(std::uint64_t)));
  return a;
}

}  // namespace

void self_edge_forward(const Context& c, const SelfEdge& e) {
  constexpr const char* kOp = "self_edge_forward";
  const Args a = arguments(kOp, e);
  if (a.rows == 0) return;
  self_edge_forward_kernel<<<added_grid(a, kAddedForwardBlocks, kForwardWarps), dim3(32, kForwardWarps), 0, c.stream>>>(a);
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
  const dim3 grid = added_grid(a, kPartialBlocks, kBackwardWarps);
  self_edge_backward_kernel<<<grid, dim3(32, kBackwardWarps), 0, c.stream>>>(a);
  check_launch(kOp);
  add_partial_sums(c, a.partials, static_cast<int>(grid.x), a.heads, dbias, dscale);
}

}  // namespace tessera::cuda
