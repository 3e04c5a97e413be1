// Learned keys and values of a head that every query sees (Sinks in kernels/ops.h). Bound by memory for few sinks.
//
// Forward, a lane's part of its head's keys and values stays in registers; backward, its part of their gradients: the warps of a block add theirs in
// the order of their numbers, and add_partial_sums() adds the blocks'. Results are f32 until they are rounded once.

#include <limits>

#include "kernels/cuda/added_edges.cuh"

namespace tessera::cuda {

namespace {

constexpr int kForwardWarps = kAddedForwardWarps, kBackwardWarps = kAddedBackwardWarps;

// Blocks that are to fit a multiprocessor, which limits a thread's registers; it matters for 4 and 8 (on an H200: tests/bench/RESULTS.md).
constexpr int forward_blocks(int sinks) { return sinks == 1 ? 8 : sinks == 2 ? 7 : sinks == 4 ? 5 : 3; }
constexpr int backward_blocks(int sinks) { return sinks == 1 ? 4 : sinks <= 4 ? 2 : 1; }

struct Args : AddedEdges {
  const float *keys, *values;  // [H, S, D]
  const float* bias;           // [H, S]
  int sinks;                   // S
};

/// Eight elements of a sink, for the head's lane; zeros where there is no such sink.
__device__ __forceinline__ void load_sink(const Args& a, const Place& place, const float* from, int sink, float (&x)[8]) {
  if (place.has && sink < a.sinks) {
    load_floats(from + (std::int64_t{place.head} * a.sinks + sink) * a.size + place.within, x);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = 0.0f;
  }
}
/// Its bias; where there is no such sink one that no score opens.
__device__ __forceinline__ float bias_of(const Args& a, const Place& place, int sink) {
  return place.has && sink < a.sinks ? a.bias[place.head * a.sinks + sink] : -std::numeric_limits<float>::infinity();
}

/// kSinks: a.sinks, or more.
template <int kSinks>
__global__ void __launch_bounds__(32 * kForwardWarps, forward_blocks(kSinks)) sinks_forward_kernel(const __grid_constant__ Args a) {
  const Place place(a);
  float keys[kSinks][8], values[kSinks][8], bias[kSinks];
#pragma unroll
  for (int j = 0; j < kSinks; ++j) {
    load_sink(a, place, a.keys, j, keys[j]);
    load_sink(a, place, a.values, j, values[j]);
    bias[j] = bias_of(a, place, j);
  }
  for (std::int64_t row = std::int64_t{blockIdx.x} * kForwardWarps + threadIdx.y; row < a.rows; row += std::int64_t{gridDim.x} * kForwardWarps) {
    const std::int64_t b = row / a.tokens, t = row % a.tokens, at_z = (b * a.heads + place.head) * a.tokens + t;
    const Piece<8> q_ = place.load(a.q, b, t), o_ = place.load(a.o, b, t);
    float before = place.first ? a.z[at_z] : 0.0f, q[8], o[8], s[kSinks];
    unpack(q_, q), unpack(o_, o);
#pragma unroll
    for (int j = 0; j < kSinks; ++j) s[j] = dot(q, keys[j]);
    group_sums(s, a.lanes);
    before = of_first_lane(a, before);
    float total = 0;
#pragma unroll
    for (int j = 0; j < kSinks; ++j) total += s[j] = a.weight_of(a.opening(place.scale, bias[j], s[j]));
    if (!place.has || !(total > 0.0f)) continue;
    const float z = before + total, inverse = 1.0f / z;
#pragma unroll
    for (int i = 0; i < 8; ++i) o[i] *= before;
#pragma unroll
    for (int j = 0; j < kSinks; ++j) add_multiple(o, s[j], values[j]);
#pragma unroll
    for (int i = 0; i < 8; ++i) o[i] *= inverse;
    store_piece(a.o.at(b, place.head, t, place.within), pack(o));
    if (place.first) a.z[at_z] = z;
  }
}

/// The place of a block's sums of sinks of `count` numbers each.
__device__ __forceinline__ float* partials_of(const Args& a, float* part, int count) {
  return part + std::int64_t{blockIdx.x} * a.heads * a.sinks * count;
}

/// Adds a lane's eight sums over the block's warps and stores them: elements of sink `sink` in [H, S, D] from `to` on. All threads call.
__device__ __forceinline__ void store_block_sums(const Args& a, float (&shared)[kBackwardWarps][256], const float (&x)[8], float* to, int sink) {
  store_floats(shared[threadIdx.y] + 8 * threadIdx.x, x);
  __syncthreads();
  const int n = static_cast<int>(threadIdx.y * 32 + threadIdx.x), lane = n / 8;
  const int head = static_cast<int>(blockIdx.y) * (32 / a.lanes) + lane / a.lanes, element = lane % a.lanes * 8 + n % 8;
  if (head < a.heads && element < a.size) {
    float sum = shared[0][n];
#pragma unroll
    for (int w = 1; w < kBackwardWarps; ++w) sum += shared[w][n];
    to[(std::int64_t{head} * a.sinks + sink) * a.size + element] = sum;
  }
  __syncthreads();
}

/// Partial sums [blocks, H, S, D] of keys, the same of values, [blocks, H, S] of biases, [blocks, H] of scales.
template <int kSinks>
__global__ void __launch_bounds__(32 * kBackwardWarps, backward_blocks(kSinks)) sinks_backward_kernel(const __grid_constant__ Args a) {
  static_assert(32 * kBackwardWarps == 256, "a thread for each number of a warp's");
  __shared__ __align__(16) float shared[kBackwardWarps][256];
  __shared__ float of_head[kBackwardWarps][32];
  const Place place(a);
  float dkeys[kSinks][8] = {}, dvalues[kSinks][8] = {}, dbias[kSinks] = {}, dscale = 0;
  for (std::int64_t row = std::int64_t{blockIdx.x} * kBackwardWarps + threadIdx.y; row < a.rows; row += std::int64_t{gridDim.x} * kBackwardWarps) {
    const std::int64_t b = row / a.tokens, t = row % a.tokens;
    const Piece<8> q_ = place.load(a.q, b, t), o_ = place.load(a.o, b, t), d_o_ = place.load(a.d_o, b, t);
    const float z = place.has ? a.z[(b * a.heads + place.head) * a.tokens + t] : 1.0f;
    float q[8], o[8], d_o[8], products[2 * kSinks];  // <q, k>, <do, v - o'>
    unpack(q_, q), unpack(o_, o), unpack(d_o_, d_o);
#pragma unroll
    for (int j = 0; j < kSinks; ++j) {
      float x[8];
      load_sink(a, place, a.keys, j, x);
      products[j] = dot(q, x);
      load_sink(a, place, a.values, j, x);
      products[kSinks + j] = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) products[kSinks + j] += d_o[i] * (x[i] - o[i]);
    }
    group_sums(products, a.lanes);
    if (!place.has) continue;
    const float inverse = 1.0f / z;
    float ds[kSinks];
    bool open = false;
#pragma unroll
    for (int j = 0; j < kSinks; ++j) {
      const float s = products[j], r = a.opening(place.scale, bias_of(a, place, j), s);
      ds[j] = 0;
      if (!(r > 0.0f)) continue;
      const float dx = products[kSinks + j] * inverse * a.weight_slope(r);
      ds[j] = place.scale * dx * a.slope(s);
      add_multiple(dkeys[j], ds[j], q);
      add_multiple(dvalues[j], a.weight_of(r) * inverse, d_o);
      dbias[j] += dx, dscale += dx * a.f(s);
      open = true;
    }
    if (!open) continue;
    bf16* const at = a.dq.at(b, place.head, t, place.within);
    float dq[8];
    unpack(load_piece(at), dq);
#pragma unroll
    for (int j = 0; j < kSinks; ++j) {
      float x[8];
      load_sink(a, place, a.keys, j, x);
      add_multiple(dq, ds[j], x);
    }
    store_piece(at, pack(dq));
  }

