// Norms of the gradient, AdamW, and the controller of the attention's thresholds.

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "kernels/cuda/check.h"
#include "kernels/cuda/layers.h"
#include "kernels/cuda/vector.cuh"

namespace tessera::cuda {
namespace {

constexpr int kThreads = 256;

std::int64_t blocks_for(std::int64_t items, std::int64_t a_block) { return (items + a_block - 1) / a_block; }
bool on_16_bytes(const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; }

// -- sums ---------------------------------------------------------------------------------------------------------------

constexpr int kSumBlocks = 1024;  // of the first stage, at most: whatever the GPU, so that the order of the sum is a matter of its length alone
constexpr int kSumAhead = 4;      // 16-byte loads that a thread has in flight
constexpr int kSumBlockElements = kThreads * 4 * kSumAhead;

template <bool kSquared>
__device__ __forceinline__ double term(float x) {
  if constexpr (kSquared)
    return static_cast<double>(x) * x;
  else
    return x;
}

template <bool kSquared>
__global__ void __launch_bounds__(kThreads) partial_sums_kernel(const float* x, int64_t count, bool aligned, double* partial) {
  __shared__ double shared[kThreads / 32];
  double sum = 0;
  const int64_t stride = int64_t{gridDim.x} * kSumBlockElements;
  for (int64_t block = int64_t{blockIdx.x} * kSumBlockElements; block < count; block += stride) {
    float v[kSumAhead][4];
    const auto at = [&](int n) { return block + (n * kThreads + static_cast<int>(threadIdx.x)) * 4; };
    if (aligned && block + kSumBlockElements <= count) {
#pragma unroll
      for (int n = 0; n < kSumAhead; ++n) load_floats(x + at(n), v[n]);
    } else {
#pragma unroll
      for (int n = 0; n < kSumAhead; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) v[n][i] = at(n) + i < count ? x[at(n) + i] : 0.0f;
      }
    }
#pragma unroll
    for (int n = 0; n < kSumAhead; ++n) {
      sum += (term<kSquared>(v[n][0]) + term<kSquared>(v[n][1])) + (term<kSquared>(v[n][2]) + term<kSquared>(v[n][3]));
    }
  }
  sum = block_sum(sum, shared);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kThreads) add_partial_sums_kernel(const double* partial, int count, double* to) {
  __shared__ double shared[kThreads / 32];
  double sum = 0;
  for (int i = threadIdx.x; i < count; i += kThreads) sum += partial[i];
  sum = block_sum(sum, shared);
  if (threadIdx.x == 0) *to += sum;
}

template <bool kSquared>
void add_terms(const Context& c, const char* operation, const Tensor& out, const Tensor& x) {
  const std::int64_t count = x.numel();
  const auto* from = elements<float>(operation, "x", x, count, sizeof(float));
  auto* to = elements<double>(operation, "out", out, 1, sizeof(double));
  if (count == 0) return;
  const auto blocks = static_cast<int>(std::min<std::int64_t>(blocks_for(count, kSumBlockElements), kSumBlocks));
  require(c.scratch_bytes >= kSumBlocks * sizeof(double), operation, "too little scratch");
  auto* partial = static_cast<double*>(c.scratch);
  partial_sums_kernel<kSquared><<<blocks, kThreads, 0, c.stream>>>(from, count, on_16_bytes(from), partial);
  add_partial_sums_kernel<<<1, kThreads, 0, c.stream>>>(partial, blocks, to);
  check_launch(operation);
}

// -- AdamW --------------------------------------------------------------------------------------------------------------

constexpr int kElements = 8;  // of a thread at a time: eight 16-byte loads in flight, and one 16-byte store of bf16 weights
constexpr int kBlocksPerMultiprocessor = 4;

struct AdamWArgs {
  float *parameter, *m, *v;
  const float* gradient;
  void* weights;  // bf16, f32 or none
  std::int64_t count, decayed;
  const double* sumsq;
  float beta1, beta2, step, root, epsilon, decay, clip;
};

__device__ __forceinline__ void update_element(const AdamWArgs& a, float g, float decay, float& p, float& m, float& v) {
  m = a.beta1 * m + (1.0f - a.beta1) * g;
  v = a.beta2 * v + (1.0f - a.beta2) * (g * g);
  p -= decay * p + a.step * m / (sqrtf(v) * a.root + a.epsilon);
}

template <class Weight>  // bf16 or float; void: none
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor) adamw_kernel(const __grid_constant__ AdamWArgs a) {
  const double sumsq = *a.sumsq;
  if (!isfinite(sumsq)) return;
  const double norm = sqrt(sumsq);
  const float scale = a.clip > 0 && norm > a.clip ? static_cast<float>(a.clip / norm) : 1.0f;
  const int64_t stride = int64_t{gridDim.x} * kThreads * kElements;
  for (int64_t first = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kElements; first < a.count; first += stride) {
    if (first + kElements <= a.count) {
      float p[kElements], m[kElements], v[kElements], g[kElements];
      load_floats(a.gradient + first, g);
      load_floats(a.parameter + first, p);
      load_floats(a.m + first, m);
      load_floats(a.v + first, v);
#pragma unroll
      for (int i = 0; i < kElements; ++i) update_element(a, g[i] * scale, first + i < a.decayed ? a.decay : 0.0f, p[i], m[i], v[i]);
      store_floats(a.parameter + first, p);
      store_floats(a.m + first, m);
      store_floats(a.v + first, v);
      if constexpr (std::is_same_v<Weight, bf16>) store_piece(static_cast<bf16*>(a.weights) + first, pack(p));
      if constexpr (std::is_same_v<Weight, float>) store_floats(static_cast<float*>(a.weights) + first, p);
      continue;
    }
#pragma unroll 1
    for (int64_t i = first; i < a.count; ++i) {
      float p = a.parameter[i], m = a.m[i], v = a.v[i];
      update_element(a, a.gradient[i] * scale, i < a.decayed ? a.decay : 0.0f, p, m, v);
      a.parameter[i] = p, a.m[i] = m, a.v[i] = v;
      if constexpr (std::is_same_v<Weight, bf16>) static_cast<bf16*>(a.weights)[i] = __float2bfloat16_rn(p);
      if constexpr (std::is_same_v<Weight, float>) static_cast<float*>(a.weights)[i] = p;
    }
  }
}

