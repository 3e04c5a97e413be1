// Bytes of each exchange, against messages counted one by one from the definition.

#include "model/sequence_bytes.h"

#include <gtest/gtest.h>

#include <set>

#include "model/pattern.h"
#include "pattern_cases.h"

namespace tessera {
namespace {

constexpr ExchangeShape kShape{.batch = 3, .heads = 4, .head_size = 8, .element = 2};
constexpr int kTile = 16;
constexpr SequenceLayout kLayouts[] = {SequenceLayout::contiguous, SequenceLayout::zigzag, SequenceLayout::balanced};

std::vector<PatternConfig> patterns() {
  std::vector<PatternConfig> result;
  for (const auto& p : {causal(), window(50), strided(37, 2), global(20), bigbird(2, 1, 2, 16), blocks(16, 30, 5), any({window(20), global(4)})}) {
    result.emplace_back();
    result.back().base = p;
  }
  result.emplace_back(result[1]);
  result.back().overrides.push_back({.head_first = 1, .head_last = 2, .pattern = dilated(5, 20)});
  return result;
}

std::vector<std::int32_t> owner_of_token(const SequenceSplit& split) {
  std::vector<std::int32_t> owner(static_cast<std::size_t>(split.tokens));
  for (int r = 0; r < split.ranks(); ++r)
    for (auto t : split.positions(r)) owner[t] = r;
  return owner;
}

// A key travels to a rank when the rank has a query in this head that sees a key of the same tile; its k and v do, once.
TEST(SequenceBytes, NeededIsTheVisibleTiles) {
  const std::int64_t tokens = 417;
  for (const auto& pattern : patterns()) {
    const auto map = make_tile_map(pattern, 0, 4, tokens, kTile, kTile);
    for (int ranks : {1, 2, 3, 4, 8}) {
      for (auto layout : kLayouts) {
        SCOPED_TRACE(describe(pattern.base) + " over " + std::to_string(ranks));
        const auto split = split_sequence(layout, tokens, ranks, {map});
        const auto owner = owner_of_token(split);
        std::set<std::tuple<int, std::int64_t, int>> fetched;  // head, tile, rank
        for (int h = 0; h < 4; ++h)
          for (std::int64_t i = 0; i < tokens; ++i)
            for (std::int64_t j = 0; j <= i; ++j)
              if (pattern.visible(0, h, i, j) && owner[i] != owner[j]) fetched.emplace(h, j / kTile, owner[i]);
        Traffic keys(ranks, std::vector<std::int64_t>(ranks));
        for (const auto& [h, tile, to] : fetched)
          for (std::int64_t j = tile * kTile; j < std::min<std::int64_t>(tokens, (tile + 1) * kTile); ++j) ++keys[owner[j]][to];

        const auto bytes = bytes_of_needed(split, plan_needed(split, *map), kTile, kShape);
        constexpr std::int64_t kRow = 2 * 3 * 8 * 2;  // k and v, sequences, head size, bytes
        std::int64_t total = 0;
        for (int a = 0; a < ranks; ++a) {
          for (int b = 0; b < ranks; ++b) {
            EXPECT_EQ(bytes.forward[a][b], keys[a][b] * kRow);
            EXPECT_EQ(bytes.backward[a][b], (keys[a][b] + keys[b][a]) * kRow);
            total += keys[a][b] * kRow;
          }
        }
        EXPECT_EQ(bytes.total(), 3 * total);
      }
    }
  }
}

// The parts handed on hop by hop.
TEST(SequenceBytes, RingIsItsHops) {
  const auto map = make_tile_map({}, 0, 4, 417, kTile, kTile);
  for (int ranks : {1, 2, 3, 8}) {
    const auto split = split_sequence(SequenceLayout::contiguous, 417, ranks, {map});
    std::vector<std::int64_t> kv(ranks), sums(ranks);  // tokens that pass from rank r to the next
    for (int part = 0; part < ranks && ranks > 1; ++part) {
      for (int hop = 0; hop < ranks; ++hop) {
        if (hop + 1 < ranks) kv[(part + hop) % ranks] += split.tokens_of(part);
        sums[(part + hop) % ranks] += split.tokens_of(part);
      }
    }
    const auto bytes = bytes_of_ring(split, kShape);
    for (int r = 0; r < ranks; ++r) {
      EXPECT_EQ(bytes.forward_sent(r), kv[r] * 2 * 3 * 4 * 8 * 2);
      EXPECT_EQ(bytes.forward_received((r + 1) % ranks), kv[r] * 2 * 3 * 4 * 8 * 2);
      EXPECT_EQ(bytes.backward_sent(r), (kv[r] * 2 + sums[r] * 4) * 2 * 3 * 4 * 8);
      EXPECT_EQ(bytes.forward[r][r], 0);
    }
  }
}

// Element by element: token t, head h goes from the owner of t to the rank with head h.
TEST(SequenceBytes, HeadsIsAllToAll) {
  const auto map = make_tile_map({}, 0, 4, 417, kTile, kTile);
  for (int ranks : {1, 2, 4}) {
    const auto split = split_sequence(SequenceLayout::zigzag, 417, ranks, {map});
    const auto owner = owner_of_token(split);
    Traffic there(ranks, std::vector<std::int64_t>(ranks));
    for (std::int64_t t = 0; t < 417; ++t)
      for (int h = 0; h < 4; ++h)
        if (owner[t] != h * ranks / 4) there[owner[t]][h * ranks / 4] += 3 * 8 * 2;
    const auto bytes = bytes_of_heads(split, kShape);
    for (int a = 0; a < ranks; ++a) {
      for (int b = 0; b < ranks; ++b) {
        EXPECT_EQ(bytes.forward[a][b], 3 * there[a][b] + there[b][a]);
        EXPECT_EQ(bytes.backward[a][b], 5 * there[a][b] + 3 * there[b][a]);
      }
    }
  }
  try {
    bytes_of_heads(split_sequence(SequenceLayout::contiguous, 417, 3, {map}), kShape);
    FAIL();
  } catch (const std::invalid_argument& e) {
    EXPECT_NE(std::string(e.what()).find("4 heads to 3 ranks"), std::string::npos);
    EXPECT_NE(std::string(e.what()).find("1, 2, 4 ranks"), std::string::npos);
  }
}

TEST(SequenceBytes, TheCheapest) {
  const std::int64_t tokens = 64 * kTile;
  PatternConfig near;
  near.base = window(40);
  const auto sparse = make_tile_map(near, 0, 8, tokens, kTile, kTile), dense = make_tile_map({}, 0, 8, tokens, kTile, kTile);
  ExchangeShape shape{.batch = 1, .heads = 8, .head_size = 8, .element = 2};
  const auto cheapest = [&](int ranks, const std::vector<std::shared_ptr<const TileMap>>& layers) {
    return cheapest_exchange(split_sequence(SequenceLayout::contiguous, tokens, ranks, layers), layers, shape);
  };
  // Causal, contiguous: rank r needs the r parts before it, S (S-1) / 2 in all, of k and v three times. All-to-all: 12 tensors, S - 1 parts in all.
  EXPECT_EQ(cheapest(2, {dense}), SequenceExchange::needed);  // 6 * 1 parts, 12 * 1
  EXPECT_EQ(cheapest(8, {dense}), SequenceExchange::heads);   // 6 * 28 parts, 12 * 7
  EXPECT_EQ(cheapest(8, {sparse}), SequenceExchange::needed);
  EXPECT_EQ(cheapest(8, {sparse, sparse, dense}), SequenceExchange::needed);
  EXPECT_EQ(cheapest(8, {sparse, dense, dense, dense}), SequenceExchange::heads);
  EXPECT_EQ(cheapest(5, {dense}), SequenceExchange::needed);  // 8 heads cannot be dealt to 5
  shape.added_edges = true;
  EXPECT_EQ(cheapest(8, {dense}), SequenceExchange::needed);
}

// A ring never moves fewer bytes than what is needed.
TEST(SequenceBytes, NeededIsAtMostARing) {
  const auto map = make_tile_map({}, 0, 4, 417, kTile, kTile);
  for (int ranks : {2, 3, 8})
    for (auto layout : kLayouts) {
      const auto split = split_sequence(layout, 417, ranks, {map});
      EXPECT_LE(bytes_of_needed(split, plan_needed(split, *map), kTile, kShape).total(), bytes_of_ring(split, kShape).total());
    }
}

}  // namespace
}  // namespace tessera
