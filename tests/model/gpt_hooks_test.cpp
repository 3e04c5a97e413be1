// Hooks: what is called when, and what may be relied on then.

#include <gtest/gtest.h>

#include <map>

#include "tests/model/gpt_harness.h"

namespace tessera::test {
namespace {

bool in_block(const ParameterInfo& p, int block) {
  const bool matrix_of_block = p.decayed && p.name.starts_with("h.");
  return block < 0 ? !matrix_of_block : matrix_of_block && p.name.starts_with("h." + std::to_string(block) + ".");
}

ModelConfig three_layers() {
  ModelConfig m = variants()[6];  // biases, learned positions, the output gate
  m.layers = 3;
  return m;
}

TEST(GptHooks, Order) {
  const ModelConfig config = three_layers();
  for (auto recompute : {Recompute::none, Recompute::gelu_norm, Recompute::block}) {
    TestModel model(config, {.micro_batch = 3, .recompute = recompute});
    std::vector<int> before, after;
    model.gpt.set_hooks({.before_forward = [&](int b) { before.push_back(b); },
                         .after_backward =
                             [&](int b) {
                               after.push_back(b);
                               EXPECT_EQ(before.size(), 4u);  // the whole forward pass comes first
                             }});
    const Batch batch = model.upload(random_sequences(config, 2, 20, 3));
    const std::vector<int> up{-1, 0, 1, 2}, down{2, 1, 0, -1};
    model.gpt.forward_backward(batch, 1);
    EXPECT_EQ(before, up);
    EXPECT_EQ(after, down);
    before.clear(), after.clear();
    model.gpt.forward(batch);
    EXPECT_EQ(before, up);
    EXPECT_EQ(after, std::vector<int>{});
    before.clear();
    model.gpt.next_logits(std::vector<std::int32_t>{1, 2, 3});
    EXPECT_EQ(before, up);
    before.clear();
    model.gpt.set_hooks({});
    model.gpt.forward_backward(batch, 1);
    EXPECT_EQ(before, std::vector<int>{});
  }
}

// A block's matrices may come as late as its hook: here they are zeros until then.
TEST(GptHooks, ParametersMayComeInTheirHook) {
  const ModelConfig config = three_layers();
  for (auto recompute : {Recompute::none, Recompute::gelu_norm, Recompute::block}) {
    TestModel model(config, {.micro_batch = 3, .recompute = recompute});
    const Sequences batch = random_sequences(config, 3, 20, 4);
    const auto expected = model.gradients(batch);
    const auto parameters = model.host(model.gpt.weights().slice(0, model.gpt.layout().count));
    model.ops->zero(model.gpt.weights());
    model.gpt.set_hooks({.before_forward =
                             [&](int block) {
                               for (const auto& p : model.gpt.layout().parameters) {
                                 if (in_block(p, block))
                                   model.gpt.set_parameters(
                                       p.offset,
                                       std::span(parameters).subspan(static_cast<std::size_t>(p.offset), static_cast<std::size_t>(p.shape.numel())));
                               }
                             },
                         .after_backward = {}});
    EXPECT_EQ(model.gradients(batch), expected);
  }
}

TEST(GptHooks, GradientsAreCompleteInTheirHook) {
  for (auto config : {three_layers(), variants()[0], variants()[1], variants()[3]}) {
    for (auto recompute : {Recompute::none, Recompute::gelu_norm, Recompute::block}) {
      TestModel model(config, {.micro_batch = 3, .recompute = recompute});
      std::map<int, std::vector<float>> then;
      const auto gradients = [&] { return model.host(model.gpt.gradients().slice(0, model.gpt.layout().count)); };
      model.gpt.set_hooks({.before_forward = {}, .after_backward = [&](int block) { then[block] = gradients(); }});
      model.gradients(random_sequences(config, 3, 20, 5));
      const auto end = gradients();
      std::size_t checked = 0;
      for (int block = -1; block < config.layers; ++block) {
        for (const auto& p : model.gpt.layout().parameters) {
          if (!in_block(p, block)) continue;
          const auto first = p.offset, last = p.offset + p.shape.numel();
          EXPECT_TRUE(std::equal(end.begin() + first, end.begin() + last, then.at(block).begin() + first)) << p.name;
          checked += static_cast<std::size_t>(p.shape.numel());
        }
      }
      EXPECT_EQ(checked, end.size());
      EXPECT_NE(end, then.at(0));  // the embedding's is not complete before the last hook
    }
  }
}

}  // namespace
}  // namespace tessera::test
