// data.mix: its configuration, and runs on it.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numbers>

#include "tests/trainer/config_testing.h"
#include "tests/trainer/run_support.h"

namespace tessera::testing {
namespace {

std::string mix_error(const std::string& yaml) { return error_of("data:\n  mix: " + yaml + "\n"); }

TEST(MixKey, ReadsAndWritesItself) {
  const Config c = parse_config("data: {mix: [{path: a b, weight: 0.7}, {weight: 2, path: c}]}", "x", {});
  EXPECT_EQ(c.data.mix, (std::vector<MixEntry>{{"a b", 0.7}, {"c", 2}}));
  EXPECT_EQ(parse_config(to_yaml(c), "y", {}).data.mix, c.data.mix);
  EXPECT_TRUE(load_config("", {"data.mix=[]"}).data.mix.empty());
  EXPECT_EQ(load_config("", {"data.mix=[{path: a, weight: 1}]", "data.mix=[{path: b, weight: 1}]"}).data.mix, (std::vector<MixEntry>{{"b", 1}}));
}

TEST(MixKey, MistakesNamePlaceAndRemedy) {
  expect_error(mix_error("a"), "x.yaml:2:8: data.mix: expected a list of {path: DIR, weight: NUMBER}, found a");
  expect_error(mix_error("[a]"), "x.yaml:2:9: data.mix[0]: expected {path: DIR, weight: NUMBER}, found a");
  expect_error(mix_error("[{path: a}]"), "data.mix[0]: weight is missing");
  expect_error(mix_error("[{weight: 1}]"), "data.mix[0]: path is missing");
  expect_error(mix_error("[{path: a, weight: 1}, {path: b, weight: 0}]"), "data.mix[1].weight: expected a number > 0", "found 0");
  expect_error(mix_error("[{path: a, weight: -1}]"), "data.mix[0].weight: expected a number > 0", "found -1");
  expect_error(mix_error("[{path: a, weight: .nan}]"), "data.mix[0].weight");
  expect_error(mix_error("[{path: '', weight: 1}]"), "data.mix[0].path");
  expect_error(mix_error("[{path: a, wieght: 1}]"), "data.mix[0].wieght: unknown key; nearest valid key \"weight\"");
  expect_error(error_of("data: {path: a, mix: [{path: b, weight: 1}]}"), "data.mix: data.path a is set too: expected one of them");
}

class MixRunTest : public RunTest {
 protected:
  void SetUp() override {
    RunTest::SetUp();
    std::string documents;
    for (std::size_t i = 0; i < 200; ++i) {
      std::string part = text().substr(150 * i, 150);
      std::replace(part.begin(), part.end(), '\n', ' ');
      documents += "{\"text\": \"" + part + "\"}\n";
    }
    write("more.jsonl", documents);
    ASSERT_EQ(tessera("prepare --input more.jsonl --tokenizer bytes --output more --validation-fraction 0.2").code, 0);
  }
  static std::string mix(const std::string& list) { return "tiny.yaml --set data.path= --set 'data.mix=" + list + "' "; }
  const std::string two = mix("[{path: data, weight: 3}, {path: more, weight: 1}]");
};

TEST_F(MixRunTest, TrainsTheSameOnAnyNumberOfRanksAndAfterResuming) {
  const Result whole = tessera("train " + two + "--set run.dir=runs/a");
  ASSERT_EQ(whole.code, 0) << whole;
  EXPECT_TRUE(whole.says("75 % of the sequences")) << whole;
  ASSERT_EQ(tessera("train " + two + "--set run.dir=runs/b", "TESSERA_FAULT=exception@0:13").code, 1);
  const Result resumed = tessera("train " + two + "--set run.dir=runs/b --resume");
  ASSERT_EQ(resumed.code, 0) << resumed;
  expect_same_bits("a", "b", 24);
  ASSERT_EQ(tessera_on(2, "train " + two + "--set run.dir=runs/c").code, 0);
  const auto one = metrics("a"), two_ranks = metrics("c");
  for (std::size_t i = 0; i < 24; ++i) EXPECT_NEAR(one[i]["loss"].get<double>(), two_ranks[i]["loss"].get<double>(), 5e-3) << i;
  // The first sequences are the same whatever has been learnt: equal to far more digits than other data would give.
  EXPECT_NEAR(one[0]["loss"].get<double>(), two_ranks[0]["loss"].get<double>(), 1e-6);

  // Validation on each, and the mixture of both.
  const Json& last = one.back();
  ASSERT_EQ(last["validation"].size(), 2u);
  const Json &first = last["validation"][0], &second = last["validation"][1];
  EXPECT_EQ(first["data"], "data");
  EXPECT_EQ(second["share"], 0.25);
  const double loss = 0.75 * first["loss"].get<double>() + 0.25 * second["loss"].get<double>();
  EXPECT_NEAR(last["validation_loss"].get<double>(), loss, 1e-12);
  EXPECT_EQ(last["validation_tokens"].get<int>(), first["tokens"].get<int>() + second["tokens"].get<int>());

  const Result evaluated = tessera("eval runs/a --json --batches 3");
  ASSERT_EQ(evaluated.code, 0) << evaluated;
  const Json e = Json::parse(evaluated.output);
  ASSERT_EQ(e["datasets"].size(), 2u);
  EXPECT_NEAR(e["loss"].get<double>(), loss, 1e-9);
  double bytes = 0;
  for (const Json& part : e["datasets"]) bytes += part["share"].get<double>() * part["bytes"].get<double>() / part["tokens"].get<double>();
  EXPECT_NEAR(e["bits_per_byte"].get<double>(), loss / std::numbers::ln2 / bytes, 1e-9);
  EXPECT_TRUE(tessera("eval runs/a").says("the mixture"));
  EXPECT_EQ(Json::parse(tessera("eval runs/a --data more --json").output)["data"], "more");

  const Json run = Json::parse(tessera("inspect runs/a --json").output);
  EXPECT_EQ(run["data"], Json::parse(R"([{"path": "data", "weight": 3.0}, {"path": "more", "weight": 1.0}])"));
  const Json checkpoint = Json::parse(tessera("inspect runs/a/checkpoints --json").output)["dataset"];
  EXPECT_EQ(checkpoint["path"], "data, more");
  EXPECT_EQ(checkpoint["mix"][1]["share"], 0.25);

  const Result samples = tessera("inspect more --samples 2 --seed 3 --json");
  ASSERT_EQ(samples.code, 0) << samples;
  EXPECT_EQ(Json::parse(samples.output)["samples"]["validation"].size(), 2u);
  EXPECT_EQ(tessera("inspect runs/a --samples 2").code, 2);

  // Data may move, and nothing else about it may change.
  ASSERT_EQ(shell("mv more moved").code, 0);
  const std::string more = "--set run.dir=runs/a --set train.steps=26 --resume";
  const Result moved = tessera("train " + mix("[{path: data, weight: 0.75}, {path: moved, weight: 0.25}]") + more);
  EXPECT_EQ(moved.code, 0) << moved;
  for (const char* list :
       {"[{path: data, weight: 2}, {path: moved, weight: 1}]", "[{path: moved, weight: 1}, {path: data, weight: 3}]", "[{path: data, weight: 3}]"}) {
    const Result r = tessera("train " + mix(list) + more);
    EXPECT_EQ(r.code, 2) << r;
    EXPECT_TRUE(r.says("other datasets, shares or order than")) << r;
  }
  EXPECT_TRUE(tessera("train tiny.yaml " + more).says("other datasets, shares or order than"));
}

TEST_F(MixRunTest, PlansWithTheShares) {
  const Json plan = Json::parse(tessera("plan " + two + "--json").output);
  ASSERT_EQ(plan["mix"].size(), 2u);
  const Json& part = plan["mix"][1];
  EXPECT_NEAR(part["epochs"].get<double>(), 0.25 * 24 * 256 / part["data_tokens"].get<double>(), 1e-12);
  EXPECT_EQ(plan["data_tokens"].get<int>(), plan["mix"][0]["data_tokens"].get<int>() + part["data_tokens"].get<int>());
  EXPECT_TRUE(tessera("plan " + two).says("more: "));
  EXPECT_TRUE(tessera("plan " + mix("[{path: data, weight: 3}, {path: gone, weight: 1}]")).says("not every folder of data.mix"));
}

TEST_F(MixRunTest, MistakesAreNamedWithTheirRemedy) {
  const auto expect = [&](const std::string& list, std::vector<std::string> words) {
    const Result r = tessera("train " + mix(list));
    EXPECT_EQ(r.code, 2) << r;
    for (const auto& word : words) EXPECT_TRUE(r.says(word)) << word << "\n" << r;
    EXPECT_EQ(r.count("error: "), 1) << r;
  };
  expect("[{path: data, weight: 3}, {path: gone, weight: 1}]", {"data.mix[1].path gone", "tessera prepare"});
  expect("[{path: data, weight: 3}, {path: ./data, weight: 1}]", {"data.mix[1], ./data", "the same training text as data.mix[0], data"});
  ASSERT_EQ(shell("cp -r data copy").code, 0);
  expect("[{path: data, weight: 3}, {path: copy, weight: 1}]", {"data.mix[1], copy", "the same training text"});
  ASSERT_EQ(tessera("tokenizer train --input text.txt --vocabulary 300 --output bpe.json").code, 0);
  ASSERT_EQ(tessera("prepare --input more.jsonl --tokenizer bpe:bpe.json --output bpe --validation-fraction 0.1").code, 0);
  expect("[{path: data, weight: 3}, {path: bpe, weight: 1}]", {"data.mix[1], bpe", "one tokenizer", "--tokenizer bpe:data/tokenizer.json"});
  EXPECT_FALSE(fs::exists(folder / "runs"));
}

}  // namespace
}  // namespace tessera::testing
