// The files of a tokenizer: every published form gives the same tokenizer, and every fault is one clear message.

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "data/bpe.h"
#include "data/files.h"
#include "tests/data/support.h"

namespace tessera {
namespace {

using nlohmann::json;
using test::put;
using test::TemporaryFolder;

const std::string kSmall = std::string(TESSERA_FIXTURES) + "/tokenizer/small.json";

json small_json() { return json::parse(read_file(kSmall)); }

std::string merges_text(const json& root) {
  std::string out;
  for (const auto& merge : root["model"]["merges"]) out += merge[0].get<std::string>() + " " + merge[1].get<std::string>() + "\n";
  return out;
}

json vocabulary_with_end(const json& root) {
  json vocabulary = root["model"]["vocab"];
  vocabulary[kEndOfText] = 599;
  return vocabulary;
}

/// Loading fails as the user's mistake, and the message holds all of `parts`.
void expect_refused(const std::string& spec, const std::vector<std::string>& parts) {
  try {
    load_tokenizer(spec);
    ADD_FAILURE() << spec << " was loaded";
  } catch (const std::invalid_argument& error) {
    for (const std::string& part : parts) {
      EXPECT_NE(std::string(error.what()).find(part), std::string::npos) << "expected \"" << part << "\" in: " << error.what();
    }
  }
}

/// A folder with vocab.json and merges.txt, to be spoilt.
class TwoFiles {
 public:
  TwoFiles() : vocabulary(vocabulary_with_end(small_json())), merges(merges_text(small_json())) {}
  std::string write() const {
    put(folder_ / "vocab.json", vocabulary.dump());
    put(folder_ / "merges.txt", merges);
    return "gpt2:" + folder_.path();
  }
  json vocabulary;
  std::string merges;

 private:
  TemporaryFolder folder_;
};

/// A tokenizer.json, to be spoilt.
class OneFile {
 public:
  std::string write(const std::string& contents) const {
    put(folder_ / "tokenizer.json", contents);
    return "bpe:" + folder_ / "tokenizer.json";
  }
  std::string write() const { return write(root.dump()); }
  json root = small_json();

