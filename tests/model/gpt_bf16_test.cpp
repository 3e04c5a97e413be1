// The model where the device computes in bf16 and keeps everything else in fp32, as a GPU does; without a GPU.

#include <gtest/gtest.h>

#include <cmath>
#include <functional>

#include "tests/model/bf16_ops.h"
#include "tests/model/gpt_bf16_cases.h"

namespace tessera::test {
namespace {

// bf16 keeps 8 bits: 2^-9 = 0.2 % an operation. A gradient has passed some twenty of them, and each query's division by the sum of few weights.
constexpr double kLossError = 0.003, kGradientError = 0.04;
constexpr double kHeadError = 0.1;  // one or two numbers: nothing averages out

TEST(GptBf16, LossesAndGradientsAreThoseOfFp32UpToRounding) {
  for (const auto& [name, config] : bf16_configs()) {
    for (auto recompute : {Recompute::none, Recompute::gelu_norm}) {
      SCOPED_TRACE(name);
      Bf16Model exact(config, make_cpu_ops(1)), model(config, make_bf16_ops(), recompute);
      const Sequences batch = bf16_sequences(config, 4);
      const Errors e = errors_of(run(model, batch), run(exact, batch), model.gpt.layout());
      EXPECT_LT(e.losses, kLossError);
      for (std::size_t i = 0; i < e.gradients.size(); ++i) {
        const ParameterInfo& p = model.gpt.layout().parameters[i];
        EXPECT_LT(e.gradients[i], p.shape.numel() <= config.heads ? kHeadError : kGradientError) << p.name;
      }
    }
  }
}

TEST(GptBf16, RecomputedBlocksGiveTheSameBits) {
  for (const auto& [name, config] : bf16_configs()) {
    SCOPED_TRACE(name);
    Bf16Model kept(config, make_bf16_ops()), again(config, make_bf16_ops(), Recompute::block);
    const Sequences batch = bf16_sequences(config, 5);
    const Outcome a = run(kept, batch), b = run(again, batch);
    EXPECT_EQ(a.losses, b.losses);
    EXPECT_EQ(a.gradients, b.gradients);
  }
}

TEST(GptBf16, ParametersAreRoundedForMatrixProductsAndExactElsewhere) {
  ModelConfig config = bf16_config();
  config.norm = NormKind::layernorm;
  config.bias = true;
  TestModel model(config, {.micro_batch = 1, .shard_multiple = 1024}, 1, make_bf16_ops());
  const Gpt& gpt = model.gpt;
  const std::int64_t count = gpt.layout().count, decayed = gpt.layout().decayed_count;
  EXPECT_EQ(gpt.weights().dtype, DType::bf16);
  EXPECT_EQ(gpt.weights().numel(), (count + 1023) / 1024 * 1024);
  EXPECT_EQ(gpt.vectors().dtype, DType::f32);
  EXPECT_EQ(gpt.vectors().numel(), count - decayed);
  EXPECT_EQ(gpt.gradients().dtype, DType::f32);
  EXPECT_EQ(gpt.gradients().numel(), gpt.weights().numel());
  EXPECT_EQ(gpt.parameter("h.1.mlp.c_fc.weight").dtype, DType::bf16);
  EXPECT_EQ(gpt.parameter("h.1.mlp.c_fc.weight").shape, (Shape{512, 128}));
  EXPECT_EQ(gpt.parameter("h.1.ln_2.bias").dtype, DType::f32);

  // Any range, on either side of the border and across it.
  std::vector<float> expected(static_cast<std::size_t>(count));
  std::mt19937 rng(1);
  std::normal_distribution<float> normal;
  const std::pair<std::int64_t, std::int64_t> ranges[] = {{0, count},         {5, 100},       {decayed - 7, 20}, {decayed - 1, 1},  {decayed, 3},
                                                          {decayed + 11, 50}, {count - 1, 1}, {count, 0},        {decayed - 64, 64}};
  for (const auto& [first, n] : ranges) {
    std::vector<float> values(static_cast<std::size_t>(n));
    for (float& v : values) v = normal(rng);
    model.gpt.set_parameters(first, values);
    std::copy(values.begin(), values.end(), expected.begin() + first);
    auto rounded = expected;
    for (float& v : rounded) v = from_bf16(to_bf16(v));
    ASSERT_EQ(model.host(gpt.weights().slice(0, count)), rounded);
    ASSERT_EQ(model.host(gpt.vectors()), std::vector<float>(expected.begin() + decayed, expected.end()));
  }
  EXPECT_EQ(model.host(gpt.parameter("h.0.attn.scale")), std::vector<float>(expected.begin() + gpt.layout().find("h.0.attn.scale").offset,
                                                                            expected.begin() + gpt.layout().find("h.0.attn.scale").offset + 2));
  EXPECT_THROW(model.gpt.set_parameters(-1, expected), std::logic_error);
  EXPECT_THROW(model.gpt.set_parameters(1, expected), std::logic_error);

  model.gpt.initialize(3);
  for (const auto& p : gpt.layout().parameters) {
    auto values = initial_values(p, 3);
    if (!p.decayed) {
      EXPECT_EQ(model.host(gpt.vectors().slice(p.offset - decayed, p.shape.numel())), values) << p.name;
    }
    for (float& v : values) v = from_bf16(to_bf16(v));
    EXPECT_EQ(model.host(gpt.weights().slice(p.offset, p.shape.numel())), values) << p.name;
  }
}

TEST(GptBf16, RoundingOnTheHost) {
  EXPECT_EQ(to_bf16(1.0f), 0x3f80);
  EXPECT_EQ(to_bf16(1.0f + 0x1p-8f), 0x3f80);             // a tie, to even
  EXPECT_EQ(to_bf16(1.0f + 0x1p-8f + 0x1p-20f), 0x3f81);  // just above it
  EXPECT_EQ(to_bf16(1.0f + 3 * 0x1p-8f), 0x3f82);         // a tie, to even
  EXPECT_EQ(to_bf16(-0.0f), 0x8000);
  EXPECT_EQ(to_bf16(INFINITY), 0x7f80);
  EXPECT_EQ(to_bf16(std::numeric_limits<float>::max()), 0x7f80);
  EXPECT_TRUE(std::isnan(from_bf16(to_bf16(NAN))));
  EXPECT_TRUE(std::isnan(from_bf16(to_bf16(std::bit_cast<float>(0x7f800001u)))));  // whose upper half alone is an infinity
  for (std::uint32_t b = 0; b < 0x10000; ++b) {
    const float f = from_bf16(static_cast<std::uint16_t>(b));
    if (!std::isnan(f)) {
      ASSERT_EQ(to_bf16(f), b);
    }
  }
}

TEST(GptBf16, OneBufferWhereTheDeviceComputesInFp32) {
  TestModel model(tiny_config());
  EXPECT_EQ(model.gpt.vectors().data, model.gpt.weights().slice(model.gpt.layout().decayed_count, 1).data);
  EXPECT_EQ(model.gpt.parameter("ln_f.weight").data, model.gpt.weights().slice(model.gpt.layout().find("ln_f.weight").offset, 1).data);
}

TEST(GptBf16, NextLogits) {
  const ModelConfig config = bf16_config();
  Bf16Model exact(config, make_cpu_ops(1)), model(config, make_bf16_ops());
  const Sequences batch = bf16_sequences(config, 6);
  for (std::size_t n : {1, 64, 150}) {
    const auto expected = exact.gpt.next_logits(std::span(batch.tokens).first(n)), logits = model.gpt.next_logits(std::span(batch.tokens).first(n));
    ASSERT_EQ(logits.size(), 499u);
    EXPECT_LT(relative_error(logits.data(), expected.data(), logits.size()), kGradientError);
  }
}

TEST(GptBf16, ThePlanIsTheSameWithoutTheDevice) {
  ModelConfig config = bf16_config();
  config.bias = true;
  const auto cpu = make_cpu_ops(1), gpu = make_bf16_ops();
  for (auto recompute : {Recompute::none, Recompute::gelu_norm, Recompute::block}) {
    MemoryPlan here, there, fp32;
    Gpt planned(config, *cpu, here, {.micro_batch = 3, .recompute = recompute, .device = DeviceKind::cuda});
    const Gpt run(config, *gpu, there, {.micro_batch = 3, .recompute = recompute});
    const Gpt other(config, *cpu, fp32, {.micro_batch = 3, .recompute = recompute});
    for (int c = 0; c < kMemoryCategories; ++c) {
      const auto category = static_cast<MemoryCategory>(c);
      EXPECT_EQ(here.bytes(category), there.bytes(category)) << name_of(category);
    }
    EXPECT_EQ(here.bytes(MemoryCategory::gradients), fp32.bytes(MemoryCategory::gradients));
    EXPECT_LT(here.bytes(MemoryCategory::activations), fp32.bytes(MemoryCategory::activations) * 0.55);  // all but the statistics
    here.allocate(*cpu);
    EXPECT_THROW(planned.bind(), std::logic_error);
  }
}

TEST(GptBf16, WhatTheGpuKernelsDoNotTake) {
  const auto message = [](const std::function<void(ModelConfig&)>& change) -> std::string {
    ModelConfig config = bf16_config();
    change(config);
    const auto ops = make_cpu_ops(1);
    MemoryPlan plan, cpu;
    Gpt anywhere(config, *ops, cpu, {});  // the CPU takes it
    try {
      Gpt gpt(config, *ops, plan, {.device = DeviceKind::cuda});
    } catch (const std::invalid_argument& e) {
      return e.what();
    }
    return "no error";
  };
  const auto expect = [&](const std::string& text, std::initializer_list<const char*> parts) {
    for (const char* part : parts) EXPECT_NE(text.find(part), std::string::npos) << text << "  lacks  " << part;
  };
  EXPECT_EQ(message([](auto&) {}), "no error");
  expect(message([](auto& m) { m.attention.tile_query = 32; }), {"attention.tile.query", "32", "cuda", "64"});
  expect(message([](auto& m) { m.attention.tile_key = 128; }), {"attention.tile.key", "128", "cuda", "64"});
  expect(message([](auto& m) { m.heads = 4; }), {"model.width 128", "model.heads 4", "32", "64 or 128"});
  expect(message([](auto& m) { m.vocabulary_padded = 500; }), {"500", "multiple of 8", "model.vocabulary_multiple"});
}

}  // namespace
}  // namespace tessera::test
