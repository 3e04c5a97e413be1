// The program that CTest starts under mpirun on 1, 2, 4 and 8 ranks: models whose sequences S ranks share, for every S that divides the ranks, every
// exchange, layout and family of patterns, with document masks and without, over sequences of an odd length; against the same model on one rank.
// Groups of S ranks have a sequence each. Losses of tokens and the sum of all gradients agree to rounding, counters are equal, and every rank's
// communicator has counted the bytes that were planned.

#include <bit>

#include "tests/model/gpt_harness.h"
#include "tests/model/shared_attention_cases.h"

namespace tessera::test {
namespace {

std::unique_ptr<Communicator> world;

/// One sequence on one rank.
struct One {
  std::vector<float> losses, gradients;
  std::vector<std::uint64_t> counters;
};

Case case_of(const Named& family, bool documents) {
  Case c;
  c.patterns = family.patterns;
  c.sequences = 1;
  c.heads = 8;
  c.tokens = 135;  // 17 blocks, the last of 7 tokens
  c.documents = documents;
  return c;
}

ModelConfig model_of(const Case& c) {
  ModelConfig m = tiny_config();
  m.layers = m.mlp_ratio = 1;
  m.heads = static_cast<int>(c.heads);
  m.width = static_cast<int>(c.heads * c.size);
  m.context = c.tokens;
  m.attention.epsilon = c.math.epsilon;
  m.attention.tile_query = m.attention.tile_key = c.tile_query;
  m.attention.document_mask = c.documents;
  m.attention.pattern = pattern_of(c);
  return m;
}

Sequences sequence(const ModelConfig& m, int number) { return random_sequences(m, 1, m.context, 50 + static_cast<unsigned>(number), 20); }

One run(TestModel& model, const Sequences& s) {
  model.gpt.zero_counters();
  One result;
  result.gradients = model.gradients(s, 0.25f);
  result.losses = model.host(model.gpt.losses());
  result.counters = model.host<std::uint64_t>(model.gpt.counters());
  return result;
}

class References {
 public:
  explicit References(const ModelConfig& m) : model_(m, {.micro_batch = 1}) {}
  const One& of(int number) {
    const auto [at, is_new] = known_.try_emplace(number);
    if (is_new) at->second = run(model_, sequence(model_.gpt.config(), number));
    return at->second;
  }

 private:
  TestModel model_;
  std::map<int, One> known_;
};

void check(const Case& c, References& references) {
  const ModelConfig m = model_of(c);
  const int group = world->rank() / c.ranks, place = world->rank() % c.ranks, groups = world->size() / c.ranks;
  SequenceGroup members{world.get(), {}};
  for (int r = 0; r < c.ranks; ++r) members.members.push_back(group * c.ranks + r);
  TestModel model(m, {.micro_batch = 1, .sequence = part_of(c, place)}, 1, make_cpu_ops(1), members);
  const auto places = model.gpt.positions();
  const std::uint64_t before = world->sent_bytes();
  One mine = run(model, part_of(sequence(m, group), places));
  const auto sent = static_cast<std::int64_t>(world->sent_bytes() - before);

  const One& whole = references.of(group);
  for (std::size_t i = 0; i < places.size(); ++i) {
    const float wanted = whole.losses[static_cast<std::size_t>(places[i])];
    EXPECT_NEAR(mine.losses[i], wanted, 2e-5 * std::max(1.0f, wanted)) << "token " << places[i];
  }
  if (c.ranks > 1) {
    const ExchangeBytes bytes = planned(c, model.gpt.split());
    // Exchange heads also says where documents start, an i32 a token to each other rank.
    const std::int64_t starts = c.documents && c.exchange == SequenceExchange::heads ? 4 * std::ssize(places) * (c.ranks - 1) : 0;
    EXPECT_EQ(sent, m.layers * (bytes.forward_sent(place) + bytes.backward_sent(place)) + starts);
  } else {
    EXPECT_EQ(sent, 0);
  }

  world->all_reduce_sum({mine.gradients.data(), DType::f32, {std::ssize(mine.gradients)}});
  world->all_reduce_sum({mine.counters.data(), DType::u64, {std::ssize(mine.counters)}});
  if (world->rank() != 0) return;
  std::vector<double> gradients(mine.gradients.size());
  std::vector<std::uint64_t> counters(mine.counters.size());
  for (int g = 0; g < groups; ++g) {
    const One& one = references.of(g);
    for (std::size_t i = 0; i < gradients.size(); ++i) gradients[i] += one.gradients[i];
    for (std::size_t i = 0; i < counters.size(); ++i) counters[i] += one.counters[i];
  }
  EXPECT_EQ(mine.counters, counters);
  EXPECT_LT(distance(mine.gradients, std::vector<float>(gradients.begin(), gradients.end())), 2e-5) << "gradients";
}

TEST(SequenceRanks, LossesAndGradientsOfOneRank) {
  int cases = 0;
  for (const Named& family : families())
    for (const bool documents : {false, true}) {
      Case c = case_of(family, documents);
      References references(model_of(c));
      for (const int shared : {1, 2, 4, 8})
        for (const auto exchange : {SequenceExchange::needed, SequenceExchange::ring, SequenceExchange::heads})
          for (const auto layout : {SequenceLayout::contiguous, SequenceLayout::zigzag, SequenceLayout::balanced}) {
            if (world->size() % shared != 0) continue;
            if (shared == 1 && (exchange != SequenceExchange::needed || layout != SequenceLayout::contiguous)) continue;  // neither has an effect
            c.ranks = shared;
            c.exchange = exchange;
            c.layout = layout;
            SCOPED_TRACE(fmt::format("{}{}, {} of {} ranks share a sequence, exchange {}, layout {}, rank {}", family.name,
                                     documents ? ", documents" : "", shared, world->size(), tessera::name_of(exchange), name_of(layout),
                                     world->rank()));
            check(c, references);
            ++cases;
          }
    }
  constexpr int kOfADivision = 9, kFamilies = 9;
  const int divisions = std::bit_width(static_cast<unsigned>(world->size())) - 1;  // 2, 4, 8 as far as they go
  EXPECT_EQ(cases, 2 * kFamilies * (1 + kOfADivision * divisions));
}

}  // namespace
}  // namespace tessera::test

int main(int argc, char** argv) {
  ::testing::InitGoogleTest(&argc, argv);
  GTEST_FLAG_SET(catch_exceptions, false);  // the other ranks would wait: see below
  auto& world = tessera::test::world;
  world = tessera::make_mpi_communicator();
  try {
    const bool failed = world->max(RUN_ALL_TESTS()) != 0;
    world.reset();
    return failed ? 1 : 0;
  } catch (const std::exception& e) {
    world->abort(1, e.what());
  }
}
