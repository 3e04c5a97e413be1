#include "tests/model/gpt_reference.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <numeric>
#include <string>

namespace tessera::test {
namespace {

using Row = std::vector<double>;
using Matrix = std::vector<Row>;

struct Parameters {
  const ParameterLayout& layout;
  const std::vector<double>& flat;
  const double* operator()(const std::string& name) const {  // nullptr: the model has none of that name
    for (const auto& p : layout.parameters) {
      if (p.name == name) return flat.data() + p.offset;
    }
    return nullptr;
  }
};

Row linear(const Row& x, const double* w, const double* bias, std::size_t out) {
  Row y(out);
  for (std::size_t o = 0; o < out; ++o) {
    y[o] = bias ? bias[o] : 0;
    for (std::size_t i = 0; i < x.size(); ++i) y[o] += w[o * x.size() + i] * x[i];
  }
  return y;
}

Row norm(NormKind kind, const Row& x, const double* gain, const double* bias) {
  const double n = static_cast<double>(x.size());
  double mean = 0, square = 0;
  if (kind == NormKind::layernorm) {
    for (double v : x) mean += v / n;
  }
  for (double v : x) square += (v - mean) * (v - mean) / n;
  Row y(x.size());
  for (std::size_t i = 0; i < x.size(); ++i) y[i] = (x[i] - mean) / std::sqrt(square + 1e-5) * gain[i] + (bias ? bias[i] : 0);
  return y;
}

double dot(const Row& a, const Row& b) {
  double s = 0;
  for (std::size_t i = 0; i < a.size(); ++i) s += a[i] * b[i];
  return s;
}

Row unit(Row x) {
  const double length = std::sqrt(dot(x, x));
  for (double& v : x) v = length < 1e-6 ? 0 : v / length;
  return x;
}

Row rotate(const Row& x, std::int64_t position, double base) {
  const std::size_t half = x.size() / 2;
  Row y(x.size());
  for (std::size_t i = 0; i < half; ++i) {
    const double angle = static_cast<double>(position) * std::pow(base, -static_cast<double>(i) / static_cast<double>(half));
    y[i] = x[i] * std::cos(angle) - x[i + half] * std::sin(angle);
    y[i + half] = x[i] * std::sin(angle) + x[i + half] * std::cos(angle);
  }
  return y;
}

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }
double gelu(double x) { return 0.5 * x * (1 + std::tanh(std::sqrt(2 / std::numbers::pi) * (x + 0.044715 * x * x * x))); }

/// One head: q, k, v are [T, D], the result is [T, D].
struct Head {
  const AttentionConfig& a;
  double c, tau;
  const double* self_bias;  // nullptr: no self edge
  struct Sink {
    const double *key, *value;
    double bias;
  };
  std::vector<Sink> sinks;
  std::vector<std::vector<bool>> visible;
  double active = 0, score_sum = 0;

  Matrix operator()(const Matrix& q, const Matrix& k, const Matrix& v) {
    const std::size_t T = q.size(), D = q[0].size();
    Matrix o(T, Row(D));
    for (std::size_t i = 0; i < T; ++i) {
      double weights = 0, n = 0;
      for (std::size_t j = 0; j <= i; ++j) {
        if (!visible[i][j]) continue;
        ++n;
        const double x = score(q[i], k[j], i), weight = gate(x);
        if (weight > 0) ++active;
        score_sum += std::clamp(x, 0.0, static_cast<double>(kBalanceReach));
        weights += weight;
        for (std::size_t d = 0; d < D; ++d) o[i][d] += weight * v[j][d];
      }
      double z = 1;
      if (a.gate == Gate::softmax)
        z = n > 0 ? weights : 1;
      else if (a.normalizer == Normalizer::length)
        z = n > 0 ? std::pow(n, a.length_alpha) : 1;
      else if (a.normalizer == Normalizer::sum)
        z = a.epsilon + weights;
      if (self_bias) {
        const double s = dot(q[i], k[i]), weight = gate(c * (a.score == Score::fidelity ? s * s : s) + *self_bias);
        if (weight > 0) ++active;
        z += weight;
        for (std::size_t d = 0; d < D; ++d) o[i][d] += weight * v[i][d];
      }
      for (const Sink& sink : sinks) {
        const double s = std::inner_product(q[i].begin(), q[i].end(), sink.key, 0.0);
        const double weight = gate(c * (a.score == Score::fidelity ? s * s : s) + sink.bias);
        z += weight;
        for (std::size_t d = 0; d < D; ++d) o[i][d] += weight * sink.value[d];
      }
      for (double& x : o[i]) x /= z;
    }
    return o;
  }

  double score(const Row& q, const Row& k, std::size_t i) const {
    const double s = dot(q, k);
    if (a.gate == Gate::softmax) return c * (a.score == Score::fidelity ? s * s : s);
    if (a.threshold.mode == ThresholdMode::length)
      return c * (s - a.threshold.beta * std::sqrt(2 * std::log(static_cast<double>(i) + 2) / static_cast<double>(q.size())));
    return a.score == Score::fidelity ? c * (s * s - tau) : c * s - tau;
  }
  double gate(double x) const { return a.gate == Gate::softmax ? std::exp(x) : x > 0 ? std::pow(x, gate_power(a.gate)) : 0; }
};

}  // namespace

