#include "data/loader.h"

#include <gtest/gtest.h>

#include <chrono>
#include <filesystem>
#include <map>
#include <set>
#include <thread>

#include "tests/data/corpus.h"

namespace tessera {
namespace {

using namespace test;

constexpr std::int64_t kContext = 50;

class LoaderTest : public testing::Test {
 protected:
  LoaderTest() {
    put(folder / "a.jsonl", jsonl(60, 1));
    info = prepare({folder / "a.jsonl"}, folder / "d", 0.1, 1000).dataset;
    tokens = all_tokens(info, info.train);
  }

  LoaderOptions options(int rank = 0, int ranks = 1, std::int64_t micro_batch = 2) const {
    LoaderOptions out;
    out.context = kContext;
    out.micro_batch = micro_batch;
    out.sequences_per_step = 8;
    out.rank = rank;
    out.ranks = ranks;
    out.seed = 5;
    return out;
  }

  /// Row `row` of a batch, against the definition.
  void expect_sequence(const HostBatch& batch, std::int64_t row, std::uint64_t first) const { expect_sequence(batch, row, first, tokens); }
  static void expect_sequence(const HostBatch& batch, std::int64_t row, std::uint64_t first, const std::vector<std::int32_t>& tokens) {
    std::int32_t document = 0;
    for (std::int64_t i = 0; i < kContext; ++i) {
      const auto at = static_cast<std::size_t>(row * kContext + i), source = static_cast<std::size_t>(first) + static_cast<std::size_t>(i);
      if (tokens[source] == 256) document = static_cast<std::int32_t>(i);
      ASSERT_EQ(batch.token[at], tokens[source]);
      ASSERT_EQ(batch.target[at], tokens[source + 1]);
      ASSERT_EQ(batch.position[at], i);
      ASSERT_EQ(batch.document_start[at], document);
    }
  }

