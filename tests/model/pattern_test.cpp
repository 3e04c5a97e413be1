// Patterns and their tile lists, against the definition evaluated edge by edge.

#include "model/pattern.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <random>
#include <set>

#include "pattern_cases.h"

namespace tessera {
namespace {

using Kind = PatternSpec::Kind;

std::vector<PatternSpec> families() {
  return {causal(),
          window(1),
          window(40),
          window(1 << 30),
          strided(1, 1),
          strided(13, 4),
          strided(64, 1),
          dilated(5, 7),
          dilated(16, 2),
          dilated(1, 1),
          global(1),
          global(37),
          global(64),
          global(5000),
          bigbird(1, 0, 0, 16),
          bigbird(2, 1, 2, 16),
          bigbird(0, 0, 3, 10),
          bigbird(1, 1, 1, 100),
          bigbird(0, 2, 50, 32),
          blocks(16, 20, 1),
          blocks(7, 9, 2),  // ends before the sequence does
          blocks(100, 3, 3),
          any({window(20), global(3)}),
          all({strided(8, 3), window(90)}),
          all({any({window(17), strided(24, 2)}), bigbird(2, 1, 1, 16)}),
          any({all({blocks(16, 20, 4), dilated(30, 3)}), global(2), window(2)}),
          all({window(10), global(10)})};  // empty for late queries
}

PatternSpec random_pattern(std::mt19937& rng, int depth) {
  const auto pick = [&](int low, int high) { return std::uniform_int_distribution<std::int64_t>(low, high)(rng); };
  switch (pick(0, depth > 0 ? 8 : 6)) {
    case 0: return causal();
    case 1: return window(pick(1, 150));
    case 2: return strided(pick(1, 70), pick(1, 10));
    case 3: return dilated(pick(1, 40), pick(1, 9));
    case 4: return global(pick(1, 100));
    case 5: return bigbird(pick(0, 2), pick(0, 2), pick(1, 3), pick(1, 40), rng());
    case 6: return blocks(pick(1, 40), pick(1, 12), rng());
    default: break;
  }
  std::vector<PatternSpec> children;
  for (auto n = pick(1, 3); n > 0; --n) children.push_back(random_pattern(rng, depth - 1));
  return pick(0, 1) ? any(std::move(children)) : all(std::move(children));
}

bool mask_bit(const TileMap& m, std::int32_t mask, int row, int key) {
  return m.masks[(static_cast<std::size_t>(mask) * m.tile_query + row) * m.mask_words + key / 64] >> (key % 64) & 1;
}

/// Everything tiles.h promises about the group of `head`, edge by edge.
void expect_exact(const TileMap& m, int head, const PatternSpec& p) {
  SCOPED_TRACE(describe(p) + " tokens " + std::to_string(m.tokens) + " tiles " + std::to_string(m.tile_query) + "x" + std::to_string(m.tile_key));
  const TileGroup& g = m.groups.at(m.group_of_head.at(head));
  ASSERT_EQ(m.query_tiles, (m.tokens + m.tile_query - 1) / m.tile_query);
  ASSERT_EQ(m.key_tiles, (m.tokens + m.tile_key - 1) / m.tile_key);
  ASSERT_EQ(static_cast<std::int64_t>(g.query_offsets.size()), m.query_tiles + 1);
  ASSERT_EQ(static_cast<std::int64_t>(g.key_offsets.size()), m.key_tiles + 1);
  ASSERT_EQ(g.query_offsets.back(), static_cast<std::int64_t>(g.query_entries.size()));

  std::uint64_t edges = 0;
  std::vector<std::vector<TileEntry>> transposed(m.key_tiles);
  for (std::int64_t a = 0; a < m.query_tiles; ++a) {
    auto entry = g.query_offsets[a];
    for (std::int64_t b = 0; b < m.key_tiles; ++b) {
      std::vector<bool> visible;
      bool listed = false, full = true;
      for (int r = 0; r < m.tile_query; ++r) {
        for (int k = 0; k < m.tile_key; ++k) {
          const std::int64_t i = a * m.tile_query + r, j = b * m.tile_key + k;
          const bool v = p.visible(i, j);
          visible.push_back(v);
          full = full && v;
          if (v && i < m.tokens && j < m.tokens) {
            listed = true;
            ++edges;
          }
        }
      }
      if (!listed) continue;
      ASSERT_LT(entry, g.query_offsets[a + 1]) << "tile " << a << "," << b << " is missing";
      const TileEntry e = g.query_entries[entry++];
      ASSERT_EQ(e.tile, b);
      ASSERT_EQ(e.mask == TileEntry::kFull, full) << "tile " << a << "," << b;
      transposed[b].push_back({static_cast<std::int32_t>(a), e.mask});
      if (full) continue;
      ASSERT_GE(e.mask, 0);
      ASSERT_LT(e.mask, m.mask_count());
      for (int r = 0; r < m.tile_query; ++r) {
        for (int k = 0; k < m.tile_key; ++k)
          ASSERT_EQ(mask_bit(m, e.mask, r, k), visible[r * m.tile_key + k]) << a << "," << b << " row " << r << " key " << k;
      }
    }
    ASSERT_EQ(entry, g.query_offsets[a + 1]);
  }
  EXPECT_EQ(g.visible_edges, edges);
  for (std::int64_t b = 0; b < m.key_tiles; ++b) {
    const std::vector<TileEntry> list(g.key_entries.begin() + g.key_offsets[b], g.key_entries.begin() + g.key_offsets[b + 1]);
    EXPECT_EQ(list, transposed[b]) << "key tile " << b;
  }
}

void expect_masks_distinct(const TileMap& m) {
  std::set<std::vector<std::uint64_t>> seen;
  const auto size = static_cast<std::ptrdiff_t>(m.tile_query) * m.mask_words;
  for (std::int64_t n = 0; n < m.mask_count(); ++n) seen.insert({m.masks.begin() + n * size, m.masks.begin() + (n + 1) * size});
  EXPECT_EQ(static_cast<std::int64_t>(seen.size()), m.mask_count());
}

TEST(Pattern, DefinitionsByHand) {
  EXPECT_TRUE(causal().visible(5, 5));
  EXPECT_FALSE(causal().visible(5, 6));
  EXPECT_TRUE(window(3).visible(10, 8));
  EXPECT_FALSE(window(3).visible(10, 7));
  EXPECT_TRUE(strided(4, 2).visible(10, 5));  // distance 5 = 4 + 1
  EXPECT_FALSE(strided(4, 2).visible(10, 4));
  EXPECT_TRUE(dilated(3, 4).visible(20, 12));
  EXPECT_FALSE(dilated(3, 4).visible(20, 8));
  EXPECT_FALSE(dilated(3, 4).visible(20, 13));
  EXPECT_TRUE(dilated(std::int64_t{1} << 62, 1 << 20).visible(1 << 20, 0));  // window * dilation overflows
  EXPECT_TRUE(global(2).visible(100, 1));
  EXPECT_FALSE(global(2).visible(100, 2));
  EXPECT_FALSE(global(2).visible(0, 1));  // causality comes first
  EXPECT_TRUE(bigbird(2, 0, 0, 10).visible(25, 10));
  EXPECT_FALSE(bigbird(2, 0, 0, 10).visible(25, 9));
  EXPECT_TRUE(bigbird(1, 1, 0, 10).visible(95, 9));
  EXPECT_TRUE(any({window(1), global(1)}).visible(9, 0));
  EXPECT_FALSE(all({window(1), global(1)}).visible(9, 0));
  BlockMask lower{.block = 2, .rows = 2, .visible = {1, 1, 0, 1}};
  const PatternSpec p{.kind = Kind::blocks, .mask = std::make_shared<BlockMask>(lower)};
  EXPECT_TRUE(p.visible(1, 0));
  EXPECT_FALSE(p.visible(0, 1));
  EXPECT_FALSE(p.visible(2, 0));
  EXPECT_TRUE(p.visible(100, 3));   // as the last row
  EXPECT_FALSE(p.visible(100, 4));  // nothing past the last column
}

TEST(Pattern, BigbirdDrawsTheStatedNumberOfBlocks) {
  const auto p = bigbird(0, 0, 3, 16, 99);
  std::set<std::string> rows;
  for (std::int64_t row = 0; row < 60; ++row) {
    const auto seen = visible_blocks(p, row);
    EXPECT_EQ(std::count(seen.begin(), seen.end(), 1), std::min<std::int64_t>(3, row + 1));
    rows.insert(std::string(seen.begin(), seen.end()));
  }
  EXPECT_EQ(rows.size(), 60u);
  EXPECT_NE(visible_blocks(p, 50), visible_blocks(bigbird(0, 0, 3, 16, 100), 50));
  // Every block of a row is drawn about equally often: 2000 seeds, 3 of 30 blocks, expected 200 +- 13 each.
  std::vector<int> count(30);
  for (std::uint64_t seed = 0; seed < 2000; ++seed) {
    const auto seen = visible_blocks(bigbird(0, 0, 3, 16, seed), 29);
    for (int b = 0; b < 30; ++b) count[b] += seen[b];
  }
  for (int c : count) EXPECT_NEAR(c, 200, 65);
  EXPECT_THROW(visible_blocks(window(3), 0), std::logic_error);
}

TEST(Pattern, DescribeIsCanonical) {
  EXPECT_EQ(describe(any({window(256), global(4)})), "any[global{4},window{256}]");
  EXPECT_EQ(describe(any({global(4), window(256), global(4)})), "any[global{4},window{256}]");
  EXPECT_EQ(describe(any({any({global(4), causal()}), window(256)})), "any[causal,global{4},window{256}]");
  EXPECT_EQ(describe(all({window(3)})), "window{3}");
  EXPECT_EQ(describe(all({any({window(3), global(1)}), strided(4, 1)})), "all[any[global{1},window{3}],strided{4,1}]");
  EXPECT_NE(describe(blocks(16, 4, 1)), describe(blocks(16, 4, 2)));
  std::set<std::string> texts;
  for (const auto& p : families()) texts.insert(describe(p));
  EXPECT_EQ(texts.size(), families().size());
}

TEST(Pattern, LastOverrideThatCoversWins) {
  PatternConfig c;
  c.base = window(8);
  c.overrides.push_back({.layer_first = 1, .layer_last = 2, .pattern = causal()});
  c.overrides.push_back({.head_first = 3, .head_last = 3, .pattern = global(2)});
  EXPECT_EQ(describe(c.at(0, 0)), "window{8}");
  EXPECT_EQ(describe(c.at(1, 0)), "causal");
  EXPECT_EQ(describe(c.at(2, 3)), "global{2}");
  EXPECT_EQ(describe(c.at(3, 3)), "global{2}");
  EXPECT_EQ(describe(c.at(3, 2)), "window{8}");
  EXPECT_FALSE(c.visible(0, 0, 20, 5));
  EXPECT_TRUE(c.visible(1, 0, 20, 5));
}

TEST(Pattern, CheckNamesTheValue) {
  const auto message = [](const PatternSpec& p) -> std::string {
    try {
      check_pattern(p);
    } catch (const std::invalid_argument& e) {
      return e.what();
    }
    return "";
  };
  EXPECT_EQ(message(window(0)), "pattern window: size is 0; it must be at least 1");
  EXPECT_NE(message(strided(0, 1)).find("stride is 0"), std::string::npos);
  EXPECT_NE(message(strided(4, -1)).find("width is -1"), std::string::npos);
  EXPECT_NE(message(dilated(0, 1)).find("window is 0"), std::string::npos);
  EXPECT_NE(message(dilated(4, 0)).find("dilation is 0"), std::string::npos);
  EXPECT_NE(message(global(0)).find("tokens is 0"), std::string::npos);
  EXPECT_NE(message(bigbird(1, 0, 0, 0)).find("block is 0"), std::string::npos);
  EXPECT_NE(message(bigbird(-1, 0, 0, 1)).find("window is -1"), std::string::npos);
  EXPECT_NE(message(bigbird(0, 0, 0, 1)).find("all 0"), std::string::npos);
  EXPECT_NE(message({.kind = Kind::blocks, .file = "x"}).find("'x' has not been read"), std::string::npos);
  EXPECT_NE(message(any({})).find("empty"), std::string::npos);
  EXPECT_NE(message(all({any({window(-3)})})).find("size is -3"), std::string::npos);
  for (const auto& p : families()) EXPECT_EQ(message(p), "");
}

TEST(TileMap, EveryFamilyEveryTileSize) {
  for (const auto& p : families()) {
    PatternConfig c;
    c.base = p;
    for (auto [tokens, tq, tk] : {std::tuple{1, 16, 16},
                                  {15, 16, 16},
                                  {16, 16, 16},
                                  {203, 16, 16},
                                  {203, 32, 32},
                                  {257, 64, 64},
                                  {300, 128, 128},
                                  {203, 16, 64},
                                  {203, 64, 16},
                                  {300, 128, 32},
                                  {300, 48, 80},
                                  {97, 1, 1}}) {
      const auto m = make_tile_map(c, 0, 1, tokens, tq, tk);
      expect_exact(*m, 0, p);
      expect_masks_distinct(*m);
      if (HasFatalFailure()) return;
    }
  }
}

TEST(TileMap, RandomCompositions) {
  std::mt19937 rng(2024);
  for (int trial = 0; trial < 150; ++trial) {
    PatternConfig c;
    c.base = random_pattern(rng, 3);
    const int sizes[] = {16, 32, 64, 128};
    const int tq = sizes[rng() % 4], tk = rng() % 3 ? tq : sizes[rng() % 4];
    const auto m = make_tile_map(c, 0, 1, 1 + rng() % 300, tq, tk);
    expect_exact(*m, 0, c.base);
    expect_masks_distinct(*m);
    if (HasFatalFailure()) return;
  }
}

TEST(TileMap, HeadsWithTheSamePatternShareAGroup) {
  PatternConfig c;
  c.base = any({window(20), global(3)});
  c.overrides.push_back({.layer_first = 1, .layer_last = 1, .head_first = 1, .head_last = 2, .pattern = strided(9, 2)});
  c.overrides.push_back({.layer_first = 1, .layer_last = 1, .head_first = 3, .head_last = 3, .pattern = any({global(3), window(20)})});
  const auto plain = make_tile_map(c, 0, 4, 100, 16, 16);
  EXPECT_EQ(plain->groups.size(), 1u);
  EXPECT_EQ(plain->group_of_head, (std::vector<std::int32_t>{0, 0, 0, 0}));
  const auto m = make_tile_map(c, 1, 4, 100, 16, 16);
  EXPECT_EQ(m->group_of_head, (std::vector<std::int32_t>{0, 1, 1, 0}));
  for (int h = 0; h < 4; ++h) expect_exact(*m, h, c.at(1, h));
}

TEST(TileMap, Mask0IsCausalForSquareTiles) {
  for (const auto& p : families()) {
    PatternConfig c;
    c.base = p;
    const auto m = make_tile_map(c, 0, 1, 100, 32, 32);
    ASSERT_TRUE(m->mask0_is_causal);
    ASSERT_GE(m->mask_count(), 1);
    for (int r = 0; r < 32; ++r) {
      for (int k = 0; k < 32; ++k) ASSERT_EQ(mask_bit(*m, 0, r, k), k <= r);
    }
    EXPECT_FALSE(make_tile_map(c, 0, 1, 100, 32, 16)->mask0_is_causal);
  }
}

// A list made for few tokens is a prefix of the one made for many: a model evaluated on a shorter sequence needs no lists of its own.
TEST(TileMap, ShorterSequencesArePrefixes) {
  for (const auto& p : families()) {
    SCOPED_TRACE(describe(p));
    PatternConfig c;
    c.base = p;
    c.overrides.push_back({.head_first = 1, .head_last = 1, .pattern = strided(11, 3)});
    const auto whole = make_tile_map(c, 0, 2, 400, 32, 32);
    for (std::int64_t tokens : {1, 31, 32, 96, 100, 256, 399}) {
      const auto part = make_tile_map(c, 0, 2, tokens, 32, 32);
      for (int h = 0; h < 2; ++h) {
        const auto &w = whole->groups[whole->group_of_head[h]], &s = part->groups[part->group_of_head[h]];
        for (std::int64_t a = 0; a < part->query_tiles; ++a) {
          const std::vector<TileEntry> expected(w.query_entries.begin() + w.query_offsets[a], w.query_entries.begin() + w.query_offsets[a + 1]);
          const std::vector<TileEntry> found(s.query_entries.begin() + s.query_offsets[a], s.query_entries.begin() + s.query_offsets[a + 1]);
          if ((a + 1) * 32 <= tokens) {
            EXPECT_EQ(found, expected);
          } else {  // the partial tile: a subset in the same order
            EXPECT_TRUE(std::includes(expected.begin(), expected.end(), found.begin(), found.end(),
                                      [](const auto& x, const auto& y) { return x.tile < y.tile; }));
          }
        }
      }
    }
  }
}

TEST(TileMap, LongSequencesHaveFewMasks) {
  PatternConfig c;
  c.base = any({window(1000), global(10)});
  const auto m = make_tile_map(c, 0, 1, 32768, 64, 64);
  // causal, where the window ends (in two tiles, since 1000 is no multiple of 64), global columns and the first window tiles.
  EXPECT_LE(m->mask_count(), 8);
  const std::uint64_t in_window = 1000ull * 32768 - 1000ull * 999 / 2;
  std::uint64_t beyond = 0;
  for (std::int64_t i = 0; i < 32768; ++i) beyond += std::clamp<std::int64_t>(i - 999, 0, 10);
  EXPECT_EQ(m->groups[0].visible_edges, in_window + beyond);
}

TEST(TileMap, RefusesWhatMakesNoMap) {
  PatternConfig c;
  EXPECT_THROW(make_tile_map(c, 0, 1, 0, 16, 16), std::invalid_argument);
  EXPECT_THROW(make_tile_map(c, 0, 0, 10, 16, 16), std::invalid_argument);
  EXPECT_THROW(make_tile_map(c, 0, 1, 10, 0, 16), std::invalid_argument);
  c.base = window(0);
  EXPECT_THROW(make_tile_map(c, 0, 1, 10, 16, 16), std::invalid_argument);
}

class BlockMaskFile : public ::testing::Test {
 protected:
  BlockMaskFile() {
    const auto* test = ::testing::UnitTest::GetInstance()->current_test_info();
    path_ = (std::filesystem::temp_directory_path() / (std::string("tessera_block_mask_") + test->name() + ".txt")).string();
  }
  ~BlockMaskFile() override { std::filesystem::remove(path_); }
  std::shared_ptr<const BlockMask> read(const std::string& text) {
    std::ofstream(path_) << text;
    return read_block_mask(path_);
  }
  std::string error(const std::string& text) {
    try {
      read(text);
    } catch (const std::invalid_argument& e) {
      return e.what();
    }
    return "no error";
  }
  std::string path_;
};

TEST_F(BlockMaskFile, Reads) {
  const auto m = read("block 16\n100\r\n010\n111\n\n");
  EXPECT_EQ(m->block, 16);
  EXPECT_EQ(m->rows, 3);
  EXPECT_EQ(m->visible, (std::vector<std::uint8_t>{1, 0, 0, 0, 1, 0, 1, 1, 1}));
  EXPECT_EQ(read("block 1\n1")->rows, 1);
}

TEST_F(BlockMaskFile, ErrorsNameFileAndLine) {
  const auto expect = [&](const std::string& text, const std::string& line, const std::string& what) {
    const std::string e = error(text);
    EXPECT_NE(e.find(path_), std::string::npos) << e;
    EXPECT_NE(e.find(line), std::string::npos) << e;
    EXPECT_NE(e.find(what), std::string::npos) << e;
  };
  expect("", "line 1", "empty");
  expect("blocks 16\n1\n", "line 1", "block N");
  expect("\x1B[31m\xFF\n", "line 1", "found \"?[31m?\"");  // nothing a terminal would act on
  expect("block 0\n1\n", "line 1", "block N");
  expect("block 16x\n1\n", "line 1", "block N");
  expect("block -1\n1\n", "line 1", "block N");
  expect("block 16\n", "line 1", "found 0");
  expect("block 16\n10\n1\n", "line 3", "expected 2 values");
  expect("block 16\n10\n12\n", "line 3", "found '2'");
  expect("block 16\n10\n11\n11\n", "line 4", "square");
  expect("block 16\n100\n110\n", "line 3", "expected 3 rows");
  EXPECT_THROW(read_block_mask("/nonexistent/mask.txt"), std::invalid_argument);
}

}  // namespace
}  // namespace tessera
