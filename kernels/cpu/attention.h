#pragma once
// Attention on the CPU: kernels/attention.h in fp32, tile by tile. The definitions, shapes and gradients are there; the tests compare
// with the naive double-precision reference in tests/kernels/attention_reference.h.
//
// Work is spread over (sequence, head, tile) by OpenMP; every sum has an order that depends on the shapes and lists alone, so the bits
// do not depend on the number of threads, nor on Visit. Nothing of size tokens x tokens exists: a thread holds a few tiles.
// The functions throw std::logic_error for wrong shapes, strides or element types.

#include "kernels/attention.h"

namespace tessera {

/// o, z, active_tiles and (added to) counters. A tile costs q k^T; a v follows where an edge of it is active (visit = all: always).
void cpu_attention_forward(const AttentionForward& a);

/// dq, dk, dv and (added to) dscale, dthreshold. Tiles whose bit in active_tiles is not set cost nothing (visit = all: as much as any).
void cpu_attention_backward(const AttentionBackward& a);

/// One query a sequence against its cache, spread over (sequence, head): the steps, the order of sums and so the bits of cpu_attention_forward's row.
void cpu_attention_decode(const AttentionDecode& a);
void cpu_cache_append(const CacheAppend& a);

}  // namespace tessera