  const std::int64_t blocks = gridDim.x, sinks = std::int64_t{a.heads} * a.sinks;
  float *const of_keys = a.partials, *const of_values = of_keys + blocks * sinks * a.size, *const of_bias = of_values + blocks * sinks * a.size,
               *const of_scale = of_bias + blocks * sinks;
  const auto store_number = [&](float x, float* to) {
    x = sum_over_warps(a, place, of_head, x);
    if (place.is_writer()) *to = x;
  };
#pragma unroll
  for (int j = 0; j < kSinks; ++j) {
    if (j >= a.sinks) break;
    store_block_sums(a, shared, dkeys[j], partials_of(a, of_keys, a.size), j);
    store_block_sums(a, shared, dvalues[j], partials_of(a, of_values, a.size), j);
    store_number(dbias[j], partials_of(a, of_bias, 1) + place.head * a.sinks + j);
  }
  store_number(dscale, of_scale + std::int64_t{blockIdx.x} * a.heads + place.head);
}

Args arguments(const char* operation, const Sinks& e) {
  Args a{};
  take_arguments(a, operation, e);
  const std::int64_t each = e.keys.shape[1], sinks = a.heads * each;
  require(each >= 1 && each <= kMostSinks && e.keys.shape == Shape{a.heads, each, a.size} && e.values.shape == e.keys.shape, operation,
          "keys and values must be [heads, 1 to 8 sinks, head size]");
  require(e.bias.shape == Shape{a.heads, each}, operation, "bias must be [heads, sinks]");
  a.sinks = static_cast<int>(each);
  a.keys = elements<float>(operation, "keys", e.keys, sinks * a.size);
  a.values = elements<float>(operation, "values", e.values, sinks * a.size);
  a.bias = elements<float>(operation, "bias", e.bias, sinks, sizeof(float));
  return a;
}

/// Calls launch(n) with the number of sinks, rounded up to a power of two, as a compile-time constant.
template <class F>
void with_sinks(int sinks, F&& launch) {
  if (sinks == 1) return launch(std::integral_constant<int, 1>{});
  if (sinks == 2) return launch(std::integral_constant<int, 2>{});
  if (sinks <= 4) return launch(std::integral_constant<int, 4>{});
  static_assert(kMostSinks == 8);
  launch(std::integral_constant<int, 8>{});
}

}  // namespace

