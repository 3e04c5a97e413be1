// Generation with cached keys and values against full recomputation, token for token, and against the double-precision reference.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "tests/model/bf16_ops.h"
#include "tests/model/gpt_harness.h"

namespace tessera::test {
namespace {

using Tokens = std::vector<std::int32_t>;
using Kind = PatternSpec::Kind;

/// What another order of sums may do to logits: kReorder of gpt_test.cpp (products of up to 64 terms, each within 64 x 2^-24, through two layers),
/// relative to the largest.
double tolerance(const std::vector<float>& logits) {
  double largest = 1;
  for (float l : logits) largest = std::max(largest, std::abs(static_cast<double>(l)));
  return 2e-5 * largest;
}

std::int32_t likeliest(const std::vector<float>& logits) {
  return static_cast<std::int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
}

void expect_close(const std::vector<float>& made, const std::vector<float>& wanted) {
  ASSERT_EQ(made.size(), wanted.size());
  for (std::size_t v = 0; v < made.size(); ++v) ASSERT_NEAR(made[v], wanted[v], tolerance(wanted));
}

/// tiny_config() with room for `context` tokens: some 16 query tiles.
ModelConfig long_config(std::int64_t context = 256) {
  ModelConfig m = tiny_config();
  m.context = context;
  m.attention.epsilon = 0.01f;
  return m;
}

PatternSpec pattern(Kind kind, std::int64_t size = 0, std::int64_t width = 0, std::int64_t random = 0, std::int64_t block = 64) {
  PatternSpec p;
  p.kind = kind;
  p.size = size;
  p.width = width;
  p.random = random;
  p.block = block;
  p.seed = 3;
  return p;
}

PatternSpec combined(Kind kind, std::vector<PatternSpec> children) {
  PatternSpec p = pattern(kind);
  p.children = std::move(children);
  return p;
}

std::vector<PatternSpec> patterns() {
  PatternSpec blocks = pattern(Kind::blocks);
  auto mask = std::make_shared<BlockMask>();
  mask->block = 16;
  mask->rows = 5;
  for (std::int64_t r = 0; r < 5; ++r)
    for (std::int64_t k = 0; k < 5; ++k) mask->visible.push_back(k == r || (r + k) % 3 == 0);
  blocks.mask = mask;
  blocks.file = "test";
  const PatternSpec window = pattern(Kind::window, 21), global = pattern(Kind::global, 3);
  return {pattern(Kind::causal),
          window,
          pattern(Kind::strided, 7, 2),
          pattern(Kind::dilated, 9, 4),
          combined(Kind::any, {global, window}),
          pattern(Kind::bigbird, 2, 1, 2, 8),
          blocks,
          combined(Kind::all, {pattern(Kind::window, 90), pattern(Kind::strided, 5, 3)})};
}

/// Greedy decoding of `count` tokens after a prompt: the same tokens and logits as recomputing the whole sequence for each. False when two tokens
/// came so close that rounding could choose either: from there on the texts may differ, and nothing is shown.
bool same_text(const ModelConfig& config, int count, unsigned seed) {
  TestModel model(config, {.micro_batch = 1, .training = false, .cache = 1}, seed);
  model.poison();
  Tokens text{0, 5, 9, 2, 11};
  auto logits = model.gpt.prefill(0, text);
  for (int n = 0;; ++n) {
    const auto wanted = model.gpt.next_logits(text);
    expect_close(logits, wanted);
    auto sorted = wanted;
    std::nth_element(sorted.begin(), sorted.begin() + 1, sorted.end(), std::greater<>());
    if (sorted[0] - sorted[1] < 2 * tolerance(wanted)) return false;
    EXPECT_EQ(likeliest(logits), likeliest(wanted)) << "token " << n;
    if (n == count || ::testing::Test::HasFailure()) break;
    text.push_back(likeliest(logits));
    logits = model.gpt.decode(std::vector<Gpt::NextToken>{{0, text.back()}});
  }
  EXPECT_EQ(model.gpt.cached_tokens(0), static_cast<std::int64_t>(text.size()));
  Sequences s{1, static_cast<std::int64_t>(text.size()), text, Tokens(text.size(), 0), Tokens(text.size(), 0)};
  const auto exact = GptReference(config, model.gpt.layout()).run(model.parameters(), model.thresholds(), s).last_logits;
  for (std::size_t v = 0; v < logits.size(); ++v) EXPECT_NEAR(logits[v], exact[v], 2 * tolerance(logits));
  for (auto c : model.host<std::uint64_t>(model.gpt.counters())) EXPECT_EQ(c, 0u);  // text does not disturb the measures
  return true;
}

void expect_same_text(const ModelConfig& config, int count) {
  for (unsigned seed = 1; seed <= 5; ++seed)
    if (same_text(config, count, seed)) return;
  FAIL() << "near-ties with every seed";
}

TEST(GptDecode, IsRecomputationForEveryGateAndPattern) {
  for (const Gate gate : {Gate::relu, Gate::relu2, Gate::relu4, Gate::softmax})
    for (const PatternSpec& p : patterns()) {
      ModelConfig config = long_config();
      config.attention.gate = gate;
      config.attention.pattern.base = p;
      SCOPED_TRACE(describe(p) + " gate " + std::to_string(static_cast<int>(gate)));
      expect_same_text(config, 200);
    }
}

TEST(GptDecode, IsRecomputationForEveryScoreNormalizerAndThreshold) {
  unsigned n = 0;
  for (const Score score : {Score::dot, Score::cosine, Score::fidelity})
    for (const Normalizer normalizer : {Normalizer::none, Normalizer::length, Normalizer::sum, Normalizer::rms})
      for (const ThresholdMode mode : {ThresholdMode::fixed, ThresholdMode::learned, ThresholdMode::controlled, ThresholdMode::length}) {
        if (mode == ThresholdMode::length && score != Score::cosine) continue;
        ModelConfig config = long_config(80);
        config.attention.score = score;
        config.attention.normalizer = normalizer;
        config.attention.threshold.mode = mode;
        config.positions = ++n % 2 ? Positions::learned : Positions::rotary;
        config.norm = n % 3 ? NormKind::rmsnorm : NormKind::layernorm;
        config.bias = n % 3 == 0;
        config.attention.tile_query = n % 4 ? 16 : 24;
        SCOPED_TRACE("score " + std::to_string(static_cast<int>(score)) + " normalizer " + std::to_string(static_cast<int>(normalizer)) +
                     " threshold " + std::to_string(static_cast<int>(mode)));
        expect_same_text(config, 60);
        if (normalizer != Normalizer::sum) continue;
        config.attention.always_self = true;
        expect_same_text(config, 60);
      }
}

TEST(GptDecode, SelfEdges) {
  for (const Gate gate : {Gate::relu, Gate::relu2, Gate::relu4, Gate::softmax})
    for (const PatternSpec& p : {pattern(Kind::window, 21), pattern(Kind::strided, 7, 2)}) {
      ModelConfig config = long_config(120);
      config.attention.gate = gate;
      config.attention.always_self = true;
      config.attention.threshold.init = 1.0f;
      config.attention.pattern.base = p;
      SCOPED_TRACE(describe(p) + " gate " + std::to_string(static_cast<int>(gate)));
      expect_same_text(config, 90);
    }
}

TEST(GptDecode, Sinks) {
  for (const Gate gate : {Gate::relu, Gate::relu2, Gate::relu4, Gate::softmax})
    for (const int sinks : {1, 4}) {
      ModelConfig config = long_config(120);
      config.attention.gate = gate;
      config.attention.always_sinks = sinks;
      config.attention.always_self = sinks == 1;
      config.attention.threshold.init = 1.0f;
      config.attention.pattern.base = pattern(Kind::window, 21);
      SCOPED_TRACE("gate " + std::to_string(static_cast<int>(gate)) + ", " + std::to_string(sinks) + " sinks");
      expect_same_text(config, 90);
    }
}

TEST(GptDecode, OutputGate) {
  for (const Gate gate : {Gate::relu2, Gate::softmax})
    for (const Normalizer normalizer : {Normalizer::sum, Normalizer::rms}) {
      ModelConfig config = long_config(120);
      config.attention.gate = gate;
      config.attention.normalizer = normalizer;
      config.attention.always_self = normalizer == Normalizer::sum;
      config.attention.output_gate = true;
      SCOPED_TRACE("gate " + std::to_string(static_cast<int>(gate)) + " normalizer " + std::to_string(static_cast<int>(normalizer)));
      expect_same_text(config, 90);
    }
}

TEST(GptDecode, HeadsAndLayersOfDifferentPatterns) {
  ModelConfig config = long_config(120);
  config.attention.pattern.overrides = {
      {.layer_first = 1, .layer_last = 1, .head_first = 0, .head_last = 0, .pattern = pattern(Kind::window, 5)},
      {.layer_first = 0, .layer_last = 0, .head_first = 1, .head_last = 1, .pattern = pattern(Kind::strided, 4, 1)}};
  config.attention.document_mask = true;  // a sequence in the cache is one document
  expect_same_text(config, 100);
}

// A prompt's logits are the same bits alone and in company, whoever it sits beside, wherever in the cache, whatever is computed in between.
TEST(GptDecode, CompanyChangesNothing) {
  for (const ModelConfig& variant : variants()) {
    ModelConfig config = variant;
    config.context = 60;
    TestModel alone(config, {.micro_batch = 1, .training = false, .cache = 1});
    TestModel together(config, {.micro_batch = 2, .training = false, .cache = 6});
    together.poison();
    const std::size_t lengths[] = {1, 7, 16, 17, 33};
    const Sequences s = random_sequences(config, 5, 60, 31);
    const auto token = [&](std::size_t b, std::size_t t) { return s.tokens[b * 60 + t]; };
    std::vector<std::vector<std::vector<float>>> wanted(5);  // of each sequence, of each token from its prompt's last on
    for (std::size_t b = 0; b < 5; ++b) {
      wanted[b].push_back(alone.gpt.prefill(0, std::span(s.tokens).subspan(b * 60, lengths[b])));
      for (std::size_t t = lengths[b]; t < lengths[b] + 20; ++t) wanted[b].push_back(alone.gpt.decode(std::vector<Gpt::NextToken>{{0, token(b, t)}}));
    }
    std::vector<std::size_t> done(5, 0);  // tokens decoded
    const auto place = [](std::size_t b) { return static_cast<std::int64_t>(5 - b); };
    for (std::size_t step = 0; step < 40; ++step) {
      if (step < 10 && step % 2 == 0) {  // they arrive one after another
        const std::size_t b = step / 2;
        EXPECT_EQ(together.gpt.prefill(place(b), std::span(s.tokens).subspan(b * 60, lengths[b])), wanted[b][0]);
      }
      if (step == 7) together.gpt.next_logits(std::span(s.tokens).first(41));
      std::vector<Gpt::NextToken> next;
      std::vector<std::size_t> who;
      for (std::size_t b = 0; b < 5; ++b) {
        if (together.gpt.cached_tokens(place(b)) == 0 || done[b] == 20 || (b + step) % 4 == 0) continue;  // nor are all there every time
        who.push_back(b);
        next.push_back({place(b), token(b, lengths[b] + done[b])});
      }
      const auto logits = together.gpt.decode(next);
      ASSERT_EQ(logits.size(), who.size() * static_cast<std::size_t>(config.vocabulary));
      for (std::size_t r = 0; r < who.size(); ++r) {
        const auto* row = logits.data() + r * static_cast<std::size_t>(config.vocabulary);
        ASSERT_TRUE(std::equal(row, row + config.vocabulary, wanted[who[r]][++done[who[r]]].begin())) << "sequence " << who[r] << " step " << step;
      }
    }
    EXPECT_EQ(std::accumulate(done.begin(), done.end(), std::size_t{0}), 100u);
  }
}

TEST(GptDecode, ASequenceStartsAnewAndFillsTheCacheToItsEnd) {
  ModelConfig config = long_config(20);
  TestModel model(config, {.micro_batch = 1, .tokens = 13, .training = false, .cache = 2});
  const Sequences s = random_sequences(config, 1, 20, 5);
  const auto all = std::span(s.tokens);
  model.gpt.prefill(1, all.first(9));
  const auto first = model.gpt.prefill(1, all.first(4));
  EXPECT_EQ(model.gpt.cached_tokens(1), 4);
  EXPECT_EQ(model.gpt.cached_tokens(0), 0);
  expect_close(first, model.gpt.next_logits(all.first(4)));
  for (std::size_t t = 4; t < 13; ++t)
    expect_close(model.gpt.decode(std::vector<Gpt::NextToken>{{1, all[t]}}), model.gpt.next_logits(all.first(t + 1)));
  EXPECT_THROW(model.gpt.decode(std::vector<Gpt::NextToken>{{1, 3}}), std::logic_error);  // full
  EXPECT_EQ(model.gpt.cached_tokens(1), 13);
}

TEST(GptDecode, MemoryIsPlanned) {
  const ModelConfig config = long_config(48);
  const auto bytes = [&](std::int64_t cache) {
    return TestModel(config, {.micro_batch = 1, .training = false, .cache = cache}).plan.bytes(MemoryCategory::activations);
  };
  // Two layers, keys and values, 48 tokens of width 16, 4 bytes.
  EXPECT_EQ(bytes(3) - bytes(0), 3u * 2 * 2 * 48 * 16 * 4);
  ModelConfig self = config, sinks = config;  // z of each row
  self.attention.always_self = true;
  sinks.attention.always_sinks = 2;
  for (const ModelConfig& added : {self, sinks}) {
    TestModel many(added, {.micro_batch = 1, .tokens = 4, .training = false, .cache = 9});  // more rows to decode than a sequence has tokens
    std::vector<Gpt::NextToken> next;
    for (std::int64_t q = 0; q < 9; ++q) {
      many.gpt.prefill(q, Tokens{static_cast<std::int32_t>(q), 1});
      next.push_back({q, 7});
    }
    const auto logits = many.gpt.decode(next);
    for (std::int64_t q = 0; q < 9; ++q)
      expect_close({logits.begin() + q * config.vocabulary, logits.begin() + (q + 1) * config.vocabulary},
                   many.gpt.next_logits(Tokens{static_cast<std::int32_t>(q), 1, 7}));
  }
}

TEST(GptDecode, WhatCannotBeDecoded) {
  const ModelConfig config = tiny_config();
  TestModel model(config, {.micro_batch = 1, .training = false, .cache = 2});
  const auto decode = [&](std::vector<Gpt::NextToken> next) { return model.gpt.decode(next); };
  EXPECT_THROW(decode({{0, 1}}), std::logic_error);  // not started
  EXPECT_THROW(model.gpt.prefill(2, Tokens{1}), std::logic_error);
  EXPECT_THROW(model.gpt.prefill(-1, Tokens{1}), std::logic_error);
  EXPECT_THROW(model.gpt.prefill(0, Tokens{}), std::logic_error);
  EXPECT_THROW(model.gpt.prefill(0, Tokens(21, 1)), std::logic_error);
  EXPECT_THROW(model.gpt.prefill(0, Tokens{19}), std::invalid_argument);
  model.gpt.prefill(0, Tokens{1, 2});
  EXPECT_THROW(decode({{0, 1}, {0, 2}}), std::logic_error);
  EXPECT_THROW(decode({{0, 19}}), std::invalid_argument);
  EXPECT_THROW(decode({{5, 1}}), std::logic_error);
  EXPECT_TRUE(decode({}).empty());
  EXPECT_EQ(model.gpt.cached_tokens(0), 2);

  TestModel without(config, {.micro_batch = 1, .training = false});
  EXPECT_THROW(without.gpt.prefill(0, Tokens{1}), std::logic_error);
  EXPECT_THROW(without.gpt.cached_tokens(0), std::logic_error);
}

}  // namespace
}  // namespace tessera::test