 private:
  TemporaryFolder folder_;
};

TEST(TokenizerFiles, EveryFormGivesTheSameTokenizer) {
  const auto expected = load_tokenizer("bpe:" + kSmall);
  EXPECT_EQ(expected->vocabulary(), 600);
  EXPECT_EQ(expected->end_of_text(), 599u);
  const json root = small_json();
  const std::string vocabulary = vocabulary_with_end(root).dump(), merges = merges_text(root);
  std::string dos_merges = "#version: 0.2\r\n";
  for (const char c : merges) dos_merges += c == '\n' ? "\r\n" : std::string(1, c);
  json joined = root;  // merges as "left right", as older files have them
  for (auto& merge : joined["model"]["merges"]) merge = merge[0].get<std::string>() + " " + merge[1].get<std::string>();

  const std::vector<std::map<std::string, std::string>> forms = {
      {{"vocab.bpe", "#version: 0.2\n" + merges}, {"encoder.json", vocabulary}},
      {{"merges.txt", merges.substr(0, merges.size() - 1)}, {"vocab.json", vocabulary}},
      {{"merges.txt", dos_merges}, {"vocab.json", vocabulary}},
      {{"tokenizer.json", root.dump()}},
      {{"tokenizer.json", joined.dump()}, {"merges.txt", "half of another form"}},
  };
  for (const auto& form : forms) {
    const TemporaryFolder folder;
    for (const auto& [name, contents] : form) put(folder / name, contents);
    const auto loaded = load_tokenizer("gpt2:" + folder.path());
    EXPECT_EQ(loaded->hash(), expected->hash());
    EXPECT_EQ(loaded->name(), "gpt2");
    loaded->save(folder / "saved.json");
    const auto saved = load_tokenizer("bpe:" + folder / "saved.json");
    EXPECT_EQ(saved->hash(), expected->hash());
    EXPECT_EQ(saved->name(), "bpe");
    EXPECT_EQ(saved->encode("the Queen’s\xFF croquet"), expected->encode("the Queen’s\xFF croquet"));
  }
}

TEST(TokenizerFiles, OtherDefinitionsHaveOtherHashes) {
  const auto hash = [](const OneFile& file) { return load_tokenizer(file.write())->hash(); };
  const OneFile same;
  OneFile fewer_merges, other_ids, more_specials;
  fewer_merges.root["model"]["merges"].erase(342);
  std::swap(other_ids.root["model"]["vocab"]["a"], other_ids.root["model"]["vocab"]["b"]);
  more_specials.root["added_tokens"].push_back({{"id", 600}, {"content", "<|pad|>"}, {"special", true}});
  EXPECT_EQ(hash(same), load_tokenizer("bpe:" + kSmall)->hash());
  EXPECT_EQ(std::set({hash(same), hash(fewer_merges), hash(other_ids), hash(more_specials)}).size(), 4u);
  const auto padded = load_tokenizer(more_specials.write());
  EXPECT_EQ(padded->vocabulary(), 601);
  EXPECT_EQ(padded->decode(std::vector<std::uint32_t>{600}), "<|pad|>");
  EXPECT_EQ(padded->encode("<|pad|>"), load_tokenizer("bpe:" + kSmall)->encode("<|pad|>"));
}

TEST(TokenizerFiles, ByteCharactersAreGpt2s) {
  const auto& characters = byte_characters();
  EXPECT_EQ(characters['!'], "!");
  EXPECT_EQ(characters[' '], "Ġ");
  EXPECT_EQ(characters['\n'], "Ċ");
  EXPECT_EQ(characters[0], "Ā");
  EXPECT_EQ(characters[0xAD], "Ń");
  EXPECT_EQ(characters[0xFF], "ÿ");
  EXPECT_EQ(std::set<std::string>(characters.begin(), characters.end()).size(), 256u);
}

TEST(TokenizerFiles, SaveIsWholeOrAbsent) {
  const auto tokenizer = load_tokenizer("bpe:" + kSmall);
  EXPECT_THROW(tokenizer->save("/nonexistent-folder/tokenizer.json"), std::runtime_error);
  const TemporaryFolder folder;
  const std::string path = folder / "tokenizer.json";
  const int status = test::with_file_size_limit(4096, [&] {
    try {
      tokenizer->save(path);
    } catch (const std::runtime_error&) {
      return 7;
    }
    return 0;
  });
  EXPECT_EQ(WEXITSTATUS(status), 7);
  EXPECT_FALSE(std::filesystem::exists(path));
  EXPECT_TRUE(std::filesystem::is_empty(folder.path()));
}

TEST(TokenizerFiles, BadSpecs) {
  for (const std::string spec : {"", "gpt2", "gpt2:", "bpe:", "BYTES", "bytes:", "word:x"}) {
    expect_refused(spec, {'"' + spec + '"', "bytes", "gpt2:DIR", "bpe:FILE"});
  }
  const TemporaryFolder folder;
  expect_refused("bpe:" + folder / "none.json", {"none.json", "No such file"});
  expect_refused("bpe:" + folder.path(), {folder.path(), "is a folder"});
  expect_refused("gpt2:" + folder / "none", {"none", "not a folder"});
  expect_refused("gpt2:" + folder.path(), {folder.path(), "vocab.bpe", "encoder.json", "merges.txt", "vocab.json", "tokenizer.json"});
  put(folder / "merges.txt", "a b\n");
  expect_refused("gpt2:" + folder.path(), {"merges.txt is there and vocab.json is missing"});
  put(folder / "vocab.bpe", "a b\n");
  put(folder / "encoder.json", "{}");
  expect_refused("gpt2:" + folder.path(), {"encoder.json", "no end-of-text token"});
}

TEST(TokenizerFiles, BadMerges) {
  const std::vector<std::pair<std::string, std::vector<std::string>>> cases = {
      {"h e\nnospace\n", {"merges.txt:2", "one space", "nospace"}},
      {"#version: 0.2\nh e\na b c\n", {"merges.txt:3", "a b c"}},
      {"h e\n\nh i\n", {"merges.txt:2", "expected a merge"}},
      {" e\n", {"merges.txt:1"}},
      {"h \n", {"merges.txt:1"}},
      {"h  e\n", {"merges.txt:1"}},
      {"h e\nzz qq\n", {"merges.txt:2", "\"zz\" is not in the vocabulary"}},
      {"q q\n", {"merges.txt:1", "\"qq\" is not in the vocabulary"}},
      {"h \xFF\n", {"merges.txt:1"}},
      {"h e\nh e\n", {"merges 1 and 2 join the same pair"}},
  };
  for (const auto& [merges, parts] : cases) {
    TwoFiles files;
    files.merges = merges;
    expect_refused(files.write(), parts);
  }
}

TEST(TokenizerFiles, BadVocabulary) {
  const auto refused = [](auto spoil, const std::vector<std::string>& parts) {
    TwoFiles files;
    spoil(files.vocabulary);
    expect_refused(files.write(), parts);
  };
  refused([](json& v) { v = json::array(); }, {"vocab.json", "expected an object"});
  refused([](json& v) { v["he"] = "one"; }, {"vocab.json", "\"he\"", "integer", "\"one\""});
  refused([](json& v) { v["he"] = -1; }, {"\"he\"", "-1"});
  refused([](json& v) { v["he"] = 1.5; }, {"\"he\"", "1.5"});
  refused([](json& v) { v["he"] = 5000000000; }, {"\"he\"", "5000000000"});
  refused([](json& v) { v["he"] = v["in"]; }, {"is given to"});
  refused([](json& v) { v["he"] = 1000; }, {"no token has id"});
  refused([](json& v) { v.erase("he"); }, {"no token has id", "599 tokens"});
  refused([](json& v) { v.erase(kEndOfText); }, {"vocab.json", "no end-of-text token", kEndOfText});
  refused([](json& v) { v["漢字"] = 600; }, {"(id 600)", "stands for no byte"});
  refused([](json& v) { v[""] = 600; }, {"token 600 is empty"});
  refused([](json& v) { v["zzz"] = v["Ā"], v.erase("Ā"); }, {"byte 0 ", "has no token"});
  TwoFiles files;
  const std::string spec = files.write();
  put(spec.substr(5) + "/vocab.json", R"({"a": 0, "b" 1})");
  expect_refused(spec, {"vocab.json", "not valid JSON at byte 14"});
  put(spec.substr(5) + "/vocab.json", "");
  expect_refused(spec, {"vocab.json", "not valid JSON"});
  put(spec.substr(5) + "/vocab.json", "{\"a\xFF\": 0}");
  expect_refused(spec, {"vocab.json", "not valid JSON at byte 4"});
}

TEST(TokenizerFiles, BadTokenizerJson) {
  const auto refused = [](const char* pointer, const json& value, const std::vector<std::string>& parts) {
    OneFile file;
    file.root[json::json_pointer(pointer)] = value;
    expect_refused(file.write(), parts);
  };
  const auto refused_text = [](const std::string& text, const std::vector<std::string>& parts) { expect_refused(OneFile().write(text), parts); };
  refused_text("", {"tokenizer.json", "not valid JSON at byte"});
  refused_text(small_json().dump().substr(0, 5000), {"tokenizer.json", "not valid JSON at byte 500"});
  refused_text("[]", {"expected an object"});
  refused_text("{}", {"model is missing"});
  refused_text(R"({"tessera_tokenizer": "words"})", {"model is missing"});
  refused("/model", 3, {"model: expected an object, found 3"});
  refused("/model/type", "Unigram", {"model.type: expected BPE, found \"Unigram\""});
  refused("/model/vocab", json::array(), {"model.vocab: expected an object"});
  refused("/model/merges", "x", {"model.merges: expected an array"});
  refused("/model/merges/5", 1, {"model.merges[5]", "found 1"});
  refused("/model/merges/5", json::array({"a"}), {"model.merges[5]"});
  refused("/model/merges/5", "a", {"model.merges[5]", "one space"});
  refused("/model/merges/5", json::array({"a", "漢"}), {"model.merges[5]", "not in the vocabulary"});
  refused("/model/dropout", 0.1, {"model.dropout", "0.1"});
  refused("/model/byte_fallback", true, {"model.byte_fallback"});
  refused("/model/ignore_merges", true, {"model.ignore_merges"});
  refused("/model/end_of_word_suffix", "</w>", {"model.end_of_word_suffix"});
  refused("/normalizer", {{"type", "NFC"}}, {"normalizer: expected null", "NFC"});
  refused("/pre_tokenizer", nullptr, {"pre_tokenizer", "ByteLevel"});
  refused("/pre_tokenizer/type", "Whitespace", {"pre_tokenizer", "ByteLevel"});
  refused("/pre_tokenizer/add_prefix_space", true, {"pre_tokenizer", "add_prefix_space"});
  refused("/pre_tokenizer/use_regex", false, {"pre_tokenizer", "use_regex"});
  refused("/added_tokens", json::array(), {"no end-of-text token"});
  refused("/added_tokens", 1, {"added_tokens: expected an array"});
  refused("/added_tokens/0", 1, {"added_tokens: expected objects"});
  refused("/added_tokens/0/special", false, {"added_tokens", "is not special"});
  refused("/added_tokens/0/content", 1, {"added_tokens.content: expected a string"});
  refused("/added_tokens/0/id", 700, {"no token has id 599"});
  refused("/added_tokens/0/id", 5, {"id 5 is given to"});
  refused("/added_tokens/0/id", "x", {"added_tokens", "expected an id"});
  refused("/model/vocab/<|endoftext|>", 598, {"id 598", "id 599"});
  OneFile special_merge;  // a merge must not make a special token
  special_merge.root["added_tokens"].push_back({{"id", special_merge.root["model"]["vocab"]["he"]}, {"content", "he"}, {"special", true}});
  expect_refused(special_merge.write(), {"no such ordinary tokens"});
}

}  // namespace
}  // namespace tessera
