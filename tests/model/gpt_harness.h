#pragma once
// A model with host vectors in and out: on the CPU, or on the Ops given.

#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <random>
#include <vector>

#include "kernels/bf16.h"
#include "kernels/memory_plan.h"
#include "kernels/ops.h"
#include "model/gpt.h"
#include "tests/model/gpt_reference.h"

namespace tessera::test {

/// Two layers of two heads of eight, a vocabulary of 19 in 24 rows, tiles of 16 for a context of 20.
inline ModelConfig tiny_config() {
  ModelConfig m;
  m.layers = 2;
  m.heads = 2;
  m.width = 16;
  m.context = 20;
  m.mlp_ratio = 2;
  m.vocabulary = 19;
  m.vocabulary_padded = 24;
  m.attention.tile_query = m.attention.tile_key = 16;
  m.attention.scale_init = 3.0f;
  m.attention.threshold.mode = ThresholdMode::fixed;
  m.attention.threshold.init = 0.1f;
  m.attention.threshold.beta = 0.3f;
  return m;
}

/// Models that between them use most of what the configuration offers.
inline std::vector<ModelConfig> variants() {
  ModelConfig m = tiny_config();
  m.attention.epsilon = 0.01f;  // a nearly empty sum of weights would blow rounding up (gpt_gradient_test.cpp measures that instead)
  std::vector<ModelConfig> v(10, m);
  v[1].positions = Positions::learned;
  v[1].norm = NormKind::layernorm;
  v[1].bias = true;
  v[1].attention.normalizer = Normalizer::rms;
  v[2].attention.gate = Gate::softmax;
  v[2].attention.score = Score::dot;
  v[3].attention.score = Score::fidelity;
  v[3].attention.normalizer = Normalizer::length;
  v[3].attention.threshold.mode = ThresholdMode::learned;
  v[4].attention.pattern.base.kind = PatternSpec::Kind::window;
  v[4].attention.pattern.base.size = 6;
  v[4].attention.threshold.mode = ThresholdMode::length;
  v[5].attention.always_self = true;
  v[5].attention.threshold.init = 2.0f;  // many a query has no other edge
  v[6] = v[1];
  v[6].attention.output_gate = true;
  v[6].attention.threshold.init = -1.0f;  // the norm of hardly any weights would blow rounding up
  v[7] = v[2];
  v[7].attention.output_gate = true;
  v[8].attention.always_sinks = 3;
  v[8].attention.threshold.init = 1.0f;
  v[8].attention.epsilon = 0.1f;
  v[9] = v[8];
  v[9].attention.always_sinks = 1;
  v[9].attention.always_self = true;
  return v;
}

/// Random tokens and targets, every seventh of these -1; a document ends about every sixth token unless told otherwise.
inline Sequences random_sequences(const ModelConfig& m, std::int64_t B, std::int64_t T, unsigned seed, unsigned document = 6) {
  std::mt19937 rng(seed);
  Sequences s{B, T, {}, {}, {}};
  for (std::int64_t b = 0; b < B; ++b) {
    std::int32_t start = 0;
    for (std::int64_t t = 0; t < T; ++t) {
      if (rng() % document == 0) start = static_cast<std::int32_t>(t);
      s.tokens.push_back(static_cast<std::int32_t>(rng() % static_cast<unsigned>(m.vocabulary)));
      s.targets.push_back(rng() % 7 == 0 ? -1 : static_cast<std::int32_t>(rng() % static_cast<unsigned>(m.vocabulary)));
      s.document_start.push_back(start);
    }
  }
  return s;
}

/// The tokens at these positions of each sequence.
inline Sequences part_of(const Sequences& s, const std::vector<std::int32_t>& positions) {
  Sequences part{s.B, std::ssize(positions), {}, {}, {}};
  for (std::int64_t b = 0; b < s.B; ++b)
    for (const std::int32_t t : positions) {
      const auto at = static_cast<std::size_t>(b * s.T + t);
      part.tokens.push_back(s.tokens[at]);
      part.targets.push_back(s.targets[at]);
      part.document_start.push_back(s.document_start[at]);
    }
  return part;
}

class TestModel {
 public:
  explicit TestModel(const ModelConfig& config, Gpt::Options options = {.micro_batch = 3}, unsigned seed = 1,
                     std::unique_ptr<Ops> device = make_cpu_ops(1), const SequenceGroup& group = {})
      : ops(std::move(device)), gpt(config, *ops, plan, options) {
    const std::int64_t n = options.micro_batch * (options.tokens ? options.tokens : config.context);
    for (auto* slot : {&tokens_, &targets_, &positions_, &document_start_})
      *slot = plan.reserve(MemoryCategory::activations, "batch", DType::i32, {n});
    plan.allocate(*ops);
    gpt.bind(group);
    fill(seed);
  }

