#include "model/parameters.h"

#include <fmt/format.h>

#include <cmath>
#include <numbers>
#include <stdexcept>

namespace tessera {
namespace {

/// SplitMix64 (Steele, Lea & Flood 2014) as a counter-based generator: number `index` of stream `key`.
std::uint64_t random_bits(std::uint64_t key, std::uint64_t index) {
  std::uint64_t x = key + (index + 1) * 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

std::uint64_t stream_key(std::uint64_t seed, const std::string& name) {
  std::uint64_t h = 0xcbf29ce484222325u;  // FNV-1a of the name
  for (unsigned char c : name) h = (h ^ c) * 0x100000001b3u;
  return random_bits(random_bits(h, seed), 0);  // twice: the keys of two seeds must not be a small multiple of the increment apart
}

/// Collects parameters in the order of their declaration.
class Builder {
 public:
  void weight(std::string name, std::int64_t out, std::int64_t in, float std) {
    layout.parameters.push_back({std::move(name), {out, in}, 0, true, std, 0.0f});
  }
  void constant(std::string name, Shape shape, float value) { layout.parameters.push_back({std::move(name), shape, 0, false, 0.0f, value}); }
  void undecayed(std::string name, Shape shape, float std) { layout.parameters.push_back({std::move(name), shape, 0, false, std, 0.0f}); }

  void place() {
    for (auto& p : layout.parameters) {
      p.offset = layout.count;
      layout.count += p.shape.numel();
      if (p.decayed) layout.decayed_count = layout.count;
    }
  }

  ParameterLayout layout;
};

}  // namespace

const ParameterInfo& ParameterLayout::find(const std::string& name) const {
  for (const auto& p : parameters) {
    if (p.name == name) return p;
  }
  throw std::out_of_range("no parameter is called " + name);
}

ParameterLayout make_parameter_layout(const ModelConfig& m) {
  const std::int64_t C = m.width, hidden = C * m.mlp_ratio, H = m.heads;
  const float std = 0.02f, residual_std = 0.02f / std::sqrt(2.0f * static_cast<float>(m.layers));
  const auto each_layer = [&](auto&& declare) {
    for (int l = 0; l < m.layers; ++l) declare(fmt::format("h.{}.", l));
  };

  Builder b;
  b.weight("wte.weight", m.vocabulary_padded, C, std);
  if (m.positions == Positions::learned) b.weight("wpe.weight", m.context, C, std);
  each_layer([&](const std::string& h) {
    b.weight(h + "attn.c_attn.weight", 3 * C, C, std);
    if (m.attention.output_gate) b.weight(h + "attn.c_gate.weight", C, C, 0.0f);
    b.weight(h + "attn.c_proj.weight", C, C, residual_std);
    b.weight(h + "mlp.c_fc.weight", hidden, C, std);
    b.weight(h + "mlp.c_proj.weight", C, hidden, residual_std);
  });

  const bool norm_bias = m.bias && m.norm == NormKind::layernorm;
  const auto norm = [&](const std::string& name) {
    b.constant(name + ".weight", {C}, 1.0f);
    if (norm_bias) b.constant(name + ".bias", {C}, 0.0f);
  };
  const auto bias = [&](const std::string& name, std::int64_t size) {
    if (m.bias) b.constant(name + ".bias", {size}, 0.0f);
  };
  each_layer([&](const std::string& h) {
    norm(h + "ln_1");
    bias(h + "attn.c_attn", 3 * C);
    if (m.attention.head_norm()) b.constant(h + "attn.norm", {H, m.head_size()}, 1.0f);
    if (m.attention.sinks()) {
      b.undecayed(h + "attn.sink_keys", {H, m.attention.sinks(), m.head_size()}, std);
      b.undecayed(h + "attn.sink_values", {H, m.attention.sinks(), m.head_size()}, std);
    }
    bias(h + "attn.c_proj", C);
    norm(h + "ln_2");
    bias(h + "mlp.c_fc", hidden);
    bias(h + "mlp.c_proj", C);
  });
  norm("ln_f");
  // A few numbers a head come last: everything before it then starts on a multiple of the width.
  each_layer([&](const std::string& h) {
    if (m.attention.learns_scale()) b.constant(h + "attn.scale", {H}, m.attention.scale_init);
    if (m.attention.learns_threshold()) b.constant(h + "attn.threshold", {H}, m.attention.threshold.init);
    if (m.attention.self_edge()) b.constant(h + "attn.self_bias", {H}, AttentionConfig::always_bias_init);
    if (m.attention.sinks()) b.constant(h + "attn.sink_bias", {H, m.attention.sinks()}, AttentionConfig::always_bias_init);
  });
  b.place();
  return std::move(b.layout);
}

std::vector<float> initial_values(const ParameterInfo& p, std::uint64_t seed) {
  std::vector<float> values(static_cast<std::size_t>(p.shape.numel()), p.init_value);
  if (p.init_std == 0.0f) return values;
  // Box & Muller (1958): two normals from two uniforms, the first in (0, 1] for the logarithm's sake.
  const std::uint64_t key = stream_key(seed, p.name);
  const auto uniform = [&](std::uint64_t index) { return static_cast<double>(random_bits(key, index) >> 11) * 0x1p-53; };
  const auto count = static_cast<std::int64_t>(values.size());
#pragma omp parallel for schedule(static)
  for (std::int64_t i = 0; i < count; i += 2) {
    const double radius = std::sqrt(-2.0 * std::log(1.0 - uniform(static_cast<std::uint64_t>(i)))) * p.init_std;
    const double angle = 2.0 * std::numbers::pi * uniform(static_cast<std::uint64_t>(i + 1));
    float* pair = values.data() + i;
    pair[0] += static_cast<float>(radius * std::cos(angle));
    if (i + 1 < count) pair[1] += static_cast<float>(radius * std::sin(angle));
  }
  return values;
}

}  // namespace tessera
