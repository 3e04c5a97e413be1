// Attention over sequences that several ranks (threads) share: the bits of o, z and dq that one rank gets, gradients of keys and values that agree to
// rounding, counters that add up, and the bytes that were planned.

#include "tests/model/shared_attention_cases.h"

#include <set>

namespace tessera::test {
namespace {

class Shared : public ::testing::TestWithParam<SequenceExchange> {};

TEST_P(Shared, EveryPatternLayoutAndNumberOfRanks) {
  unsigned n = 0;
  for (const auto& [name, patterns] : families())
    for (const auto layout : {SequenceLayout::contiguous, SequenceLayout::zigzag, SequenceLayout::balanced})
      for (const int ranks : {2, 3, 4, 8})
        for (const bool documents : {false, true}) {
          Case c;
          c.patterns = patterns;
          c.layout = layout;
          c.ranks = ranks;
          c.exchange = GetParam();
          c.documents = documents;
          c.stages = 1 + static_cast<int>(++n % 3);
          if (c.exchange == SequenceExchange::heads) c.heads = ranks;
          SCOPED_TRACE(fmt::format("{}, {}, {} ranks{}", name, name_of(layout), ranks, documents ? ", documents" : ""));
          check_with_self_edges(c, n);
        }
}

TEST_P(Shared, EveryScoreGateAndNormalizer) {
  unsigned n = 0;
  for (const Score score : {Score::dot, Score::cosine, Score::fidelity})
    for (const Gate gate : {Gate::relu, Gate::relu2, Gate::relu4, Gate::softmax})
      for (const Normalizer normalizer : {Normalizer::none, Normalizer::length, Normalizer::sum, Normalizer::rms}) {
        if (gate == Gate::softmax && normalizer != Normalizer::none) continue;
        Case c;
        c.math.score = score;
        c.math.gate = gate;
        c.math.normalizer = normalizer;
        c.math.length_beta = score == Score::cosine && n % 2 == 1 ? 0.2f : 0.0f;
        c.patterns = families()[n % 9].patterns;
        c.heads = 4;
        c.exchange = GetParam();
        c.documents = n % 3 == 0;
        c.tokens = 90 + 7 * (n % 5);
        SCOPED_TRACE(fmt::format("score {}, gate {}, normalizer {}, {}", static_cast<int>(score), static_cast<int>(gate),
                                 static_cast<int>(normalizer), families()[n % 9].name));
        check_with_self_edges(c, 200 + n++, fp32(3e-5));
      }
}

TEST_P(Shared, TilesThatAreNotSquareAndSequencesOfEveryLength) {
  for (const auto& [query, key] : {std::pair{8, 16}, {16, 8}, {24, 16}})
    for (const std::int64_t tokens : {97, 144, 145, 160, 191}) {
      Case c;
      c.patterns = {window(23), causal()};
      c.tile_query = query;
      c.tile_key = key;
      c.tokens = tokens;
      c.heads = 2;
      c.layout = SequenceLayout::balanced;
      c.exchange = GetParam();
      c.documents = tokens % 2 == 1;
      SCOPED_TRACE(fmt::format("{} tokens in tiles of {} x {}", tokens, query, key));
      check(c, 300);
    }
}

INSTANTIATE_TEST_SUITE_P(Exchanges, Shared, ::testing::Values(SequenceExchange::needed, SequenceExchange::heads, SequenceExchange::ring),
                         [](const auto& info) { return name_of(info); });

/// With a window each rank needs the end of the part before its own, and no more however long the sequence is.
TEST(SharedAttention, AWindowMovesAHaloWhateverTheLength) {
  for (const std::int64_t tokens : {128, 256, 1024}) {
    Case c;
    c.patterns = {window(17)};  // the first query of a tile sees all of the two tiles before
    c.layout = SequenceLayout::contiguous;
    c.tokens = tokens;
    c.ranks = 4;
    const std::vector<Sent> sent = on_ranks(c, make_inputs(c, 9)).sent;
    const std::uint64_t halo = 2 * 8 * c.heads * c.size * c.sequences * 2 * sizeof(float);  // two tiles of keys and values
    for (int rank = 0; rank < c.ranks; ++rank) {
      const Sent& s = sent[static_cast<std::size_t>(rank)];
      EXPECT_EQ(s.forward, rank == 3 ? 0 : halo) << tokens << " tokens, rank " << rank;
      // Keys and values again to the next rank, gradients to the one before.
      EXPECT_EQ(s.backward, (rank == 3 ? 0 : halo) + (rank == 0 ? 0 : halo)) << tokens << " tokens, rank " << rank;
    }
  }
}

/// The keys of a turn of heads are on their way before the attention of the turn before it is computed.
TEST(SharedAttention, FetchesOfATurnBeginBeforeTheAttentionOfTheOneBefore) {
  Case c;
  c.heads = 6;
  c.stages = 3;
  for (const Sent& sent : on_ranks(c, make_inputs(c, 11)).sent) EXPECT_EQ(sent.heads_done, (std::vector<int>{0, 0, 2}));
}

/// What a ring holds of other ranks does not grow with their number.
TEST(SharedAttention, MemoryOfARingIsOfOnePart) {
  std::map<std::string, std::set<std::size_t>> bytes;  // by name of the block, whatever the ranks
  for (const int ranks : {2, 4, 8}) {
    Case c;
    c.exchange = SequenceExchange::ring;
    c.layout = SequenceLayout::contiguous;
    c.ranks = ranks;
    c.tokens = 64 * ranks;
    MemoryPlan plan;
    const auto shared = make_shared_attention(part_of(c, 1), split_sequence(c.layout, c.tokens, ranks, {map_of(c)}), {map_of(c)}, shape_of(c), plan);
    EXPECT_EQ(shared->sizes().z, c.sequences * c.heads * 64);
    std::map<std::string, std::size_t> found;
    for (const auto& block : plan.blocks())
      if (block.category == MemoryCategory::communication && !block.name.ends_with("table"))
        found[block.name] += Tensor(nullptr, block.dtype, block.shape).bytes();
    for (const auto& [name, size] : found) bytes[name].insert(size);
  }
  EXPECT_EQ(bytes.size(), 6u);
  for (const auto& [name, sizes] : bytes) EXPECT_EQ(sizes.size(), 1u) << name;
  const std::size_t part = 64 * 3 * 8 * 2;  // numbers of a part: tokens, heads, size, sequences
  EXPECT_EQ(bytes["keys and values on their way"], std::set{2 * 2 * part * sizeof(float)}) << "two buffers";
}

TEST(SharedAttention, CallsThatDoNotFitAreRefused) {
  Case c;
  const auto map = map_of(c);
  const auto split = split_sequence(c.layout, c.tokens, c.ranks, {map});
  const auto ops = make_cpu_ops(1);
  MemoryPlan plan;
  EXPECT_THROW(make_shared_attention({3, 0, c.layout, c.exchange, 1}, split, {map}, shape_of(c), plan), std::logic_error);
  EXPECT_THROW(make_shared_attention({2, 0, c.layout, SequenceExchange::automatic, 1}, split, {map}, shape_of(c), plan), std::logic_error);
  const auto shared = make_shared_attention(part_of(c, 0), split, {map}, shape_of(c), plan);
  plan.allocate(*ops);
  const auto single = make_single_communicator();
  EXPECT_THROW(shared->bind(*ops, {single.get(), {0}}), std::logic_error);
  EXPECT_THROW(shared->forward(0, {}), std::logic_error);
}

TEST(SharedAttention, HeadsHaveNoSelfEdges) {
  Case c;
  c.heads = 2;
  c.exchange = SequenceExchange::heads;
  const auto map = map_of(c);
  const auto split = split_sequence(c.layout, c.tokens, c.ranks, {map});
  MemoryPlan plan;
  const auto shared = make_shared_attention(part_of(c, 0), split, {map}, shape_of(c), plan);
  EXPECT_THROW(shared->z_heads(), std::logic_error);
  c.self_edges = true;
  EXPECT_THROW(make_shared_attention(part_of(c, 0), split, {map}, shape_of(c), plan), std::invalid_argument);
}

}  // namespace
}  // namespace tessera::test
