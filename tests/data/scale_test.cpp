// What tests/bench/loader_at_scale.cpp shows over a billion tokens, over a few million.

#include <gtest/gtest.h>

#include <memory>

#include "data/loader.h"
#include "tests/data/corpus.h"
#include "tests/data/numbered.h"

namespace tessera {
namespace {

using namespace test;

constexpr std::uint32_t kEndOfText = 256;
constexpr std::int64_t kContext = 1024;

class LoaderAtScale : public testing::Test {
 protected:
  TemporaryFolder folder;
};

/// An epoch is begun on one number of ranks and gone on with on others: every sequence comes once, whole and right.
TEST_F(LoaderAtScale, EveryPositionOfAnEpochOnceOverResumesAndRanks) {
  constexpr std::uint64_t kTokens = 3'333'333, kPerStep = 64;
  write_numbered(folder / "numbered", kTokens, 5, kEndOfText);
  const DatasetInfo info = prepare({folder / "numbered"}, folder / "data", 0, 16'000).dataset;
  ASSERT_EQ(info.train.tokens, kTokens);
  ASSERT_GT(info.train.shards.size(), 200u);
  const std::uint64_t sequences = (kTokens - 1) / kContext, steps = 2 * sequences / kPerStep;  // almost two epochs
  Coverage coverage(sequences);
  std::uint64_t number = 0;
  const std::vector<std::pair<int, std::uint64_t>> starts = {{1, 0}, {4, steps / 5}, {64, steps / 3}, {2, steps / 2 + 3}, {64, steps * 3 / 4}};
  for (std::size_t start = 0; start < starts.size(); ++start) {
    const auto [ranks, first_step] = starts[start];
    std::vector<std::unique_ptr<Loader>> loaders;
    for (int rank = 0; rank < ranks; ++rank) {
      LoaderOptions o;
      o.context = kContext;
      o.sequences_per_step = kPerStep;
      o.rank = rank;
      o.ranks = ranks;
      o.seed = 11;
      o.first_step = first_step;
      o.prefetch = 2;
      o.open_files = 8;  // 64 ranks in one process: a process may often have 1024
      loaders.push_back(std::make_unique<Loader>(info, info.train, o));
    }
    for (std::uint64_t step = first_step; step < (start + 1 < starts.size() ? starts[start + 1].second : steps); ++step)
      for (auto& loader : loaders)
        for (std::uint64_t i = 0; i < kPerStep / static_cast<std::uint64_t>(ranks); ++i) {
          const HostBatch& batch = loader->next();
          const std::uint64_t place = place_of(batch.token, kEndOfText);
          ASSERT_EQ(place % kContext, 0u);
          ASSERT_NO_THROW(check_sequence(place, kEndOfText, batch.token, batch.target, batch.document_start));
          ASSERT_NO_THROW(coverage.add(place / kContext)) << step;
          if (++number % sequences == 0) {
            ASSERT_TRUE(coverage.complete());
            coverage.clear();
          }
        }
  }
  EXPECT_EQ(number, steps * kPerStep);
}

}  // namespace
}  // namespace tessera