GptReference::Result GptReference::run(const std::vector<double>& parameters, const std::vector<double>& thresholds, const Sequences& batch) const {
  const ModelConfig& m = config_;
  const AttentionConfig& a = m.attention;
  const Parameters p{layout_, parameters};
  const auto T = static_cast<std::size_t>(batch.T), C = static_cast<std::size_t>(m.width), H = static_cast<std::size_t>(m.heads), D = C / H;

  Result result;
  result.active_edges.assign(static_cast<std::size_t>(m.layers) * H, 0);
  result.score_sums.assign(static_cast<std::size_t>(m.layers) * H, 0);
  for (std::size_t b = 0; b < static_cast<std::size_t>(batch.B); ++b) {
    const auto at = [&](const std::vector<std::int32_t>& values, std::size_t t) { return values[b * T + t]; };
    Matrix x(T, Row(C));
    for (std::size_t t = 0; t < T; ++t) {
      for (std::size_t i = 0; i < C; ++i) {
        x[t][i] = p("wte.weight")[static_cast<std::size_t>(at(batch.tokens, t)) * C + i];
        if (m.positions == Positions::learned) x[t][i] += p("wpe.weight")[t * C + i];
      }
    }
    for (std::size_t l = 0; l < static_cast<std::size_t>(m.layers); ++l) {
      const auto name = [&](const char* rest) { return "h." + std::to_string(l) + "." + rest; };
      Matrix attended(T, Row(C));
      Matrix qkv(T), gates(T);
      for (std::size_t t = 0; t < T; ++t) {
        const Row y = norm(m.norm, x[t], p(name("ln_1.weight")), p(name("ln_1.bias")));
        qkv[t] = linear(y, p(name("attn.c_attn.weight")), p(name("attn.c_attn.bias")), 3 * C);
        if (const double* w = p(name("attn.c_gate.weight"))) gates[t] = linear(y, w, nullptr, C);
      }
      for (std::size_t h = 0; h < H; ++h) {
        const auto part = [&](std::size_t which) {
          Matrix rows(T);
          for (std::size_t t = 0; t < T; ++t) {
            rows[t].assign(qkv[t].begin() + static_cast<std::ptrdiff_t>(which * C + h * D),
                           qkv[t].begin() + static_cast<std::ptrdiff_t>(which * C + (h + 1) * D));
            if (which < 2 && a.score != Score::dot) rows[t] = unit(rows[t]);
            if (which < 2 && m.positions == Positions::rotary) rows[t] = rotate(rows[t], static_cast<std::int64_t>(t), m.rotary_base);
          }
          return rows;
        };
        const double* scale = p(name("attn.scale"));
        const double* threshold = p(name("attn.threshold"));
        const double* self_bias = p(name("attn.self_bias"));
        Head head{.a = a,
                  .c = a.score == Score::dot ? 1 / std::sqrt(static_cast<double>(D))
                       : scale               ? scale[h]
                                             : a.scale_init,
                  .tau = threshold ? threshold[h] : thresholds[l * H + h],
                  .self_bias = self_bias ? self_bias + h : nullptr,
                  .sinks = {},
                  .visible = std::vector<std::vector<bool>>(T, std::vector<bool>(T))};
        const auto S = static_cast<std::size_t>(a.sinks());
        for (std::size_t n = h * S; n < (h + 1) * S; ++n)
          head.sinks.push_back({p(name("attn.sink_keys")) + n * D, p(name("attn.sink_values")) + n * D, p(name("attn.sink_bias"))[n]});
        for (std::size_t i = 0; i < T; ++i) {
          for (std::size_t j = 0; j <= i; ++j) {
            head.visible[i][j] =
                a.pattern.visible(static_cast<int>(l), static_cast<int>(h), static_cast<std::int64_t>(i), static_cast<std::int64_t>(j)) &&
                (!a.document_mask || static_cast<std::int32_t>(j) >= at(batch.document_start, i));
          }
        }
        Matrix o = head(part(0), part(1), part(2));
        result.active_edges[l * H + h] += head.active;
        result.score_sums[l * H + h] += head.score_sum;
        for (std::size_t t = 0; t < T; ++t) {
          if (const double* gain = p(name("attn.norm"))) o[t] = norm(NormKind::rmsnorm, o[t], gain + h * D, nullptr);
          std::copy(o[t].begin(), o[t].end(), attended[t].begin() + static_cast<std::ptrdiff_t>(h * D));
        }
      }
      for (std::size_t t = 0; t < T; ++t) {
        for (std::size_t i = 0; i < gates[t].size(); ++i) attended[t][i] *= 2 * sigmoid(gates[t][i]);
        const Row branch = linear(attended[t], p(name("attn.c_proj.weight")), p(name("attn.c_proj.bias")), C);
        for (std::size_t i = 0; i < C; ++i) x[t][i] += branch[i];
        const Row y = norm(m.norm, x[t], p(name("ln_2.weight")), p(name("ln_2.bias")));
        Row hidden = linear(y, p(name("mlp.c_fc.weight")), p(name("mlp.c_fc.bias")), C * static_cast<std::size_t>(m.mlp_ratio));
        for (double& v : hidden) v = gelu(v);
        const Row mlp = linear(hidden, p(name("mlp.c_proj.weight")), p(name("mlp.c_proj.bias")), C);
        for (std::size_t i = 0; i < C; ++i) x[t][i] += mlp[i];
      }
    }
    for (std::size_t t = 0; t < T; ++t) {
      const Row y = norm(m.norm, x[t], p("ln_f.weight"), p("ln_f.bias"));
      result.last_logits = linear(y, p("wte.weight"), nullptr, static_cast<std::size_t>(m.vocabulary));
      double sum = 0;
      for (double v : result.last_logits) sum += std::exp(v);
      const auto target = at(batch.targets, t);
      result.losses.push_back(target < 0 ? 0 : std::log(sum) - result.last_logits[static_cast<std::size_t>(target)]);
    }
  }
  return result;
}

}  // namespace tessera::test
