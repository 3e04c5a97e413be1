// What is computed again in the backward pass: the same bits, in the memory that a count by hand gives.

#include <gtest/gtest.h>

#include "tests/model/gpt_harness.h"

namespace tessera::test {
namespace {

constexpr Recompute kAgain[] = {Recompute::gelu_norm, Recompute::block};

std::vector<ModelConfig> deep_variants() {
  auto v = variants();
  for (auto& m : v) m.layers = 4;
  v.push_back(v[1]);
  v.back().norm = NormKind::rmsnorm;  // with normalizer rms and biases
  v.back().positions = Positions::rotary;
  return v;
}

TEST(GptRecompute, SameBits) {
  for (auto config : deep_variants()) {
    for (const bool documents : {false, true}) {
      config.attention.document_mask = documents;
      TestModel kept(config);
      const Sequences whole = random_sequences(config, 3, 20, 3), part = random_sequences(config, 2, 13, 4);
      const auto gradients = kept.gradients(whole, 0.1f), losses = kept.host(kept.gpt.losses());
      const auto of_part = kept.gradients(part, 0.1f);
      kept.gpt.forward_backward(kept.upload(whole), 0.5f);
      const auto both = kept.host(kept.gpt.gradients());
      const auto counters = kept.host<std::uint64_t>(kept.gpt.counters());
      EXPECT_GT(kept.gpt.attention_seconds(kept.upload(whole)), 0);
      EXPECT_EQ(kept.host(kept.gpt.gradients()), both);
      EXPECT_EQ(kept.host(kept.gpt.losses()), losses);
      for (auto recompute : kAgain) {
        TestModel again(config, {.micro_batch = 3, .recompute = recompute});
        again.poison();
        EXPECT_EQ(again.gradients(whole, 0.1f), gradients);
        EXPECT_EQ(again.host(again.gpt.losses()), losses);
        EXPECT_EQ(again.gradients(part, 0.1f), of_part);
        again.gpt.forward_backward(again.upload(whole), 0.5f);
        EXPECT_EQ(again.host(again.gpt.gradients()), both);
        EXPECT_EQ(again.host<std::uint64_t>(again.gpt.counters()), counters);  // an edge counts once, however often it is computed
        EXPECT_GT(again.gpt.attention_seconds(again.upload(whole)), 0);
        EXPECT_EQ(again.host(again.gpt.gradients()), both);
        EXPECT_EQ(again.host(again.gpt.losses()), losses);
        EXPECT_EQ(again.host<std::uint64_t>(again.gpt.counters()), counters);
        EXPECT_EQ(again.losses(whole), losses);
        EXPECT_EQ(again.gpt.next_logits(part.tokens), kept.gpt.next_logits(part.tokens));
      }
    }
  }
}

TEST(GptRecompute, OneLayer) {
  auto config = tiny_config();
  config.layers = 1;
  TestModel kept(config);
  const Sequences batch = random_sequences(config, 3, 20, 5);
  for (auto recompute : kAgain) EXPECT_EQ(TestModel(config, {.micro_batch = 3, .recompute = recompute}).gradients(batch), kept.gradients(batch));
}

// Extents of which every tensor is a multiple of 256 bytes, the alignment of a plan.
TEST(GptRecompute, Memory) {
  constexpr std::size_t L = 5, C = 64, H = 8, B = 4, N = B * 32;  // hidden layer of 3 C
  ModelConfig config = tiny_config();
  config.layers = L;
  config.width = C;
  config.heads = H;
  config.context = 32;
  config.mlp_ratio = 3;
  config.norm = NormKind::layernorm;
  config.attention.normalizer = Normalizer::rms;
  const auto bytes = [&](Recompute recompute, MemoryCategory category) {
    const auto ops = make_cpu_ops(1);
    MemoryPlan plan;
    Gpt gpt(config, *ops, plan, {.micro_batch = B, .recompute = recompute});
    return plan.bytes(category);
  };
  const std::size_t statistics = 2 * N * 4;  // mean, rstd
  const std::size_t bitmap = B * H * 2 * 4;  // two query tiles of 16, one word each
  // qkv, output of the attention, hidden layer; lengths of q and k, z, statistics of the head norm; bitmap
  const std::size_t block = (3 + 1 + 3) * N * C * 4 + (2 + 1 + 1) * N * H * 4 + bitmap;
  const std::size_t head_norm = N * C * 4, gelu = 3 * N * C * 4, norms = 2 * (N * C * 4 + statistics), norm_outputs = 2 * N * C * 4;
  const std::size_t last_norm = N * C * 4 + statistics;  // its output is in the workspace
  constexpr auto activations = MemoryCategory::activations, workspace = MemoryCategory::workspace;
  EXPECT_EQ(bytes(Recompute::none, activations), L * (block + head_norm + gelu + norms + norm_outputs) + last_norm);
  EXPECT_EQ(bytes(Recompute::gelu_norm, activations), L * (block + norms) + 3 * N * C * 4 + last_norm);
  EXPECT_EQ(bytes(Recompute::block, activations), block + head_norm + gelu + norms + norm_outputs + (L - 1) * N * C * 4 + last_norm);
  for (auto recompute : kAgain) EXPECT_EQ(bytes(recompute, workspace), bytes(Recompute::none, workspace));

  // The output gate keeps its argument, and needs no other memory.
  constexpr Recompute kAll[] = {Recompute::none, Recompute::gelu_norm, Recompute::block};
  std::vector<std::size_t> activation_bytes, workspace_bytes;
  for (auto recompute : kAll) activation_bytes.push_back(bytes(recompute, activations)), workspace_bytes.push_back(bytes(recompute, workspace));
  config.attention.output_gate = true;
  for (std::size_t i = 0; i < 3; ++i) {
    EXPECT_EQ(bytes(kAll[i], activations), activation_bytes[i] + (kAll[i] == Recompute::block ? 1 : L) * N * C * 4);
    EXPECT_EQ(bytes(kAll[i], workspace), workspace_bytes[i]);
  }
}

}  // namespace
}  // namespace tessera::test
