#pragma once
// What the CPU attention's passes share: small matrix products on tiles, the score's arithmetic on one edge, and which edges of a tile
// are visible.
//
// Layout. A tile of scores is stored [rows][lanes]: one of queries and keys runs over the lanes of vector registers, padded to a
// multiple of kLanePadding. Padded lanes hold garbage that never reaches another lane, and nothing reads them at the end.

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "kernels/attention.h"
#include "kernels/cpu/simd.h"

namespace tessera::cpu {

inline constexpr std::int64_t kLanePadding = 16;
constexpr std::int64_t padded(std::int64_t n) { return (n + kLanePadding - 1) / kLanePadding * kLanePadding; }

/// A matrix operand read one element at a time: element (k, m) at data[k*step + m*row].
struct Broadcast {
  const float* data;
  std::int64_t step, row;
};

/// C[m][n] = (add ? C[m][n] : 0) + sum over k, ascending, of A(k, m) B[k][n]. n is a multiple of 8. The sum is taken from zero and
/// then added, and each element's bits are a function of its own row and column only, not of m, n or its place in the matrix.
void product(std::int64_t m, std::int64_t n, std::int64_t k, Broadcast a, const float* b, std::int64_t b_stride, float* c, std::int64_t c_stride,
             bool add);

/// to[d][r] = from[r*stride + d] for r < rows, d < size (a multiple of 8); lanes rows <= r < lanes become zero.
void transpose(const float* from, std::int64_t stride, std::int64_t rows, std::int64_t size, float* to, std::int64_t lanes);

// -- one edge ---------------------------------------------------------------------------------------------------------

/// The three ways from a product s = <q, k> to x. Softmax uses linear and squared with tau = 0.
enum class Form {
  linear,   // c s - tau
  shifted,  // c (s - tau)
  squared   // c (s^2 - tau)
};

/// Calls f(form, gate) with both as compile-time constants.
template <class F>
void with_math(const AttentionMath& math, F&& f) {
  const auto with_gate = [&](auto form) {
    switch (math.gate) {
      case Gate::relu: return f(form, std::integral_constant<Gate, Gate::relu>{});
      case Gate::relu2: return f(form, std::integral_constant<Gate, Gate::relu2>{});
      case Gate::relu4: return f(form, std::integral_constant<Gate, Gate::relu4>{});
      case Gate::softmax: return f(form, std::integral_constant<Gate, Gate::softmax>{});
    }
  };
  if (math.score == Score::fidelity) return with_gate(std::integral_constant<Form, Form::squared>{});
  if (math.gate != Gate::softmax && math.length_beta > 0) return with_gate(std::integral_constant<Form, Form::shifted>{});
  return with_gate(std::integral_constant<Form, Form::linear>{});
}

/// dx / dc
template <Form form>
inline float scaled_part(float s, float tau) {
  if constexpr (form == Form::linear) return s;
  if constexpr (form == Form::shifted) return s - tau;
  if constexpr (form == Form::squared) return multiply_add(s, s, -tau);
}

template <Form form>
inline float argument(float s, float c, float tau) {
  if constexpr (form == Form::linear) return multiply_add(c, s, -tau);
  return c * scaled_part<form>(s, tau);
}

/// x^p for x >= 0
template <Gate gate>
inline float gate_value(float x) {
  if constexpr (gate == Gate::relu) return x;
  if constexpr (gate == Gate::relu2) return x * x;
  return (x * x) * (x * x);
}

/// 1 / z; 0 for z = 0, which a row without an active edge can have (and with epsilon = 0 one whose gate values all underflowed).
inline float inverse_of(float z) { return z > 0.0f ? 1.0f / z : 0.0f; }

/// What the gradients of one query's edges have in common.
struct QueryTerms {
  float tau;
  float z;            // softmax: ln sum exp
  float inverse_z;    // 1 / z of the normalizer (softmax: unused)
  float delta;        // <do, o> for sum and softmax, else 0
  float balance = 0;  // joins dx of active edges with x < kBalanceReach
};

struct EdgeGradient {
  float weight;  // a / z
  float dx, ds;  // of x, and of s before the factor c
};

/// Gradients of an edge with product s and dp = <do_i, v_j>: all zero unless it is visible and active.
template <Form form, Gate gate>
inline EdgeGradient edge_gradient(float s, float dp, bool visible, float c, QueryTerms q) {
  const float x = argument<form>(s, c, q.tau);
  EdgeGradient g;
  if constexpr (gate == Gate::softmax) {
    g.weight = visible ? exp_vector(x - q.z) : 0.0f;
    g.dx = visible ? g.weight * (dp - q.delta) : 0.0f;
  } else {
    const bool active = visible & (x > 0.0f);
    const float y = active ? x : 0.0f, da = (dp - q.delta) * q.inverse_z;
    g.weight = gate_value<gate>(y) * q.inverse_z;
    // The selection, not the zero factor, makes inactive edges zero: da may have overflowed there.
    float dx = da;
    if constexpr (gate == Gate::relu2) dx = da * (2.0f * y);
    if constexpr (gate == Gate::relu4) dx = da * (4.0f * (y * y * y));
    g.dx = active ? dx + (y < kBalanceReach ? q.balance : 0.0f) : 0.0f;
  }
  g.ds = form == Form::squared ? g.dx * (2.0f * s) : g.dx;
  return g;
}

// -- one tile ---------------------------------------------------------------------------------------------------------

/// The part of a tile inside the sequence, and what bounds visibility in it.
struct Tile {
  std::int64_t first_query, queries, first_key, keys;
  const std::uint64_t* mask = nullptr;  // [tile_query][mask_words], or null: no edge mask
  std::int64_t mask_words = 1;
  const std::int32_t* document_start = nullptr;  // of its queries, or null: every key is in the query's document
  bool masked() const { return mask || document_start; }
};

/// visible[i] = -1 where key `key` of the tile is visible to query i of the tile, else 0.
inline void visible_queries(const Tile& t, std::int64_t key, std::int32_t* visible) {
  for (std::int64_t i = 0; i < t.queries; ++i) visible[i] = -1;
  if (t.mask) {
    const std::uint64_t* words = t.mask + key / 64;
    const int shift = static_cast<int>(key % 64);
    for (std::int64_t i = 0; i < t.queries; ++i) visible[i] = -static_cast<std::int32_t>((words[i * t.mask_words] >> shift) & 1);
  }
  if (t.document_start) {
    const auto absolute = static_cast<std::int32_t>(t.first_key + key);
    for (std::int64_t i = 0; i < t.queries; ++i) visible[i] &= -static_cast<std::int32_t>(absolute >= t.document_start[i]);
  }
}

/// visible[j] = -1 where key j of the tile is visible to query `query` of the tile, else 0.
inline void visible_keys(const Tile& t, std::int64_t query, std::int32_t* visible) {
  for (std::int64_t j = 0; j < t.keys; ++j) visible[j] = -1;
  if (t.mask)
    for (std::int64_t first = 0; first < t.keys; first += 64) {
      const std::uint64_t word = t.mask[query * t.mask_words + first / 64];
      const std::int64_t end = std::min<std::int64_t>(64, t.keys - first);
      for (std::int64_t j = 0; j < end; ++j) visible[first + j] = -static_cast<std::int32_t>((word >> j) & 1);
    }
  if (t.document_start) {
    const auto start = static_cast<std::int32_t>(t.document_start[query] - t.first_key);
    for (std::int64_t j = 0; j < t.keys; ++j) visible[j] &= -static_cast<std::int32_t>(static_cast<std::int32_t>(j) >= start);
  }
}

}  // namespace tessera::cpu
