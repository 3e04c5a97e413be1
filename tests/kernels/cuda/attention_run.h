#pragma once
// One call of the CUDA attention, forward and backward, on a random problem.

#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <vector>

#include "attention_problem.h"

namespace tessera::cuda_test {

struct Result {
  std::vector<Bf16> o, dq, dk, dv;
  std::vector<float> z, dscale, dtau;
  std::vector<std::uint32_t> bitmap;
  std::vector<std::uint64_t> counters;
};

/// Runs work(stream) from a CUDA graph.
template <class Work>
inline void run_recorded(Work work) {
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t recorded;
  TESSERA_CUDA_CHECK(cudaStreamCreate(&stream));
  TESSERA_CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed));
  work(stream);
  TESSERA_CUDA_CHECK(cudaStreamEndCapture(stream, &graph));
  TESSERA_CUDA_CHECK(cudaGraphInstantiate(&recorded, graph, 0));
  TESSERA_CUDA_CHECK(cudaGraphLaunch(recorded, stream));
  TESSERA_CUDA_CHECK(cudaStreamSynchronize(stream));
  TESSERA_CUDA_CHECK(cudaGraphExecDestroy(recorded));
  TESSERA_CUDA_CHECK(cudaGraphDestroy(graph));
  TESSERA_CUDA_CHECK(cudaStreamDestroy(stream));
}

/// Runs forward and backward; q, k, v and their gradients in the packed layout [B, T, 3, H, D]. What follows in the stream must find the gradients.
inline Result run(const Problem& p, CudaAttentionPath path, Visit visit, const DeviceTiles* shared_tiles = nullptr,
                  CudaAttentionSchedule schedule = CudaAttentionSchedule::automatic, bool recorded = false) {
  const auto& s = p.in.shape;
  const auto [B, H, T, D] = s;
  const std::int64_t tiles = (T + 63) / 64, words = bitmap_words(tiles), token = 3 * H * D;
  std::vector<Bf16> qkv(B * T * token);
  const std::vector<Bf16> parts[3] = {rounded(p.in.q), rounded(p.in.k), rounded(p.in.v)};
  for (int n = 0; n < 3; ++n)
    for (std::int64_t b = 0; b < B; ++b)
      for (std::int64_t h = 0; h < H; ++h)
        for (std::int64_t t = 0; t < T; ++t)
          for (std::int64_t d = 0; d < D; ++d) qkv[(b * T + t) * token + (n * H + h) * D + d] = parts[n][((b * H + h) * T + t) * D + d];
  Device<Bf16> d_qkv(qkv), d_gradient(qkv.size()), d_follows(qkv.size()), d_out(B * H * T * D), d_do(rounded(p.d_o));
  Device<float> d_scale(std::vector<float>(p.in.scale.begin(), p.in.scale.end())), d_tau(std::vector<float>(p.in.tau.begin(), p.in.tau.end()));
  Device<float> d_balance(std::vector<float>(p.in.balance.begin(), p.in.balance.end()));
  Device<float> d_z(B * H * T), d_dscale(std::vector<float>(H, 0.f)), d_dtau(std::vector<float>(H, 0.f)), d_work(attention_backward_workspace(s, 64));
  Device<std::uint32_t> d_bits(B * H * tiles * words);
  Device<std::uint64_t> d_counters(std::vector<std::uint64_t>(H * kAttentionCounters, 0));
  Device<std::int32_t> d_documents(p.document_start);
  std::unique_ptr<DeviceTiles> own;
  if (!shared_tiles) {
    own = upload_tiles_cuda(make_tiles(p.map_tokens ? p.map_tokens : T, H, p.patterns));
    shared_tiles = own.get();
  }
  const auto part = [&](const Device<Bf16>& from, int n) { return HeadsView{from.get() + n * H * D, DType::bf16, T * token, D, token}; };
  AttentionForward f;
  f.shape = s, f.math = p.in.math, f.visit = visit, f.tiles = shared_tiles;
  f.q = part(d_qkv, 0), f.k = part(d_qkv, 1), f.v = part(d_qkv, 2), f.o = packed(d_out.get(), s);
  f.scale = {d_scale.get(), DType::f32, {H}}, f.threshold = {d_tau.get(), DType::f32, {H}};
  if (!p.document_start.empty()) f.document_start = {d_documents.get(), DType::i32, {B, T}};
  f.z = {d_z.get(), DType::f32, {B, H, T}}, f.active_tiles = {d_bits.get(), DType::u32, {B, H, tiles, words}};
  f.counters = {d_counters.get(), DType::u64, {H, kAttentionCounters}};
  AttentionBackward g;
  g.forward = f, g.d_o = packed(d_do.get(), s);
  g.dq = part(d_gradient, 0), g.dk = part(d_gradient, 1), g.dv = part(d_gradient, 2);
  g.dscale = {d_dscale.get(), DType::f32, {H}}, g.dthreshold = {d_dtau.get(), DType::f32, {H}};
  if (!p.in.balance.empty()) g.balance = {d_balance.get(), DType::f32, {H}};
  g.workspace = {d_work.get(), DType::f32, {static_cast<std::int64_t>(d_work.size())}};
  const auto work = [&](cudaStream_t stream) {
    cuda_attention_forward(f, stream, {path, schedule});
    cuda_attention_backward(g, stream, {path, schedule});
    TESSERA_CUDA_CHECK(cudaMemcpyAsync(d_follows.get(), d_gradient.get(), qkv.size() * sizeof(Bf16), cudaMemcpyDeviceToDevice, stream));
  };
  TESSERA_CUDA_CHECK(cudaDeviceSynchronize());
  if (recorded)
    run_recorded(work);
  else
    work(nullptr);
  TESSERA_CUDA_CHECK(cudaDeviceSynchronize());

  Result r;
  r.o = d_out.host(), r.z = d_z.host(), r.dscale = d_dscale.host(), r.dtau = d_dtau.host(), r.bitmap = d_bits.host(), r.counters = d_counters.host();
  const std::vector<Bf16> gradient = d_gradient.host();
  EXPECT_TRUE(same_bits(d_follows.host(), gradient)) << "what follows in the stream began before the gradients were there";
  std::vector<Bf16>* to[3] = {&r.dq, &r.dk, &r.dv};
  for (int n = 0; n < 3; ++n) {
    to[n]->resize(B * H * T * D);
    for (std::int64_t b = 0; b < B; ++b)
      for (std::int64_t h = 0; h < H; ++h)
        for (std::int64_t t = 0; t < T; ++t)
          for (std::int64_t d = 0; d < D; ++d) (*to[n])[((b * H + h) * T + t) * D + d] = gradient[(b * T + t) * token + (n * H + h) * D + d];
  }
  return r;
}

}  // namespace tessera::cuda_test
