// Steps of training in which ranks (threads) share sequences, against the same steps on one rank; and how ranks are laid out.

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "tests/trainer/thread_ranks.h"
#include "trainer/rank_layout.h"
#include "trainer/step.h"

namespace tessera {
namespace {

constexpr std::int64_t kSequences = 8;  // a step

Config make_config(int sequence, const std::string& exchange, const std::string& layout, bool documents, bool self_edges) {
  Config c = load_config(
      "", {"model.layers=2", "model.heads=4", "model.width=32", "model.context=75",
           "attention.pattern={any: [{window: {size: 20}}, {global: {tokens: 3}}]}", "attention.threshold.mode=learned", "train.micro_batch=1",
           "train.tokens_per_step=600", fmt::format("attention.document_mask={}", documents), fmt::format("attention.always.self={}", self_edges),
           // With two edges at most, a document's first tokens divide by little more than epsilon.
           fmt::format("attention.epsilon={}", self_edges ? 0.1 : 0.01), fmt::format("parallel.sequence={}", sequence),
           "parallel.exchange=" + exchange, "parallel.layout=" + layout, "parallel.bucket_mib=1"});
  c.model.attention.tile_query = c.model.attention.tile_key = 8;  // 10 blocks
  c.model.vocabulary = 19;
  c.model.vocabulary_padded = 24;
  return c;
}

/// Places of sequence n; the first ones of the last sequences are the only ones with a target, so that some ranks have none.
HostBatch sequence(const Config& c, std::int64_t n, const std::vector<std::int32_t>& places) {
  std::mt19937 rng(static_cast<unsigned>(n));
  HostBatch b;
  b.batch = 1;
  b.tokens = std::ssize(places);
  std::vector<std::int32_t> tokens, starts;
  for (std::int64_t t = 0; t <= c.model.context; ++t) {
    tokens.push_back(static_cast<std::int32_t>(rng() % static_cast<unsigned>(c.model.vocabulary)));
    starts.push_back(t > 0 && rng() % 15 != 0 ? starts.back() : static_cast<std::int32_t>(t));
  }
  for (const std::int32_t t : places) {
    b.token.push_back(tokens[static_cast<std::size_t>(t)]);
    b.target.push_back(n >= 6 && t >= 5 ? -1 : tokens[static_cast<std::size_t>(t) + 1]);
    b.position.push_back(t);
    b.document_start.push_back(starts[static_cast<std::size_t>(t)]);
    b.target_tokens += b.target.back() >= 0;
  }
  return b;
}

struct Trace {
  std::vector<double> losses, norms;
  std::vector<std::uint64_t> counters;
  std::vector<float> parameters;
};

Trace train(const Config& config, int ranks) {
  Trace trace;
  const int shared = config.parallel.sequence;
  testing::ThreadRanks::run(ranks, [&](Communicator& comm) {
    const RankLayout layout = layout_of(std::vector<std::string>(static_cast<std::size_t>(ranks), "host"), comm.rank(), shared);
    const auto ops = make_cpu_ops(1);
    TrainState state(config, *ops, comm.rank(), ranks, layout.place);
    state.plan.allocate(*ops);
    state.bind(*ops, comm, layout.members);
    state.initialize(3);
    TrainStep step(state, *ops, comm);
    const std::int64_t mine = kSequences / layout.groups;
    for (std::int64_t t = 1; t <= 3; ++t) {
      std::vector<HostBatch> batches;
      for (std::int64_t i = 0; i < mine; ++i) batches.push_back(sequence(config, layout.group * mine + i, state.model.positions()));
      step.begin();
      const TrainStep::Sums sums = step.gradients(batches, 1.0f / 480);
      step.update({.lr = 1e-3, .weight_decay = 0.1, .clip = 1, .update = t});
      if (comm.rank() != 0) continue;
      trace.losses.push_back(sums.loss);
      trace.norms.push_back(sums.grad_norm);
      if (t == 1) trace.counters = sums.counters;
    }
    const Tensor all = state.optimizer.gather_parameters();
    if (comm.rank() == 0) trace.parameters.assign(all.as<float>(), all.as<float>() + state.model.layout().count);
  });
  return trace;
}

class SequenceStep : public ::testing::TestWithParam<const char*> {};

TEST_P(SequenceStep, AnyNumberOfRanksTrainsTheSameModel) {
  for (const bool documents : {false, true}) {
    const bool self_edges = documents && GetParam() != std::string("heads");
    const Trace one = train(make_config(1, "auto", "balanced", documents, self_edges), 1);
    for (const int ranks : {2, 4, 8})
      for (const int shared : {2, 4, 8}) {
        if (ranks % shared != 0 || (shared == 8 && GetParam() == std::string("heads"))) continue;
        const char* layout = shared == 8 ? "contiguous" : ranks == 4 ? "balanced" : "zigzag";  // 10 blocks are too few for 16 parts
        SCOPED_TRACE(fmt::format("{} ranks, {} to a sequence, {}{}", ranks, shared, layout, documents ? ", documents" : ""));
        const Trace other = train(make_config(shared, GetParam(), layout, documents, self_edges), ranks);
        for (std::size_t i = 0; i < one.losses.size(); ++i) {
          EXPECT_NEAR(other.losses[i], one.losses[i], 1e-4 * one.losses[i]);
          EXPECT_NEAR(other.norms[i], one.norms[i], 1e-4 * one.norms[i]);
        }
        EXPECT_EQ(other.counters, one.counters);  // of the first step: later ones may differ in an edge on the threshold
        // Adam divides by the root of a second moment: where that is tiny, rounding shows as a part of the learning rate.
        double error = 0;
        for (std::size_t i = 0; i < one.parameters.size(); ++i)
          error = std::max(error, static_cast<double>(std::abs(one.parameters[i] - other.parameters[i])));
        EXPECT_LT(error, 1e-3);
      }
  }
}

INSTANTIATE_TEST_SUITE_P(Exchanges, SequenceStep, ::testing::Values("needed", "heads", "ring"), [](const auto& info) { return info.param; });

TEST(RankLayout, ARingExchangesWithNeighboursAlone) {
  const RankLayout first{2, 0, 0, {4, 2, 7, 1, 9}};
  EXPECT_EQ(exchange_partners(first, SequenceExchange::ring), (std::vector<int>{9, 4, 2}));
  EXPECT_EQ(exchange_partners({2, 0, 4, first.members}, SequenceExchange::ring), (std::vector<int>{1, 9, 4}));
  EXPECT_EQ(exchange_partners(first, SequenceExchange::needed), first.members);
  EXPECT_EQ(exchange_partners(first, SequenceExchange::heads), first.members);
  EXPECT_EQ(exchange_partners({1, 0, 1, {3, 5}}, SequenceExchange::ring), (std::vector<int>{3, 5})) << "each once";
}

TEST(RankLayout, GroupsAreNeighboursOfOneMachine) {
  // Dealt to two machines by turns: a group's ranks are on one of them.
  const std::vector<std::string> turns{"a", "b", "a", "b", "a", "b", "a", "b"};
  const auto layout = layout_of(turns, 3, 4);
  EXPECT_EQ(layout.members, (std::vector<int>{1, 3, 5, 7}));
  EXPECT_EQ(layout.group, 1);
  EXPECT_EQ(layout.place, 1);
  EXPECT_EQ(layout.groups, 2);
  EXPECT_EQ(layout_of(turns, 3, 8).members, (std::vector<int>{0, 2, 4, 6, 1, 3, 5, 7}));
  std::vector<int> met(8);
  for (int rank = 0; rank < 8; ++rank) {
    const auto l = layout_of(turns, rank, 2);
    EXPECT_EQ(l.members[static_cast<std::size_t>(l.place)], rank);
    ++met[static_cast<std::size_t>(2 * l.group + l.place)];
  }
  EXPECT_EQ(met, std::vector<int>(8, 1));
  const auto alone = layout_of(turns, 5, 1);
  EXPECT_EQ(alone.groups, 8);
  EXPECT_EQ(alone.place, 0);
}

}  // namespace
}  // namespace tessera