  /// Every parameter random and large enough that nothing is close to linear: weights normal(0, 0.3) unless told otherwise, gains, scales and
  /// thresholds around their first values, biases normal(0, 0.2). `rounded`: each a bf16 number.
  void fill(unsigned seed, float weight = 0.3f, bool rounded = false) {
    std::mt19937 rng(seed);
    std::normal_distribution<float> normal;
    for (const auto& p : gpt.layout().parameters) {
      std::vector<float> values(static_cast<std::size_t>(p.shape.numel()));
      for (float& v : values) v = p.decayed ? weight * normal(rng) : p.init_value + 0.2f * (p.init_value != 0 ? p.init_value : 1.0f) * normal(rng);
      if (rounded) std::transform(values.begin(), values.end(), values.begin(), [](float v) { return from_bf16(to_bf16(v)); });
      gpt.set_parameters(p.offset, values);
    }
  }

  /// NaN into all that a pass writes before it reads: what it forgets to write then shows.
  void poison() {
    const auto& blocks = plan.blocks();
    for (std::size_t i = 0; i < blocks.size(); ++i) {
      const auto& b = blocks[i];
      if (b.category != MemoryCategory::activations && b.category != MemoryCategory::workspace) continue;
      if (b.name == "batch" || b.name == "constant scale" || b.name == "rotary table" || b.name == "attention counters") continue;
      const Tensor t = plan[static_cast<MemoryPlan::Slot>(i)];
      ops->upload(t, std::vector<std::uint8_t>(t.bytes(), 0xff).data());
    }
  }

  Batch upload(const Sequences& s) {
    std::vector<std::int32_t> positions;
    const auto places = gpt.positions();
    for (std::int64_t i = 0; i < s.B * s.T; ++i) positions.push_back(places[static_cast<std::size_t>(i % s.T)]);
    const auto put = [&](MemoryPlan::Slot slot, const std::vector<std::int32_t>& host) {
      const Tensor t = plan[slot].view({s.B, s.T});
      ops->upload(t, host.data());
      return t;
    };
    Batch batch;
    batch.tokens = put(tokens_, s.tokens);
    batch.targets = put(targets_, s.targets);
    batch.positions = put(positions_, positions);
    if (gpt.config().attention.document_mask) batch.document_start = put(document_start_, s.document_start);
    return batch;
  }

  /// bf16 tensors are read as float.
  template <class T = float>
  std::vector<T> host(const Tensor& t) {
    std::vector<T> values(static_cast<std::size_t>(t.numel()));
    if (t.dtype == DType::bf16) {
      std::vector<std::uint16_t> narrow(values.size());
      ops->download(narrow.data(), t);
      std::transform(narrow.begin(), narrow.end(), values.begin(), from_bf16);
      return values;
    }
    ops->download(values.data(), t);
    return values;
  }

  std::vector<float> losses(const Sequences& s) {
    gpt.forward(upload(s));
    return host(gpt.losses());
  }
  /// The flat gradient of scale * (sum of losses), without padding.
  std::vector<float> gradients(const Sequences& s, float scale = 1.0f) {
    gpt.zero_gradients();
    gpt.forward_backward(upload(s), scale);
    return host(gpt.gradients().slice(0, gpt.layout().count));
  }

  std::vector<double> parameters() { return widen(host(gpt.weights().slice(0, gpt.layout().count))); }
  std::vector<double> thresholds() { return widen(host(gpt.thresholds())); }

  std::unique_ptr<Ops> ops;
  MemoryPlan plan;
  Gpt gpt;

 private:
  static std::vector<double> widen(const std::vector<float>& v) { return {v.begin(), v.end()}; }
  MemoryPlan::Slot tokens_, targets_, positions_, document_start_;
};

}  // namespace tessera::test
