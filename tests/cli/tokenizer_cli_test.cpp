// tessera tokenizer: a vocabulary from text files, tokens and back, and what it says when it cannot.

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <string>

#include "tests/cli/run_tessera.h"
#include "tests/data/support.h"

namespace tessera {
namespace {

using Json = nlohmann::json;

const std::string kFixtures = TESSERA_FIXTURES "/tokenizer";
const std::string kSmall = " --tokenizer bpe:" + kFixtures + "/small.json ";

std::string contents(const std::string& path) {
  std::ostringstream text;
  text << std::ifstream(path, std::ios::binary).rdbuf();
  return text.str();
}

void expect_error(const Outcome& outcome, int code, const std::string& part) {
  EXPECT_EQ(outcome.code, code) << outcome.err;
  EXPECT_EQ(outcome.out, "");
  EXPECT_NE(outcome.err.find(part), std::string::npos) << "expected: " << part << "\nfound: " << outcome.err;
}

TEST(TokenizerCommand, TrainsTheSameVocabularyFromTextAndFromJsonLines) {
  const test::TemporaryFolder folder;
  const std::string text = contents(kFixtures + "/alice.txt");
  test::put(folder / "alice.jsonl", Json{{"text", text}}.dump() + "\n");
  const std::string from_text = folder / "a.json", from_lines = folder / "new/b.json";
  const Outcome a = run_tessera("tokenizer train --vocabulary 600 --json --output " + from_text + " --input " + kFixtures + "/alice.txt");
  ASSERT_EQ(a.code, 0) << a.err;
  const Json result = Json::parse(a.out);
  EXPECT_EQ(result["vocabulary"], 600);
  EXPECT_EQ(result["documents"], 1);
  EXPECT_EQ(result["bytes"], text.size());
  EXPECT_GT(result["bytes_per_token"], 2.0);
  const Outcome b = run_tessera("tokenizer train --vocabulary 600 --output " + from_lines + " --input " + folder / "alice.jsonl");
  ASSERT_EQ(b.code, 0) << b.err;
  EXPECT_NE(b.out.find("600 tokens"), std::string::npos) << b.out;
  EXPECT_EQ(contents(from_text), contents(from_lines));
  const auto hash = [](const std::string& tokenizer) {
    return Json::parse(run_tessera("tokenizer encode --json --tokenizer bpe:" + tokenizer + " /dev/null").out)["hash"];
  };
  EXPECT_EQ(result["hash"], hash(from_text));
  EXPECT_EQ(result["hash"], hash(kFixtures + "/small.json"));  // learned from this text by another implementation
}

TEST(TokenizerCommand, SaysWhenTheTextIsTooSmall) {
  const test::TemporaryFolder folder;
  const Outcome outcome = run_tessera("tokenizer train --vocabulary 300 --input - --output " + folder / "t.json", "printf 'abcabc' |");
  EXPECT_EQ(outcome.code, 0) << outcome.err;
  EXPECT_NE(outcome.out.find("fewer than the 300 asked for"), std::string::npos) << outcome.out;
}

TEST(TokenizerCommand, EncodesAndDecodesAnyBytes) {
  const test::TemporaryFolder folder;
  const std::string text = std::string("The Queen’s \xFF croquet\0 ground\n", 32);
  test::put(folder / "text", text);
  const Outcome encoded = run_tessera("tokenizer encode" + kSmall + folder / "text");
  ASSERT_EQ(encoded.code, 0) << encoded.err;
  test::put(folder / "tokens", encoded.out);
  const Outcome decoded = run_tessera("tokenizer decode" + kSmall, "cat " + folder / "tokens" + " |");
  EXPECT_EQ(decoded.code, 0) << decoded.err;
  EXPECT_EQ(decoded.out, text);
  EXPECT_EQ(run_tessera("tokenizer encode --tokenizer bytes", "printf 'hi' |").out, "104 105\n");
  EXPECT_EQ(run_tessera("tokenizer decode --tokenizer bytes", "printf '104\\n256\\t105' |").out, "hi");
}

TEST(TokenizerCommand, Errors) {
  const test::TemporaryFolder folder;
  const std::string train = "tokenizer train --vocabulary 300 --output " + folder / "t.json" + " --input ", alice = kFixtures + "/alice.txt";
  expect_error(run_tessera("tokenizer"), 2, "subcommand");
  expect_error(run_tessera(train + folder / "none.txt"), 2, "none.txt");
  test::put(folder / "empty.txt", "");
  expect_error(run_tessera(train + folder / "empty.txt"), 2, "no text");
  test::put(folder / "bad.jsonl", "{\"text\": \"a\"}\n{\"text\": \n");
  expect_error(run_tessera(train + folder / "bad.jsonl"), 1, "bad.jsonl:2");
  EXPECT_EQ(run_tessera(train + folder / "bad.jsonl" + " --skip-bad").code, 0);
  expect_error(run_tessera("tokenizer train --vocabulary 256 --output x --input " + alice), 2, "257");
  expect_error(run_tessera("tokenizer train --vocabulary 300 --output " + folder / "empty.txt/t.json" + " --input " + alice), 2, "empty.txt");
  expect_error(run_tessera("tokenizer train --vocabulary 300 --output " + folder.path() + " --input " + alice), 2, "expected a file to write");
  test::put(folder / "own.txt", "precious text");
  expect_error(run_tessera("tokenizer train --vocabulary 300 --output " + folder / "own.txt" + " --input " + folder.path()), 2,
               "one of the input files");
  EXPECT_EQ(contents(folder / "own.txt"), "precious text");
  expect_error(run_tessera("tokenizer train --vocabulary 300 --output " + folder / "made/t.json" + " --input " + folder / "none.txt"), 2, "none");
  EXPECT_FALSE(std::filesystem::exists(folder / "made"));
  test::put(folder / "odd.dat", "text of an odd name");
  expect_error(run_tessera(train + folder / "odd.dat"), 2, "--format (txt");
  EXPECT_EQ(run_tessera(train + folder / "odd.dat" + " --format txt").code, 0);
  expect_error(run_tessera(train + alice, "ulimit -f 1;"), 1, "ulimit -f");
  expect_error(run_tessera("tokenizer encode --tokenizer words " + alice), 2, "gpt2:DIR");
  expect_error(run_tessera("tokenizer encode" + kSmall + folder / "none"), 2, "none");
  expect_error(run_tessera("tokenizer decode" + kSmall, "printf '1 2 600' |"), 2, "\"600\" at byte 4 of the input: expected a number from 0 to 599");
  expect_error(run_tessera("tokenizer decode" + kSmall, "printf '1 -2' |"), 2, "\"-2\"");
  expect_error(run_tessera("tokenizer decode" + kSmall, "printf '1x' |"), 2, "\"1x\"");
}

}  // namespace
}  // namespace tessera
