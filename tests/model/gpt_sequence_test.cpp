// A model whose sequences several ranks (threads) share, against the same model on one rank: losses of every token and gradients that add up to the
// same, to rounding (matrix products of fewer rows may take another order), and counters that are equal.

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "model/sequence_bytes.h"
#include "tests/model/gpt_harness.h"
#include "tests/trainer/thread_ranks.h"

namespace tessera {
namespace {

using test::Sequences;
using test::TestModel;

struct Part {
  std::vector<float> losses, gradients;
  std::vector<std::int32_t> positions, predictions;
  std::vector<std::uint64_t> counters;
  std::uint64_t sent = 0;
  std::size_t bytes = 0;
};

Gpt::Options options_of(const SequencePart& part, Recompute recompute) {
  Gpt::Options o;
  o.micro_batch = 3;
  o.sequence = part;
  o.recompute = recompute;
  return o;
}

Part run(const ModelConfig& m, const Sequences& s, const SequencePart& part, Recompute recompute, Communicator& comm) {
  SequenceGroup group{&comm, {}};
  for (int r = 0; r < part.ranks; ++r) group.members.push_back(r);
  TestModel model(m, options_of(part, recompute), 1, make_cpu_ops(1), group);
  Part result;
  result.positions = model.gpt.positions();
  const Sequences mine = test::part_of(s, result.positions);
  model.gpt.forward(model.upload(mine), true);
  result.predictions = model.host<std::int32_t>(model.gpt.predictions());
  model.gpt.zero_counters();
  result.gradients = model.gradients(mine, 0.25f);
  result.losses = model.host(model.gpt.losses());
  result.counters = model.host<std::uint64_t>(model.gpt.counters());
  result.sent = comm.sent_bytes();
  return result;
}

void check(const ModelConfig& m, const SequencePart& shape, Recompute recompute) {
  const Sequences s = test::random_sequences(m, 2, m.context, 5, 20);
  const auto single = make_single_communicator();
  const Part whole = run(m, s, {}, recompute, *single);
  std::vector<Part> parts(static_cast<std::size_t>(shape.ranks));
  testing::ThreadRanks::run(shape.ranks, [&](Communicator& comm) {
    SequencePart part = shape;
    part.rank = comm.rank();
    parts[static_cast<std::size_t>(comm.rank())] = run(m, s, part, recompute, comm);
  });
  std::vector<double> gradients(whole.gradients.size());
  std::vector<std::uint64_t> counters(whole.counters.size());
  std::int64_t tokens = 0;
  for (const Part& p : parts) {
    const auto T = std::ssize(p.positions);
    tokens += T;
    for (std::int64_t b = 0; b < s.B; ++b)
      for (std::int64_t t = 0; t < T; ++t) {
        const auto at = static_cast<std::size_t>(b * s.T + p.positions[static_cast<std::size_t>(t)]);
        ASSERT_NEAR(p.losses[static_cast<std::size_t>(b * T + t)], whole.losses[at], 2e-5 * std::max(1.0f, whole.losses[at]));
        ASSERT_EQ(p.predictions[static_cast<std::size_t>(b * T + t)], whole.predictions[at]);
      }
    for (std::size_t i = 0; i < gradients.size(); ++i) gradients[i] += p.gradients[i];
    for (std::size_t i = 0; i < counters.size(); ++i) counters[i] += p.counters[i];
  }
  EXPECT_EQ(tokens, m.context);
  EXPECT_EQ(counters, whole.counters);
  double error = 0, largest = 0;
  for (std::size_t i = 0; i < gradients.size(); ++i) {
    error = std::max(error, std::abs(gradients[i] - whole.gradients[i]));
    largest = std::max(largest, std::abs(static_cast<double>(whole.gradients[i])));
  }
  EXPECT_LT(error, 2e-5 * largest);
}

ModelConfig longer(ModelConfig m) {
  m.context = 93;
  m.attention.tile_query = m.attention.tile_key = 8;
  return m;
}

class GptSequence : public ::testing::TestWithParam<SequenceExchange> {};

TEST_P(GptSequence, LossesAndGradientsOfOneRank) {
  int n = 0;
  for (const ModelConfig& variant : test::variants())
    for (const int ranks : {2, 4})
      for (const bool documents : {false, true}) {
        if (GetParam() == SequenceExchange::heads && variant.attention.adds_edges()) continue;  // refused: see below
        ModelConfig m = longer(variant);
        m.heads = GetParam() == SequenceExchange::heads ? 4 : 2;
        m.width = 8 * m.heads;
        m.attention.document_mask = documents;
        constexpr SequenceLayout kLayouts[] = {SequenceLayout::contiguous, SequenceLayout::zigzag, SequenceLayout::balanced};
        constexpr Recompute kRecompute[] = {Recompute::none, Recompute::block, Recompute::gelu_norm};
        const SequencePart part{ranks, 0, kLayouts[n % 3], GetParam(), 1 + n % 2};
        SCOPED_TRACE(fmt::format("variant {}, {} ranks, layout {}{}", n / 4, ranks, n % 3, documents ? ", documents" : ""));
        check(m, part, kRecompute[n / 2 % 3]);
        ++n;
      }
}

INSTANTIATE_TEST_SUITE_P(Exchanges, GptSequence, ::testing::Values(SequenceExchange::needed, SequenceExchange::heads, SequenceExchange::ring),
                         [](const auto& info) {
                           return info.param == SequenceExchange::needed ? "needed" : info.param == SequenceExchange::heads ? "heads" : "ring";
                         });

TEST(GptSequenceSetUp, ThePlanIsOfTheRanksOwnTokens) {
  ModelConfig m = longer(test::tiny_config());
  m.context = 1024;
  m.attention.pattern.base = {.kind = PatternSpec::Kind::window, .size = 20};
  const auto bytes = [&](const SequencePart& part) {
    MemoryPlan plan;
    const auto ops = make_cpu_ops(1);
    const Gpt gpt(m, *ops, plan, options_of(part, Recompute::none));
    EXPECT_EQ(std::ssize(gpt.positions()), 1024 / part.ranks);
    return plan.bytes(MemoryCategory::activations);
  };
  EXPECT_LT(4 * bytes({4, 1, SequenceLayout::contiguous, SequenceExchange::needed, 2}), 1.02 * static_cast<double>(bytes({})) + 4096);
}

TEST(GptSequenceSetUp, WhatIsRefused) {
  const ModelConfig m = longer(test::tiny_config());
  const auto make = [&](const ModelConfig& model, Gpt::Options o) {
    MemoryPlan plan;
    const auto ops = make_cpu_ops(1);
    const Gpt gpt(model, *ops, plan, o);
  };
  Gpt::Options o = options_of({2, 0, SequenceLayout::zigzag, SequenceExchange::needed, 2}, Recompute::none);
  make(m, o);
  o.sequence.ranks = 7;  // 14 parts of 12 blocks
  EXPECT_THROW(make(m, o), std::invalid_argument);
  o.sequence = {2, 2, SequenceLayout::zigzag, SequenceExchange::needed, 2};
  EXPECT_THROW(make(m, o), std::logic_error);
  o.sequence.rank = 0;
  o.cache = 1;
  EXPECT_THROW(make(m, o), std::logic_error);

  ModelConfig self = m;
  self.attention.always_self = true;
  o = options_of({2, 0, SequenceLayout::zigzag, SequenceExchange::heads, 2}, Recompute::none);
  make(m, o);
  EXPECT_THROW(make(self, o), std::invalid_argument);
  self.attention.gate = Gate::softmax;  // the option is then no part of the model
  make(self, o);
  ModelConfig sinks = m;
  sinks.attention.always_sinks = 1;
  EXPECT_THROW(make(sinks, o), std::invalid_argument);
}

}  // namespace
}  // namespace tessera
