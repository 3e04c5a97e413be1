#pragma once
// What the host's sides of the operators share: checks of descriptors, and how a kernel's arguments are filled from them.

#include "kernels/attention.h"
#include "kernels/cuda/attention/attention.h"
#include "kernels/cuda/attention/tiles.h"

namespace tessera::cuda_attention {

/// Does a call with this option run Hopper's kernels? Throws std::runtime_error where it must and cannot.
bool choose_path(CudaAttentionPath path);

/// The [B, H, rows, D] tensor in boxes of 64 columns x 64 rows, for the copy engine.
CUtensorMap tensor_map(const View& v, const AttentionShape& s, std::int64_t rows);

/// Score, gate, normalizer and their numbers.
void set_math(Args& a, const AttentionMath& math);

/// Of `heads` (batch, head) pairs, how many follow each other so that their keys and values stay in the L2 cache.
int section_of(std::int64_t keys, std::int64_t head_size, std::int64_t heads);

/// A decoding call's descriptor, checked: the cache, the new tokens' tensors, the lists. Throws std::logic_error.
void check_cache(const char* operation, const KeyValueCache& c);
const CudaTiles& check_decode(const char* operation, const AttentionDecode& a);

}  // namespace tessera::cuda_attention
