// The edge from each token to itself, beside the attention's own (SelfEdge in kernels/ops.h).

#include "kernels/cpu/added_edges.h"

namespace tessera::cpu {

namespace {

/// The arguments, checked, and the score of a token with itself.
struct Call : AddedEdges {
  Heads k, v;
  const float* bias;
  std::uint64_t* counters;

  Call(const char* operation, const SelfEdge& a) : AddedEdges(operation, a) {
    k = view(operation, "k", a.k), v = view(operation, "v", a.v);
    bias = elements<float>(operation, "bias", a.bias, heads);
    counters = optional_elements<std::uint64_t>(operation, "counters", a.counters, heads * kAttentionCounters);
  }
  float score(std::int64_t b, std::int64_t h, std::int64_t t) const { return dot(q.at(b, h, t), k.at(b, h, t), size); }
};

}  // namespace

void self_edge_forward(const SelfEdge& a) {
  const Call c("self_edge_forward", a);
  with_gate(a.gate, [&](auto gate) {
    parallel_ranges(c.rows, Call::kRowGrain, [&](std::int64_t first, std::int64_t last) {
      for (std::int64_t h = 0; h < c.heads; ++h) {
        std::uint64_t open = 0;
        for (std::int64_t row = first; row < last; ++row) {
          const std::int64_t b = row / c.tokens, t = row % c.tokens;
          const float x = argument<Form::linear>(c.f(c.score(b, h, t)), c.scale[h], -c.bias[h]);
          if (!(x > 0.0f)) continue;
          ++open;
          float &z = c.z_of(b, h, t), *o = c.o.at(b, h, t);
          const float *v = c.v.at(b, h, t), weight = gate_value<gate.value>(x), before = z, inverse = inverse_of(before + weight);
          z = before + weight;
#pragma omp simd
          for (std::int64_t d = 0; d < c.size; ++d) o[d] = multiply_add(before, o[d], weight * v[d]) * inverse;
        }
        if (!c.counters) continue;
#pragma omp atomic
        c.counters[h * kAttentionCounters + kActiveEdges] += open;
      }
    });
  });
}

void self_edge_backward(const SelfEdgeBackward& a) {
  constexpr const char* kOp = "self_edge_backward";
  const Call c(kOp, a.forward);
  const Heads d_o = c.view(kOp, "d_o", a.d_o), dq = c.view(kOp, "dq", a.dq), dk = c.view(kOp, "dk", a.dk), dv = c.view(kOp, "dv", a.dv);
  std::vector<float*> sums{elements<float>(kOp, "dbias", a.dbias, c.heads)};
  if (a.dscale) sums.push_back(elements<float>(kOp, "dscale", a.dscale, c.heads));
  with_gate(a.forward.gate, [&](auto gate) {
    const auto backward = [&](std::int64_t row, float* sum) {
      const std::int64_t b = row / c.tokens, t = row % c.tokens;
      for (std::int64_t h = 0; h < c.heads; ++h) {
        const float s = c.score(b, h, t), scale = c.scale[h], *of_o = d_o.at(b, h, t);
        const QueryTerms terms{-c.bias[h], 0.0f, inverse_of(c.z_of(b, h, t)), dot(of_o, c.o.at(b, h, t), c.size)};
        const EdgeGradient e = edge_gradient<Form::linear, gate.value>(c.f(s), dot(of_o, c.v.at(b, h, t), c.size), true, scale, terms);
        if (e.weight == 0.0f && e.dx == 0.0f) continue;
        const float ds = scale * c.slope(s) * e.dx;
        add_multiple(dv.at(b, h, t), e.weight, of_o, c.size);
        add_multiple(dq.at(b, h, t), ds, c.k.at(b, h, t), c.size);
        add_multiple(dk.at(b, h, t), ds, c.q.at(b, h, t), c.size);
        sum[h] += e.dx;
        if (a.dscale) sum[c.heads + h] += e.dx * c.f(s);
      }
    };
    add_column_sums(c.rows, c.heads, backward, sums);
  });
}

}  // namespace tessera::cpu