  TemporaryFolder folder;
  DatasetInfo info;
  std::vector<std::int32_t> tokens;
};

TEST_F(LoaderTest, EqualsDirectComputation) {
  Loader loader(info, info.train, options());
  const Sampler sampler(tokens.size(), kContext, 8, 5);
  for (std::uint64_t step = 0; step < 60; ++step)  // several epochs
    for (std::uint64_t micro = 0; micro < 4; ++micro) {
      const HostBatch& batch = loader.next();
      ASSERT_EQ(batch.batch, 2);
      ASSERT_EQ(batch.tokens, kContext);
      ASSERT_EQ(batch.target_tokens, 100u);
      for (std::int64_t row = 0; row < 2; ++row) expect_sequence(batch, row, sampler.first_token(step, micro * 2 + static_cast<std::uint64_t>(row)));
    }
  EXPECT_GE(loader.take_wait_seconds(), 0.0);
}

TEST_F(LoaderTest, PlacesOfASequenceAreThoseOfTheWhole) {
  auto o = options();
  Loader whole(info, info.train, o);
  o.places = {0, 1, 2, 9, 20, 21, 48, 49};
  Loader part(info, info.train, o);
  const auto n = static_cast<std::int64_t>(o.places.size());
  for (int micro = 0; micro < 20; ++micro) {
    const HostBatch &all = whole.next(), &some = part.next();
    ASSERT_EQ(some.tokens, n);
    ASSERT_EQ(some.target_tokens, static_cast<std::uint64_t>(2 * n));
    for (std::int64_t row = 0; row < 2; ++row)
      for (std::int64_t i = 0; i < n; ++i) {
        const auto at = static_cast<std::size_t>(row * n + i),
                   from = static_cast<std::size_t>(row * kContext + o.places[static_cast<std::size_t>(i)]);
        ASSERT_EQ(some.token[at], all.token[from]);
        ASSERT_EQ(some.target[at], all.target[from]);
        ASSERT_EQ(some.position[at], all.position[from]);
        ASSERT_EQ(some.document_start[at], all.document_start[from]);
      }
  }
  for (const std::vector<std::int32_t>& wrong : {std::vector<std::int32_t>{-1}, {kContext}, {3, 3}, {4, 3}}) {
    o.places = wrong;
    EXPECT_THROW(Loader(info, info.train, o), std::invalid_argument);
  }
}

/// A part is read where the shards that hold the rest of the sequence are gone.
TEST_F(LoaderTest, PlacesOfASequenceAreAllThatIsRead) {
  const auto& shards = info.train.shards;
  ASSERT_GE(shards.size(), 4u);
  const auto first = static_cast<std::int32_t>(shards[0].tokens), end = first + static_cast<std::int32_t>(shards[1].tokens);
  std::vector<std::int32_t> places;  // of the second shard, from where a document begins; the last target is in it too
  for (std::int32_t p = first; p + 1 < end; ++p)
    if (!places.empty() || tokens[static_cast<std::size_t>(p)] == 256) places.push_back(p);
  ASSERT_GT(places.size(), 100u);
  const auto context = static_cast<std::int64_t>(tokens.size()) - 1;
  for (std::size_t shard = 0; shard < shards.size(); ++shard)
    if (shard != 1) std::filesystem::remove(info.directory + "/" + shards[shard].file);

  TokenReader reader(info, info.train);
  const HostBatch found = read_sequences(reader, 0, 1, context, places);
  std::int32_t document = 0;
  for (std::size_t i = 0; i < places.size(); ++i) {
    const auto at = static_cast<std::size_t>(places[i]);
    if (tokens[at] == 256) document = places[i];
    ASSERT_EQ(found.token[i], tokens[at]);
    ASSERT_EQ(found.target[i], tokens[at + 1]);
    ASSERT_EQ(found.document_start[i], document);
  }
  EXPECT_THROW(read_sequences(reader, 0, 1, context), std::runtime_error);
}

TEST_F(LoaderTest, PlacesOfASequenceThatTheSplitEndsIn) {
  TokenReader reader(info, info.train);
  const std::uint64_t last = (reader.size() - 1) / kContext;  // its targets may end with the sequence before
  for (std::uint64_t sequence = last - 1; sequence * kContext < reader.size(); ++sequence) {
    const HostBatch all = read_sequences(reader, sequence, 1, kContext);
    std::uint64_t targets = 0;
    for (std::int32_t first = 0; first < kContext; first += 7) {  // every stretch: before, across and beyond the end
      std::vector<std::int32_t> places;
      for (std::int32_t p = first; p < std::min<std::int32_t>(kContext, first + 7); ++p) places.push_back(p);
      const HostBatch some = read_sequences(reader, sequence, 1, kContext, places);
      targets += some.target_tokens;
      for (std::size_t i = 0; i < places.size(); ++i) {
        const auto from = static_cast<std::size_t>(places[i]);
        ASSERT_EQ(some.token[i], all.token[from]);
        ASSERT_EQ(some.target[i], all.target[from]);
        ASSERT_EQ(some.document_start[i], all.document_start[from]);
      }
    }
    EXPECT_EQ(targets, all.target_tokens);
  }
}

TEST_F(LoaderTest, TheSameGlobalBatchesOnAnyNumberOfRanksAndAfterResuming) {
  constexpr int kSteps = 7;
  const auto global = [&](int ranks, std::int64_t micro_batch, std::uint64_t first_step) {
    std::vector<std::unique_ptr<Loader>> loaders;
    for (int rank = 0; rank < ranks; ++rank) {
      auto o = options(rank, ranks, micro_batch);
      o.first_step = first_step;
      o.prefetch = 1 + rank;
      loaders.push_back(std::make_unique<Loader>(info, info.train, o));
    }
    std::vector<std::vector<std::int32_t>> steps;
    for (std::uint64_t step = first_step; step < kSteps; ++step) {
      steps.emplace_back();
      for (auto& loader : loaders)
        for (std::int64_t i = 0; i < 8 / ranks / micro_batch; ++i) {
          const HostBatch& batch = loader->next();
          for (const auto* row : {&batch.token, &batch.target, &batch.document_start})
            steps.back().insert(steps.back().end(), row->begin(), row->end());
        }
    }
    return steps;
  };
  // Equal layout needs equal micro-batches; the order of sequences within the step is the same in any case.
  const auto expected = global(1, 2, 0);
  EXPECT_EQ(global(2, 2, 0), expected);
  EXPECT_EQ(global(4, 2, 0), expected);
  EXPECT_EQ(global(4, 2, 3), (std::vector(expected.begin() + 3, expected.end())));
  EXPECT_EQ(global(8, 1, 0), global(1, 1, 0));
}

TEST_F(LoaderTest, AMixtureDealsItsDatasetsAndKeepsTheirDocuments) {
  put(folder / "b.jsonl", jsonl(90, 2));
  const std::vector<MixPart> mix = {{info, 3}, {prepare({folder / "b.jsonl"}, folder / "e", 0, 1000).dataset, 1}};
  const std::vector<std::vector<std::int32_t>> corpora = {tokens, all_tokens(mix[1].data, mix[1].data.train)};
  constexpr std::uint64_t kSteps = 400;  // several epochs of both
  const Mixture mixture(std::vector{3.0, 1.0}, 8, 5);
  // Where each sequence comes from, by what it is: the text of a dataset, at a multiple of the context, each once in an epoch of its own.
  std::vector<std::map<std::vector<std::int32_t>, std::uint64_t>> sequences(2);
  std::vector<std::uint64_t> epoch(2);
  for (std::size_t part = 0; part < 2; ++part) {
    epoch[part] = (corpora[part].size() - 1) / kContext;
    for (std::uint64_t s = 0; s < epoch[part]; ++s) {
      const auto first = corpora[part].begin() + static_cast<std::ptrdiff_t>(s * kContext);
      sequences[part].emplace(std::vector(first, first + kContext + 1), s);
    }
    ASSERT_EQ(sequences[part].size(), epoch[part]);
  }
  Loader loader(mix, options());
  std::vector<std::map<std::uint64_t, int>> came(2);  // epoch * sequences + sequence
  for (std::uint64_t step = 0; step < kSteps; ++step) {
    std::vector<std::uint64_t> of_step(2);
    for (std::uint64_t micro = 0; micro < 4; ++micro) {
      const HostBatch& batch = loader.next();
      for (std::int64_t row = 0; row < 2; ++row) {
        const Mixture::Turn turn = mixture.turn(step, micro * 2 + static_cast<std::uint64_t>(row));
        const auto begin = batch.token.begin() + row * kContext;
        std::vector<std::int32_t> text(begin, begin + kContext);
        text.push_back(batch.target[static_cast<std::size_t>((row + 1) * kContext - 1)]);
        const auto found = sequences[turn.part].find(text);
        ASSERT_NE(found, sequences[turn.part].end());
        expect_sequence(batch, row, found->second * kContext, corpora[turn.part]);
        ++came[turn.part][turn.number / epoch[turn.part] * epoch[turn.part] + found->second];
        ++of_step[turn.part];
      }
    }
    ASSERT_EQ(of_step, (std::vector<std::uint64_t>{6, 2}));
  }
  for (std::size_t part = 0; part < 2; ++part) {
    const std::uint64_t whole = kSteps * (part == 0 ? 6 : 2) / epoch[part];
    EXPECT_GE(whole, 2u);
    std::uint64_t in_whole_epochs = 0;
    for (const auto& [key, times] : came[part]) {
      EXPECT_EQ(times, 1);
      in_whole_epochs += key < whole * epoch[part];
    }
    EXPECT_EQ(in_whole_epochs, whole * epoch[part]);
  }
}

TEST_F(LoaderTest, AMixtureIsTheSameOnAnyNumberOfRanksAndAfterResuming) {
  put(folder / "b.jsonl", jsonl(90, 2));
  const std::vector<MixPart> mix = {{info, 1}, {prepare({folder / "b.jsonl"}, folder / "e", 0, 1000).dataset, 2}};
  const auto global = [&](int ranks, std::uint64_t first_step) {
    std::vector<std::vector<std::int32_t>> rows;
    std::vector<std::unique_ptr<Loader>> loaders;
    for (int rank = 0; rank < ranks; ++rank) {
      auto o = options(rank, ranks, 1);
      o.first_step = first_step;
      loaders.push_back(std::make_unique<Loader>(mix, o));
    }
    for (std::uint64_t step = first_step; step < 9; ++step)
      for (auto& loader : loaders)
        for (int i = 0; i < 8 / ranks; ++i) {
          const HostBatch& batch = loader->next();
          rows.push_back(batch.token);
          rows.push_back(batch.document_start);
        }
    return rows;
  };
  const auto expected = global(1, 0);
  EXPECT_EQ(global(2, 0), expected);
  EXPECT_EQ(global(8, 0), expected);
  EXPECT_EQ(global(4, 5), (std::vector(expected.begin() + 5 * 16, expected.end())));
}

TEST_F(LoaderTest, AMixtureOfOneIsThatDataset) {
  const std::vector<MixPart> mix = {{info, 0.25}};
  Loader mixed(mix, options()), plain(info, info.train, options());
  for (int i = 0; i < 100; ++i) ASSERT_EQ(mixed.next().token, plain.next().token);
}

TEST_F(LoaderTest, AMixtureNamesTheDatasetThatIsTooShort) {
  const std::vector<MixPart> mix = {{info, 1}, {prepare({folder / "a.jsonl"}, folder / "e", 0.1, 1000).dataset, 1}};
  auto o = options();
  o.context = static_cast<std::int64_t>(tokens.size());
  EXPECT_NE(message_of([&] { Loader(mix, o); }).find(folder / "d: the split has"), std::string::npos);
  EXPECT_THROW(Loader(std::span<const MixPart>(), o), std::invalid_argument);
}

TEST_F(LoaderTest, ErrorsOfTheThreadSurfaceInNext) {
  const std::string path = folder / "d/" + info.train.shards[0].file;
  for (std::size_t i = 0; i < file_bytes(path); i += 64) flip_bit(path, i);
  Loader loader(info, info.train, options());
  const auto drain = [&] {
    for (int i = 0; i < 1000; ++i) loader.next();
  };
  const std::string message = message_of(drain);
  EXPECT_NE(message.find("shard_00000.h5"), std::string::npos) << message;
  EXPECT_EQ(message_of(drain), message);  // and again
}

TEST_F(LoaderTest, RefusesWhatCannotBeDivided) {
  auto o = options(0, 3);
  EXPECT_THROW(Loader(info, info.train, o), std::invalid_argument);
  o = options();
  o.micro_batch = 3;
  EXPECT_THROW(Loader(info, info.train, o), std::invalid_argument);
  o = options();
  o.context = static_cast<std::int64_t>(tokens.size());
  EXPECT_THROW(Loader(info, info.train, o), std::invalid_argument);
  o = options(2, 2);
  EXPECT_THROW(Loader(info, info.train, o), std::invalid_argument);
  EXPECT_THROW(Loader(info, SplitInfo{}, options()), std::invalid_argument);
}

TEST_F(LoaderTest, StopsWhileTheThreadIsBusyOrWaits) {
  for (int i = 0; i < 20; ++i) {
    Loader loader(info, info.train, options());
    if (i % 2) loader.next();
    if (i % 4 > 1) std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
}

TEST_F(LoaderTest, ReadSequencesCoversTheSplitOnce) {
  TokenReader reader(info, info.train);
  const std::uint64_t sequences = (tokens.size() - 1 + kContext - 1) / kContext;
  std::uint64_t targets = 0;
  for (std::uint64_t first = 0; first < sequences; first += 3) {
    const auto count = static_cast<std::int64_t>(std::min<std::uint64_t>(3, sequences - first));
    const HostBatch batch = read_sequences(reader, first, count, kContext);
    for (std::int64_t row = 0; row < count; ++row)
      if ((first + static_cast<std::uint64_t>(row) + 1) * kContext < tokens.size())
        expect_sequence(batch, row, (first + static_cast<std::uint64_t>(row)) * kContext);
    targets += batch.target_tokens;
  }
  EXPECT_EQ(targets, tokens.size() - 1);
  const HostBatch last = read_sequences(reader, sequences - 1, 1, kContext);
  const std::size_t have = tokens.size() - (sequences - 1) * kContext;
  for (std::size_t i = 0; i < kContext; ++i) {
    EXPECT_EQ(last.target[i], i + 1 < have ? tokens[(sequences - 1) * kContext + i + 1] : -1);
    EXPECT_GE(last.token[i], 0);
    EXPECT_LE(last.document_start[i], static_cast<std::int32_t>(i));
  }
  EXPECT_THROW(read_sequences(reader, tokens.size() / kContext + 1, 1, kContext), std::out_of_range);
  EXPECT_THROW(read_sequences(reader, 0, 0, kContext), std::invalid_argument);
}

}  // namespace
}  // namespace tessera
