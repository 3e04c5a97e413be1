// Runs of prepare that are interrupted: by kill -9 anywhere, by a full disk, by bad input.

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <random>
#include <thread>

#include "data/files.h"
#include "data/output_folder.h"
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
    if (item.is_regular_file() && item.path().filename() != "lock")
      out[fs::relative(item.path(), folder).string()] = sha256_file(item.path().string());
  return out;
}

PrepareSummary run(const PrepareOptions& options) { return prepare_dataset(*load_tokenizer("bytes"), options); }

/// Enough text (more than the 16 MiB after which the split is decided) for hundreds of records: lines of JSON, some bad and many repeated, and
/// texts of one piece and of many.
class Interrupted : public testing::Test {
 protected:
  Interrupted() {
    put(folder / "a.jsonl", jsonl(30'000, 1) + "{broken\n" + jsonl(30'000, 2));
    put(folder / "b.txt", words(3'000'000, 3));
    put(folder / "c.jsonl", jsonl(20'000, 2) + "{\"text\": 1}\n" + jsonl(10'000, 4));
    put(folder / "d.jsonl", "{\"text\": \"" + std::string(2 << 20, 'x') + "\"}\n" + jsonl(20'000, 5));
    options.inputs = {folder / "a.jsonl", folder / "b.txt", folder / "c.jsonl", folder / "d.jsonl"};
    options.output = folder / "out";
    options.validation_fraction = 0.1;
    options.shard_tokens = 1'000'000;
    options.threads = 2;
    options.reader.skip_bad = true;
    options.journal_seconds = 0.01;
  }
  std::map<std::string, std::string> uninterrupted() {
    PrepareOptions whole = options;
    whole.output = folder / "whole";
    run(whole);
    EXPECT_TRUE(verify_dataset(folder / "whole").empty());
    return contents(folder / "whole");
  }
  std::string journal() const { return folder / "out/.prepare/journal.json"; }

  nlohmann::json journal_json() const { return nlohmann::json::parse(read_file(journal()).substr(65)); }
  /// Runs until about `milliseconds` after the first record and until `shards` are finished, or to the end; true when it was killed.
  bool run_and_kill(int milliseconds, std::size_t shards = 0) const {
    const pid_t child = ::fork();
    if (child == 0) {
      run(options);
      ::_exit(0);
    }
    const bool resumed = fs::exists(journal());
    int status = 0;
    while (!resumed && !fs::exists(journal()) && ::waitpid(child, &status, WNOHANG) == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    std::this_thread::sleep_for(std::chrono::milliseconds(milliseconds));
    try {
      while (shards > 0 && journal_json().at("state").at("train").at("shards").size() < shards)
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    } catch (const std::exception&) {  // no journal any more: the run has ended
    }
    ::kill(child, SIGKILL);
    ::waitpid(child, &status, 0);
    return !is_dataset(options.output) || fs::exists(folder / "out/.prepare/complete");  // the very last step may have been killed too
  }

  TemporaryFolder folder;
  PrepareOptions options;
};

TEST_F(Interrupted, KilledAnywhereTheResultIsTheSameToTheByte) {
  std::mt19937 random(1);
  int kills = 0;
  for (const bool dedup : {false, true}) {
    options.dedup = dedup;
    const auto expected = uninterrupted();
    ASSERT_GT(expected.size(), 15u);
    for (int attempt = 0; attempt < 2; ++attempt) {
      options.resume = false;
      bool killed = run_and_kill(static_cast<int>(random() % 60));
      for (options.resume = true; killed && kills < 200; options.threads = 1 + static_cast<int>(random() % 3)) {
        ++kills;
        killed = run_and_kill(5 + static_cast<int>(random() % 150));
      }
      if (killed) run(options);
      ASSERT_TRUE(contents(folder / "out") == expected) << dedup << " " << attempt;
      fs::remove_all(folder / "out");
    }
    fs::remove_all(folder / "whole");
  }
  EXPECT_GT(kills, 10);
}

TEST_F(Interrupted, FinishedShardsAreNotMadeAgain) {
  while (!run_and_kill(0, 4)) fs::remove_all(folder / "out");  // on a busy machine a run may end before this process is given time to kill it
  const auto before = fs::last_write_time(folder / "out/.prepare/train/shard_00000.h5");
  EXPECT_EQ(journal_json().at("state").at("train").at("shards").at(0).at(1), 1'000'000);
  options.resume = true;
  const PrepareSummary summary = run(options);
  EXPECT_EQ(fs::last_write_time(folder / "out/train/shard_00000.h5"), before);
  EXPECT_LT(summary.tokens, summary.dataset.train.tokens + summary.dataset.validation.tokens - 4'000'000);
  ASSERT_FALSE(summary.notices.empty());
  EXPECT_NE(summary.notices[0].find("resumed after"), std::string::npos);
}

TEST_F(Interrupted, OnlyTheSameRunIsResumed) {
  ASSERT_TRUE(run_and_kill(20));
  options.resume = true;
  const auto refused = [&](const PrepareOptions& other) { return message_of([&] { run(other); }); };
  PrepareOptions other = options;
  other.shard_tokens = 2'000'000;
  EXPECT_NE(refused(other).find("--shard-tokens 1000000, this one has 2000000"), std::string::npos) << refused(other);
  other = options;
  other.inputs.pop_back();
  EXPECT_NE(refused(other).find("3 input files, the interrupted run had 4"), std::string::npos) << refused(other);
  other = options;
  other.dedup = true;
  EXPECT_NE(refused(other).find("--dedup"), std::string::npos);
  EXPECT_TRUE(fs::exists(journal()));  // a refusal takes nothing away

  const std::string text = read_file(journal());
  flip_bit(journal(), text.size() / 2);
  EXPECT_NE(refused(options).find("journal of the interrupted run is damaged"), std::string::npos);
  put(journal(), text);
  for (const auto& item : fs::directory_iterator(folder / "out/.prepare"))
    if (item.path().extension() == ".tokens") flip_bit(item.path().string(), 5);
  EXPECT_NE(refused(options).find("is not as the interrupted run left it"), std::string::npos);

  put(folder / "b.txt", words(3'000'001, 3));
  EXPECT_NE(refused(options).find("b.txt has changed since"), std::string::npos);
  options.resume = false;  // replaced, as ever, and said
  const PrepareSummary summary = run(options);
  EXPECT_NE(summary.notices.at(0).find("--resume would have gone on"), std::string::npos);
  EXPECT_TRUE(verify_dataset(folder / "out").empty());
}

TEST_F(Interrupted, AFullDiskStopsCleanlyAndIsResumed) {
  options.shard_tokens = 20'000'000;
  options.output = folder / "large";
  run(options);
  const auto large = contents(folder / "large");
  options.output = folder / "out";
  const int status = with_file_size_limit(36'000'000, [&] {  // the first shard has 40 MB
    const std::string message = message_of([&] { run(options); });
    return message.find("writing ") != std::string::npos && message.find("--resume goes on with it") != std::string::npos ? 7 : 8;
  });
  ASSERT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), 7);
  EXPECT_FALSE(is_dataset(folder / "out"));
  options.resume = true;
  run(options);
  EXPECT_EQ(contents(folder / "out"), large);
}

TEST_F(Interrupted, ABadLineStopsAndIsPassedByResume) {
  const auto expected = uninterrupted();
  options.reader.skip_bad = false;
  put(folder / "a.jsonl", jsonl(30'000, 1) + jsonl(30'000, 2));  // the bad line of c.jsonl is met after the first record
  const std::string message = message_of([&] { run(options); });
  EXPECT_NE(message.find("c.jsonl:20001:"), std::string::npos) << message;
  EXPECT_NE(message.find("--resume"), std::string::npos) << message;
  options.resume = true;
  options.skip_errors = true;
  const PrepareSummary summary = run(options);
  EXPECT_EQ(summary.dataset.preparation.bad_documents, 1u);
  ASSERT_EQ(summary.problems.size(), 1u);
  EXPECT_NE(summary.problems[0].find("c.jsonl:20001:"), std::string::npos);
  EXPECT_EQ(contents(folder / "out").at("train/shard_00000.h5"), expected.at("train/shard_00000.h5"));
}

TEST(OutputFolder, TheLastStepMayBeKilledAnywhere) {
  // Each call that changes a folder is one step; the process ends before step n. Emulated with the states that those ends leave.
  const TemporaryFolder folder;
  put(folder / "old.txt", "the old text");
  put(folder / "new.jsonl", jsonl(100, 1));
  prepare({folder / "old.txt"}, folder / "old", 0);
  prepare({folder / "new.jsonl"}, folder / "new");
  const auto expected = contents(folder / "new");
  const std::vector<std::string> parts = {"train", "validation", "tokenizer.json", "dataset.json"};
  const auto move = [](const std::string& from, const std::string& to) {
    if (fs::exists(from)) fs::rename(from, to);
  };
  for (int steps = 0; steps <= 8; ++steps) {
    const std::string out = folder / "out";
    fs::copy(folder / "old", out, fs::copy_options::recursive);
    fs::create_directories(out + "/.prepare");
    fs::copy(folder / "new", out + "/.prepare", fs::copy_options::recursive);
    put(out + "/.prepare/complete", "train\nvalidation\ntokenizer.json\ndataset.json\n");
    int left = steps;
    if (left-- > 0) fs::create_directories(out + "/.prepare/old");
    if (left-- > 0) move(out + "/dataset.json", out + "/.prepare/old/dataset.json");
    for (const std::string& part : parts) {
      if (part != "dataset.json" && left-- > 0) move(out + "/" + part, out + "/.prepare/old/" + part);
      if (left-- > 0) move(out + "/.prepare/" + part, out + "/" + part);
    }
    PrepareOptions options;
    options.inputs = {folder / "new.jsonl"};
    options.output = out;
    options.resume = steps % 2 == 0;
    if (options.resume) {
      EXPECT_NE(run(options).notices.at(0).find("complete but for its last step"), std::string::npos);
    } else {
      EXPECT_NE(message_of([&] { run(options); }).find("is in place now"), std::string::npos);
    }
    EXPECT_EQ(contents(out), expected) << steps;
    fs::remove_all(out);
  }
}

TEST_F(Interrupted, ReplacingADatasetMayBeKilledAndLosesNeither) {
  put(folder / "small.txt", "the old text");
  options.inputs = {folder / "small.txt"};
  options.output = folder / "other";
  run(options);
  const auto other = contents(folder / "other");
  put(folder / "second.txt", "another text");
  std::mt19937 random(2);
  for (int i = 0; i < 40; ++i) {
    fs::remove_all(folder / "out");
    fs::copy(folder / "other", folder / "out", fs::copy_options::recursive);
    options.output = folder / "out";
    options.overwrite = true;
    options.resume = false;
    options.inputs = {folder / "second.txt"};
    const pid_t child = ::fork();
    if (child == 0) {
      run(options);
      ::_exit(0);
    }
    std::this_thread::sleep_for(std::chrono::microseconds(random() % 30'000));
    ::kill(child, SIGKILL);
    int status = 0;
    ::waitpid(child, &status, 0);
    if (is_dataset(folder / "out")) {
      EXPECT_TRUE(verify_dataset(folder / "out").empty());
    } else {
      EXPECT_TRUE(fs::exists(folder / "out/.prepare/complete"));
      options.resume = true;
      EXPECT_EQ(run(options).dataset.train.text_bytes, 12u);
      EXPECT_TRUE(verify_dataset(folder / "out").empty());
    }
  }
}

}  // namespace
}  // namespace tessera
