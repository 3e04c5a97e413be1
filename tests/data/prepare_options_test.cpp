// Options of prepare: duplicates, errors that are left out, the order of the inputs, estimates; and the manifest.

#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <regex>
#include <set>

#include "data/dedup.h"
#include "data/files.h"
#include "data/prepare.h"
#include "data/sha256.h"
#include "tests/data/corpus.h"

namespace tessera {
namespace {

namespace fs = std::filesystem;
using namespace test;

std::map<std::string, std::string> contents(const std::string& folder) {
  std::map<std::string, std::string> out;
  for (const auto& item : fs::recursive_directory_iterator(folder))
    if (item.is_regular_file()) out[fs::relative(item.path(), folder).string()] = sha256_file(item.path().string());
  return out;
}

PrepareSummary run(const PrepareOptions& options) { return prepare_dataset(*load_tokenizer("bytes"), options); }

std::string line(const std::string& text) { return nlohmann::json{{"text", text}}.dump() + "\n"; }

TEST(PrepareOptions, TheOrderOfTheInputsDoesNotMatter) {
  const TemporaryFolder folder;
  PrepareOptions options;
  for (const char* name : {"a.jsonl", "b.jsonl", "c.txt"}) {
    put(folder / name, name[2] == 't' ? words(100'000, 6) : jsonl(300, static_cast<unsigned>(name[0])));
    options.inputs.push_back(folder / name);
  }
  options.shard_tokens = 20'000;
  options.output = folder / "sorted";
  run(options);
  const auto expected = contents(folder / "sorted");
  options.output = folder / "other";
  do {
    options.overwrite = true;
    run(options);
    ASSERT_EQ(contents(folder / "other"), expected);
  } while (std::next_permutation(options.inputs.begin(), options.inputs.end()));
  options.inputs = {folder / "?.*"};
  run(options);
  EXPECT_EQ(contents(folder / "other"), expected);
}

TEST(PrepareOptions, DuplicatesAreLeftOutOnce) {
  const TemporaryFolder folder;
  const std::string large = words(300'000, 1);  // several pieces
  std::string changed = large;
  changed.back() = '!';  // differs in its last piece only
  const std::string text = "\xff\xfe not UTF-8\n";
  put(folder / "a.jsonl", line("one") + line("two") + line("one") + line(large) + line(changed) + jsonl(500, 7));
  put(folder / "b.txt", large + "\n<|endoftext|>\ntwo\n<|endoftext|>\n" + text + "<|endoftext|>\n" + text);
  put(folder / "c.txt", large);
  put(folder / "d.jsonl", jsonl(600, 7) + line("two\n"));
  PrepareOptions options;
  options.inputs = {folder.path()};
  options.output = folder / "all";
  options.validation_fraction = 0;
  options.shard_tokens = 100'000;
  const DatasetInfo all = run(options).dataset;
  const auto every = documents_of(all, all.train);
  options.output = folder / "unique";
  options.dedup = true;
  const PrepareSummary summary = run(options);
  std::vector<std::string> expected;
  std::set<std::string> seen;
  std::uint64_t left_out = 0;
  for (const std::string& document : every) {
    if (seen.insert(document).second) {
      expected.push_back(document);
    } else {
      left_out += document.size();
    }
  }
  EXPECT_LT(expected.size(), every.size() - 500);
  EXPECT_EQ(documents_of(summary.dataset, summary.dataset.train), expected);
  EXPECT_EQ(summary.dataset.preparation.duplicates, every.size() - expected.size());
  EXPECT_EQ(summary.dataset.preparation.duplicate_bytes, left_out);
  EXPECT_TRUE(read_dataset(folder / "unique").preparation.deduplicated);
  EXPECT_TRUE(verify_dataset(folder / "unique").empty());
  const auto once = contents(folder / "unique");
  for (const int threads : {1, 5}) {
    options.threads = threads;
    options.overwrite = true;
    run(options);
    EXPECT_EQ(contents(folder / "unique"), once);
  }
}

TEST(KeySet, AgainstASet) {
  KeySet keys;
  std::set<TextKey> expected;
  std::uint64_t state = 1;
  for (int i = 0; i < 200'000; ++i) {
    const auto next = [&] { return state = state * 6364136223846793005u + 1442695040888963407u; };
    TextKey key{next() >> 48, next() >> 62 << 56};
    if (i % 1000 == 0) key = {};
    EXPECT_EQ(keys.insert(key), expected.insert(key).second);
  }
  EXPECT_EQ(keys.size(), expected.size());
}

TEST(PrepareOptions, BadDocumentsAndDamagedFilesAreLeftOutByChoice) {
  const TemporaryFolder folder;
  put(folder / "a.jsonl", line("good") + "{broken\n" + line("fine"));
  ASSERT_EQ(std::system(("gzip -c " + (folder / "a.jsonl") + " > " + (folder / "cut.jsonl.gz")).c_str()), 0);
  put(folder / "long.jsonl", jsonl(3000, 9));
  ASSERT_EQ(std::system(("gzip " + (folder / "long.jsonl")).c_str()), 0);
  const std::string whole = read_file(folder / "long.jsonl.gz");
  put(folder / "long.jsonl.gz", whole.substr(0, whole.size() / 2));
  put(folder / "z.txt", "the last");
  PrepareOptions options;
  options.inputs = {folder.path()};
  options.output = folder / "out";
  options.validation_fraction = 0;
  const std::string stopped = message_of([&] { run(options); });
  EXPECT_NE(stopped.find("a.jsonl:2:"), std::string::npos) << stopped;
  options.reader.skip_bad = true;
  const std::string damaged = message_of([&] { run(options); });
  EXPECT_NE(damaged.find("long.jsonl.gz: gzip"), std::string::npos) << damaged;
  EXPECT_NE(damaged.find("offset"), std::string::npos) << damaged;
  options.reader.skip_bad = false;
  options.skip_errors = true;
  const PrepareSummary summary = run(options);
  EXPECT_EQ(summary.dataset.preparation.bad_documents, 2u);
  EXPECT_EQ(summary.dataset.preparation.bad_files, 1u);
  ASSERT_EQ(summary.problems.size(), 3u);
  EXPECT_NE(summary.problems[0].find("a.jsonl:2:"), std::string::npos);
  EXPECT_EQ(summary.problems[0].find("--skip-bad"), std::string::npos);
  EXPECT_NE(summary.problems[1].find("cut.jsonl.gz:2:"), std::string::npos);
  EXPECT_NE(summary.problems[2].find("long.jsonl.gz"), std::string::npos);
  EXPECT_NE(summary.problems[2].find("the rest of the file was left out"), std::string::npos);
  const auto documents = documents_of(summary.dataset, summary.dataset.train);
  EXPECT_EQ(documents.front(), "good");
  EXPECT_EQ(documents.back(), "the last");
  EXPECT_GT(documents.size(), 1000u);  // those before the damage
  EXPECT_LT(documents.size(), 2000u);
  EXPECT_NE(describe(summary, false).find("left out: "), std::string::npos);
  EXPECT_EQ(nlohmann::json::parse(describe(summary, true)).at("problems").size(), 3u);
}

TEST(Manifest, ListsInputsAndTokens) {
  const TemporaryFolder folder;
  put(folder / "a.jsonl", jsonl(400, 1));
  put(folder / "b.txt", words(250'000, 2));
  put(folder / "c.jsonl", jsonl(400, 3));
  PrepareOptions options;
  options.inputs = {folder.path()};
  options.output = folder / "out";
  options.shard_tokens = 30'000;
  run(options);
  const DatasetInfo info = read_dataset(folder / "out");
  EXPECT_EQ(info.preparation.held_out, "documents");
  EXPECT_EQ(info.preparation.validation_fraction, 0.01);
  std::uint64_t tokens = 0;
  for (const SourceInfo& source : info.sources) tokens += source.tokens;
  EXPECT_EQ(tokens, info.train.tokens + info.validation.tokens);
  // A shard's stretches lie in the order of the files and cover its documents; each document begins in one shard.
  std::vector<std::uint64_t> next(info.sources.size());
  for (const ShardInfo& shard : info.train.shards) {
    ASSERT_FALSE(shard.inputs.empty());
    std::uint64_t covered = 0;
    for (const ShardInput& input : shard.inputs) {
      ASSERT_LT(input.source, info.sources.size());
      EXPECT_LE(input.first_document, input.last_document);
      EXPECT_GE(input.first_document + 1, next[input.source]);  // the last one of the shard before may go on
      next[input.source] = input.last_document + 1;
      covered += input.last_document - input.first_document + 1;
    }
    EXPECT_GE(covered, shard.documents);
    EXPECT_LE(covered, shard.documents + 1 + info.validation.documents);
  }
  EXPECT_LE(next[0], 400u);
  EXPECT_EQ(next[1], 1u);
  EXPECT_GE(next[2], 398u);
}

TEST(Manifest, EveryFlippedBitIsFound) {
  const TemporaryFolder folder;
  put(folder / "a.jsonl", jsonl(100, 1));
  prepare({folder / "a.jsonl"}, folder / "out");
  const std::string path = folder / "out/dataset.json", text = read_file(path);
  EXPECT_TRUE(text.ends_with("\"\n}\n"));
  const std::size_t line = text.rfind(",\n  \"sha256\"");  // as anybody can check it
  EXPECT_EQ(sha256_hex(text.substr(0, line) + "\n}\n"), text.substr(text.size() - 68, 64));
  for (std::size_t i = 0; i < text.size(); ++i) {
    std::string flipped = text;
    flipped[i] = static_cast<char>(flipped[i] ^ 1 << i % 8);
    put(path, flipped);
    ASSERT_THROW(read_dataset(folder / "out"), std::runtime_error) << i << ": " << text.substr(i, 10);
  }
  put(path, text);
  EXPECT_TRUE(verify_dataset(folder / "out").empty());
}

TEST(Manifest, TheFirstVersionIsStillRead) {
  const TemporaryFolder folder;
  put(folder / "a.jsonl", jsonl(100, 1));
  const DatasetInfo info = prepare({folder / "a.jsonl"}, folder / "out").dataset;
  auto json = nlohmann::ordered_json::parse(read_file(folder / "out/dataset.json"));
  json["version"] = 1;
  json.erase("sha256");
  json.erase("preparation");
  for (const char* split : {"train", "validation"})
    for (auto& shard : json["splits"][split]["shards"]) shard.erase("inputs");
  for (auto& source : json["sources"]) source.erase("tokens");
  put(folder / "out/dataset.json", json.dump(2));
  const DatasetInfo old = read_dataset(folder / "out");
  EXPECT_EQ(old.train.tokens, info.train.tokens);
  EXPECT_EQ(old.preparation.held_out, "");
  EXPECT_TRUE(verify_dataset(folder / "out").empty());
}

TEST(PrepareEstimate, IsCloseToWhatComesOut) {
  const TemporaryFolder folder;
  PrepareOptions options;
  options.inputs = {folder.path()};
  options.output = folder / "out";
  options.validation_fraction = 0.1;
  options.shard_tokens = 1'000'000;
  for (unsigned i = 0; i < 12; ++i) put(folder / std::to_string(i) + ".jsonl", jsonl(20'000 + 1000 * static_cast<int>(i), i + 1));
  const auto tokenizer = load_tokenizer("bytes");
  const PrepareEstimate part = estimate_dataset(*tokenizer, options, 16'000'000);
  EXPECT_FALSE(fs::exists(folder / "out"));
  EXPECT_EQ(part.files, 12u);
  EXPECT_EQ(part.sampled_files, 8u);
  EXPECT_FALSE(part.exact);
  EXPECT_LT(part.sampled_bytes, 19'000'000u);
  const PrepareEstimate all = estimate_dataset(*tokenizer, options, 1'000'000'000);
  const DatasetInfo info = run(options).dataset;
  const auto tokens = static_cast<double>(info.train.tokens + info.validation.tokens);
  EXPECT_NEAR(part.tokens, tokens, 0.1 * tokens);
  EXPECT_LE(part.tokens_low, tokens);
  EXPECT_GE(part.tokens_high, tokens);
  EXPECT_NEAR(part.documents, static_cast<double>(info.train.documents + info.validation.documents), 0.1 * part.documents);
  std::uint64_t disk = 0;
  for (const SplitInfo* split : {&info.train, &info.validation})
    for (const ShardInfo& shard : split->shards) disk += shard.file_bytes;
  EXPECT_NEAR(part.disk_bytes, static_cast<double>(disk), 0.1 * part.disk_bytes);
  EXPECT_NEAR(part.shards, static_cast<double>(info.train.shards.size() + info.validation.shards.size()), 3);
  EXPECT_FALSE(all.exact);  // 8 of 12 files

  for (int i = 6; i < 12; ++i) fs::remove(folder / std::to_string(i) + ".jsonl");
  options.overwrite = true;
  const DatasetInfo fewer = run(options).dataset;
  const PrepareEstimate counted = estimate_dataset(*tokenizer, options, 1'000'000'000);
  EXPECT_TRUE(counted.exact);
  EXPECT_EQ(counted.tokens, static_cast<double>(fewer.train.tokens + fewer.validation.tokens));
  const auto json = nlohmann::json::parse(describe(counted, true));
  EXPECT_EQ(json.at("tokens"), fewer.train.tokens + fewer.validation.tokens);
  EXPECT_NE(describe(counted, false).find("counted from all"), std::string::npos);
  options.inputs = {"-"};
  EXPECT_NE(message_of([&] { estimate_dataset(*tokenizer, options, 1000); }).find("standard input"), std::string::npos);
}

}  // namespace
}  // namespace tessera
