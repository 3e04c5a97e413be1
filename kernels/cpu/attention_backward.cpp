// Attention, backward. Per tile that the forward pass marked active (or every listed one):
//
//   S = Q K^T, dP = dO V^T                 recomputed
//   W = a / z, G = ds                      edge_gradient(), in place of S and dP
//   dV += W^T dO, dK += G^T Q              by key tile over query tiles, ascending: keys run over vector lanes
//   dQ += G K                              by query tile over key tiles, ascending
//
// Two ways to the same bits. Where there are (sequence, head) pairs enough for the threads, one thread walks all key tiles of a head
// in order and adds to dQ as it goes: five products a tile. Otherwise key tiles are spread over threads, and a second walk by query
// tile, which recomputes S and dP, makes dQ: seven products, more parallel. Either way an element of dQ is the same sum in the same order.

#include <omp.h>

#include <vector>

#include "kernels/cpu/attention.h"
#include "kernels/cpu/attention_call.h"
#include "kernels/cpu/check.h"

namespace tessera {
namespace cpu {
namespace {

struct BackwardCall : AttentionCall {
  explicit BackwardCall(const AttentionBackward& a) : AttentionCall("attention_backward", a.forward) {
    const char* operation = "attention_backward";
    d_o = heads_of(operation, "d_o", a.d_o, tokens);
    dq = heads_of(operation, "dq", a.dq, tokens);
    dk = heads_of(operation, "dk", a.dk, keys);
    dv = heads_of(operation, "dv", a.dv, keys);
    dscale = optional_elements<float>(operation, "dscale", a.dscale, heads);
    dthreshold = optional_elements<float>(operation, "dthreshold", a.dthreshold, heads);
    balance = optional_elements<float>(operation, "balance", a.balance, heads);
    require(!balance || (threshold && math.score != Score::fidelity), operation,
            "balance is for relu gates over dot and cosine with a threshold a head");
    require(
        a.workspace.dtype == DType::f32 && a.workspace.data && a.workspace.numel() >= attention_backward_workspace(a.forward.shape, map->tile_query),
        operation, "workspace must hold attention_backward_workspace() elements of f32");
    delta = a.workspace.as<float>();
    wants_delta = math.gate == Gate::softmax || math.normalizer == Normalizer::sum;
  }
  Heads d_o, dq, dk, dv;
  float *dscale, *dthreshold;  // or null
  const float* balance;        // or null
  float* delta;                // [B, H, T]
  bool wants_delta;

  bool wanted(std::int64_t b, std::int64_t h, std::int64_t query_tile, std::int64_t key_tile) const {
    return visit_all || is_active(b, h, query_tile, key_tile);
  }
  QueryTerms terms(std::int64_t b, std::int64_t h, std::int64_t i) const {
    const std::int64_t row = (b * heads + h) * tokens + i;
    return {.tau = tau(h, i), .z = z[row], .inverse_z = inverse_of(z[row]), .delta = wants_delta ? delta[row] : 0.0f, .balance = balance_of(h)};
  }
  float balance_of(std::int64_t h) const { return balance ? balance[h] : 0.0f; }
};

/// Sums of dx dx/dc and of dx over a key tile. In double: they run over many edges of both signs.
struct Partial {
  double scale = 0, x = 0;
};

struct BackwardScratch {
  std::int64_t lanes = 0;              // of the walk at hand: padded tile_key by key tile, padded tile_query by query tile
  float *left, *right;                 // [D][lanes]: K^T and V^T of a key tile, or Q^T and dO^T of a query tile
  float *s, *p;                        // [rows][lanes]: S, then W; dP, then G
  float *first, *second;               // [rows][D]: dV and dK of a key tile; first: dQ of a query tile
  float *scale_sum, *x_sum;            // [lanes]
  float *tau, *z, *inverse_z, *delta;  // [lanes] of a query tile's queries
  std::int32_t* visible;               // [lanes]

