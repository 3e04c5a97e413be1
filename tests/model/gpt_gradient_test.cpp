// Losses and gradients of whole models against GptReference in double precision: the loss directly, the gradient by central differences
// of the reference. For each parameter tensor by itself the gradient is compared along random directions and along single elements, so that a
// mistake in a small tensor cannot hide behind a large one.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "tests/model/gpt_harness.h"

namespace tessera::test {
namespace {

// fp32 rounds to 24 bits, and how far that is carried depends on the point: a query whose few active edges are barely above the threshold has a
// nearly empty sum to divide by. So the tolerance is measured where the test stands: what changes when every parameter moves by its last bit or
// less? The model, which rounds at every operation, may be off by a small multiple of that.
constexpr double kMultiple = 16;
constexpr double kFloor = 2e-6;  // of the largest loss, of the norm of a gradient: where a change of the parameters happens to cancel
constexpr double kStep = 1e-6;   // central differences in double: error about 1e-9

double norm_of(const std::vector<float>& v, std::size_t first, std::size_t n) {
  double sum = 0;
  for (std::size_t i = first; i < first + n; ++i) sum += static_cast<double>(v[i]) * v[i];
  return std::sqrt(sum);
}

void expect_matches_reference(const ModelConfig& config, unsigned seed = 1) {
  TestModel model(config, {.micro_batch = 2}, seed);
  const Sequences batch = random_sequences(config, 2, config.context - 1, seed);  // one short of the longest: T is no multiple of the tile
  const GptReference reference(config, model.gpt.layout());
  // The controller gives every layer and head a threshold of its own.
  auto own = model.host(model.gpt.thresholds());
  for (std::size_t r = 0; r < own.size(); ++r) own[r] *= 1 + 0.3f * static_cast<float>(r);
  model.ops->upload(model.gpt.thresholds(), own.data());
  // And a balance m, which stands for a term m * (sum of min(x, kBalanceReach) of active edges) in what is differentiated.
  std::vector<float> balances;
  if (const Tensor m = model.gpt.balances()) {
    for (std::size_t r = 0; r < own.size(); ++r) balances.push_back(0.02f * static_cast<float>(r + 1) * (r % 2 ? -1.0f : 1.0f));
    model.ops->upload(m, balances.data());
  }
  const auto parameters = model.parameters(), thresholds = model.thresholds();
  const auto expected = reference.run(parameters, thresholds, batch);
  const double largest = *std::max_element(expected.losses.begin(), expected.losses.end());

  constexpr float scale = 0.125f;
  const auto gradients = model.gradients(batch, scale);
  const auto losses = model.host(model.gpt.losses());
  const auto counters = model.host<std::uint64_t>(model.gpt.counters());
  const auto threshold_gradients = [&] { return balances.empty() ? balances : model.host(model.gpt.threshold_gradients()); };
  const auto by_threshold = threshold_gradients();
  if (!balances.empty()) {  // micro-batches add up
    model.gpt.forward_backward(model.upload(batch), scale);
    const auto twice = threshold_gradients();
    for (std::size_t r = 0; r < twice.size(); ++r) EXPECT_FLOAT_EQ(twice[r], 2 * by_threshold[r]) << "layer and head " << r;
  }

  // Last-bit changes of the parameters: what they do to each loss (in double) and to the gradient (in the model).
  std::mt19937 rng(seed);
  std::vector<double> loss_change(losses.size());
  std::vector<float> gradient_change(gradients.size()), by_threshold_change(by_threshold.size());
  for (int trial = 0; trial < 4; ++trial) {
    auto moved = parameters;
    std::vector<float> moved32(moved.size());
    for (std::size_t i = 0; i < moved.size(); ++i) moved[i] = moved32[i] = static_cast<float>(parameters[i] * (1 + (rng() % 3 - 1.0) * 0x1p-23));
    const auto result = reference.run(moved, thresholds, batch);
    for (std::size_t i = 0; i < losses.size(); ++i) loss_change[i] = std::max(loss_change[i], std::abs(result.losses[i] - expected.losses[i]));
    model.gpt.set_parameters(0, moved32);
    const auto g = model.gradients(batch, scale);
    for (std::size_t i = 0; i < g.size(); ++i) gradient_change[i] = std::max(gradient_change[i], std::abs(g[i] - gradients[i]));
    const auto t = threshold_gradients();
    for (std::size_t r = 0; r < t.size(); ++r) by_threshold_change[r] = std::max(by_threshold_change[r], std::abs(t[r] - by_threshold[r]));
  }

  for (std::size_t i = 0; i < losses.size(); ++i)
    ASSERT_NEAR(losses[i], expected.losses[i], kMultiple * loss_change[i] + kFloor * largest) << "token " << i;

  double active = 0;
  for (std::size_t r = 0; r < expected.active_edges.size(); ++r) {
    EXPECT_EQ(static_cast<double>(counters[r * kAttentionCounters + kActiveEdges]), expected.active_edges[r]) << "layer and head " << r;
    active += expected.active_edges[r];
  }
  ASSERT_GT(active, 0) << "a model without active edges tests nothing";

  const auto objective = [&](const std::vector<double>& at, const std::vector<double>& taus) {
    const auto result = reference.run(at, taus, batch);
    double sum = 0;
    for (double loss : result.losses) sum += scale * loss;
    for (std::size_t r = 0; r < balances.size(); ++r) sum += static_cast<double>(balances[r]) * result.score_sums[r];
    return sum;
  };
  for (std::size_t r = 0; r < by_threshold.size(); ++r) {
    auto plus = thresholds, minus = thresholds;
    plus[r] += kStep;
    minus[r] -= kStep;
    EXPECT_NEAR(by_threshold[r], (objective(parameters, plus) - objective(parameters, minus)) / (2 * kStep),
                kMultiple * by_threshold_change[r] + kFloor * std::abs(by_threshold[r]) + 1e-8)
        << "threshold of layer and head " << r;
  }
  for (const auto& p : model.gpt.layout().parameters) {
    SCOPED_TRACE(p.name);
    const auto n = static_cast<std::size_t>(p.shape.numel()), first = static_cast<std::size_t>(p.offset);
    const double norm = norm_of(gradients, first, n), change = norm_of(gradient_change, first, n);
    EXPECT_LT(change, 0.01 * norm + 1e-4) << "too close to a kink of the gate to tell anything";
    for (int direction = 0; direction < 4; ++direction) {
      std::vector<double> u(n);
      if (direction < 2) {
        for (double& v : u) v = rng() % 2 ? 1 : -1;
      } else {
        u[rng() % n] = 1;
      }
      auto plus = parameters, minus = parameters;
      double found = 0;
      for (std::size_t i = 0; i < n; ++i) {
        plus[first + i] += kStep * u[i];
        minus[first + i] -= kStep * u[i];
        found += u[i] * gradients[first + i];
      }
      EXPECT_NEAR(found, (objective(plus, thresholds) - objective(minus, thresholds)) / (2 * kStep), kMultiple * change + kFloor * norm + 1e-8)
          << "direction " << direction << ", norm of the gradient " << norm << ", last-bit change " << change;
    }
  }
}

const char* text(Score s) { return s == Score::dot ? "dot" : s == Score::cosine ? "cosine" : "fidelity"; }
const char* text(Gate g) { return g == Gate::relu ? "relu" : g == Gate::relu2 ? "relu2" : g == Gate::relu4 ? "relu4" : "softmax"; }
const char* text(Normalizer n) { return n == Normalizer::none ? "none" : n == Normalizer::length ? "length" : n == Normalizer::sum ? "sum" : "rms"; }

PatternSpec pattern_number(int n) {
  PatternSpec window, sinks;
  window.kind = PatternSpec::Kind::window;
  window.size = 5;
  sinks.kind = PatternSpec::Kind::global;
  sinks.size = 2;
  PatternSpec both;
  both.kind = PatternSpec::Kind::any;
  both.children = {window, sinks};
  return n == 0 ? PatternSpec{} : n == 1 ? window : both;
}

class ScoreGateNormalizer : public ::testing::TestWithParam<std::tuple<Score, Gate, Normalizer>> {};

// Every score x gate x normalizer; positions, norm, biases, document mask, learned scale, threshold mode and pattern vary along with them, each at
// its own pace.
TEST_P(ScoreGateNormalizer, MatchesReference) {
  const auto [score, gate, normalizer] = GetParam();
  const int n = static_cast<int>(score) * 16 + static_cast<int>(gate) * 4 + static_cast<int>(normalizer);
  ModelConfig m = tiny_config();
  m.attention.score = score;
  m.attention.gate = gate;
  m.attention.normalizer = normalizer;
  m.attention.length_alpha = n % 3 == 0 ? 1.0f : 0.5f;
  m.positions = n % 2 ? Positions::learned : Positions::rotary;
  m.norm = n / 2 % 2 ? NormKind::layernorm : NormKind::rmsnorm;
  m.bias = n % 3 == 1;
  m.attention.document_mask = n % 5 == 2;
  m.attention.scale_learned = n % 7 != 3;
  m.attention.threshold.mode = n % 2 ? ThresholdMode::learned : ThresholdMode::controlled;
  m.attention.pattern.base = pattern_number(n % 3);
  expect_matches_reference(m, static_cast<unsigned>(n + 1));
}

INSTANTIATE_TEST_SUITE_P(Gpt, ScoreGateNormalizer,
                         ::testing::Combine(::testing::Values(Score::dot, Score::cosine, Score::fidelity),
                                            ::testing::Values(Gate::relu, Gate::relu2, Gate::relu4, Gate::softmax),
                                            ::testing::Values(Normalizer::none, Normalizer::length, Normalizer::sum, Normalizer::rms)),
                         [](const auto& info) {
                           return std::string(text(std::get<0>(info.param))) + "_" + text(std::get<1>(info.param)) + "_" +
                                  text(std::get<2>(info.param));
                         });

TEST(GptGradients, ThresholdModes) {
  for (auto score : {Score::dot, Score::cosine, Score::fidelity}) {
    for (auto mode : {ThresholdMode::fixed, ThresholdMode::learned, ThresholdMode::controlled, ThresholdMode::length}) {
      if (mode == ThresholdMode::length && score != Score::cosine) continue;
      for (bool scale_learned : {false, true}) {
        SCOPED_TRACE(std::string(text(score)) + " mode " + std::to_string(static_cast<int>(mode)));
        ModelConfig m = tiny_config();
        m.attention.score = score;
        m.attention.threshold.mode = mode;
        m.attention.scale_learned = scale_learned;
        expect_matches_reference(m, 77);
      }
    }
  }
}

/// Every score and gate with what `add` puts beside the attention.
template <class Add>
void expect_added_edges_match(unsigned seed, Add&& add) {
  for (auto score : {Score::dot, Score::cosine, Score::fidelity}) {
    for (auto gate : {Gate::relu, Gate::relu2, Gate::relu4, Gate::softmax}) {
      SCOPED_TRACE(std::string(text(score)) + " " + text(gate));
      ModelConfig m = tiny_config();
      m.attention.score = score;
      m.attention.gate = gate;
      m.attention.scale_learned = gate != Gate::relu4;
      m.attention.document_mask = gate == Gate::relu;
      m.attention.threshold.mode = score == Score::cosine && gate == Gate::relu2 ? ThresholdMode::length : ThresholdMode::learned;
      m.attention.threshold.init = score == Score::fidelity ? 0.3f : 1.0f;
      add(m.attention);
      expect_matches_reference(m, seed + static_cast<unsigned>(gate));
    }
  }
}

TEST(GptGradients, SelfEdges) {
  expect_added_edges_match(31, [](AttentionConfig& a) { a.always_self = true; });
}

TEST(GptGradients, Sinks) {
  expect_added_edges_match(61, [](AttentionConfig& a) {
    a.always_sinks = a.score == Score::dot ? 1 : 3;
    a.always_self = a.gate == Gate::relu4;
  });
}

TEST(GptGradients, OutputGate) {
  unsigned n = 0;
  for (auto gate : {Gate::relu2, Gate::softmax}) {
    for (auto normalizer : {Normalizer::sum, Normalizer::rms}) {
      for (bool bias : {false, true}) {
        SCOPED_TRACE(std::string(text(gate)) + " " + text(normalizer) + (bias ? " biases" : ""));
        ModelConfig m = tiny_config();
        m.attention.output_gate = true;
        m.attention.gate = gate;
        m.attention.normalizer = normalizer;
        m.attention.always_self = normalizer == Normalizer::sum;
        m.bias = bias;
        m.norm = bias ? NormKind::layernorm : NormKind::rmsnorm;
        m.mlp_ratio = bias ? 1 : 4;  // the gradients of qkv or the hidden layer decide how large their memory is
        m.attention.document_mask = n % 2;
        expect_matches_reference(m, 300 + n++);
      }
    }
  }
}

TEST(GptGradients, PositionsNormsBiasesDocuments) {
  for (int n = 0; n < 16; ++n) {
    SCOPED_TRACE(n);
    ModelConfig m = tiny_config();
    m.positions = n & 1 ? Positions::learned : Positions::rotary;
    m.norm = n & 2 ? NormKind::layernorm : NormKind::rmsnorm;
    m.bias = n & 4;
    m.attention.document_mask = n & 8;
    expect_matches_reference(m, 200 + static_cast<unsigned>(n));
  }
}

TEST(GptGradients, PatternsByLayerAndHead) {
  ModelConfig m = tiny_config();
  m.attention.threshold.init = 0.0f;
  m.attention.pattern.base = pattern_number(1);
  m.attention.pattern.overrides.push_back({.layer_first = 1, .layer_last = 1, .pattern = pattern_number(2)});
  m.attention.pattern.overrides.push_back({.head_first = 1, .head_last = 1, .pattern = pattern_number(0)});
  expect_matches_reference(m, 5);
  m.attention.tile_query = 8;
  m.attention.tile_key = 16;
  expect_matches_reference(m, 6);
  // Queries that see nothing at all.
  PatternSpec nothing_late;
  nothing_late.kind = PatternSpec::Kind::all;
  nothing_late.children = {pattern_number(1), pattern_number(2).children[1]};
  m.attention.pattern.overrides.push_back({.head_first = 0, .head_last = 0, .pattern = nothing_late});
  for (auto gate : {Gate::relu2, Gate::softmax}) {
    m.attention.gate = gate;
    expect_matches_reference(m, 7);
  }
}

TEST(GptGradients, OneLayerOneHeadLongerThanATile) {
  ModelConfig m = tiny_config();
  m.layers = 1;
  m.heads = 1;
  m.context = 50;
  m.mlp_ratio = 4;
  expect_matches_reference(m, 9);
}

}  // namespace
}  // namespace tessera::test
