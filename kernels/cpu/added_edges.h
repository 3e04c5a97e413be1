#pragma once
// What self_edge.cpp and sinks.cpp share: a call over rows of queries whose o and z get more edges than the attention gave them.

#include <cstdint>

#include "kernels/cpu/attention_call.h"
#include "kernels/cpu/check.h"
#include "kernels/cpu/ops.h"
#include "kernels/cpu/parallel.h"

namespace tessera::cpu {

/// The arguments that SelfEdge and Sinks both have, checked. A row is a token of a sequence.
struct AddedEdges {
  static constexpr std::int64_t kRowGrain = 16;

  std::int64_t heads, tokens, size, rows;
  bool squared;
  AttentionShape shape;
  Heads q, o;
  const float* scale;
  float* z;

  template <class Call>
  AddedEdges(const char* operation, const Call& a)
      : heads(a.shape.heads),
        tokens(a.shape.tokens),
        size(a.shape.head_size),
        rows(a.shape.batch * tokens),
        squared(a.score == Score::fidelity),
        shape(a.shape) {
    require(a.shape.batch >= 0 && heads >= 1 && tokens >= 1 && size >= 1, operation, "there must be heads, tokens and a head size");
    require(a.gate != Gate::softmax, operation, "softmax has no threshold that could close the edge");
    q = view(operation, "q", a.q), o = view(operation, "o", a.o);
    scale = elements<float>(operation, "scale", a.scale, heads);
    z = elements<float>(operation, "z", a.z, rows * heads);
  }
  Heads view(const char* operation, const char* name, const HeadsView& v) const {
    return checked_heads(operation, name, v, shape.batch, heads, tokens, size);
  }

  float& z_of(std::int64_t b, std::int64_t h, std::int64_t t) const { return z[(b * heads + h) * tokens + t]; }
  float f(float s) const { return squared ? s * s : s; }
  float slope(float s) const { return squared ? 2.0f * s : 1.0f; }
};

inline void add_multiple(float* to, float factor, const float* from, std::int64_t size) {
#pragma omp simd
  for (std::int64_t d = 0; d < size; ++d) to[d] = multiply_add(factor, from[d], to[d]);
}

/// Calls f(gate) with the gate as a compile-time constant.
template <class F>
void with_gate(Gate gate, F&& f) {
  with_math({.score = Score::dot, .gate = gate}, [&](auto, auto constant) { f(constant); });
}

}  // namespace tessera::cpu
