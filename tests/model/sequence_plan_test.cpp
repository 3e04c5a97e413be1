// Sequence plans, against the pattern's definition evaluated edge by edge.

#include "model/sequence_plan.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <numeric>
#include <set>

#include "model/pattern.h"
#include "pattern_cases.h"

namespace tessera {
namespace {

using Layers = std::vector<std::shared_ptr<const TileMap>>;

constexpr SequenceLayout kLayouts[] = {SequenceLayout::contiguous, SequenceLayout::zigzag, SequenceLayout::balanced};
constexpr int kHeads = 3;

struct Case {
  const char* name;
  PatternConfig pattern;
};

PatternConfig config_of(PatternSpec base) {
  PatternConfig c;
  c.base = std::move(base);
  return c;
}

std::vector<Case> cases() {
  PatternConfig mixed = config_of(window(20));
  mixed.overrides.push_back({.head_first = 1, .head_last = 1, .pattern = global(3)});
  mixed.overrides.push_back({.head_first = 2, .head_last = 2, .pattern = dilated(6, 9)});
  return {{"causal", config_of(causal())},
          {"window", config_of(window(40))},
          {"strided", config_of(strided(33, 2))},
          {"dilated", config_of(dilated(4, 20))},
          {"global", config_of(global(19))},
          {"bigbird", config_of(bigbird(2, 1, 2, 16))},
          {"blocks", config_of(blocks(16, 20, 3))},
          {"union", config_of(any({window(17), global(5), strided(64, 1)}))},
          {"empty for late queries", config_of(all({window(10), global(10)}))},
          {"mixed heads", mixed}};
}

struct Tiles {
  int query, key;
};

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

bool mask_bit(const TileMap& m, std::int32_t mask, int row, int key) {
  return m.masks[(static_cast<std::size_t>(mask) * m.tile_query + row) * m.mask_words + key / 64] >> (key % 64) & 1;
}

/// Every token has one owner; positions ascend; a rank holds whole blocks, and at least one.
void expect_partition(const SequenceSplit& split, int ranks, std::int64_t tokens, std::int64_t block) {
  ASSERT_EQ(split.ranks(), ranks);
  ASSERT_EQ(split.tokens, tokens);
  ASSERT_EQ(split.block, block);
  const auto owners = split.owners();
  ASSERT_EQ(std::ssize(owners), ceil_div(tokens, block));
  std::vector<int> seen(static_cast<std::size_t>(tokens));
  for (int r = 0; r < ranks; ++r) {
    const auto positions = split.positions(r);
    ASSERT_FALSE(positions.empty());
    ASSERT_EQ(std::ssize(positions), split.tokens_of(r));
    ASSERT_TRUE(std::is_sorted(positions.begin(), positions.end()));
    for (auto t : positions) {
      ++seen.at(static_cast<std::size_t>(t));
      ASSERT_EQ(owners[static_cast<std::size_t>(t / block)], r);
    }
  }
  ASSERT_TRUE(std::all_of(seen.begin(), seen.end(), [](int n) { return n == 1; }));
}

/// What one head sees, from the definition.
struct Seen {
  std::vector<std::vector<char>> tiles;  // [query tile][key tile]: whether a query sees a key
  std::vector<std::uint64_t> keys;       // [query]: how many keys it sees
};

std::vector<Seen> brute_force(const PatternConfig& pattern, std::int64_t tokens, Tiles tiles) {
  std::vector<Seen> seen(kHeads);
  for (int h = 0; h < kHeads; ++h) {
    Seen& s = seen[h];
    s.tiles.assign(ceil_div(tokens, tiles.query), std::vector<char>(ceil_div(tokens, tiles.key)));
    s.keys.resize(tokens);
    for (std::int64_t i = 0; i < tokens; ++i) {
      for (std::int64_t j = 0; j <= i; ++j) {
        if (!pattern.visible(0, h, i, j)) continue;
        s.tiles[i / tiles.query][j / tiles.key] = 1;
        ++s.keys[i];
      }
    }
  }
  return seen;
}

/// All that sequence_plan.h promises of a layer's plan.
void expect_exact(const SequenceSplit& split, const TileMap& whole, const std::vector<Seen>& seen) {
  const auto plan = plan_needed(split, whole);
  const std::int64_t tokens = split.tokens;
  const auto owners = split.owners();
  const auto owner_of_key_tile = [&](std::int64_t b) { return owners[static_cast<std::size_t>(b * whole.tile_key / split.block)]; };
  ASSERT_EQ(std::ssize(plan), split.ranks());

  for (int r = 0; r < split.ranks(); ++r) {
    SCOPED_TRACE(fmt::format("rank {}", r));
    const NeededKeys& needed = plan[static_cast<std::size_t>(r)];
    const auto positions = split.positions(r);

    // What it fetches, from the definition.
    std::vector<std::vector<HeadTile>> receive(static_cast<std::size_t>(split.ranks()));
    std::vector<HeadTile> own;
    std::set<std::int32_t> tiles;
    for (int h = 0; h < kHeads; ++h) {
      std::set<std::int32_t> of_head;
      for (auto t : positions) {
        const auto& row = seen[h].tiles[t / whole.tile_query];
        for (std::size_t b = 0; b < row.size(); ++b)
          if (row[b]) of_head.insert(static_cast<std::int32_t>(b));
      }
      for (auto b : of_head) (owner_of_key_tile(b) == r ? own : receive[static_cast<std::size_t>(owner_of_key_tile(b))]).push_back({h, b});
      tiles.insert(of_head.begin(), of_head.end());
    }
    ASSERT_EQ(needed.receive, receive);
    ASSERT_EQ(needed.own, own);
    if (tiles.empty()) {
      ASSERT_EQ(needed.tiles.size(), 1u);
      ASSERT_EQ(owner_of_key_tile(needed.tiles[0]), r);
    } else {
      ASSERT_EQ(needed.tiles, std::vector<std::int32_t>(tiles.begin(), tiles.end()));
    }
    std::int64_t keys = 0;
    for (auto b : needed.tiles) keys += std::min<std::int64_t>(whole.tile_key, tokens - b * whole.tile_key);
    ASSERT_EQ(needed.keys, keys);

    // The lists.
    const TileMap& lists = *needed.lists;
    ASSERT_EQ(lists.tokens, split.tokens_of(r));
    ASSERT_EQ(lists.key_count(), keys);
    ASSERT_EQ(lists.tile_query, whole.tile_query);
    ASSERT_EQ(lists.tile_key, whole.tile_key);
    ASSERT_EQ(lists.query_tiles, ceil_div(lists.tokens, lists.tile_query));
    ASSERT_EQ(lists.key_tiles, ceil_div(keys, lists.tile_key));
    ASSERT_EQ(lists.key_tiles, std::ssize(needed.tiles));
    ASSERT_EQ(lists.mask_words, whole.mask_words);
    ASSERT_EQ(lists.mask0_is_causal, whole.mask0_is_causal);
    ASSERT_EQ(lists.masks, whole.masks);
    ASSERT_EQ(lists.group_of_head, whole.group_of_head);
    for (int h = 0; h < kHeads; ++h) {
      const auto group = static_cast<std::size_t>(lists.group_of_head[static_cast<std::size_t>(h)]);
      const TileGroup &g = lists.groups.at(group), &w = whole.groups.at(group);
      ASSERT_EQ(std::ssize(g.query_offsets), lists.query_tiles + 1);
      ASSERT_EQ(g.query_offsets.back(), std::ssize(g.query_entries));
      std::vector<std::vector<TileEntry>> transposed(static_cast<std::size_t>(lists.key_tiles));
      for (std::int64_t a = 0; a < lists.query_tiles; ++a) {
        const std::int64_t global_a = positions[static_cast<std::size_t>(a * lists.tile_query)] / lists.tile_query;
        const auto& row = seen[h].tiles[global_a];
        std::vector<TileEntry> expected;  // of the whole map, where the definition sees a tile
        for (auto i = w.query_offsets[global_a]; i < w.query_offsets[global_a + 1]; ++i) {
          const TileEntry e = w.query_entries[i];
          if (e.tile < std::ssize(row) && row[e.tile]) expected.push_back(e);
        }
        ASSERT_EQ(std::ssize(expected), std::count(row.begin(), row.end(), 1));
        std::vector<TileEntry> found;
        for (auto i = g.query_offsets[a]; i < g.query_offsets[a + 1]; ++i) {
          const TileEntry e = g.query_entries[i];
          found.push_back({needed.tiles.at(e.tile), e.mask});
          transposed[e.tile].push_back({static_cast<std::int32_t>(a), e.mask});
        }
        ASSERT_EQ(found, expected) << "head " << h << " query tile " << global_a;
      }
      ASSERT_EQ(std::ssize(g.key_offsets), lists.key_tiles + 1);
      for (std::int64_t b = 0; b < lists.key_tiles; ++b)
        ASSERT_EQ(std::vector<TileEntry>(g.key_entries.begin() + g.key_offsets[b], g.key_entries.begin() + g.key_offsets[b + 1]), transposed[b]);
      std::uint64_t edges = 0;
      for (std::int64_t i : positions) edges += seen[h].keys[i];
      ASSERT_EQ(g.visible_edges, edges);
    }
  }
}

/// What a kernel computes from the compact lists, edge by edge: exactly the visible edges, once each, at the keys' own places.
void expect_edges(const SequenceSplit& split, const PatternConfig& pattern, const TileMap& whole) {
  const auto plan = plan_needed(split, whole);
  for (int r = 0; r < split.ranks(); ++r) {
    const NeededKeys& needed = plan[static_cast<std::size_t>(r)];
    const TileMap& m = *needed.lists;
    const auto positions = split.positions(r);
    for (int h = 0; h < kHeads; ++h) {
      const TileGroup& g = m.groups[static_cast<std::size_t>(m.group_of_head[static_cast<std::size_t>(h)])];
      for (std::int64_t row = 0; row < m.tokens; ++row) {
        std::vector<std::int64_t> found, expected;
        for (auto n = g.query_offsets[row / m.tile_query]; n < g.query_offsets[row / m.tile_query + 1]; ++n) {
          const TileEntry e = g.query_entries[n];
          for (std::int64_t k = 0; k < m.tile_key && e.tile * m.tile_key + k < needed.keys; ++k)
            if (e.mask == TileEntry::kFull || mask_bit(m, e.mask, static_cast<int>(row % m.tile_query), static_cast<int>(k)))
              found.push_back(needed.tiles[static_cast<std::size_t>(e.tile)] * m.tile_key + k);
        }
        for (std::int64_t j = 0; j <= positions[row]; ++j)
          if (pattern.visible(0, h, positions[row], j)) expected.push_back(j);
        ASSERT_EQ(found, expected) << "rank " << r << " head " << h << " query " << positions[row];
      }
    }
  }
}

std::string text_of(SequenceLayout layout) {
  return layout == SequenceLayout::contiguous ? "contiguous" : layout == SequenceLayout::zigzag ? "zigzag" : "balanced";
}

TEST(SequencePlan, EveryPatternLayoutAndNumberOfRanks) {
  for (const auto& c : cases()) {
    for (const auto& [tokens, tiles] :
         {std::pair<std::int64_t, Tiles>{411, {16, 16}}, {256, {16, 16}}, {611, {16, 32}}, {611, {32, 16}}, {900, {24, 16}}}) {
      const auto whole = make_tile_map(c.pattern, 0, kHeads, tokens, tiles.query, tiles.key);
      const auto seen = brute_force(c.pattern, tokens, tiles);
      for (int ranks : {1, 2, 3, 4, 8}) {
        for (auto layout : kLayouts) {
          SCOPED_TRACE(fmt::format("{}, {} tokens, tiles {} x {}, {} ranks, {}", c.name, tokens, tiles.query, tiles.key, ranks, text_of(layout)));
          const auto split = split_sequence(layout, tokens, ranks, {whole});
          expect_partition(split, ranks, tokens, std::lcm(tiles.query, tiles.key));
          expect_exact(split, *whole, seen);
          if (HasFatalFailure()) return;
        }
      }
    }
  }
}

TEST(SequencePlan, CompactListsAreTheVisibleEdges) {
  for (const auto& c : cases()) {
    for (const Tiles tiles : {Tiles{16, 16}, Tiles{16, 32}, Tiles{32, 16}}) {
      const auto whole = make_tile_map(c.pattern, 0, kHeads, 307, tiles.query, tiles.key);
      for (auto layout : kLayouts) {
        SCOPED_TRACE(fmt::format("{}, tiles {} x {}, {}", c.name, tiles.query, tiles.key, text_of(layout)));
        expect_edges(split_sequence(layout, 307, 3, {whole}), c.pattern, *whole);
        if (HasFatalFailure()) return;
      }
    }
  }
}

// A map of a longer sequence serves: what only later tokens see is left out.
TEST(SequencePlan, MapsOfLongerSequences) {
  for (const auto& c : cases()) {
    const auto whole = make_tile_map(c.pattern, 0, kHeads, 500, 32, 16);
    for (std::int64_t tokens : {130, 257, 300}) {
      const auto seen = brute_force(c.pattern, tokens, {32, 16});
      for (auto layout : kLayouts) {
        SCOPED_TRACE(fmt::format("{}, {} tokens, {}", c.name, tokens, text_of(layout)));
        expect_exact(split_sequence(layout, tokens, 2, {whole}), *whole, seen);
        if (HasFatalFailure()) return;
      }
    }
  }
}

/// Visible tiles of each rank and of the largest row of blocks, from the definition.
struct Loads {
  std::vector<std::int64_t> of_rank;
  std::int64_t largest_row = 0;
};

Loads loads_of(const SequenceSplit& split, const std::vector<std::vector<Seen>>& layers, Tiles tiles) {
  Loads loads{std::vector<std::int64_t>(split.ranks()), 0};
  const auto owners = split.owners();
  std::vector<std::int64_t> rows(owners.size());
  for (const auto& seen : layers)
    for (const auto& head : seen)
      for (std::size_t a = 0; a < head.tiles.size(); ++a)
        rows[a * tiles.query / split.block] += std::count(head.tiles[a].begin(), head.tiles[a].end(), 1);
  for (std::size_t b = 0; b < rows.size(); ++b) loads.of_rank[owners[b]] += rows[b];
  loads.largest_row = *std::max_element(rows.begin(), rows.end());
  return loads;
}

TEST(SequencePlan, BalancedDiffersByAtMostOneRow) {
  const auto all_cases = cases();
  for (std::size_t n = 0; n < all_cases.size(); ++n) {
    const auto& second = all_cases[(n + 3) % all_cases.size()].pattern;  // of another layer
    for (const Tiles tiles : {Tiles{16, 16}, Tiles{16, 32}}) {
      const auto one = make_tile_map(all_cases[n].pattern, 0, kHeads, 611, tiles.query, tiles.key);
      const auto two = make_tile_map(second, 0, kHeads, 611, tiles.query, tiles.key);
      const auto a = brute_force(all_cases[n].pattern, 611, tiles), b = brute_force(second, 611, tiles);
      for (int ranks : {2, 3, 4, 8}) {
        SCOPED_TRACE(fmt::format("{}, tiles {} x {}, {} ranks", all_cases[n].name, tiles.query, tiles.key, ranks));
        const auto split = split_sequence(SequenceLayout::balanced, 611, ranks, {one, two, one});
        const Loads loads = loads_of(split, {a, b, a}, tiles);
        const auto [low, high] = std::minmax_element(loads.of_rank.begin(), loads.of_rank.end());
        EXPECT_LE(*high - *low, loads.largest_row);
      }
    }
  }
}

std::int64_t fetched_keys(const NeededKeys& needed, const TileMap& whole, std::int64_t tokens) {
  std::int64_t keys = 0;
  for (const auto& from : needed.receive)
    for (const HeadTile& t : from) keys += std::min<std::int64_t>(whole.tile_key, tokens - t.tile * whole.tile_key);
  return keys;
}

// A rank's queries see a window's worth of keys before its first one, and no more however long the sequence is.
TEST(SequencePlan, AWindowIsAHalo) {
  for (std::int64_t tokens : {2048, 8192, 32768}) {
    for (std::int64_t size : {100, 128, 129}) {
      const auto whole = make_tile_map(config_of(window(size)), 0, kHeads, tokens, 32, 32);
      for (auto layout : {SequenceLayout::contiguous, SequenceLayout::balanced}) {
        const auto split = split_sequence(layout, tokens, 4, {whole});
        const auto plan = plan_needed(split, *whole);
        const std::int64_t halo = ceil_div(size - 1, 32) * 32;  // the first query sees the size - 1 keys before it
        for (int r = 0; r < 4; ++r) {
          SCOPED_TRACE(fmt::format("{} tokens, window {}, {}, rank {}", tokens, size, text_of(layout), r));
          EXPECT_EQ(fetched_keys(plan[r], *whole, tokens), r == 0 ? 0 : kHeads * halo);
          for (int s = 0; s < 4; ++s) EXPECT_EQ(plan[r].receive[s].empty(), s != r - 1);
        }
      }
    }
  }
}

// Windows leave the first rows with less, which zigzag does not even out: a few blocks are moved, and little more than with zigzag is fetched.
TEST(SequencePlan, BalancedWithWindowsAndCausalLayersIsNearZigzag) {
  const std::int64_t tokens = 8192;
  const auto near = make_tile_map(config_of(window(512)), 0, kHeads, tokens, 32, 32), far = make_tile_map({}, 0, kHeads, tokens, 32, 32);
  const Layers layers = {near, near, near, far};
  const auto loads_and_keys = [&](SequenceLayout layout) {
    const auto split = split_sequence(layout, tokens, 8, layers);
    std::vector<std::int64_t> loads(8);
    std::int64_t keys = 0;
    for (const auto& map : layers) {
      const auto plan = plan_needed(split, *map);
      for (int r = 0; r < 8; ++r) {
        loads[r] += kHeads * std::ssize(plan[r].lists->groups[0].query_entries);
        keys += fetched_keys(plan[r], *map, tokens);
      }
    }
    return std::pair(*std::max_element(loads.begin(), loads.end()) - *std::min_element(loads.begin(), loads.end()), keys);
  };
  const auto zigzag = loads_and_keys(SequenceLayout::zigzag), balanced = loads_and_keys(SequenceLayout::balanced);
  const std::int64_t last_row = kHeads * (256 + 3 * 17);
  EXPECT_GT(zigzag.first, last_row);
  EXPECT_LE(balanced.first, last_row);
  EXPECT_LE(static_cast<double>(balanced.second), 1.1 * static_cast<double>(zigzag.second));
}

// Contiguous parts of a causal sequence: rank r sees all keys before it.
TEST(SequencePlan, CausalNeedsWhatComesBefore) {
  const std::int64_t tokens = 131072;
  const auto whole = make_tile_map({}, 0, 2, tokens, 64, 64);
  const auto plan = plan_needed(split_sequence(SequenceLayout::contiguous, tokens, 8, {whole}), *whole);
  for (int r = 0; r < 8; ++r) EXPECT_EQ(fetched_keys(plan[r], *whole, tokens), 2 * r * tokens / 8);

  const auto split = split_sequence(SequenceLayout::balanced, tokens, 8, {whole});
  std::vector<std::int64_t> tiles;
  for (const auto& needed : plan_needed(split, *whole)) tiles.push_back(std::ssize(needed.lists->groups[0].query_entries));
  EXPECT_LE(*std::max_element(tiles.begin(), tiles.end()) - *std::min_element(tiles.begin(), tiles.end()), tokens / 64);
  for (int r = 0; r < 8; ++r) EXPECT_EQ(split.tokens_of(r), tokens / 8);
}

TEST(SequencePlan, Layouts) {
  const auto whole = make_tile_map({}, 0, 1, 13 * 16 - 3, 16, 16);
  using Blocks = std::vector<std::vector<std::int32_t>>;
  EXPECT_EQ(split_sequence(SequenceLayout::contiguous, 13 * 16 - 3, 3, {whole}).blocks, (Blocks{{0, 1, 2, 3, 4}, {5, 6, 7, 8}, {9, 10, 11, 12}}));
  EXPECT_EQ(split_sequence(SequenceLayout::zigzag, 13 * 16 - 3, 3, {whole}).blocks, (Blocks{{0, 1, 2, 11, 12}, {3, 4, 9, 10}, {5, 6, 7, 8}}));
  EXPECT_EQ(split_sequence(SequenceLayout::zigzag, 16, 1, {whole}).blocks, (Blocks{{0}}));
}

TEST(SequencePlan, ErrorsSayWhichNumbersWouldDo) {
  const auto whole = make_tile_map({}, 0, 1, 100, 16, 32);  // blocks of 32: four
  const auto message = [&](SequenceLayout layout, std::int64_t tokens, int ranks, const Layers& layers) -> std::string {
    try {
      split_sequence(layout, tokens, ranks, layers);
    } catch (const std::invalid_argument& e) {
      return e.what();
    }
    return "";
  };
  EXPECT_EQ(message(SequenceLayout::contiguous, 100, 4, {whole}), "");
  EXPECT_EQ(message(SequenceLayout::contiguous, 100, 5, {whole}),
            "100 tokens over 5 ranks: tiles of 16 x 32 make 4 blocks of 32 tokens, and a layout needs 5. Possible: at most 4 ranks to a sequence "
            "(parallel.sequence, --sequence), a sequence of at least 129 tokens (model.context, --context), or smaller tiles (attention.tile)");
  try {
    split_sequence(SequenceLayout::zigzag, 100, 3, {whole}, DeviceKind::cuda);
    ADD_FAILURE() << "four blocks make no six parts";
  } catch (const std::invalid_argument& e) {
    const std::string text = e.what();
    EXPECT_TRUE(
        text.ends_with("at most 2 ranks to a sequence (parallel.sequence, --sequence), another parallel.layout, or a sequence of at least 161 "
                       "tokens (model.context, --context)"))
        << text;
  }
  EXPECT_EQ(message(SequenceLayout::zigzag, 100, 2, {whole}), "");
  for (const char* part : {"at most 2 ranks to", "another parallel.layout", "a sequence of at least 161 tokens"})
    EXPECT_NE(message(SequenceLayout::zigzag, 100, 3, {whole}).find(part), std::string::npos) << part;
  EXPECT_EQ(message(SequenceLayout::zigzag, 100, 5, {whole}).find("another"), std::string::npos);
  for (const char* part : {"at most 3 ranks to", "a sequence of at least 97 tokens"})
    EXPECT_NE(message(SequenceLayout::balanced, 96, 4, {whole}).find(part), std::string::npos) << part;
  EXPECT_NE(message(SequenceLayout::balanced, 101, 2, {whole}).find("for a sequence of 101 tokens"), std::string::npos);
  EXPECT_NE(message(SequenceLayout::balanced, 100, 2, {whole, make_tile_map({}, 0, 1, 100, 16, 16)}).find("tiles of 16 x 16"), std::string::npos);
  EXPECT_NE(message(SequenceLayout::balanced, 100, 2, {}), "");
  EXPECT_NE(message(SequenceLayout::balanced, 0, 2, {whole}), "");
  EXPECT_NE(message(SequenceLayout::balanced, 100, 0, {whole}), "");
  EXPECT_THROW(plan_needed(split_sequence(SequenceLayout::contiguous, 100, 2, {whole}), *make_tile_map({}, 0, 1, 99, 16, 32)), std::invalid_argument);
}

}  // namespace
}  // namespace tessera
