// What a model promises beyond its gradients: causality, independence of documents and of batch mates, exact skipping, shapes, errors.

#include "model/gpt.h"

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <numeric>
#include <set>

#include "tests/model/gpt_harness.h"

namespace tessera::test {
namespace {

// A sequence computed in another company goes through matrix products of other shapes, which may sum in another order.
constexpr float kReorder = 2e-5f;

TEST(Gpt, ATokenDoesNotChangeLossesBeforeIt) {
  for (const auto& config : variants()) {
    TestModel model(config);
    const Sequences batch = random_sequences(config, 2, 20, 3);
    const auto before = model.losses(batch);
    for (std::int64_t t : {0, 7, 15, 16, 19}) {
      Sequences changed = batch;
      auto& token = changed.tokens[static_cast<std::size_t>(20 + t)];  // of the second sequence
      token = (token + 1) % 19;
      changed.targets[static_cast<std::size_t>(20 + t)] = 3;
      const auto after = model.losses(changed);
      for (std::int64_t i = 0; i < 20 + t; ++i) ASSERT_EQ(after[static_cast<std::size_t>(i)], before[static_cast<std::size_t>(i)]) << t << " " << i;
      EXPECT_NE(after[static_cast<std::size_t>(20 + t)], before[static_cast<std::size_t>(20 + t)]);
    }
  }
}

TEST(Gpt, DocumentsDoNotSeeEachOther) {
  for (auto config : variants()) {
    config.attention.document_mask = true;
    TestModel model(config);
    Sequences batch = random_sequences(config, 1, 20, 4);
    for (int t = 0; t < 20; ++t) {
      batch.document_start[static_cast<std::size_t>(t)] = t < 9 ? 0 : 9;
      batch.targets[static_cast<std::size_t>(t)] = t % 19;
    }
    const auto before = model.losses(batch);
    Sequences changed = batch;
    for (std::size_t t = 0; t < 9; ++t) changed.tokens[t] = (changed.tokens[t] + 1 + static_cast<std::int32_t>(t)) % 19;
    const auto after = model.losses(changed);
    for (std::size_t t = 0; t < 9; ++t) EXPECT_NE(after[t], before[t]);
    for (std::size_t t = 9; t < 20; ++t) EXPECT_EQ(after[t], before[t]) << t;

    // Without the mask the second document does see the first one.
    config.attention.document_mask = false;
    TestModel open(config);
    const auto seen = open.losses(batch);
    const auto other = open.losses(changed);
    EXPECT_FALSE(std::equal(seen.begin() + 9, seen.end(), other.begin() + 9));
  }
}

TEST(Gpt, LossesAndGradientsDoNotDependOnBatchMates) {
  for (auto config : variants()) {
    config.attention.document_mask = true;
    TestModel model(config);
    const Sequences batch = random_sequences(config, 3, 20, 5);
    const auto together = model.gradients(batch);
    const auto losses = model.losses(batch);
    std::vector<float> sum(together.size());
    for (std::size_t b = 0; b < 3; ++b) {
      const auto part = [&](const std::vector<std::int32_t>& v) {
        return std::vector<std::int32_t>(v.begin() + static_cast<std::ptrdiff_t>(20 * b), v.begin() + static_cast<std::ptrdiff_t>(20 * (b + 1)));
      };
      const Sequences alone{1, 20, part(batch.tokens), part(batch.targets), part(batch.document_start)};
      const auto g = model.gradients(alone);
      for (std::size_t i = 0; i < sum.size(); ++i) sum[i] += g[i];
      const auto l = model.host(model.gpt.losses());
      for (std::size_t t = 0; t < 20; ++t) EXPECT_NEAR(l[t], losses[20 * b + t], kReorder * 5);
    }
    const float scale = std::sqrt(std::inner_product(together.begin(), together.end(), together.begin(), 0.0f));
    for (std::size_t i = 0; i < sum.size(); ++i) ASSERT_NEAR(sum[i], together[i], kReorder * scale);
  }
}

TEST(Gpt, VisitingAllTilesGivesTheSameBits) {
  for (auto config : variants()) {
    config.context = 100;
    config.attention.document_mask = true;
    config.attention.tile_query = config.attention.tile_key = 8;
    // High enough that whole tiles are empty, not so high that all are.
    config.attention.threshold.init = config.attention.score == Score::fidelity ? 0.75f : 0.8f * config.attention.scale_init;
    config.attention.threshold.beta = 0.8f;
    config.attention.visit = Visit::active;
    TestModel active(config);
    config.attention.visit = Visit::all;
    TestModel all(config);
    const Sequences batch = random_sequences(config, 3, 99, 6);
    EXPECT_EQ(active.gradients(batch, 0.01f), all.gradients(batch, 0.01f));
    EXPECT_EQ(active.host(active.gpt.losses()), all.host(all.gpt.losses()));
    const auto counters = active.host<std::uint64_t>(active.gpt.counters());
    EXPECT_EQ(counters, all.host<std::uint64_t>(all.gpt.counters()));
    if (config.attention.gate == Gate::softmax) continue;
    std::uint64_t active_tiles = 0, visible_tiles = 0;  // of all heads
    for (std::size_t head = 0; head < counters.size(); head += kAttentionCounters)
      active_tiles += counters[head + kActiveTiles], visible_tiles += counters[head + kVisibleTiles];
    EXPECT_GT(active_tiles, 0u);
    EXPECT_LT(active_tiles, visible_tiles);
  }
}

TEST(Gpt, AModelForEvaluationGivesTheSameBitsInLessMemory) {
  for (const auto& config : variants()) {
    TestModel training(config), evaluation(config, {.micro_batch = 3, .training = false});
    const Sequences batch = random_sequences(config, 3, 20, 7);
    EXPECT_EQ(training.losses(batch), evaluation.losses(batch));
    EXPECT_LT(evaluation.plan.bytes(MemoryCategory::activations), training.plan.bytes(MemoryCategory::activations) / 2);
    EXPECT_EQ(evaluation.plan.bytes(MemoryCategory::gradients), 0u);
    EXPECT_THROW(evaluation.gpt.gradients(), std::logic_error);
    EXPECT_THROW(evaluation.gpt.forward_backward(evaluation.upload(batch), 1), std::logic_error);
  }
}

TEST(Gpt, EveryLengthAndBatchUpToTheLargest) {
  for (const auto& config : variants()) {
    TestModel model(config);
    const Sequences whole = random_sequences(config, 3, 20, 8);
    const auto expected = model.losses(whole);
    for (std::int64_t B = 1; B <= 3; ++B) {
      for (std::int64_t T = 1; T <= 20; ++T) {
        Sequences part{B, T, {}, {}, {}};
        for (std::int64_t i = 0; i < B * T; ++i) {
          const auto from = static_cast<std::size_t>(i / T * 20 + i % T);
          part.tokens.push_back(whole.tokens[from]);
          part.targets.push_back(whole.targets[from]);
        }
        model.gradients(part);
        const auto losses = model.host(model.gpt.losses());
        ASSERT_EQ(losses.size(), static_cast<std::size_t>(B * T));
        for (std::int64_t i = 0; i < B * T; ++i)
          ASSERT_NEAR(losses[static_cast<std::size_t>(i)], expected[static_cast<std::size_t>(i / T * 20 + i % T)], kReorder * 5) << B << " x " << T;
      }
    }
  }
}

TEST(Gpt, SameStepSameBits) {
  const auto config = tiny_config();
  TestModel a(config), b(config);
  const Sequences batch = random_sequences(config, 3, 20, 9);
  const auto first = a.gradients(batch);
  EXPECT_EQ(first, a.gradients(batch));
  EXPECT_EQ(first, b.gradients(batch));
}

// As it starts, the gate changes no loss and no gradient but its own, which is not zero.
TEST(Gpt, AnUntrainedOutputGateIsTheIdentity) {
  for (auto config : variants()) {
    if (config.attention.output_gate) continue;
    const Sequences batch = random_sequences(config, 3, 20, 17);
    TestModel without(config);
    config.attention.output_gate = true;
    TestModel with(config);
    without.gpt.initialize(3);
    with.gpt.initialize(3);
    const auto gradients = without.gradients(batch), gated = with.gradients(batch);
    EXPECT_EQ(with.host(with.gpt.losses()), without.host(without.gpt.losses()));
    const auto slice = [](const std::vector<float>& flat, const ParameterInfo& p) {
      return std::vector<float>(flat.begin() + p.offset, flat.begin() + p.offset + p.shape.numel());
    };
    for (const auto& p : without.gpt.layout().parameters) EXPECT_EQ(slice(gated, with.gpt.layout().find(p.name)), slice(gradients, p)) << p.name;
    for (const char* name : {"h.0.attn.c_gate.weight", "h.1.attn.c_gate.weight"})
      for (float g : slice(gated, with.gpt.layout().find(name))) EXPECT_NE(g, 0.0f);
  }
}

TEST(Gpt, GradientsAccumulateAndScale) {
  const auto config = tiny_config();
  TestModel model(config);
  const Sequences batch = random_sequences(config, 2, 20, 10);
  const auto once = model.gradients(batch, 0.5f);
  model.gpt.zero_gradients();
  model.gpt.forward_backward(model.upload(batch), 0.25f);
  model.gpt.forward_backward(model.upload(batch), 0.25f);
  const auto twice = model.host(model.gpt.gradients());
  const float scale = std::sqrt(std::inner_product(once.begin(), once.end(), once.begin(), 0.0f));
  for (std::size_t i = 0; i < once.size(); ++i) ASSERT_NEAR(twice[i], once[i], 1e-6f * scale);
}

TEST(Gpt, TargetsOfMinusOneCountForNothing) {
  const auto config = tiny_config();
  TestModel model(config);
  Sequences batch = random_sequences(config, 2, 20, 11);
  std::fill(batch.targets.begin(), batch.targets.end(), -1);
  for (float g : model.gradients(batch)) ASSERT_EQ(g, 0.0f);
  for (float l : model.losses(batch)) ASSERT_EQ(l, 0.0f);
}

TEST(Gpt, PaddingRowsOfTheEmbeddingTakeNoPart) {
  const auto config = tiny_config();
  TestModel model(config);
  const Sequences batch = random_sequences(config, 2, 20, 12);
  const auto before = model.losses(batch);
  const auto gradients = model.gradients(batch);
  for (int i = 19 * 16; i < 24 * 16; ++i) EXPECT_EQ(gradients[static_cast<std::size_t>(i)], 0.0f);
  const std::vector<float> large(5 * 16, 100.0f);
  model.ops->upload(model.gpt.parameter("wte.weight").slice(19 * 16, 5 * 16), large.data());
  EXPECT_EQ(model.losses(batch), before);
}

TEST(Gpt, PredictionsAreTheLikeliestTokens) {
  const auto config = tiny_config();
  TestModel model(config);
  Sequences batch = random_sequences(config, 1, 20, 13);
  model.gpt.forward(model.upload(batch), true);
  const auto predictions = model.host<std::int32_t>(model.gpt.predictions());
  ASSERT_EQ(predictions.size(), 20u);
  for (std::size_t t = 0; t < 20; ++t) {
    const auto logits = model.gpt.next_logits(std::span(batch.tokens).first(t + 1));
    EXPECT_EQ(predictions[t], std::max_element(logits.begin(), logits.end()) - logits.begin()) << t;
  }
}

TEST(Gpt, NextLogits) {
  for (auto config : variants()) {
    config.attention.document_mask = true;  // a prompt is one document
    TestModel model(config);
    Sequences s = random_sequences(config, 1, 20, 14);
    std::fill(s.document_start.begin(), s.document_start.end(), 0);
    const auto expected = GptReference(config, model.gpt.layout()).run(model.parameters(), model.thresholds(), s).last_logits;
    const auto logits = model.gpt.next_logits(s.tokens);
    ASSERT_EQ(logits.size(), 19u);
    for (std::size_t v = 0; v < 19; ++v) EXPECT_NEAR(logits[v], expected[v], 2e-5);
    for (auto c : model.host<std::uint64_t>(model.gpt.counters())) EXPECT_EQ(c, 0u);  // a sample does not disturb the measures

    std::vector<std::int32_t> longer{1, 2, 3};  // only the last `context` tokens count
    longer.insert(longer.end(), s.tokens.begin(), s.tokens.end());
    EXPECT_EQ(model.gpt.next_logits(longer), logits);
  }
  TestModel model(tiny_config());
  EXPECT_THROW(model.gpt.next_logits({}), std::invalid_argument);
  EXPECT_THROW(model.gpt.next_logits(std::vector<std::int32_t>{3, 19}), std::invalid_argument);
  EXPECT_THROW(model.gpt.next_logits(std::vector<std::int32_t>{-1}), std::invalid_argument);
}

TEST(Gpt, CountersAddUpOverPasses) {
  auto config = tiny_config();
  TestModel model(config);
  const Sequences batch = random_sequences(config, 3, 20, 15);
  EXPECT_EQ(model.gpt.counters().shape, (Shape{2, 2, kAttentionCounters}));
  model.losses(batch);
  model.gradients(batch);
  const auto counters = model.host<std::uint64_t>(model.gpt.counters());
  for (std::size_t r = 0; r < 4; ++r) {
    EXPECT_EQ(counters[r * kAttentionCounters + kVisibleEdges], 2u * 3 * 210);
    EXPECT_EQ(counters[r * kAttentionCounters + kVisibleTiles], 2u * 3 * 3);
    EXPECT_GT(counters[r * kAttentionCounters + kActiveEdges], 0u);
    EXPECT_LT(counters[r * kAttentionCounters + kActiveEdges], 2u * 3 * 210);
  }
  model.gpt.zero_counters();
  for (auto c : model.host<std::uint64_t>(model.gpt.counters())) EXPECT_EQ(c, 0u);
}

TEST(Gpt, BindGivesFirstValues) {
  auto config = tiny_config();
  config.attention.threshold.mode = ThresholdMode::controlled;
  config.attention.threshold.init = 0.25f;
  TestModel model(config, {.micro_batch = 1, .shard_multiple = 192});
  EXPECT_EQ(model.host(model.gpt.thresholds()), std::vector<float>(4, 0.25f));
  EXPECT_EQ(model.gpt.thresholds().shape, (Shape{2, 2}));
  EXPECT_EQ(model.gpt.weights().numel() % 192, 0);
  EXPECT_GE(model.gpt.weights().numel(), model.gpt.layout().count);
  EXPECT_LT(model.gpt.weights().numel(), model.gpt.layout().count + 192);
  EXPECT_EQ(model.gpt.gradients().numel(), model.gpt.weights().numel());
  for (float g : model.host(model.gpt.gradients())) EXPECT_EQ(g, 0.0f);
  config.attention.threshold.mode = ThresholdMode::learned;  // then they are parameters
  EXPECT_EQ(TestModel(config).thresholds(), std::vector<double>(4, 0.0));
}

TEST(Gpt, MemoryHasNames) {
  TestModel model(tiny_config());
  std::set<std::string> names;
  for (const auto& b : model.plan.blocks()) {
    if (b.name == "batch") continue;
    EXPECT_TRUE(names.insert(b.name).second) << b.name << " twice";
  }
  for (const char* name : {"weights", "gradients", "h.0.attn.qkv", "h.1.mlp.gelu", "h.1.ln_2.input", "ln_f.input", "logits"})
    EXPECT_TRUE(names.contains(name)) << name;
  EXPECT_EQ(model.plan.bytes(MemoryCategory::gradients), (static_cast<std::size_t>(model.gpt.layout().count) * 4 + 255) / 256 * 256);
}

TEST(Gpt, Flops) {
  auto config = tiny_config();
  const auto flops = [](const ModelConfig& c, std::int64_t tokens = 0) {
    const auto ops = make_cpu_ops(1);
    MemoryPlan plan;
    return Gpt(c, *ops, plan, {.micro_batch = 1, .tokens = tokens}).flops_per_token();
  };
  // A layer: qkv 3 C^2, projection C^2, MLP 2 x 2 C^2; the classifier 24 C.
  EXPECT_DOUBLE_EQ(flops(config).dense, 6.0 * (2 * 8 * 256 + 24 * 16));
  EXPECT_DOUBLE_EQ(flops(config).attention_causal, 12.0 * 16 * 2 * 10.5);
  EXPECT_DOUBLE_EQ(flops(config).attention_visible, flops(config).attention_causal);
  auto gated = config;  // C^2 more a layer
  gated.attention.output_gate = true;
  EXPECT_DOUBLE_EQ(flops(gated).dense, 6.0 * (2 * 9 * 256 + 24 * 16));
  EXPECT_DOUBLE_EQ(flops(gated).attention_causal, flops(config).attention_causal);
  config.attention.pattern.base.kind = PatternSpec::Kind::window;
  config.attention.pattern.base.size = 1;
  EXPECT_DOUBLE_EQ(flops(config).attention_visible, 12.0 * 16 * 2);
  EXPECT_DOUBLE_EQ(flops(config, 7).attention_visible, 12.0 * 16 * 2);  // at full context whatever is run
}

TEST(Gpt, ConfigurationsThatMakeNoModel) {
  const auto message = [](const std::function<void(ModelConfig&)>& change, Gpt::Options options = {}) -> std::string {
    ModelConfig config = tiny_config();
    change(config);
    const auto ops = make_cpu_ops(1);
    MemoryPlan plan;
    try {
      Gpt gpt(config, *ops, plan, options);
    } catch (const std::invalid_argument& e) {
      return e.what();
    }
    return "no error";
  };
  const auto expect = [&](const std::string& text, std::initializer_list<const char*> parts) {
    for (const char* part : parts) EXPECT_NE(text.find(part), std::string::npos) << text << "  lacks  " << part;
  };
  expect(message([](auto& m) { m.layers = 0; }), {"layers", "0"});
  expect(message([](auto& m) { m.heads = 0; }), {"heads", "0"});
  expect(message([](auto& m) { m.width = 17; }), {"17", "2"});
  expect(message([](auto& m) { m.width = 24; }), {"24", "12", "multiple of 8"});
  expect(message([](auto& m) { m.width = 1024; }), {"1024", "512", "256"});
  expect(message([](auto& m) { m.context = 0; }), {"context", "0"});
  expect(message([](auto& m) { m.mlp_ratio = 0; }), {"mlp_ratio", "0"});
  expect(message([](auto& m) { m.vocabulary = 0; }), {"vocabulary", "0"});
  expect(message([](auto& m) { m.vocabulary = 25; }), {"24", "25"});
  expect(message([](auto& m) { m.rotary_base = 0; }), {"rotary_base"});
  expect(message([](auto& m) { m.attention.tile_query = 20; }), {"tile.query", "20"});
  expect(message([](auto& m) { m.attention.tile_key = 256; }), {"tile.key", "256"});
  expect(message([](auto& m) { m.attention.scale_init = 0; }), {"scale_init"});
  expect(message([](auto& m) { m.attention.epsilon = 0; }), {"epsilon"});
  expect(message([](auto& m) {
           m.attention.threshold.mode = ThresholdMode::length;
           m.attention.score = Score::dot;
         }),
         {"length", "cosine", "dot"});
  expect(message([](auto& m) { m.attention.pattern.base.kind = PatternSpec::Kind::window; }), {"window", "size is 0"});
  expect(message([](auto& m) { m.attention.pattern.overrides.push_back({.pattern = {.kind = PatternSpec::Kind::any}}); }), {"any", "empty"});
  expect(message([](auto& m) { m.positions = Positions::learned; }, {.micro_batch = 1, .tokens = 21}), {"21", "20"});
  expect(message([](auto&) {}, {.micro_batch = 0}), {"micro-batch", "0"});
  expect(message([](auto&) {}, {.micro_batch = 1, .tokens = -1}), {"-1"});
  expect(message([](auto&) {}, {.micro_batch = 1, .shard_multiple = 0}), {"0"});
  // What has no effect is no error.
  EXPECT_EQ(message([](auto& m) {
              m.attention.gate = Gate::softmax;
              m.attention.score = Score::dot;
              m.attention.threshold.mode = ThresholdMode::length;
            }),
            "no error");
  EXPECT_EQ(message([](auto&) {}, {.micro_batch = 1, .tokens = 50}), "no error");  // rotary positions go further
}

TEST(Gpt, BatchesThatDoNotFit) {
  auto config = tiny_config();
  config.attention.document_mask = true;
  TestModel model(config);
  const auto good = model.upload(random_sequences(config, 3, 20, 16));
  const auto broken = [&](const std::function<void(Batch&)>& change) {
    Batch b = good;
    change(b);
    EXPECT_THROW(model.gpt.forward(b), std::logic_error);
  };
  broken([](Batch& b) { b.tokens.shape = {4, 15}; });
  broken([](Batch& b) { b.tokens.shape = {2, 21}; });
  broken([](Batch& b) { b.tokens.shape = {0, 20}; });
  broken([](Batch& b) { b.tokens.shape = {60}; });
  broken([](Batch& b) { b.document_start = {}; });
  broken([](Batch& b) { b.positions = {}; });
  EXPECT_NO_THROW(model.gpt.forward(good));

  const auto ops = make_cpu_ops(1);
  MemoryPlan plan;
  Gpt unbound(config, *ops, plan, {});
  plan.allocate(*ops);
  EXPECT_THROW(unbound.forward(good), std::logic_error);
}

}  // namespace
}  // namespace tessera::test
