#pragma once
// Models for devices that compute in bf16, and how far their losses and gradients are from those of the same parameters in fp32.

#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "tests/model/gpt_harness.h"

namespace tessera::test {

/// Two layers, width 128, heads of 64, sequences of up to 200 tokens: no multiple of a tile, nor of anything else.
inline ModelConfig bf16_config() {
  ModelConfig m;
  m.layers = 2;
  m.heads = 2;
  m.width = 128;
  m.context = 200;
  m.vocabulary = 499;
  m.vocabulary_padded = 512;
  // Queries with hardly an active edge divide by almost nothing, and rounding would be all that is left of their gradients.
  m.attention.threshold.init = 0.05f;
  m.attention.epsilon = 0.5f;
  return m;
}

inline std::vector<std::pair<std::string, ModelConfig>> bf16_configs() {
  std::vector<std::pair<std::string, ModelConfig>> v;
  const auto add = [&](const char* name) -> ModelConfig& { return v.emplace_back(name, bf16_config()).second; };
  add("sparse");
  auto& softmax = add("softmax");
  softmax.attention.gate = Gate::softmax;
  softmax.attention.score = Score::dot;
  auto& gpt2 = add("layernorm, biases, learned positions");
  gpt2.norm = NormKind::layernorm;
  gpt2.bias = true;
  gpt2.positions = Positions::learned;
  auto& rms = add("normalizer rms");
  rms.attention.normalizer = Normalizer::rms;
  rms.attention.threshold.init = -0.9f;  // it divides by almost nothing whatever epsilon is
  auto& documents = add("documents, learned threshold, window");
  documents.attention.document_mask = true;
  documents.attention.threshold.init = -0.3f;  // the first tokens of a document have few edges
  documents.attention.threshold.mode = ThresholdMode::learned;
  documents.attention.pattern.base.kind = PatternSpec::Kind::window;
  documents.attention.pattern.base.size = 70;
  auto& fidelity = add("fidelity, head size 128");
  fidelity.heads = 1;
  fidelity.attention.score = Score::fidelity;
  fidelity.attention.normalizer = Normalizer::length;
  fidelity.attention.threshold.init = 0.01f;
  auto& self = add("self edges");
  self.attention.always_self = true;
  self.attention.threshold.init = 1.0f;  // early queries have no other edge
  auto& self_fidelity = add("self edges, fidelity, head size 128");
  self_fidelity.heads = 1;
  self_fidelity.attention.score = Score::fidelity;
  self_fidelity.attention.always_self = true;
  self_fidelity.attention.threshold.init = 0.01f;
  auto& sinks = add("sinks");
  sinks.attention.always_sinks = 3;
  auto& sinks_fidelity = add("sinks and self edges, fidelity, head size 128");
  sinks_fidelity.heads = 1;
  sinks_fidelity.attention.score = Score::fidelity;
  sinks_fidelity.attention.always_sinks = 8;
  sinks_fidelity.attention.always_self = true;
  sinks_fidelity.attention.threshold.init = 0.01f;
  auto& gated = add("output gate, self edges");
  gated.attention.output_gate = true;
  gated.attention.always_self = true;
  gated.attention.threshold.init = 1.0f;
  auto& gated_rms = add("output gate, normalizer rms, biases");
  gated_rms.attention.output_gate = true;
  gated_rms.attention.normalizer = Normalizer::rms;
  gated_rms.attention.threshold.init = -9.0f;  // every edge is open: else the norm divides by almost nothing for early queries
  gated_rms.attention.scale_learned = false;   // and nearly takes the scale out again
  gated_rms.bias = true;
  auto& gated_softmax = add("output gate, softmax");
  gated_softmax.attention.output_gate = true;
  gated_softmax.attention.gate = Gate::softmax;
  return v;
}

constexpr float kBf16Scale = 1.0f / 512;  // of the gradients

/// A model with the same bf16 parameters on any device, of the size that training goes to.
struct Bf16Model : TestModel {
  Bf16Model(const ModelConfig& config, std::unique_ptr<Ops> device, Recompute recompute = Recompute::none)
      : TestModel(config, {.micro_batch = 3, .recompute = recompute}, 1, std::move(device)) {
    fill(1, 0.08f, true);
  }
};

inline Sequences bf16_sequences(const ModelConfig& m, unsigned seed) { return random_sequences(m, 3, 200, seed, 50); }

struct Outcome {
  std::vector<float> losses, gradients;
};

inline Outcome run(TestModel& model, const Sequences& batch) {
  model.poison();
  Outcome o;
  o.gradients = model.gradients(batch, kBf16Scale);
  o.losses = model.host(model.gpt.losses());
  return o;
}

inline double norm_of(const float* v, std::size_t n) { return std::sqrt(std::inner_product(v, v + n, v, 0.0)); }

/// |found - exact| / |exact|, or over `least` where that is larger.
inline double relative_error(const float* found, const float* exact, std::size_t n, double least = 0) {
  double sum = 0;
  for (std::size_t i = 0; i < n; ++i) sum += std::pow(static_cast<double>(found[i]) - exact[i], 2);
  return std::sqrt(sum) / std::max(norm_of(exact, n), least);
}

/// The relative error of the losses, and of the gradient of each parameter by itself. That of a scale is a difference of large parts where the
/// normalizer takes the scale out again: no gradient counts as smaller than 1/5000 of all together. The few numbers of a head may all but cancel in
/// one batch: none counts as smaller than in `sizes`, where given.
struct Errors {
  double losses = 0;
  std::vector<double> gradients;
};

inline Errors errors_of(const Outcome& found, const Outcome& exact, const ParameterLayout& layout, const std::vector<double>& sizes = {}) {
  Errors e;
  e.losses = relative_error(found.losses.data(), exact.losses.data(), exact.losses.size());
  const double least = norm_of(exact.gradients.data(), exact.gradients.size()) / 5000;
  for (const auto& p : layout.parameters) {
    const double size = sizes.empty() ? least : std::max(least, sizes[e.gradients.size()]);
    e.gradients.push_back(
        relative_error(found.gradients.data() + p.offset, exact.gradients.data() + p.offset, static_cast<std::size_t>(p.shape.numel()), size));
  }
  return e;
}

/// The size of the gradient of a parameter of one number a head, the root mean square over batches; 0 for any other.
inline std::vector<double> sizes_of(const std::vector<Outcome>& exact, const ParameterLayout& layout, int heads) {
  std::vector<double> sizes;
  for (const auto& p : layout.parameters) {
    double square = 0;
    for (const Outcome& o : exact)
      if (p.shape.numel() <= heads) square += std::pow(norm_of(o.gradients.data() + p.offset, static_cast<std::size_t>(p.shape.numel())), 2);
    sizes.push_back(std::sqrt(square / static_cast<double>(exact.size())));
  }
  return sizes;
}

}  // namespace tessera::test
