// The whole model on a GPU, against the model on the CPU with the same parameters.
//
// Tolerance. The same model is also run in bf16 on the CPU (bf16_ops.h): fp32 inside an operation, every output rounded once. A GPU may be twice as
// far from fp32 as that is, in each parameter's gradient by itself, and a little more for gradients of a few numbers only; over four batches,
// because the error of one is a matter of luck.

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdio>
#include <cstring>

#include "kernels/cuda/ops.h"
#include "tests/model/bf16_ops.h"
#include "tests/model/gpt_bf16_cases.h"
#include "tests/model/pattern_cases.h"

namespace tessera::test {
namespace {

constexpr double kMultiple = 2, kLossFloor = 5e-4, kGradientFloor = 0.01;
constexpr unsigned kBatches = 4;

class GptCuda : public ::testing::Test {
 protected:
  void SetUp() override {
    if (const std::string problem = cuda_problem(); !problem.empty()) GTEST_SKIP() << "no GPU: " << problem;
  }
};

TEST_F(GptCuda, LossesAndGradientsAreThoseOfTheCpuUpToRounding) {
  for (const auto& [name, config] : bf16_configs()) {
    Bf16Model fp32(config, make_cpu_ops()), bf16(config, make_bf16_ops());
    const ParameterLayout& layout = fp32.gpt.layout();
    std::vector<Outcome> exact;
    Errors usual;
    usual.gradients.resize(layout.parameters.size());
    for (unsigned seed = 0; seed < kBatches; ++seed) exact.push_back(run(fp32, bf16_sequences(config, seed)));
    const std::vector<double> sizes = sizes_of(exact, layout, config.heads);
    for (unsigned seed = 0; seed < kBatches; ++seed) {
      const Errors e = errors_of(run(bf16, bf16_sequences(config, seed)), exact[seed], layout, sizes);
      usual.losses = std::max(usual.losses, e.losses);
      for (std::size_t i = 0; i < e.gradients.size(); ++i) usual.gradients[i] = std::max(usual.gradients[i], e.gradients[i]);
    }
    for (auto recompute : {Recompute::none, Recompute::gelu_norm}) {
      SCOPED_TRACE(name + (recompute == Recompute::none ? "" : ", gelu and norms computed again"));
      Bf16Model gpu(config, make_cuda_ops(0), recompute);
      double worst = 0;
      for (unsigned seed = 0; seed < kBatches; ++seed) {
        const Errors e = errors_of(run(gpu, bf16_sequences(config, seed)), exact[seed], layout, sizes);
        EXPECT_LE(e.losses, kMultiple * usual.losses + kLossFloor);
        for (std::size_t i = 0; i < e.gradients.size(); ++i) {
          EXPECT_LE(e.gradients[i], kMultiple * usual.gradients[i] + kGradientFloor)
              << layout.parameters[i].name << ", batch " << seed << ", bf16 on the CPU " << usual.gradients[i];
          worst = std::max(worst, e.gradients[i] / (kMultiple * usual.gradients[i] + kGradientFloor));
        }
      }
      std::printf("%-40s worst gradient at %.2f of its tolerance\n", name.c_str(), worst);
    }
  }
}

TEST_F(GptCuda, RecomputedBlocksGiveTheSameBits) {
  for (const auto& [name, config] : bf16_configs()) {
    SCOPED_TRACE(name);
    Bf16Model kept(config, make_cuda_ops(0)), again(config, make_cuda_ops(0), Recompute::block);
    const Sequences batch = bf16_sequences(config, 5);
    const Outcome a = run(kept, batch), b = run(again, batch);
    EXPECT_EQ(a.losses, b.losses);
    EXPECT_EQ(a.gradients, b.gradients);
    EXPECT_EQ(kept.host<std::uint64_t>(kept.gpt.counters()), again.host<std::uint64_t>(again.gpt.counters()));
  }
}

TEST_F(GptCuda, TenRepetitionsGiveTheSameBits) {
  for (const auto& [name, config] : bf16_configs()) {
    SCOPED_TRACE(name);
    Bf16Model model(config, make_cuda_ops(0), Recompute::gelu_norm);
    const Sequences batch = bf16_sequences(config, 6);
    const Outcome first = run(model, batch);
    for (int n = 1; n < 10; ++n) {
      const Outcome next = run(model, batch);
      ASSERT_EQ(next.losses, first.losses) << n;
      ASSERT_EQ(next.gradients, first.gradients) << n;
    }
    Bf16Model other(config, make_cuda_ops(0), Recompute::gelu_norm);
    EXPECT_EQ(run(other, batch).gradients, first.gradients);
  }
}

TEST_F(GptCuda, RecordedWorkGivesTheSameBits) {
  for (auto recompute : {Recompute::none, Recompute::gelu_norm, Recompute::block}) {
    for (const auto& [name, config] : bf16_configs()) {
      SCOPED_TRACE(name);
      Bf16Model model(config, make_cuda_ops(0), recompute);
      const Sequences one = bf16_sequences(config, 7), two = bf16_sequences(config, 8);
      const Outcome first = run(model, one), second = run(model, two);

      const Batch batch = model.upload(one);
      model.gpt.zero_gradients();
      model.gpt.zero_counters();
      const auto work = model.ops->record([&] { model.gpt.forward_backward(batch, kBf16Scale); });
      ASSERT_TRUE(work);
      for (float g : model.host(model.gpt.gradients())) ASSERT_EQ(g, 0.0f) << "recording ran the work";
      // Into the same memory come one batch, another, and the first again.
      for (const auto& [sequences, expected] : {std::pair(one, first), std::pair(two, second), std::pair(one, first)}) {
        model.poison();
        model.upload(sequences);
        model.gpt.zero_gradients();
        work->replay();
        EXPECT_EQ(model.host(model.gpt.losses()), expected.losses);
        EXPECT_EQ(model.host(model.gpt.gradients().slice(0, model.gpt.layout().count)), expected.gradients);
      }
      const auto counters = model.host<std::uint64_t>(model.gpt.counters());
      EXPECT_EQ(counters[kVisibleEdges] % 3, 0u);
      EXPECT_GT(counters[kVisibleEdges], 0u);
    }
  }
}

TEST_F(GptCuda, EvaluationAndGeneration) {
  for (const auto& [name, config] : bf16_configs()) {
    SCOPED_TRACE(name);
    Bf16Model fp32(config, make_cpu_ops()), training(config, make_cuda_ops(0));
    TestModel evaluation(config, {.micro_batch = 3, .training = false}, 1, make_cuda_ops(0));
    evaluation.fill(1, 0.08f, true);
    const Sequences batch = bf16_sequences(config, 9);
    EXPECT_EQ(evaluation.losses(batch), training.losses(batch));

    evaluation.gpt.forward(evaluation.upload(batch), true);
    fp32.gpt.forward(fp32.upload(batch), true);
    const auto predicted = evaluation.host<std::int32_t>(evaluation.gpt.predictions()), expected = fp32.host<std::int32_t>(fp32.gpt.predictions());
    std::size_t same = 0;
    for (std::size_t i = 0; i < expected.size(); ++i) same += predicted[i] == expected[i];
    EXPECT_GE(same, expected.size() * 95 / 100);

    for (std::size_t n : {1, 2, 63, 64, 65, 200}) {
      const auto prompt = std::span(batch.tokens).first(n);
      const auto logits = evaluation.gpt.next_logits(prompt), wanted = fp32.gpt.next_logits(prompt);
      EXPECT_LT(relative_error(logits.data(), wanted.data(), wanted.size()), 0.04) << n << " tokens";
      EXPECT_EQ(training.gpt.next_logits(prompt), logits);
    }
  }
}

/// Greedy text of three sequences at different lengths, from the cache. Calls check(sequence, text, logits) for every token.
template <class Check>
void generate_greedily(TestModel& model, std::int64_t vocabulary, std::span<const std::int32_t> tokens, int steps, Check check) {
  std::vector<std::vector<std::int32_t>> text;
  std::vector<std::vector<float>> logits(3);
  for (std::int64_t s = 0; s < 3; ++s) {
    text.emplace_back(tokens.begin(), tokens.begin() + 1 + 62 * s);
    logits[s] = model.gpt.prefill(s, text[s]);
  }
  for (int step = 0; step < steps && !::testing::Test::HasFatalFailure(); ++step) {
    std::vector<Gpt::NextToken> next;
    for (std::int64_t s = 0; s < (step / 9 % 2 ? 2 : 3); ++s) {  // one stops now and then, and goes on
      const auto likeliest = static_cast<std::int32_t>(std::max_element(logits[s].begin(), logits[s].end()) - logits[s].begin());
      text[s].push_back(likeliest);
      next.push_back({s, likeliest});
    }
    const auto made = model.gpt.decode(next);
    for (std::int64_t s = 0; s < static_cast<std::int64_t>(next.size()); ++s) {
      logits[s].assign(made.begin() + s * vocabulary, made.begin() + (s + 1) * vocabulary);
      check(step, text[s], logits[s]);
    }
  }
}

/// At every token as near to the fp32 model on the same tokens as computing the whole text is. The tokens are the GPU's own choice; where
/// recomputation would choose another, the two logits are nearly equal.
TEST_F(GptCuda, FastGenerationIsRecomputationUpToBf16) {
  for (auto [name, config] : bf16_configs()) {
    config.attention.document_mask = false;  // one document anyway
    SCOPED_TRACE(name);
    Bf16Model fp32(config, make_cpu_ops());
    TestModel cached(config, {.micro_batch = 1, .training = false, .cache = 3}, 1, make_cuda_ops(0));
    cached.fill(1, 0.08f, true);
    int differ = 0, tokens = 0;
    generate_greedily(cached, config.vocabulary, bf16_sequences(config, 9).tokens, 70, [&](int step, const auto& text, const auto& logits) {
      const auto whole = cached.gpt.next_logits(text);
      const auto choice = std::max_element(whole.begin(), whole.end()) - whole.begin();
      differ += logits[choice] < *std::max_element(logits.begin(), logits.end());
      ++tokens;
      EXPECT_LT(relative_error(logits.data(), whole.data(), whole.size()), 0.04) << text.size() << " tokens";
      if (step % 10 != 0) return;
      const auto wanted = fp32.gpt.next_logits(text);
      EXPECT_LT(relative_error(logits.data(), wanted.data(), wanted.size()), 0.04) << text.size() << " tokens";
    });
    EXPECT_LE(differ, tokens / 10);
    std::printf("%-40s %d of %d tokens chosen differently\n", name.c_str(), differ, tokens);
  }
}

/// Every logit of every token to the bit.
void expect_recomputations_bits(const ModelConfig& config, int steps) {
  TestModel model(config, {.micro_batch = 1, .training = false, .cache = 3}, 1, make_cuda_ops(0, true));
  model.fill(1, 0.08f, true);
  model.poison();  // the cache too
  const auto same = [](const std::vector<float>& a, const std::vector<float>& b) {
    return std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
  };
  generate_greedily(model, config.vocabulary, bf16_sequences(config, 9).tokens, steps, [&](int, const auto& text, const auto& logits) {
    const auto whole = model.gpt.next_logits(text);
    ASSERT_TRUE(same(logits, whole)) << "logits after " << text.size() << " tokens, relative error "
                                     << relative_error(logits.data(), whole.data(), whole.size());
  });
  // A place in the cache that a longer text had.
  std::vector<std::int32_t> text{7, 3, 11};
  auto logits = model.gpt.prefill(2, text);
  for (int n = 0; n < 3; ++n) {
    ASSERT_TRUE(same(logits, model.gpt.next_logits(text))) << n;
    text.push_back(5 + n);
    logits = model.gpt.decode(std::vector<Gpt::NextToken>{{2, text.back()}});
  }
}

TEST_F(GptCuda, GenerationIsRecomputationForEveryGateAndPattern) {
  for (const Gate gate : {Gate::relu, Gate::relu2, Gate::relu4, Gate::softmax})
    for (const PatternSpec& p : {causal(), window(70), strided(21, 3), dilated(30, 5), any({global(3), window(40)}), bigbird(2, 1, 2, 16),
                                 blocks(64, 5, 5), all({window(150), strided(5, 3)})}) {
      ModelConfig config = bf16_config();
      config.context = 330;  // 200 tokens after the longest prompt
      config.attention.gate = gate;
      config.attention.pattern.base = p;
      SCOPED_TRACE(describe(p) + " gate " + std::to_string(static_cast<int>(gate)));
      expect_recomputations_bits(config, 200);
      if (HasFatalFailure()) return;
    }
}

TEST_F(GptCuda, GenerationIsRecomputationForEveryScoreNormalizerAndThreshold) {
  for (auto& [name, config] : bf16_configs()) {
    SCOPED_TRACE(name);
    expect_recomputations_bits(config, 70);
    if (HasFatalFailure()) return;
  }
  unsigned n = 0;
  for (const Score score : {Score::dot, Score::cosine, Score::fidelity})
    for (const Normalizer normalizer : {Normalizer::none, Normalizer::length, Normalizer::sum, Normalizer::rms})
      for (const ThresholdMode mode : {ThresholdMode::fixed, ThresholdMode::length}) {
        if (mode == ThresholdMode::length && score != Score::cosine) continue;
        ModelConfig config = bf16_config();
        config.attention.score = score;
        config.attention.normalizer = normalizer;
        config.attention.threshold.mode = mode;
        config.attention.threshold.init = score == Score::fidelity ? 0.01f : 0.05f;
        config.heads = ++n % 2 ? 2 : 1;  // of 64 and 128
        config.positions = n % 4 > 1 ? Positions::learned : Positions::rotary;
        config.bias = n % 3 == 0;
        SCOPED_TRACE("score " + std::to_string(static_cast<int>(score)) + " normalizer " + std::to_string(static_cast<int>(normalizer)) +
                     " threshold " + std::to_string(static_cast<int>(mode)));
        expect_recomputations_bits(config, 40);
        if (HasFatalFailure()) return;
      }
}

TEST_F(GptCuda, ShorterAndSmallerBatches) {
  const ModelConfig config = bf16_config();
  Bf16Model fp32(config, make_cpu_ops()), bf16(config, make_bf16_ops()), gpu(config, make_cuda_ops(0));
  const auto error = [](const std::vector<float>& found, const std::vector<float>& exact) {
    return relative_error(found.data(), exact.data(), exact.size());
  };
  for (const auto& [B, T] : {std::pair(1, 1), std::pair(1, 200), std::pair(2, 63), std::pair(3, 64), std::pair(2, 129)}) {
    SCOPED_TRACE(std::to_string(B) + " x " + std::to_string(T));
    Sequences batch = random_sequences(config, B, T, 10, 50);
    batch.targets[0] = 3;
    const Outcome exact = run(fp32, batch), usual = run(bf16, batch), found = run(gpu, batch);
    EXPECT_LE(error(found.losses, exact.losses), kMultiple * error(usual.losses, exact.losses) + 0.002);
    EXPECT_LE(error(found.gradients, exact.gradients), kMultiple * error(usual.gradients, exact.gradients) + kGradientFloor);
  }
}

}  // namespace
}  // namespace tessera::test