void sinks_forward(const Context& c, const Sinks& e) {
  constexpr const char* kOp = "sinks_forward";
  const Args a = arguments(kOp, e);
  if (a.rows == 0) return;
  with_sinks(a.sinks, [&](auto n) {
    sinks_forward_kernel<n.value><<<added_grid(a, kAddedForwardBlocks, kForwardWarps), dim3(32, kForwardWarps), 0, c.stream>>>(a);
  });
  check_launch(kOp);
}

void sinks_backward(const Context& c, const SinksBackward& g) {
  constexpr const char* kOp = "sinks_backward";
  Args a = arguments(kOp, g.forward);
  const std::int64_t sinks = std::int64_t{a.heads} * a.sinks;
  a.d_o = view_of(kOp, "d_o", g.d_o), a.dq = view_of(kOp, "dq", g.dq);
  auto* dkeys = elements<float>(kOp, "dkeys", g.dkeys, sinks * a.size, sizeof(float));
  auto* dvalues = elements<float>(kOp, "dvalues", g.dvalues, sinks * a.size, sizeof(float));
  auto* dbias = elements<float>(kOp, "dbias", g.dbias, sinks, sizeof(float));
  auto* dscale = optional_elements<float>(kOp, "dscale", g.dscale, a.heads, sizeof(float));
  require(c.scratch && c.scratch_bytes >= norm_backward_scratch(sinks * (a.size + 1)), kOp,
          "needs norm_backward_scratch(heads x sinks x (head size + 1)) bytes of scratch");
  a.partials = static_cast<float*>(c.scratch);
  if (a.rows == 0) return;
  const dim3 grid = added_grid(a, kPartialBlocks, kBackwardWarps);
  with_sinks(a.sinks, [&](auto n) { sinks_backward_kernel<n.value><<<grid, dim3(32, kBackwardWarps), 0, c.stream>>>(a); });
  check_launch(kOp);
  const auto blocks = static_cast<int>(grid.x), columns = static_cast<int>(sinks);
  const float* of_bias = a.partials + std::int64_t{2} * blocks * sinks * a.size;
  add_partial_sums(c, a.partials, blocks, columns * a.size, dkeys, dvalues);
  add_partial_sums(c, of_bias, blocks, columns, dbias, nullptr);
  if (dscale) add_partial_sums(c, of_bias + std::int64_t{blocks} * sinks, blocks, a.heads, dscale, nullptr);
}

}  // namespace tessera::cuda
