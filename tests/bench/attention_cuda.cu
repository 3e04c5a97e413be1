// Times the CUDA attention and prints one JSON object a line: milliseconds (median over the repeats, CUDA events), TFLOP/s, share of
// active tiles. tests/bench/attention_cuda.py runs it beside PyTorch's kernels and prints the table.
//
//   attention_cuda [--path automatic|portable|hopper] [--head-size 64] [--repeats 30] [--only SUBSTRING] [--no-counters]
//
// fwd_ms, both_ms: one call (forward; forward and backward) between two events, the schedule chosen automatically. *_stream_ms: a call of twenty in a
// row, as in training, where the host's part of a call is hidden. *_block_ms, *_persistent_ms: one call, a block a band or persistent blocks.
//
// FLOPs are counted as everybody counts them: 4 D a visible edge forward, 2.5 times that backward, whatever the kernels do. Inputs are random:
// independent unit vectors for the dense cases; for the data-dependent one each tile of queries and of keys belongs to one of ten directions of its
// head, so that one tile in ten has active edges.

#include <cuda_bf16.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <string>

#include "../kernels/cuda/device.h"
#include "kernels/cuda/attention/attention.h"

namespace {

using namespace tessera;
using namespace tessera::cuda_test;

__device__ uint32_t hash(uint32_t x) {  // Wellons' lowbias32
  x ^= x >> 16, x *= 0x7feb352du, x ^= x >> 15, x *= 0x846ca68bu;
  return x ^ x >> 16;
}
__device__ float normal(uint32_t seed, uint32_t n) {
  const float u = (hash(seed ^ hash(2 * n)) + 1.f) * 0x1p-32f, v = hash(seed + 1 ^ hash(2 * n + 1)) * 0x1p-32f;
  return sqrtf(-2.f * logf(fminf(u, 1.f))) * cospif(2.f * v);
}

/// One warp a row of [B, T, H, D] inside a packed projection. clusters > 0: near the direction of its tile's cluster.
__global__ void fill(__nv_bfloat16* to, int64_t rows, int heads, int D, int64_t token, uint32_t seed, bool unit, int clusters) {
  const int64_t row = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / 32;
  const int lane = threadIdx.x % 32;
  if (row >= rows) return;
  const int64_t t = row / heads;
  const int h = static_cast<int>(row % heads);
  float x[4], square = 0;
  for (int n = 0; n < D / 32; ++n) {
    const int d = n * 32 + lane;
    x[n] = normal(seed, static_cast<uint32_t>(row * D + d));
    if (clusters) {
      const uint32_t cluster = hash(seed * 31 + h * 7919 + static_cast<uint32_t>(t / 64)) % clusters;
      x[n] = 0.5f * x[n] + normal(12345, (h * clusters + cluster) * D + d);
    }
    square += x[n] * x[n];
  }
  for (int step = 16; step; step /= 2) square += __shfl_xor_sync(~0u, square, step);
  for (int n = 0; n < D / 32; ++n) to[t * token + h * D + n * 32 + lane] = __float2bfloat16(unit ? x[n] * rsqrtf(square) : x[n]);
}

struct Case {
  const char* name;
  std::int64_t batch, tokens, window;
  int clusters;
  float tau;
  Visit visit;
};

struct Options {
  CudaAttentionPath path = CudaAttentionPath::automatic;
  const char* path_name = "automatic";
  std::int64_t head_size = 64;
  int repeats = 30;
  std::string only;
  bool counters = true;
};

/// Median time of `calls` calls of f in a row, over their number. Calls of 50 ms go before: a GPU that had nothing to do takes up to 5 % longer at
/// first.
template <class F>
double median_ms(int repeats, F&& f, int calls = 1) {
  cudaEvent_t start, stop;
  TESSERA_CUDA_CHECK(cudaEventCreate(&start));
  TESSERA_CUDA_CHECK(cudaEventCreate(&stop));
  const auto begin = std::chrono::steady_clock::now();
  do {
    for (int n = 0; n < 5; ++n) f();
    TESSERA_CUDA_CHECK(cudaDeviceSynchronize());
  } while (std::chrono::steady_clock::now() - begin < std::chrono::milliseconds(50));
  std::vector<float> ms(repeats);
  for (float& t : ms) {
    TESSERA_CUDA_CHECK(cudaEventRecord(start));
    for (int n = 0; n < calls; ++n) f();
    TESSERA_CUDA_CHECK(cudaEventRecord(stop));
    TESSERA_CUDA_CHECK(cudaEventSynchronize(stop));
    TESSERA_CUDA_CHECK(cudaEventElapsedTime(&t, start, stop));
  }
  std::sort(ms.begin(), ms.end());
  TESSERA_CUDA_CHECK(cudaEventDestroy(start));
  TESSERA_CUDA_CHECK(cudaEventDestroy(stop));
  return ms[repeats / 2] / calls;
}

void measure(const Case& c, const Options& options) {
  const std::int64_t B = c.batch, H = 16, T = c.tokens, D = options.head_size, token = 3 * H * D, n = (T + 63) / 64;
  const AttentionShape s{B, H, T, D};
  const auto tiles = upload_tiles_cuda(make_window_tiles(T, H, c.window));
  Device<Bf16> qkv(B * T * token), gradient(B * T * token), o(B * T * H * D), d_o(B * T * H * D);
  Device<float> scale(std::vector<float>(H, 8.f)), tau(std::vector<float>(H, c.tau)), z(B * H * T), dscale(std::vector<float>(H, 0.f)),
      work(attention_backward_workspace(s, 64));
  Device<std::uint32_t> bits(B * H * n * bitmap_words(n));
  Device<std::uint64_t> counters(std::vector<std::uint64_t>(H * kAttentionCounters, 0));
  const std::int64_t rows = B * T * H;
  const auto blocks = static_cast<unsigned>((rows * 32 + 255) / 256);
  for (int part = 0; part < 3; ++part) {
    fill<<<blocks, 256>>>(qkv.get() + part * H * D, rows, static_cast<int>(H), static_cast<int>(D), token, 100 + part, part < 2,
                          part < 2 ? c.clusters : 0);
  }
  fill<<<blocks, 256>>>(d_o.get(), rows, static_cast<int>(H), static_cast<int>(D), H * D, 200, false, 0);
  TESSERA_CUDA_CHECK(cudaDeviceSynchronize());
  const auto part = [&](Bf16* p, std::int64_t stride, int which) { return HeadsView{p + which * H * D, DType::bf16, T * stride, D, stride}; };
  AttentionForward f;
  f.shape = s, f.visit = c.visit, f.tiles = tiles.get();
  f.q = part(qkv.get(), token, 0), f.k = part(qkv.get(), token, 1), f.v = part(qkv.get(), token, 2), f.o = part(o.get(), H * D, 0);
  f.scale = {scale.get(), DType::f32, {H}}, f.threshold = {tau.get(), DType::f32, {H}}, f.z = {z.get(), DType::f32, {B, H, T}};
  f.active_tiles = {bits.get(), DType::u32, {static_cast<std::int64_t>(bits.size())}};
  if (options.counters) f.counters = {counters.get(), DType::u64, {H, kAttentionCounters}};
  AttentionBackward g;
  g.forward = f, g.d_o = part(d_o.get(), H * D, 0);
  g.dq = part(gradient.get(), token, 0), g.dk = part(gradient.get(), token, 1), g.dv = part(gradient.get(), token, 2);
  g.dscale = {dscale.get(), DType::f32, {H}}, g.workspace = {work.get(), DType::f32, {static_cast<std::int64_t>(work.size())}};

  cuda_attention_forward(f, nullptr, {options.path});
  const auto counted = counters.host();
  double active = 0, visible = 0, edges = 0, active_edges = 0;
  for (int h = 0; h < H; ++h) {
    active += counted[h * kAttentionCounters + kActiveTiles], visible += counted[h * kAttentionCounters + kVisibleTiles];
    edges += counted[h * kAttentionCounters + kVisibleEdges], active_edges += counted[h * kAttentionCounters + kActiveEdges];
  }
  const auto time = [&](bool backward, CudaAttentionSchedule schedule, int calls) {
    const CudaAttentionOptions how{options.path, schedule};
    const auto call = [&] {
      cuda_attention_forward(f, nullptr, how);
      if (backward) cuda_attention_backward(g, nullptr, how);
    };
    return median_ms(calls > 1 ? 5 : options.repeats, call, calls);
  };
  using Schedule = CudaAttentionSchedule;
  const double forward = time(false, Schedule::automatic, 1), both = time(true, Schedule::automatic, 1);
  const double forward_stream = time(false, Schedule::automatic, 20), both_stream = time(true, Schedule::automatic, 20);
  const double forward_block = time(false, Schedule::block_a_band, 1), both_block = time(true, Schedule::block_a_band, 1);
  const double forward_persistent = time(false, Schedule::persistent, 1), both_persistent = time(true, Schedule::persistent, 1);
  TESSERA_CUDA_CHECK(cudaDeviceSynchronize());
  const double span = c.window ? c.window : T;  // edges: T^2/2 causal, T x window in a window, as the peers count
  const double flops = 4.0 * D * H * B * (c.window ? double(T) * span : double(T) * T / 2);
  std::printf(
      "{\"case\": \"%s\", \"path\": \"%s\", \"B\": %lld, \"T\": %lld, \"D\": %lld, \"window\": %lld, \"fwd_ms\": %.4f, \"fwd_tflops\": %.1f, "
      "\"both_ms\": %.4f, "
      "\"both_tflops\": %.1f, \"fwd_stream_ms\": %.4f, \"both_stream_ms\": %.4f, \"fwd_block_ms\": %.4f, \"fwd_persistent_ms\": %.4f, "
      "\"both_block_ms\": %.4f, "
      "\"both_persistent_ms\": %.4f, \"active_tiles\": %.4f, \"active_edges\": %.5f}\n",
      c.name, options.path_name, static_cast<long long>(B), static_cast<long long>(T), static_cast<long long>(D), static_cast<long long>(c.window),
      forward, flops / forward * 1e-9, both, 3.5 * flops / both * 1e-9, forward_stream, both_stream, forward_block, forward_persistent, both_block,
      both_persistent, visible > 0 ? active / visible : 0, edges > 0 ? active_edges / edges : 0);
  std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
  if (!has_gpu()) {
    std::fprintf(stderr, "attention_cuda: no GPU here\n");
    return 1;
  }
  Options options;
  for (int n = 1; n < argc; ++n) {
    const std::string arg = argv[n];
    const bool has_value = n + 1 < argc;
    if (arg == "--no-counters")
      options.counters = false;
    else if (arg == "--path" && has_value) {
      options.path_name = argv[++n];
      const std::string name = options.path_name;
      if (name == "automatic")
        options.path = CudaAttentionPath::automatic;
      else if (name == "portable")
        options.path = CudaAttentionPath::portable;
      else if (name == "hopper")
        options.path = CudaAttentionPath::hopper;
      else
        return std::fprintf(stderr, "attention_cuda: --path is automatic, portable or hopper, not %s\n", argv[n]), 2;
    } else if (arg == "--head-size" && has_value)
      options.head_size = std::stoll(argv[++n]);
    else if (arg == "--repeats" && has_value)
      options.repeats = std::stoi(argv[++n]);
    else if (arg == "--only" && has_value)
      options.only = argv[++n];
    else
      return std::fprintf(stderr, "attention_cuda: unknown option or missing value: %s\n", argv[n]), 2;
  }
  const Case cases[] = {
      {"causal", 16, 1024, 0, 0, 0.f, Visit::all},
      {"causal", 8, 2048, 0, 0, 0.f, Visit::all},
      {"causal", 4, 4096, 0, 0, 0.f, Visit::all},
      {"causal", 1, 4096, 0, 0, 0.f, Visit::all},
      {"causal", 1, 16384, 0, 0, 0.f, Visit::all},
      {"window-1024", 1, 16384, 1024, 0, 0.f, Visit::all},
      {"window-1024", 1, 65536, 1024, 0, 0.f, Visit::all},
      {"window-256", 1, 16384, 256, 0, 0.f, Visit::all},
      {"window-256", 1, 65536, 256, 0, 0.f, Visit::all},
      {"data-dependent", 1, 16384, 0, 10, 4.8f, Visit::active},
      {"data-dependent, all", 1, 16384, 0, 10, 4.8f, Visit::all},
  };
  for (const Case& c : cases) {
    const std::string name = std::string(c.name) + " B=" + std::to_string(c.batch) + " T=" + std::to_string(c.tokens);
    if (name.find(options.only) != std::string::npos) measure(c, options);
  }
}