  static std::int64_t elements(const AttentionCall& c) {
    const auto rows = std::max(c.tile_query, c.tile_key), lanes = padded(rows);
    return 2 * c.size * lanes + 2 * rows * lanes + 2 * padded(rows * c.size) + 7 * lanes;
  }
  BackwardScratch(const AttentionCall& c, float* memory) {
    Carver carve(memory);
    const auto rows = std::max(c.tile_query, c.tile_key), most_lanes = padded(rows);
    for (auto* m : {&left, &right}) *m = carve.floats(c.size * most_lanes);
    for (auto* m : {&s, &p}) *m = carve.floats(rows * most_lanes);
    for (auto* m : {&first, &second}) *m = carve.floats(rows * c.size);
    for (auto* m : {&scale_sum, &x_sum, &tau, &z, &inverse_z, &delta}) *m = carve.floats(most_lanes);
    visible = carve.ints(most_lanes);
  }
};

/// S and dP to W and G, keys over the lanes; adds to `sums`.
template <Form form, Gate gate, bool masked>
void gradients_by_key(const BackwardCall& call, const Tile& tile, std::int64_t b, std::int64_t h, BackwardScratch& s, Partial& sums) {
  const float c = call.scale[h];
  std::fill_n(s.scale_sum, s.lanes, 0.0f);
  std::fill_n(s.x_sum, s.lanes, 0.0f);
  for (std::int64_t i = 0; i < tile.queries; ++i) {
    const QueryTerms terms = call.terms(b, h, tile.first_query + i);
    if constexpr (masked) visible_keys(tile, i, s.visible);
    float *w = s.s + i * s.lanes, *g = s.p + i * s.lanes;
#pragma omp simd
    for (std::int64_t j = 0; j < s.lanes; ++j) {
      const float product = w[j];
      const auto e = edge_gradient<form, gate>(product, g[j], !masked || s.visible[j] != 0, c, terms);
      w[j] = e.weight;
      g[j] = e.ds;
      s.scale_sum[j] += e.dx * scaled_part<form>(product, terms.tau);
      s.x_sum[j] += e.dx;
    }
  }
  for (std::int64_t j = 0; j < tile.keys; ++j) {
    sums.scale += static_cast<double>(s.scale_sum[j]);
    sums.x += static_cast<double>(s.x_sum[j]);
  }
}

/// dP^T to G^T, queries over the lanes.
template <Form form, Gate gate, bool masked>
void gradients_by_query(float c, float balance, const Tile& tile, BackwardScratch& s) {
  for (std::int64_t j = 0; j < tile.keys; ++j) {
    if constexpr (masked) visible_queries(tile, j, s.visible);
    const float* product = s.s + j * s.lanes;
    float* g = s.p + j * s.lanes;
#pragma omp simd
    for (std::int64_t i = 0; i < s.lanes; ++i)
      g[i] = edge_gradient<form, gate>(product[i], g[i], !masked || s.visible[i] != 0, c,
                                       {.tau = s.tau[i], .z = s.z[i], .inverse_z = s.inverse_z[i], .delta = s.delta[i], .balance = balance})
                 .ds;
  }
}

/// to = factor * from, row by row; a zero leaves as +0.
void scaled_rows(float factor, const float* from, std::int64_t rows, std::int64_t size, float* to, std::int64_t stride) {
  for (std::int64_t r = 0; r < rows; ++r)
    for (std::int64_t d = 0; d < size; ++d) to[r * stride + d] = factor * from[r * size + d] + 0.0f;
}

/// dK and dV of a key tile; with `with_dq` its share of each dQ (before the factor c) is added to call.dq.
template <Form form, Gate gate>
Partial key_tile(const BackwardCall& call, std::int64_t b, std::int64_t h, std::int64_t at, BackwardScratch& s, bool with_dq) {
  const std::int64_t first = at * call.tile_key, keys = std::min(call.tile_key, call.keys - first), size = call.size;
  s.lanes = padded(call.tile_key);
  float *dv = s.first, *dk = s.second;
  std::fill_n(dv, keys * size, 0.0f);
  std::fill_n(dk, keys * size, 0.0f);
  Partial sums;
  bool transposed = false;
  for (const TileEntry entry : call.key_list(h, at)) {
    if (entry.tile >= call.query_tiles) break;
    Tile tile;
    if (!call.wanted(b, h, entry.tile, at) || !call.tile(entry.tile, at, entry.mask, call.documents_of(b, entry.tile), tile)) continue;
    if (!transposed) {
      transpose(call.k.at(b, h, first), call.k.token, keys, size, s.left, s.lanes);
      transpose(call.v.at(b, h, first), call.v.token, keys, size, s.right, s.lanes);
      transposed = true;
    }
    const float *q = call.q.at(b, h, tile.first_query), *d_o = call.d_o.at(b, h, tile.first_query);
    product(tile.queries, s.lanes, size, {q, 1, call.q.token}, s.left, s.lanes, s.s, s.lanes, false);
    product(tile.queries, s.lanes, size, {d_o, 1, call.d_o.token}, s.right, s.lanes, s.p, s.lanes, false);
    if (tile.masked())
      gradients_by_key<form, gate, true>(call, tile, b, h, s, sums);
    else
      gradients_by_key<form, gate, false>(call, tile, b, h, s, sums);
    product(keys, size, tile.queries, {s.s, s.lanes, 1}, d_o, call.d_o.token, dv, size, true);
    product(keys, size, tile.queries, {s.p, s.lanes, 1}, q, call.q.token, dk, size, true);
    if (with_dq)
      product(tile.queries, size, keys, {s.p, 1, s.lanes}, call.k.at(b, h, first), call.k.token, call.dq.at(b, h, tile.first_query), call.dq.token,
              true);
  }
  scaled_rows(1.0f, dv, keys, size, call.dv.at(b, h, first), call.dv.token);
  scaled_rows(call.scale[h], dk, keys, size, call.dk.at(b, h, first), call.dk.token);
  return sums;
}

/// dQ of a query tile.
template <Form form, Gate gate>
void query_tile(const BackwardCall& call, std::int64_t b, std::int64_t h, std::int64_t at, BackwardScratch& s) {
  const std::int64_t first = at * call.tile_query, queries = std::min(call.tile_query, call.tokens - first), size = call.size;
  s.lanes = padded(call.tile_query);
  float* dq = s.first;
  std::fill_n(dq, queries * size, 0.0f);
  const float balance = call.balance_of(h);
  bool transposed = false;
  const auto documents = call.documents_of(b, at);
  for (const TileEntry entry : call.query_list(h, at)) {
    if (entry.tile >= call.key_tiles) break;
    Tile tile;
    if (!call.wanted(b, h, at, entry.tile) || !call.tile(at, entry.tile, entry.mask, documents, tile)) continue;
    if (!transposed) {
      transpose(call.q.at(b, h, first), call.q.token, queries, size, s.left, s.lanes);
      transpose(call.d_o.at(b, h, first), call.d_o.token, queries, size, s.right, s.lanes);
      for (std::int64_t i = 0; i < queries; ++i) {
        const QueryTerms terms = call.terms(b, h, first + i);
        s.tau[i] = terms.tau;
        s.z[i] = terms.z;
        s.inverse_z[i] = terms.inverse_z;
        s.delta[i] = terms.delta;
      }
      transposed = true;
    }
    const float *k = call.k.at(b, h, tile.first_key), *v = call.v.at(b, h, tile.first_key);
    product(tile.keys, s.lanes, size, {k, 1, call.k.token}, s.left, s.lanes, s.s, s.lanes, false);
    product(tile.keys, s.lanes, size, {v, 1, call.v.token}, s.right, s.lanes, s.p, s.lanes, false);
    if (tile.masked())
      gradients_by_query<form, gate, true>(call.scale[h], balance, tile, s);
    else
      gradients_by_query<form, gate, false>(call.scale[h], balance, tile, s);
    product(queries, size, tile.keys, {s.p, s.lanes, 1}, k, call.k.token, dq, size, true);
  }
  scaled_rows(call.scale[h], dq, queries, size, call.dq.at(b, h, first), call.dq.token);
}

/// delta_i = <do_i, o_i>
void row_products(const BackwardCall& call) {
#pragma omp parallel for schedule(static)
  for (std::int64_t row = 0; row < call.batch * call.heads * call.tokens; ++row) {
    const std::int64_t head = row / call.tokens, i = row % call.tokens;
    const float *d_o = call.d_o.at(head / call.heads, head % call.heads, i), *o = call.o.at(head / call.heads, head % call.heads, i);
    float sum[8] = {};
    for (std::int64_t d = 0; d < call.size; d += 8)
      for (int l = 0; l < 8; ++l) sum[l] = multiply_add(d_o[d + l], o[d + l], sum[l]);
    call.delta[row] = ((sum[0] + sum[4]) + (sum[1] + sum[5])) + ((sum[2] + sum[6]) + (sum[3] + sum[7]));
  }
}

/// A whole head on one thread: dK, dV, and dQ on the way.
template <Form form, Gate gate>
void whole_head(const BackwardCall& call, std::int64_t b, std::int64_t h, BackwardScratch& s, Partial* partial) {
  for (std::int64_t i = 0; i < call.tokens; ++i) std::fill_n(call.dq.at(b, h, i), call.size, 0.0f);
  for (std::int64_t at = 0; at < call.key_tiles; ++at) partial[at] = key_tile<form, gate>(call, b, h, at, s, true);
  const float c = call.scale[h];
  for (std::int64_t i = 0; i < call.tokens; ++i) {
    float* dq = call.dq.at(b, h, i);
    for (std::int64_t d = 0; d < call.size; ++d) dq[d] = c * dq[d] + 0.0f;
  }
}

template <Form form, Gate gate>
void backward(const BackwardCall& call) {
  const std::int64_t pairs = call.batch * call.heads, threads = omp_get_max_threads();
  const ThreadScratch memory(static_cast<int>(threads), BackwardScratch::elements(call));
  std::vector<Partial> partial(pairs * call.key_tiles);
  if (call.wants_delta) row_products(call);

  // The busiest thread has ceil(pairs / threads) heads at five products a tile, against an even share at seven.
  const bool by_head = (pairs + threads - 1) / threads * threads * 5 <= pairs * 7;
#pragma omp parallel
  {
    BackwardScratch scratch(call, memory.of(omp_get_thread_num()));
    if (by_head) {
#pragma omp for schedule(dynamic, 1)
      for (std::int64_t head = 0; head < pairs; ++head)
        whole_head<form, gate>(call, head / call.heads, head % call.heads, scratch, &partial[head * call.key_tiles]);
    } else {
#pragma omp for schedule(dynamic, 1) nowait
      for (std::int64_t item = 0; item < pairs * call.key_tiles; ++item) {
        const std::int64_t head = item / call.key_tiles;
        partial[item] = key_tile<form, gate>(call, head / call.heads, head % call.heads, item % call.key_tiles, scratch, false);
      }
#pragma omp for schedule(dynamic, 1)
      for (std::int64_t item = 0; item < pairs * call.query_tiles; ++item) {
        const std::int64_t head = item / call.query_tiles;
        query_tile<form, gate>(call, head / call.heads, head % call.heads, call.query_tiles - 1 - item % call.query_tiles, scratch);
      }
    }
  }

  for (std::int64_t h = 0; h < call.heads; ++h) {
    Partial sum;
    for (std::int64_t b = 0; b < call.batch; ++b)
      for (std::int64_t at = 0; at < call.key_tiles; ++at) {
        const Partial& p = partial[(b * call.heads + h) * call.key_tiles + at];
        sum.scale += p.scale;
        sum.x += p.x;
      }
    if (call.dscale) call.dscale[h] += static_cast<float>(sum.scale);
    if (call.dthreshold && call.threshold)  // no tau, no gradient of it
      call.dthreshold[h] -= static_cast<float>(form == Form::squared ? call.scale[h] * sum.x : sum.x);
  }
}

}  // namespace
}  // namespace cpu

void cpu_attention_backward(const AttentionBackward& a) {
  const cpu::BackwardCall call(a);
  cpu::with_math(call.math, [&](auto form, auto gate) { cpu::backward<form.value, gate.value>(call); });
}

}  // namespace tessera
