// Learned keys and values of a head that every query sees (Sinks in kernels/ops.h).

#include <array>
#include <vector>

#include "kernels/cpu/added_edges.h"

namespace tessera::cpu {

namespace {

/// The arguments, checked. Sinks of a head follow each other.
struct Call : AddedEdges {
  std::int64_t sinks;
  const float *keys, *values, *bias;

  Call(const char* operation, const Sinks& a) : AddedEdges(operation, a), sinks(a.keys.shape[1]) {
    require(sinks >= 1 && sinks <= kMostSinks && a.keys.shape == Shape{heads, sinks, size} && a.values.shape == a.keys.shape, operation,
            "keys and values must be [heads, 1 to 8 sinks, head size]");
    require(a.bias.shape == Shape{heads, sinks}, operation, "bias must be [heads, sinks]");
    keys = elements<float>(operation, "keys", a.keys, heads * sinks * size);
    values = elements<float>(operation, "values", a.values, heads * sinks * size);
    bias = elements<float>(operation, "bias", a.bias, heads * sinks);
  }
};

}  // namespace

void sinks_forward(const Sinks& a) {
  const Call c("sinks_forward", a);
  with_gate(a.gate, [&](auto gate) {
    parallel_ranges(c.rows, Call::kRowGrain, [&](std::int64_t first, std::int64_t last) {
      for (std::int64_t row = first; row < last; ++row) {
        const std::int64_t b = row / c.tokens, t = row % c.tokens;
        for (std::int64_t h = 0; h < c.heads; ++h) {
          std::array<float, kMostSinks> weights{};
          float total = 0.0f;
          for (std::int64_t s = 0; s < c.sinks; ++s) {
            const std::int64_t sink = h * c.sinks + s;
            const float x = argument<Form::linear>(c.f(dot(c.q.at(b, h, t), c.keys + sink * c.size, c.size)), c.scale[h], -c.bias[sink]);
            if (x > 0.0f) total += weights[static_cast<std::size_t>(s)] = gate_value<gate.value>(x);
          }
          if (!(total > 0.0f)) continue;
          float &z = c.z_of(b, h, t), *o = c.o.at(b, h, t);
          const float before = z, inverse = inverse_of(before + total);
          z = before + total;
          for (std::int64_t d = 0; d < c.size; ++d) o[d] *= before;
          for (std::int64_t s = 0; s < c.sinks; ++s) {
            const float weight = weights[static_cast<std::size_t>(s)];
            if (weight > 0.0f) add_multiple(o, weight, c.values + (h * c.sinks + s) * c.size, c.size);
          }
          for (std::int64_t d = 0; d < c.size; ++d) o[d] *= inverse;
        }
      }
    });
  });
}

void sinks_backward(const SinksBackward& a) {
  constexpr const char* kOp = "sinks_backward";
  const Call c(kOp, a.forward);
  const Heads d_o = c.view(kOp, "d_o", a.d_o), dq = c.view(kOp, "dq", a.dq);
  const std::int64_t all = c.heads * c.sinks;  // sinks of all heads
  // Sums over rows, one part after another: those of keys, values, biases, scales.
  const std::array<float*, 4> to{elements<float>(kOp, "dkeys", a.dkeys, all * c.size), elements<float>(kOp, "dvalues", a.dvalues, all * c.size),
                                 elements<float>(kOp, "dbias", a.dbias, all), optional_elements<float>(kOp, "dscale", a.dscale, c.heads)};
  const std::array<std::int64_t, 4> counts{all * c.size, all * c.size, all, c.heads};
  std::vector<float> sums(static_cast<std::size_t>(2 * all * c.size + all + c.heads));
  with_gate(a.forward.gate, [&](auto gate) {
    const auto backward = [&](std::int64_t row, float* sum) {
      float *dkeys = sum, *dvalues = dkeys + all * c.size, *dbias = dvalues + all * c.size, *dscale = dbias + all;
      const std::int64_t b = row / c.tokens, t = row % c.tokens;
      for (std::int64_t h = 0; h < c.heads; ++h) {
        const float scale = c.scale[h], *of_o = d_o.at(b, h, t), *q = c.q.at(b, h, t);
        QueryTerms terms{0.0f, 0.0f, inverse_of(c.z_of(b, h, t)), dot(of_o, c.o.at(b, h, t), c.size)};
        for (std::int64_t sink = h * c.sinks; sink < (h + 1) * c.sinks; ++sink) {
          const float *key = c.keys + sink * c.size, s = dot(q, key, c.size);
          terms.tau = -c.bias[sink];
          const EdgeGradient e = edge_gradient<Form::linear, gate.value>(c.f(s), dot(of_o, c.values + sink * c.size, c.size), true, scale, terms);
          if (e.weight == 0.0f && e.dx == 0.0f) continue;
          const float ds = scale * c.slope(s) * e.dx;
          add_multiple(dq.at(b, h, t), ds, key, c.size);
          add_multiple(dkeys + sink * c.size, ds, q, c.size);
          add_multiple(dvalues + sink * c.size, e.weight, of_o, c.size);
          dbias[sink] += e.dx;
          dscale[h] += e.dx * c.f(s);
        }
      }
    };
    add_column_sums(c.rows, static_cast<std::int64_t>(sums.size()), backward, {sums.data()});
  });
  const float* from = sums.data();
  for (std::size_t part = 0; part < to.size(); from += counts[part++])
    if (to[part]) add_multiple(to[part], 1.0f, from, counts[part]);
}

}  // namespace tessera::cpu
