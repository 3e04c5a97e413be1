#include "data/dataset.h"

#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <regex>
#include <set>

#include "data/dataset_contents.h"
#include "data/files.h"
#include "data/hdf5_file.h"
#include "tests/data/corpus.h"

namespace tessera {
namespace {

namespace fs = std::filesystem;
using namespace test;

/// A dataset of bytes in shards of 1000 tokens, with documents from 1 to 400 bytes and one of 3500 that fills shards of its own.
class Dataset : public testing::Test {
 protected:
  Dataset() {
    put(folder / "a.jsonl", jsonl(40, 1));
    put(folder / "b.txt", words(3500, 2));
    put(folder / "c.jsonl", jsonl(40, 3));
    info = prepare({folder / "a.jsonl", folder / "b.txt", folder / "c.jsonl"}, folder / "d", 0, 1000).dataset;
    tokens = all_tokens(info, info.train);
  }
  std::string shard(int i) const { return folder / "d/" + info.train.shards.at(static_cast<std::size_t>(i)).file; }

  TemporaryFolder folder;
  DatasetInfo info;
  std::vector<std::int32_t> tokens;
};

TEST_F(Dataset, ShardsAreOneRowOfTokens) {
  ASSERT_GT(info.train.shards.size(), 10u);
  for (std::size_t i = 0; i + 1 < info.train.shards.size(); ++i) EXPECT_EQ(info.train.shards[i].tokens, 1000u);
  TokenReader reader(read_dataset(folder / "d"), info.train);
  ASSERT_EQ(reader.size(), tokens.size());
  for (std::uint64_t first = 0; first < tokens.size(); first += 611)
    for (const std::uint64_t length : {1, 7, 1000, 2500}) {
      if (first + length > tokens.size()) continue;
      std::vector<std::int32_t> out(length);
      reader.read(first, out);
      ASSERT_TRUE(std::equal(out.begin(), out.end(), tokens.begin() + static_cast<std::ptrdiff_t>(first))) << first << " " << length;
    }
  std::vector<std::int32_t> out(2);
  EXPECT_THROW(reader.read(tokens.size() - 1, out), std::out_of_range);
  EXPECT_THROW(reader.read(~0ull, out), std::out_of_range);
}

TEST_F(Dataset, DocumentStartsAgainstTheTokensThemselves) {
  std::vector<std::int64_t> start(tokens.size());
  for (std::size_t i = 0; i < tokens.size(); ++i) start[i] = tokens[i] == 256 ? static_cast<std::int64_t>(i) : i == 0 ? 0 : start[i - 1];
  for (std::uint64_t first = 0; first < tokens.size(); first += 97) {
    TokenReader reader(info, info.train);  // a fresh one, so that each shard is met first at every place
    std::vector<std::int32_t> out(std::min<std::size_t>(1500, tokens.size() - first));
    reader.read_document_starts(first, out);
    for (std::size_t i = 0; i < out.size(); ++i) ASSERT_EQ(out[i], start[first + i] - static_cast<std::int64_t>(first)) << first << " " << i;
  }
}

TEST_F(Dataset, ManyShardsThroughFewOpenFiles) {
  const DatasetInfo many = prepare({folder / "a.jsonl"}, folder / "many", 0, 100).dataset;
  ASSERT_GT(many.train.shards.size(), 70u);  // and 64 stay open
  TokenReader reader(many, many.train);
  const auto whole = all_tokens(many, many.train);
  std::vector<std::int32_t> out(100);
  for (std::uint64_t i = 0; i < 500; ++i) {
    const std::uint64_t first = i * 7919 % (whole.size() - 100);
    reader.read(first, out);
    ASSERT_TRUE(std::equal(out.begin(), out.end(), whole.begin() + static_cast<std::ptrdiff_t>(first)));
  }
}

TEST_F(Dataset, DescribesItself) {
  const auto dataset = nlohmann::json::parse(describe_dataset(folder / "d", true));
  EXPECT_EQ(dataset.at("splits").at("train").at("tokens"), tokens.size());
  EXPECT_EQ(dataset.at("sources").size(), 3u);
  const auto first = nlohmann::json::parse(describe_shard(shard(0), true));
  EXPECT_EQ(first.at("tokens"), 1000);
  EXPECT_EQ(first.at("type"), "uint16");
  EXPECT_EQ(first.at("fletcher32"), true);
  EXPECT_EQ(first.at("split"), "train");
  EXPECT_EQ(first.at("tokenizer").at("hash"), info.tokenizer_hash);
  EXPECT_EQ(first.at("sources").at(0).at("file"), folder / "a.jsonl");
  EXPECT_NE(describe_dataset(folder / "d", false).find("81 documents"), std::string::npos);
  EXPECT_NE(describe_shard(shard(0), false).find("1000 (uint16"), std::string::npos);
  EXPECT_TRUE(is_shard(shard(0)));
  EXPECT_FALSE(is_shard(folder / "a.jsonl"));
  EXPECT_THROW(describe_shard(folder / "a.jsonl", true), std::invalid_argument);
}

TEST_F(Dataset, LengthsOfItsDocuments) {
  std::vector<std::uint64_t> lengths;
  for (const std::int32_t token : tokens) token == 256 ? lengths.push_back(1) : void(++lengths.back());
  const LengthHistogram found = document_lengths(info, info.train);  // the shards have 1000 tokens: one document fills several
  EXPECT_EQ(found.documents, lengths.size());
  EXPECT_EQ(found.tokens, tokens.size());
  std::vector<LengthHistogram::Bucket> buckets(found.buckets.size());
  for (const std::uint64_t length : lengths) {
    auto& bucket = buckets.at(static_cast<std::size_t>(std::log2(static_cast<double>(length))));
    ++bucket.documents;
    bucket.tokens += length;
  }
  for (std::size_t i = 0; i < buckets.size(); ++i) {
    EXPECT_EQ(found.buckets[i].documents, buckets[i].documents) << i;
    EXPECT_EQ(found.buckets[i].tokens, buckets[i].tokens) << i;
  }
  std::sort(lengths.begin(), lengths.end());
  EXPECT_EQ(found.shortest, lengths.front());
  EXPECT_EQ(found.longest, 3501u);
  EXPECT_EQ(found.median, lengths[lengths.size() / 2]);
  EXPECT_EQ(document_lengths(info, SplitInfo()).documents, 0u);
}

TEST_F(Dataset, SamplesAreItsDocuments) {
  const auto tokenizer = load_tokenizer("bytes");
  const auto documents = documents_of(info, info.train);
  std::set<std::uint64_t> numbers;
  for (const DocumentSample& sample : sample_documents(info, info.train, *tokenizer, 1000, 1, 10'000)) {
    EXPECT_TRUE(numbers.insert(sample.number).second);
    EXPECT_EQ(sample.text, documents.at(sample.number));
    EXPECT_EQ(sample.tokens, sample.text.size() + 1);
    EXPECT_TRUE(sample.whole);
  }
  EXPECT_EQ(numbers.size(), documents.size());
  const auto a = sample_documents(info, info.train, *tokenizer, 3, 1, 10), b = sample_documents(info, info.train, *tokenizer, 3, 2, 10);
  EXPECT_EQ(a.size(), 3u);
  EXPECT_TRUE(a[0].number != b[0].number || a[1].number != b[1].number || a[2].number != b[2].number);
  for (const DocumentSample& sample : a) EXPECT_EQ(sample.text, documents.at(sample.number).substr(0, 9));
  EXPECT_TRUE(sample_documents(info, info.validation, *tokenizer, 3, 1, 10).empty());
}

TEST_F(Dataset, DescribesItsContents) {
  const auto json = nlohmann::json::parse(describe_dataset(folder / "d", true, {2, 7}));
  EXPECT_EQ(json.at("lengths").at("train").at("documents"), info.train.documents);
  ASSERT_EQ(json.at("samples").at("train").size(), 2u);
  EXPECT_EQ(json.at("samples").at("train").at(0).at("whole"), json.at("samples").at("train").at(0).at("tokens") <= 200);
  const std::string text = describe_dataset(folder / "d", false, {2, 7});
  EXPECT_NE(text.find("longest 3501"), std::string::npos) << text;
  EXPECT_NE(text.find("  sample       train: document "), std::string::npos) << text;
  EXPECT_EQ(describe_dataset(folder / "d", false).find("sample "), std::string::npos);
  // Damage in one part leaves the others.
  const std::string path = shard(0), bytes = read_file(path);
  put(path, std::string(bytes.size(), 'x'));
  const std::string damaged = describe_dataset(folder / "d", false);
  EXPECT_NE(damaged.find("train: cannot be read: " + path), std::string::npos) << damaged;
  EXPECT_NE(damaged.find("sources      3 files"), std::string::npos) << damaged;
}

TEST_F(Dataset, MissingAndForeignFolders) {
  EXPECT_THROW(read_dataset(folder / "missing"), std::invalid_argument);
  EXPECT_THROW(read_dataset(folder.path()), std::invalid_argument);
  const std::string manifest = read_file(folder / "d/dataset.json");
  const auto broken = [&](const std::string& text) {
    put(folder / "d/dataset.json", text);
    EXPECT_THROW(read_dataset(folder / "d"), std::runtime_error) << text.substr(0, 50);
  };
  broken("");
  broken("{}");
  broken("[1]");
  broken(manifest.substr(0, manifest.size() / 2));
  broken(std::regex_replace(manifest, std::regex("\"version\": 2"), "\"version\": 3"));
  broken(std::regex_replace(manifest, std::regex("\"tokens\": 1000,"), "\"tokens\": 999,"));
}

TEST_F(Dataset, MissingAndTruncatedShards) {
  const std::string path = shard(3), bytes = read_file(path);
  for (const std::size_t size : {std::size_t{0}, std::size_t{100}, bytes.size() / 2, bytes.size() - 1}) {
    put(path, bytes.substr(0, size));
    const std::string message = message_of([&] { read_dataset(folder / "d"); });
    EXPECT_NE(message.find("shard_00003.h5"), std::string::npos) << message;
    EXPECT_NE(message.find(std::to_string(size)), std::string::npos) << message;
    // Cut short after the manifest was read.
    EXPECT_NE(message_of([&] { all_tokens(info, info.train); }).find("shard_00003.h5"), std::string::npos);
    EXPECT_FALSE(verify_dataset(folder / "d").empty());
    EXPECT_FALSE(verify_shard(path).empty());
  }
  fs::remove(path);
  EXPECT_NE(message_of([&] { read_dataset(folder / "d"); }).find("shard_00003.h5"), std::string::npos);
}

TEST_F(Dataset, EveryFlippedByteIsFoundOrHarmless) {
  const std::string path = shard(2), bytes = read_file(path);
  EXPECT_TRUE(holds_in_child([&] {
    int found = 0;
    SplitInfo alone;
    alone.shards = {info.train.shards[2]};
    alone.tokens = 1000;
    const std::vector<std::int32_t> expected(tokens.begin() + 2000, tokens.begin() + 3000);
    for (std::size_t i = 0; i < bytes.size(); i += i < 100 ? 1 : 13) {
      flip_bit(path, i, static_cast<int>(i % 8));
      try {
        ASSERT_EQ(all_tokens(info, alone), expected) << "byte " << i;
      } catch (const std::runtime_error& e) {
        ASSERT_NE(std::string(e.what()).find("shard_00002.h5"), std::string::npos) << e.what();
        ++found;
      }
      if (i % 31 == 0) {  // the SHA-256 sees every byte
        ASSERT_FALSE(verify_dataset(folder / "d").empty()) << "byte " << i;
      }
      flip_bit(path, i, static_cast<int>(i % 8));  // back
    }
    EXPECT_GT(found, 2000 / 13);  // the tokens themselves, and most of the structure
  }));
  EXPECT_TRUE(verify_dataset(folder / "d").empty());
}

TEST_F(Dataset, ADamagedChunkIsNamedWithItsTokens) {
  const std::string path = shard(2);
  const std::string bytes = read_file(path), sample = std::string(1, static_cast<char>(tokens[2500])) + '\0' + static_cast<char>(tokens[2501]) +
                                                      '\0' + static_cast<char>(tokens[2502]) + '\0' + static_cast<char>(tokens[2503]) + '\0' +
                                                      static_cast<char>(tokens[2504]) + '\0';
  const std::size_t at = bytes.find(sample);
  ASSERT_NE(at, std::string::npos);
  flip_bit(path, at);
  TokenReader reader(info, info.train);
  std::vector<std::int32_t> out(10);
  reader.read(1000, out);  // another shard
  const std::string message = message_of([&] { reader.read(2498, out); });
  EXPECT_NE(message.find("shard_00002.h5: tokens 498 to 508 cannot be read: the shard is damaged"), std::string::npos) << message;
  const auto problems = verify_dataset(folder / "d");
  ASSERT_EQ(problems.size(), 3u);  // SHA-256, the block, and the first read
}

TEST_F(Dataset, ShardsOfAnotherTokenizerOrDatasetAreRefused) {
  DatasetInfo wrong = info;
  wrong.tokenizer_hash = "0123";
  EXPECT_NE(message_of([&] { all_tokens(wrong, wrong.train); }).find("tokenizer's hash"), std::string::npos);
  wrong = info;
  wrong.vocabulary = 300;
  EXPECT_NE(message_of([&] { all_tokens(wrong, wrong.train); }).find("vocabulary is 257"), std::string::npos);
  // A shard that is whole but belongs elsewhere.
  fs::copy_file(shard(static_cast<int>(info.train.shards.size()) - 1), shard(1), fs::copy_options::overwrite_existing);
  EXPECT_NE(message_of([&] { all_tokens(info, info.train); }).find("shard_00001.h5"), std::string::npos);
  EXPECT_FALSE(verify_dataset(folder / "d").empty());
}

TEST_F(Dataset, TokensOutsideTheVocabularyAreRefused) {
  const std::string path = folder / "odd.h5";
  const auto make = [&](std::uint16_t token, std::uint64_t start) {
    Hdf5File file = Hdf5File::create(path);
    file.write<std::uint16_t>("tokens", {3}, std::vector<std::uint16_t>{256, 65, token});
    file.write<std::uint64_t>("documents", {2}, std::vector<std::uint64_t>{start, 3});
    for (const char* name : {"split", "tokenizer", "tokenizer_hash"}) file.set_attribute(name, "x");
    file.set_attribute("sources", "[]");
    for (const char* name : {"format_version", "text_bytes", "source_files"}) file.set_attribute(name, 1);
    file.set_attribute("vocabulary", 257);
    file.set_attribute("end_of_text", 256);
    file.close();
  };
  make(66, 0);
  EXPECT_TRUE(verify_shard(path).empty());
  make(257, 0);
  ASSERT_EQ(verify_shard(path).size(), 1u);
  EXPECT_NE(verify_shard(path)[0].find("token 257 at index 2"), std::string::npos);
  DatasetInfo odd;
  odd.directory = folder.path();
  odd.tokenizer_hash = "x";
  odd.vocabulary = 257;
  odd.train.shards = {{"odd.h5", 3, 1, 1, 1, ""}};
  EXPECT_NE(message_of([&] { all_tokens(odd, odd.train); }).find("token 257 at index 2 lies outside the vocabulary of 257"), std::string::npos);
  make(66, 1);  // a document that does not begin with the end-of-text token
  ASSERT_EQ(verify_shard(path).size(), 1u);
  EXPECT_NE(verify_shard(path)[0].find("begins with token 65"), std::string::npos);
}

TEST_F(Dataset, VerifyChecksTheTokenizersCopy) {
  EXPECT_TRUE(verify_dataset(folder / "d").empty());
  fs::remove(folder / "d/tokenizer.json");
  ASSERT_EQ(verify_dataset(folder / "d").size(), 1u);
  EXPECT_NE(verify_dataset(folder / "d")[0].find("tokenizer.json"), std::string::npos);
}

}  // namespace
}  // namespace tessera
