#include "data/prepare.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/file.h>
#include <unistd.h>

#include <chrono>
#include <cmath>
#include <csignal>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <numbers>
#include <set>
#include <thread>

#include "data/files.h"
#include "data/hdf5_file.h"
#include "data/sha256.h"
#include "tests/data/corpus.h"

namespace tessera {
namespace {

namespace fs = std::filesystem;
using namespace test;

/// SHA-256 of each file, by its path in the folder.
std::map<std::string, std::string> contents(const std::string& folder) {
  std::map<std::string, std::string> out;
  for (const auto& item : fs::recursive_directory_iterator(folder))
    if (item.is_regular_file()) out[fs::relative(item.path(), folder).string()] = sha256_file(item.path().string());
  return out;
}

std::vector<std::string> names(const std::string& folder) {
  std::vector<std::string> out;
  for (const auto& item : fs::directory_iterator(folder)) out.push_back(item.path().filename().string());
  std::sort(out.begin(), out.end());
  return out;
}

const std::vector<std::string> kWhole = {"dataset.json", "tokenizer.json", "train", "validation"};

TEST(Prepare, KeepsEveryDocumentOnce) {
  const TemporaryFolder folder;
  put(folder / "a.txt", "first\n<|endoftext|>\nsecond \xff\xfe\n");
  put(folder / "b.jsonl", jsonl(300, 1));
  const PrepareSummary summary = prepare({folder / "a.txt", folder / "b.jsonl"}, folder / "out");
  const DatasetInfo info = read_dataset(folder / "out");

  auto train = documents_of(info, info.train), validation = documents_of(info, info.validation);
  EXPECT_EQ(train.size(), info.train.documents);
  EXPECT_EQ(validation.size(), info.validation.documents);
  EXPECT_EQ(validation.size(), 30u);  // 10 % of 302, ranked
  std::vector<std::string> expected = {"first\n", "second \xff\xfe\n"};
  DocumentReader reader({folder / "b.jsonl"}, {});
  std::vector<Entry> entries;
  while (reader.next(entries, 1 << 20))
    for (const Entry& entry : entries) reader.pieces(entry, [&](std::string_view text, bool) { expected.emplace_back(text); });
  train.insert(train.end(), validation.begin(), validation.end());
  std::sort(train.begin(), train.end());
  std::sort(expected.begin(), expected.end());
  EXPECT_EQ(train, expected);

  std::uint64_t bytes = 0;
  for (const std::string& text : expected) bytes += text.size();
  EXPECT_EQ(info.train.text_bytes + info.validation.text_bytes, bytes);
  EXPECT_EQ(info.train.tokens + info.validation.tokens, bytes + expected.size());
  ASSERT_EQ(info.sources.size(), 2u);
  EXPECT_EQ(info.sources[0].file, folder / "a.txt");
  EXPECT_EQ(info.sources[0].documents, 2u);
  EXPECT_EQ(info.sources[1].documents, 300u);
  EXPECT_EQ(info.tokenizer_hash, load_tokenizer("bytes")->hash());
  EXPECT_EQ(load_tokenizer("bpe:" + folder / "out/tokenizer.json")->hash(), info.tokenizer_hash);
  EXPECT_EQ(names(folder / "out"), kWhole);
  EXPECT_TRUE(verify_dataset(folder / "out").empty());
  EXPECT_EQ(summary.dataset.train.tokens, info.train.tokens);
}

TEST(Prepare, DoesNotDependOnThreads) {
  const TemporaryFolder folder;
  put(folder / "a.jsonl", jsonl(3000, 2));
  put(folder / "b.txt", words(900'000, 3));
  const std::vector<std::string> inputs = {folder / "a.jsonl", folder / "b.txt"};
  prepare(inputs, folder / "one", 0.1, 100'000, 1);
  std::this_thread::sleep_for(std::chrono::milliseconds(1100));  // nor on the time
  const auto expected = contents(folder / "one");
  EXPECT_GE(expected.size(), 12u);
  for (const int threads : {2, 7}) {
    prepare(inputs, folder / "more", 0.1, 100'000, threads);
    EXPECT_EQ(contents(folder / "more"), expected) << threads;
    fs::remove_all(folder / "more");
  }
}

TEST(Prepare, TheValidationSplitDoesNotDependOnOrder) {
  const TemporaryFolder folder;
  put(folder / "a.jsonl", jsonl(500, 4));
  put(folder / "b.jsonl", jsonl(400, 5));
  put(folder / "c.txt", words(200'000, 6));  // a document of several pieces stays whole
  std::vector<std::string> inputs = {folder / "a.jsonl", folder / "b.jsonl", folder / "c.txt"};
  std::multiset<std::string> expected;
  for (int i = 0; i < 3; ++i) {
    const DatasetInfo info = prepare(inputs, folder / std::to_string(i)).dataset;
    const auto validation = documents_of(info, info.validation);
    const std::multiset<std::string> found(validation.begin(), validation.end());
    EXPECT_EQ(info.train.documents + info.validation.documents, 901u);
    if (i == 0) expected = found;
    EXPECT_EQ(found, expected);
    std::rotate(inputs.begin(), inputs.begin() + 1, inputs.end());
  }
}

TEST(Prepare, LargeCorporaAreDrawnByThreshold) {
  const TemporaryFolder folder;
  std::string text;  // 18 MB: more than is kept for ranking
  for (int i = 0; i < 9000; ++i) text += std::to_string(i) + std::string(2000, 'x') + "\n<|endoftext|>\n";
  put(folder / "a.txt", text);
  const DatasetInfo info = prepare({folder / "a.txt"}, folder / "out", 0.05).dataset;
  EXPECT_EQ(info.train.documents + info.validation.documents, 9000u);
  EXPECT_NEAR(static_cast<double>(info.validation.documents), 450, 5 * std::sqrt(450));
  const auto held = documents_of(info, info.validation);
  // The same documents in another order, and fewer of them: those that were held out still are.
  std::string half;
  for (int i = 8999; i >= 0; --i) half += std::to_string(i) + std::string(2000, 'x') + "\n<|endoftext|>\n";
  put(folder / "b.txt", half);
  const DatasetInfo again = prepare({folder / "b.txt"}, folder / "again", 0.05).dataset;
  auto reversed = documents_of(again, again.validation);
  std::reverse(reversed.begin(), reversed.end());
  EXPECT_EQ(reversed, held);
}

TEST(Prepare, FewDocumentsAtTheFrontDecideNothing) {
  const TemporaryFolder folder;
  const std::string large = words(20'000'000, 8);  // more than is read before the way of holding out is chosen
  std::map<std::string, std::multiset<std::string>> held;
  for (const char* name : {"a", "z"}) {
    fs::create_directories(folder / name);
    put(folder / name + ("/" + std::string(name) + ".txt"), large);
    put(folder / name + "/m.jsonl", jsonl(1000, 3));
    const DatasetInfo info = prepare({folder / name}, folder / (std::string(name) + "-data"), 0.2).dataset;
    EXPECT_EQ(info.preparation.held_out, "documents");
    const auto validation = documents_of(info, info.validation);
    held[name] = {validation.begin(), validation.end()};
    EXPECT_NEAR(static_cast<double>(info.validation.text_bytes), 660'000, 600'000);  // beyond 16 MiB the large one is held out by pieces
    EXPECT_TRUE(verify_dataset(folder / (std::string(name) + "-data")).empty());
  }
  EXPECT_GT(held["a"].size(), 150u);
  EXPECT_TRUE(held["a"] == held["z"]);

  // Of too few it is all held out by pieces, wherever they stand.
  put(folder / "z/m.jsonl", jsonl(19, 3));
  put(folder / "a/m.jsonl", jsonl(18, 3));
  EXPECT_EQ(prepare({folder / "z"}, folder / "19").dataset.preparation.held_out, "documents");  // 20 with the large one
  EXPECT_EQ(prepare({folder / "a"}, folder / "18").dataset.preparation.held_out, "pieces");
}

TEST(Prepare, ASingleDocumentIsHeldOutByPieces) {
  const TemporaryFolder folder;
  const std::string text = words(1'200'000, 7);
  put(folder / "a.txt", text);
  const PrepareSummary summary = prepare({folder / "a.txt"}, folder / "out", 0.1);
  const DatasetInfo& info = summary.dataset;
  EXPECT_NEAR(static_cast<double>(info.validation.text_bytes), 120'000, 70'000);
  EXPECT_EQ(info.train.text_bytes + info.validation.text_bytes, text.size());
  ASSERT_EQ(summary.notices.size(), 1u);
  EXPECT_NE(summary.notices[0].find("pieces"), std::string::npos);
  for (const SplitInfo* split : {&info.train, &info.validation})
    for (const std::string& stretch : documents_of(info, *split)) EXPECT_NE(text.find(stretch), std::string::npos);
  EXPECT_TRUE(verify_dataset(folder / "out").empty());
}

TEST(Prepare, TinyInputsAndNoValidation) {
  const TemporaryFolder folder;
  put(folder / "a.txt", "x");
  const PrepareSummary summary = prepare({folder / "a.txt"}, folder / "one", 0.5);
  EXPECT_EQ(summary.dataset.train.tokens, 2u);
  EXPECT_EQ(summary.dataset.validation.tokens, 0u);
  ASSERT_EQ(summary.notices.size(), 1u);
  EXPECT_NE(summary.notices[0].find("validation split is empty"), std::string::npos);
  EXPECT_TRUE(verify_dataset(folder / "one").empty());
  put(folder / "b.jsonl", jsonl(100, 1));
  const PrepareSummary none = prepare({folder / "b.jsonl"}, folder / "none", 0);
  EXPECT_EQ(none.dataset.train.documents, 100u);
  EXPECT_TRUE(none.notices.empty());
}

TEST(Prepare, UnigramEntropyIsThatOfTheDefinition) {
  const TemporaryFolder folder;
  put(folder / "a.jsonl", jsonl(200, 8));
  const PrepareSummary summary = prepare({folder / "a.jsonl"}, folder / "out", 0.2);
  const DatasetInfo& info = summary.dataset;
  std::map<std::int32_t, double> train, validation;
  for (const std::int32_t token : all_tokens(info, info.train)) ++train[token];
  for (const std::int32_t token : all_tokens(info, info.validation)) ++validation[token];
  double entropy = 0, loss = 0;
  const auto n = static_cast<double>(info.train.tokens), m = static_cast<double>(info.validation.tokens);
  for (const auto& [token, count] : train) entropy -= count / n * std::log(count / n);
  for (const auto& [token, count] : validation) loss -= count / m * std::log((train[token] + 1) / (n + 257));
  EXPECT_NEAR(info.unigram_entropy, entropy, 1e-12);
  EXPECT_NEAR(info.validation_unigram_loss, loss, 1e-12);
  EXPECT_EQ(read_dataset(folder / "out").unigram_entropy, info.unigram_entropy);
  const auto json = nlohmann::json::parse(describe(summary, true));
  EXPECT_NEAR(json.at("unigram_bits_per_byte").get<double>(), entropy * n / std::numbers::ln2 / double(info.train.text_bytes), 1e-12);
  EXPECT_EQ(json.at("train").at("tokens"), info.train.tokens);
  EXPECT_NE(describe(summary, false).find("unigram entropy"), std::string::npos);
}

/// Two bytes a token: a vocabulary that needs 32 bits.
class PairTokenizer : public Tokenizer {
 public:
  void encode(std::string_view text, std::vector<std::uint32_t>& out) const override {
    for (std::size_t i = 0; i < text.size(); i += 2)
      out.push_back(static_cast<unsigned char>(text[i]) << 8 | (i + 1 < text.size() ? static_cast<unsigned char>(text[i + 1]) : 0));
  }
  void decode(std::uint32_t, std::string&) const override {}
  std::int64_t vocabulary() const override { return 65537; }
  std::uint32_t end_of_text() const override { return 65536; }
  std::string name() const override { return "pairs"; }
  std::string hash() const override { return "0123"; }
  void save(const std::string& file) const override { write_file(file, "pairs"); }
};

TEST(Prepare, WideVocabulariesTakeFourBytes) {
  const TemporaryFolder folder;
  put(folder / "a.txt", "abcd");
  PrepareOptions options;
  options.inputs = {folder / "a.txt"};
  options.output = folder / "wide";
  const DatasetInfo info = prepare_dataset(PairTokenizer(), options).dataset;
  EXPECT_EQ(Hdf5File::open(folder / "wide/train/shard_00000.h5").info("tokens").type, Hdf5Type::u32);
  EXPECT_EQ(all_tokens(info, info.train), (std::vector<std::int32_t>{65536, 0x6162, 0x6364}));
  prepare({folder / "a.txt"}, folder / "narrow");
  EXPECT_EQ(Hdf5File::open(folder / "narrow/train/shard_00000.h5").info("tokens").type, Hdf5Type::u16);
}

TEST(Prepare, RefusesFoldersThatHoldSomething) {
  const TemporaryFolder folder;
  put(folder / "a.txt", "some text");
  prepare({folder / "a.txt"}, folder / "out");
  const auto before = contents(folder / "out");
  EXPECT_THROW(prepare({folder / "a.txt"}, folder / "out"), std::invalid_argument);
  EXPECT_EQ(contents(folder / "out"), before);

  fs::create_directories(folder / "foreign");
  put(folder / "foreign/precious.txt", "x");
  EXPECT_THROW(prepare({folder / "a.txt"}, folder / "foreign"), std::invalid_argument);
  EXPECT_EQ(names(folder / "foreign"), std::vector<std::string>{"precious.txt"});

  PrepareOptions options;
  options.inputs = {folder / "foreign/precious.txt"};
  options.overwrite = true;
  for (const char* name : {"foreign", "out"}) {
    options.output = folder / name;
    prepare_dataset(*load_tokenizer("bytes"), options);
    EXPECT_EQ(read_dataset(folder / name).train.text_bytes, 1u);
  }
  EXPECT_EQ(read_file(folder / "foreign/precious.txt"), "x");  // --overwrite touches nothing but a dataset's parts

  // A failure leaves the old dataset as it was.
  options.inputs = {folder / "missing.txt"};
  const auto whole = contents(folder / "out");
  EXPECT_THROW(prepare_dataset(*load_tokenizer("bytes"), options), std::invalid_argument);
  put(folder / "bad.jsonl", jsonl(5000, 1) + "{broken\n");
  options.inputs = {folder / "bad.jsonl"};
  EXPECT_THROW(prepare_dataset(*load_tokenizer("bytes"), options), std::runtime_error);
  EXPECT_EQ(contents(folder / "out"), whole);
}

TEST(Prepare, ErrorsAreClearAndLeaveNothing) {
  const TemporaryFolder folder;
  put(folder / "a.txt", "some text");
  put(folder / "empty.txt", "");
  put(folder / "blank.jsonl", "\n\n{\"text\": \"\"}\n");
  put(folder / "bad.jsonl", "{\"text\": \"good\"}\n{\"text\": 1}\nnonsense\n");
  const auto message = [&](const std::vector<std::string>& inputs, const std::string& output, double fraction = 0.1) {
    return message_of([&] { prepare(inputs, output, fraction); });
  };
  EXPECT_NE(message({folder / "missing.txt"}, folder / "out").find("missing.txt: no such file"), std::string::npos);
  EXPECT_NE(message({folder / "empty.txt"}, folder / "out").find("the input is empty"), std::string::npos);
  EXPECT_NE(message({folder / "blank.jsonl"}, folder / "out").find("the input is empty"), std::string::npos);
  EXPECT_NE(message({folder / "bad.jsonl"}, folder / "out").find("bad.jsonl:2:"), std::string::npos);
  EXPECT_NE(message({folder / "a.txt"}, folder / "a.txt/out").find("a.txt/out: the folder cannot be made"), std::string::npos);
  EXPECT_NE(message({folder / "a.txt"}, folder / "a.txt").find("the folder cannot be made"), std::string::npos);
  EXPECT_NE(message({folder / "a.txt"}, folder / "out", 1.0).find("--validation-fraction"), std::string::npos);
  EXPECT_NE(message({folder / "a.txt"}, folder / "out", -0.1).find("--validation-fraction"), std::string::npos);
  EXPECT_NE(message_of([&] { prepare({folder / "a.txt"}, folder / "out", 0.1, 1); }).find("--shard-tokens"), std::string::npos);
  EXPECT_NE(message_of([&] { prepare({folder / "a.txt"}, folder / "out", 0.1, 100, -1); }).find("--threads"), std::string::npos);
  EXPECT_FALSE(fs::exists(folder / "out"));

  PrepareOptions options;
  options.inputs = {folder / "bad.jsonl"};
  options.output = folder / "out";
  options.reader.skip_bad = true;
  const PrepareSummary summary = prepare_dataset(*load_tokenizer("bytes"), options);
  EXPECT_EQ(summary.skipped_lines, 2u);
  EXPECT_EQ(summary.dataset.train.documents, 1u);
}

TEST(Prepare, TheFirstErrorOfTheInputIsReportedWhateverTheThreads) {
  const TemporaryFolder folder;
  put(folder / "a.jsonl", jsonl(20'000, 1) + "{broken\n" + jsonl(3000, 2) + "{broken\n");
  for (int i = 0; i < 5; ++i) {
    const std::string message = message_of([&] { prepare({folder / "a.jsonl"}, folder / "out", 0, 1'000'000, 3); });
    EXPECT_NE(message.find("a.jsonl:20001:"), std::string::npos) << message;
  }
}

TEST(Prepare, AFullDiskLeavesNothing) {
  const TemporaryFolder folder;
  put(folder / "a.txt", words(3'000'000, 9));
  for (const std::size_t limit : {std::size_t{100}, std::size_t{3'000}, std::size_t{50'000}, std::size_t{2'000'000}, std::size_t{5'500'000}}) {
    const int status = with_file_size_limit(limit, [&] {
      const std::string message = message_of([&] { prepare({folder / "a.txt"}, folder / "out", 0.05); });
      return message.find("/out/") != std::string::npos && message.find("writing ") != std::string::npos ? 7 : 8;
    });
    ASSERT_TRUE(WIFEXITED(status)) << limit;
    EXPECT_EQ(WEXITSTATUS(status), 7) << limit;
    EXPECT_FALSE(fs::exists(folder / "out")) << limit;
  }
}

TEST(Prepare, NothingMovesUntilTheManifestIsWritten) {
  // dataset.json names every source, a shard the first thousand: here it is the largest file, and the one that does not fit.
  const TemporaryFolder folder;
  const std::string inputs = folder / std::string(100, 'd');
  fs::create_directories(inputs);
  for (int i = 0; i < 3000; ++i) put(inputs + "/" + std::to_string(i) + ".txt", "text");
  put(folder / "a.txt", "some text");
  prepare({folder / "a.txt"}, folder / "old");
  const auto before = contents(folder / "old");
  for (const char* name : {"new", "old"}) {
    const int status = with_file_size_limit(350'000, [&] {
      PrepareOptions options;
      options.inputs = {inputs};
      options.output = folder / name;
      options.overwrite = true;
      const std::string message = message_of([&] { prepare_dataset(*load_tokenizer("bytes"), options); });
      return message.find("dataset.json: writing ") != std::string::npos ? 7 : 8;
    });
    ASSERT_TRUE(WIFEXITED(status));
    EXPECT_EQ(WEXITSTATUS(status), 7);
  }
  EXPECT_FALSE(fs::exists(folder / "new"));
  EXPECT_EQ(contents(folder / "old"), before);
}

TEST(Prepare, SaysWhenFilesRepeatOrAreNotUtf8) {
  const TemporaryFolder folder;
  put(folder / "a.txt", "some text");
  put(folder / "latin1.txt", "caf\xE9");
  fs::create_symlink(folder / "a.txt", folder / "link.txt");
  const auto notices = [&](std::vector<std::string> inputs) {
    PrepareOptions options;
    for (const std::string& name : inputs) options.inputs.push_back(folder / name);
    options.output = folder / "out";
    options.validation_fraction = 0;
    options.overwrite = true;
    std::string all;
    for (const std::string& notice : prepare_dataset(*load_tokenizer("bytes"), options).notices) all += notice + "\n";
    return all;
  };
  EXPECT_EQ(notices({"a.txt"}), "");
  EXPECT_NE(notices({"a.txt", "a.txt"}).find("/a.txt stands in the input more than once;"), std::string::npos);
  EXPECT_NE(notices({"a.txt", "link.txt"}).find("/link.txt (also " + folder / "a.txt" + ") stands in the input more than once"), std::string::npos);
  EXPECT_NE(
      notices({"a.txt", "latin1.txt"}).find("not UTF-8 were kept as they are, in 1 of the pieces of up to 64 KiB, first in " + folder / "latin1.txt"),
      std::string::npos);
  EXPECT_EQ(read_dataset(folder / "out").train.text_bytes, 13u);
}

TEST(Prepare, AKilledRunLeavesWholeShardsOrNoneAndTheNextOneGoesThrough) {
  const TemporaryFolder folder;
  put(folder / "a.txt", words(6'000'000, 10));
  for (const int milliseconds : {5, 20, 40, 60, 100}) {
    const pid_t child = ::fork();
    if (child == 0) {
      prepare({folder / "a.txt"}, folder / "out", 0.05, 500'000);
      ::_exit(0);
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(milliseconds));
    ::kill(child, SIGKILL);
    int status = 0;
    ::waitpid(child, &status, 0);
    // Under final names: whole shards only.
    if (fs::exists(folder / "out"))
      for (const auto& item : fs::recursive_directory_iterator(folder / "out")) {
        if (item.path().extension() != ".h5") continue;
        EXPECT_TRUE(verify_shard(item.path().string()).empty()) << item.path();
      }
    if (is_dataset(folder / "out")) {
      EXPECT_TRUE(verify_dataset(folder / "out").empty());
      fs::remove_all(folder / "out");
    }
  }
  prepare({folder / "a.txt"}, folder / "out", 0.05, 500'000);
  EXPECT_EQ(names(folder / "out"), kWhole);
  EXPECT_TRUE(verify_dataset(folder / "out").empty());
}

TEST(Prepare, ClearsWhatAKilledRunLeftAndKeepsOutOfARunningOne) {
  const TemporaryFolder folder;
  put(folder / "a.txt", "some text");
  // Killed while the parts moved into place.
  fs::create_directories(folder / "out/.prepare/train");
  fs::create_directories(folder / "out/validation");
  put(folder / "out/.prepare/lock", "");
  put(folder / "out/.prepare/train/shard_00000.h5.tmp-123", "half");
  put(folder / "out/validation/shard_00007.h5", "old");
  prepare({folder / "a.txt"}, folder / "out");
  EXPECT_EQ(names(folder / "out"), (std::vector<std::string>{"dataset.json", "tokenizer.json", "train"}));
  EXPECT_EQ(names(folder / "out/train"), std::vector<std::string>{"shard_00000.h5"});

  fs::create_directories(folder / "busy/.prepare");
  const int lock = ::open((folder / "busy/.prepare/lock").c_str(), O_RDWR | O_CREAT, 0666);
  ASSERT_EQ(::flock(lock, LOCK_EX), 0);
  const std::string message = message_of([&] { prepare({folder / "a.txt"}, folder / "busy"); });
  EXPECT_NE(message.find("another tessera prepare"), std::string::npos) << message;
  ::close(lock);
  EXPECT_NO_THROW(prepare({folder / "a.txt"}, folder / "busy"));
}

TEST(Prepare, ReportsProgress) {
  const TemporaryFolder folder;
  put(folder / "a.txt", words(8'000'000, 11));
  PrepareOptions options;
  options.inputs = {folder / "a.txt"};
  options.output = folder / "out";
  options.threads = 1;
  PrepareProgress last;
  prepare_dataset(*load_tokenizer("bytes"), options, [&](const PrepareProgress& now) {
    EXPECT_LE(now.input_bytes, now.total_input_bytes);
    EXPECT_GE(now.text_bytes, last.text_bytes);
    EXPECT_GT(now.seconds, last.seconds);
    last = now;
  });
}

}  // namespace
}  // namespace tessera
