// The flat parameter buffer and its first values.

#include "model/parameters.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <set>

#include "tests/model/gpt_harness.h"

namespace tessera::test {
namespace {

ModelConfig gpt2(int layers, int heads, int width) {
  ModelConfig m;
  m.layers = layers;
  m.heads = heads;
  m.width = width;
  m.context = 1024;
  m.positions = Positions::learned;
  m.norm = NormKind::layernorm;
  m.bias = true;
  m.vocabulary = m.vocabulary_padded = 50257;
  m.attention.score = Score::dot;
  m.attention.gate = Gate::softmax;
  return m;
}

TEST(Parameters, CountsOfGpt2AreThePublishedOnes) {
  EXPECT_EQ(make_parameter_layout(gpt2(12, 12, 768)).count, 124439808);
  EXPECT_EQ(make_parameter_layout(gpt2(24, 16, 1024)).count, 354823168);
  EXPECT_EQ(make_parameter_layout(gpt2(36, 20, 1280)).count, 774030080);
  EXPECT_EQ(make_parameter_layout(gpt2(48, 25, 1600)).count, 1557611200);
}

TEST(Parameters, NamesShapesAndOrder) {
  ModelConfig m = tiny_config();
  m.layers = 1;
  m.bias = true;
  m.norm = NormKind::layernorm;
  m.positions = Positions::learned;
  m.attention.normalizer = Normalizer::rms;
  m.attention.threshold.mode = ThresholdMode::learned;
  const auto layout = make_parameter_layout(m);
  std::vector<std::string> found;
  for (const auto& p : layout.parameters) found.push_back(p.name + " " + p.shape.str());
  EXPECT_EQ(found,
            (std::vector<std::string>{"wte.weight [24,16]", "wpe.weight [20,16]", "h.0.attn.c_attn.weight [48,16]", "h.0.attn.c_proj.weight [16,16]",
                                      "h.0.mlp.c_fc.weight [32,16]", "h.0.mlp.c_proj.weight [16,32]", "h.0.ln_1.weight [16]", "h.0.ln_1.bias [16]",
                                      "h.0.attn.c_attn.bias [48]", "h.0.attn.norm [2,8]", "h.0.attn.c_proj.bias [16]", "h.0.ln_2.weight [16]",
                                      "h.0.ln_2.bias [16]", "h.0.mlp.c_fc.bias [32]", "h.0.mlp.c_proj.bias [16]", "ln_f.weight [16]",
                                      "ln_f.bias [16]", "h.0.attn.scale [2]", "h.0.attn.threshold [2]"}));
  EXPECT_EQ(layout.find("h.0.attn.scale").init_value, 3.0f);
  EXPECT_EQ(layout.find("h.0.attn.threshold").init_value, 0.1f);
  EXPECT_EQ(layout.find("ln_f.weight").init_value, 1.0f);
  EXPECT_FLOAT_EQ(layout.find("h.0.mlp.c_proj.weight").init_std, 0.02f / std::sqrt(2.0f));
  EXPECT_THROW(layout.find("h.1.ln_1.weight"), std::out_of_range);
}

TEST(Parameters, OnlyWhatHasAnEffect) {
  const auto has = [](const ModelConfig& m, const char* name) {
    const auto layout = make_parameter_layout(m);
    return std::any_of(layout.parameters.begin(), layout.parameters.end(), [&](const auto& p) { return p.name == name; });
  };
  ModelConfig m = tiny_config();
  m.attention.normalizer = Normalizer::rms;
  m.attention.threshold.mode = ThresholdMode::learned;
  EXPECT_TRUE(has(m, "h.1.attn.scale"));
  EXPECT_TRUE(has(m, "h.1.attn.threshold"));
  EXPECT_TRUE(has(m, "h.1.attn.norm"));
  EXPECT_FALSE(has(m, "wpe.weight"));
  EXPECT_FALSE(has(m, "h.1.ln_1.bias"));
  m.bias = true;
  EXPECT_TRUE(has(m, "h.1.attn.c_attn.bias"));
  EXPECT_FALSE(has(m, "h.1.ln_1.bias"));  // rmsnorm has none
  m.attention.gate = Gate::softmax;
  EXPECT_TRUE(has(m, "h.1.attn.scale"));
  EXPECT_FALSE(has(m, "h.1.attn.threshold"));
  EXPECT_FALSE(has(m, "h.1.attn.norm"));
  m.attention.score = Score::dot;
  EXPECT_FALSE(has(m, "h.1.attn.scale"));

  m = tiny_config();
  EXPECT_FALSE(has(m, "h.1.attn.self_bias"));
  m.attention.always_self = true;
  EXPECT_TRUE(has(m, "h.1.attn.self_bias"));
  EXPECT_EQ(make_parameter_layout(m).find("h.0.attn.self_bias").init_value, 0.25f);
  EXPECT_EQ(make_parameter_layout(m).find("h.0.attn.self_bias").shape, (Shape{2}));
  EXPECT_FALSE(make_parameter_layout(m).find("h.0.attn.self_bias").decayed);
  m.attention.gate = Gate::softmax;
  EXPECT_FALSE(has(m, "h.1.attn.self_bias"));
}

TEST(Parameters, SinksAreRandomKeysAndValuesThatDoNotDecay) {
  ModelConfig m = tiny_config();
  EXPECT_THROW(make_parameter_layout(m).find("h.0.attn.sink_keys"), std::out_of_range);
  m.attention.always_sinks = 3;
  const auto layout = make_parameter_layout(m);
  for (const char* name : {"h.0.attn.sink_keys", "h.1.attn.sink_values"}) {
    const ParameterInfo& p = layout.find(name);
    EXPECT_EQ(p.shape, (Shape{m.heads, 3, m.head_size()}));
    EXPECT_FALSE(p.decayed);
    EXPECT_EQ(p.init_std, 0.02f);
    EXPECT_EQ(p.offset % 8, 0);  // kernels read eight numbers at once
    std::vector<float> values = initial_values(p, 7);
    std::ranges::sort(values);
    EXPECT_EQ(std::ranges::unique(values).size(), 0u);
  }
  EXPECT_EQ(layout.find("h.1.attn.sink_bias").shape, (Shape{m.heads, 3}));
  EXPECT_EQ(layout.find("h.1.attn.sink_bias").init_value, 0.25f);
  m.attention.gate = Gate::softmax;
  EXPECT_THROW(make_parameter_layout(m).find("h.0.attn.sink_keys"), std::out_of_range);
}

TEST(Parameters, TheOutputGateIsAMatrixOfZerosBesideTheQueries) {
  ModelConfig m = tiny_config();
  m.bias = true;
  const auto without = make_parameter_layout(m);
  m.attention.output_gate = true;
  for (const Gate gate : {Gate::relu2, Gate::softmax}) {
    m.attention.gate = gate;
    const auto layout = make_parameter_layout(m);
    const ParameterInfo &p = layout.find("h.1.attn.c_gate.weight"), &before = layout.find("h.1.attn.c_attn.weight");
    EXPECT_EQ(p.shape, (Shape{16, 16}));
    EXPECT_TRUE(p.decayed);
    EXPECT_EQ(p.offset, before.offset + before.shape.numel());
    EXPECT_EQ(layout.decayed_count, without.decayed_count + 2 * 256);
    EXPECT_EQ(initial_values(p, 5), std::vector<float>(256, 0.0f));
    EXPECT_THROW(layout.find("h.1.attn.c_gate.bias"), std::out_of_range);
  }
  EXPECT_THROW(without.find("h.1.attn.c_gate.weight"), std::out_of_range);
}

TEST(Parameters, DecayedOnesFirstWithoutGaps) {
  ModelConfig m = gpt2(3, 4, 64);
  m.attention.score = Score::cosine;
  const auto layout = make_parameter_layout(m);
  std::int64_t offset = 0;
  std::set<std::string> names;
  for (const auto& p : layout.parameters) {
    EXPECT_EQ(p.offset, offset) << p.name;
    EXPECT_EQ(p.decayed, p.offset < layout.decayed_count) << p.name;
    EXPECT_EQ(p.decayed, p.shape.rank == 2) << p.name;
    offset += p.shape.numel();
    names.insert(p.name);
  }
  EXPECT_EQ(layout.count, offset);
  EXPECT_EQ(names.size(), layout.parameters.size());
}

TEST(InitialValues, NormalAndIndependentOfTheRest) {
  const ParameterInfo a{"h.0.mlp.c_fc.weight", {300, 100}, 0, true, 0.02f, 0.0f};
  const auto x = initial_values(a, 5);
  double sum = 0, square = 0, product = 0, fourth = 0;
  for (std::size_t i = 0; i < x.size(); ++i) {
    const double v = x[i] / 0.02;
    sum += v;
    square += v * v;
    fourth += v * v * v * v;
    product += v * x[(i + 1) % x.size()] / 0.02;
  }
  const double n = static_cast<double>(x.size());  // standard errors: mean 0.006, variance 0.008, fourth moment 0.06
  EXPECT_NEAR(sum / n, 0, 0.03);
  EXPECT_NEAR(square / n, 1, 0.04);
  EXPECT_NEAR(fourth / n, 3, 0.3);
  EXPECT_NEAR(product / n, 0, 0.03);

  ParameterInfo moved = a;  // its place, and how many there are, do not matter
  moved.offset = 12345;
  moved.shape = {10, 100};
  const auto fewer = initial_values(moved, 5);
  EXPECT_TRUE(std::equal(fewer.begin(), fewer.end(), x.begin()));
  EXPECT_NE(initial_values(a, 6), x);
  ParameterInfo other = a;
  other.name = "h.1.mlp.c_fc.weight";
  EXPECT_NE(initial_values(other, 5), x);
  const ParameterInfo gain{"ln_f.weight", {7}, 0, false, 0.0f, 1.0f};
  EXPECT_EQ(initial_values(gain, 5), std::vector<float>(7, 1.0f));
  const ParameterInfo odd{"x", {3, 1}, 0, true, 1.0f, 0.0f};
  EXPECT_EQ(initial_values(odd, 1).size(), 3u);
}

TEST(InitialValues, ReachTheModel) {
  TestModel model(tiny_config());
  model.gpt.initialize(42);
  for (const auto& p : model.gpt.layout().parameters) EXPECT_EQ(model.host(model.gpt.parameter(p.name)), initial_values(p, 42)) << p.name;
}

}  // namespace
}  // namespace tessera::test
