#pragma once
// The attention operator of kernels/attention.h on NVIDIA GPUs: bf16 in and out, fp32 accumulation.
//
// All calls are asynchronous on `stream`: they return before the work is done, launch kernels only (no allocation, no
// synchronisation), and can be captured in a CUDA graph. Every pointer in the descriptors is device memory.
//
//   q, k, v, o, d_o, dq, dk, dv   bf16; head sizes 64 and 128; address and strides multiples of 16 bytes. Head size 128 takes 160 KiB of shared
//                                 memory a block: compute capability 8.0, 9.0 and 10.0 have it, 8.6, 8.9 and 12.0 do not
//   q, k                          of unit length for cosine and fidelity (up to bf16 rounding): the gate is computed on the scale that this bounds,
//                                 and longer vectors give wrong values without an error
//   tiles                         of 64 x 64, from upload_tiles_cuda; up to 131,072 tokens and beyond (64-bit offsets)
//   dq, dk, dv                    overlap no input: dq is written while dk and dv are computed
//   workspace                     16-byte aligned, attention_backward_workspace() elements
//   carry                         8-byte aligned; the sum of a is four, top and edges seen stand behind them
//
// Errors: std::logic_error for descriptors that break the contract, std::runtime_error for what CUDA reports and a head size too large for the GPU.
// Deterministic: no atomics on values, every sum in a fixed order; visit all and visit active give the same bits.
// Document masks expect documents in one piece: document_start never falls from one token to the next.

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <memory>

#include "kernels/attention.h"

namespace tessera {

/// Which implementation runs. automatic: Hopper's (TMA and wgmma) where the library holds code for the GPU's compute capability 9.0,
/// else the portable one (sm_80 and later). The others are for tests and measurements.
enum class CudaAttentionPath { automatic, portable, hopper };

/// How blocks take bands of tiles. automatic: persistent where lists are short, else a block a band. Never changes a bit of a result.
enum class CudaAttentionSchedule { automatic, block_a_band, persistent };

/// For tests and measurements.
struct CudaAttentionOptions {
  CudaAttentionPath path = CudaAttentionPath::automatic;
  CudaAttentionSchedule schedule = CudaAttentionSchedule::automatic;
};

/// Bytes of shared memory that a block of the portable kernels takes, forward and backward, at most. head_size: 64 or 128. GPUs that run Hopper's
/// have more than those take.
constexpr std::size_t cuda_attention_shared_bytes(std::int64_t head_size) { return std::size_t{head_size <= 64 ? 97u : 161u} << 10; }

/// Does the current device run the Hopper path?
bool cuda_attention_has_hopper_path();

/// Copies the lists to the current device as the kernels walk them: neighbouring tiles in pairs. Throws std::invalid_argument unless
/// tiles are 64 x 64.
std::unique_ptr<DeviceTiles> upload_tiles_cuda(std::shared_ptr<const TileMap> tiles);

void cuda_attention_forward(const AttentionForward& a, cudaStream_t stream, const CudaAttentionOptions& options = {});
void cuda_attention_backward(const AttentionBackward& a, cudaStream_t stream, const CudaAttentionOptions& options = {});

/// Generation, on any GPU of sm_80 and later. A row's bits do not depend on the other sequences. A sequence or a position that is not in the cache is
/// not found out on the host: nothing is stored for it, and its output is NaN.
///
/// cuda_attention_decode: fastest over long contexts, as a row's keys are cut into parts. Equal to the forward pass up to bf16: that rounds weights
/// before it multiplies values with them, this does not.
/// cuda_attention_decode_exact: the bits of cuda_attention_forward's row, by its kernel and on the GPUs that run it. Without document_start.
void cuda_attention_decode(const AttentionDecode& a, cudaStream_t stream);
void cuda_attention_decode_exact(const AttentionDecode& a, cudaStream_t stream, const CudaAttentionOptions& options = {});
void cuda_cache_append(const CacheAppend& a, cudaStream_t stream);

}  // namespace tessera