// -- thresholds ---------------------------------------------------------------------------------------------------------

struct ThresholdArgs {
  float* threshold;
  const unsigned long long* counters;
  std::int64_t rows;
  double causal_edges, wanted_density;
  float rate, low, high;
  float* balance;  // or null
  const float* gradient;
  float balance_rate;
};

__global__ void __launch_bounds__(kThreads) update_thresholds_kernel(const __grid_constant__ ThresholdArgs a) {
  const int64_t row = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (row >= a.rows) return;
  const auto active = static_cast<double>(a.counters[row * kAttentionCounters + kActiveEdges]);
  const double error = active > 0 ? fmin(fmax(log(active / a.causal_edges / a.wanted_density), -1.0), 1.0) : -1.0;
  a.threshold[row] = fminf(fmaxf(static_cast<float>(a.threshold[row] + a.rate * error), a.low), a.high);
  if (!a.balance) return;
  float m = a.balance[row];
  if (active > 0 && isfinite(a.gradient[row])) m += static_cast<float>(a.balance_rate * (a.gradient[row] / active));
  if (error <= -1) m = fminf(m, 0.f);
  if (error >= 1) m = fmaxf(m, 0.f);
  a.balance[row] = m;
}

}  // namespace

void add_sum(const Context& c, const Tensor& out, const Tensor& x) { add_terms<false>(c, "add_sum", out, x); }

void add_sum_of_squares(const Context& c, const Tensor& out, const Tensor& x) { add_terms<true>(c, "add_sum_of_squares", out, x); }

void adamw(const Context& c, const AdamW& a) {
  constexpr const char* kOp = "adamw";
  const std::int64_t count = a.parameter.numel();
  AdamWArgs k{};
  k.parameter = elements<float>(kOp, "parameter", a.parameter, count);
  k.gradient = elements<float>(kOp, "gradient", a.gradient, count);
  k.m = elements<float>(kOp, "m", a.m, count);
  k.v = elements<float>(kOp, "v", a.v, count);
  k.sumsq = elements<double>(kOp, "gradient_sumsq", a.gradient_sumsq, 1, sizeof(double));
  require(a.update >= 1, kOp, "update counts from 1");
  require(a.decayed >= 0 && a.decayed <= count, kOp, "decayed must be within the shard");
  if (a.weights) {
    require(a.weights.dtype == DType::bf16 || a.weights.dtype == DType::f32, kOp, "weights must be bf16 or f32");
    k.weights = elements(kOp, "weights", a.weights, a.weights.dtype, count);
  }
  if (count == 0) return;
  k.count = count, k.decayed = a.decayed;
  k.beta1 = a.beta1, k.beta2 = a.beta2, k.epsilon = a.epsilon, k.clip = a.clip, k.decay = a.lr * a.weight_decay;
  // The bias corrections and the rate go into two factors: lr m^/(sqrt(v^) + eps) = step m / (sqrt(v) root + eps).
  k.step = static_cast<float>(a.lr / (1.0 - std::pow(static_cast<double>(a.beta1), static_cast<double>(a.update))));
  k.root = static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(static_cast<double>(a.beta2), static_cast<double>(a.update))));
  const auto kernel = !a.weights ? adamw_kernel<void> : a.weights.dtype == DType::bf16 ? adamw_kernel<bf16> : adamw_kernel<float>;
  const std::int64_t resident = std::int64_t{kBlocksPerMultiprocessor} * std::max(c.multiprocessors, 1);
  const auto blocks = static_cast<unsigned>(std::min(blocks_for(count, kThreads * kElements), resident));
  kernel<<<blocks, kThreads, 0, c.stream>>>(k);
  check_launch(kOp);
}

void update_thresholds(const Context& c, const ThresholdUpdate& a) {
  constexpr const char* kOp = "update_thresholds";
  const std::int64_t rows = a.threshold.numel();
  ThresholdArgs k{};
  k.threshold = elements<float>(kOp, "threshold", a.threshold, rows, sizeof(float));
  k.counters = reinterpret_cast<const unsigned long long*>(
      elements<std::uint64_t>(kOp, "counters", a.counters, rows * kAttentionCounters, sizeof(std::uint64_t)));
  require(a.causal_edges > 0 && a.wanted_density > 0, kOp, "causal_edges and wanted_density must be positive");
  require(a.low <= a.high, kOp, "low must not exceed high");
  if (rows == 0) return;
  k.rows = rows, k.causal_edges = a.causal_edges, k.wanted_density = a.wanted_density;
  k.rate = a.rate, k.low = a.low, k.high = a.high;
  if (a.balance) {
    k.balance = elements<float>(kOp, "balance", a.balance, rows, sizeof(float));
    k.gradient = elements<float>(kOp, "gradient", a.gradient, rows, sizeof(float));
    k.balance_rate = a.balance_rate;
  }
  update_thresholds_kernel<<<static_cast<unsigned>(blocks_for(rows, kThreads)), kThreads, 0, c.stream>>>(k);
  check_launch(kOp);
}

}  // namespace tessera::cuda
