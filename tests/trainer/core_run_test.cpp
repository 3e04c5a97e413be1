// CORE of real models: one with random weights in any batches, and a trained one through the command, alone and under mpirun.

#include "kernels/memory_plan.h"
#include "tests/trainer/core_testing.h"
#include "tests/trainer/run_support.h"
#include "trainer/core/report.h"

namespace tessera {
namespace {

using testing::Json;
using testing::kToyBundle;
using testing::Result;
using testing::toy_task;

/// A model of bytes with random weights.
struct RandomModel {
  static ModelConfig config() {
    ModelConfig m;
    m.layers = 2, m.heads = 2, m.width = 32, m.context = 160;
    m.vocabulary = 257, m.vocabulary_padded = 264;
    m.attention.tile_query = m.attention.tile_key = 16;
    m.attention.document_mask = true;
    return m;
  }
  explicit RandomModel(std::int64_t micro_batch)
      : model(config(), *ops, plan, {.micro_batch = micro_batch, .training = false}), buffer(plan, micro_batch, 160) {
    plan.allocate(*ops);
    model.bind();
    model.initialize(7);
  }
  BatchLimits limits() const { return {static_cast<std::size_t>(buffer.shape()[0]), static_cast<std::size_t>(buffer.shape()[1])}; }
  CoreResult run(const CoreWork& work) {
    const auto alone = make_single_communicator();
    return score_task(work, *tokenizer, limits(), score_with(model, *ops, buffer), *alone, [](double) {});
  }

  std::unique_ptr<Tokenizer> tokenizer = load_tokenizer("bytes");
  std::unique_ptr<Ops> ops = make_cpu_ops(1);
  MemoryPlan plan;
  Gpt model;
  BatchBuffer buffer;
};

TEST(CoreModel, BatchesAndPaddingChangeNoChoice) {
  for (const std::string label : {"copa", "toy_choices", "toy_schema_shown"}) {
    RandomModel alone(1);  // a prompt at a time: nothing is padded
    const std::vector<std::uint64_t> expected = alone.run({toy_task(label), 0, *alone.tokenizer, alone.limits()}).chosen;
    for (const std::int64_t micro_batch : {3, 8}) {
      RandomModel together(micro_batch);
      EXPECT_EQ(together.run({toy_task(label), 0, *together.tokenizer, together.limits()}).chosen, expected) << label << " " << micro_batch;
    }
  }
}

TEST(CoreModel, WhatTheModelWouldSayIsRight) {
  RandomModel m(4);
  CoreTask task = toy_task("toy_words");
  task.delimiter = "";
  CoreWork work(task, 0, *m.tokenizer, m.limits());
  std::uint64_t right = 0;
  std::vector<std::uint64_t> expected;
  for (std::size_t i = 0; i < work.items.size(); ++i) {
    CoreItem& item = work.items[i];
    if (item.contexts[0].empty()) item.contexts[0] = "x";  // after end of text alone this model says end of text, which no text is
    std::vector<std::int32_t> tokens{static_cast<std::int32_t>(m.tokenizer->end_of_text())};
    for (const std::uint32_t t : m.tokenizer->encode(item.contexts[0])) tokens.push_back(static_cast<std::int32_t>(t));
    item.continuations[0].clear();
    for (int n = 0; n < 2; ++n) {  // two tokens, greedily, by the model's logits
      const std::vector<float> logits = m.model.next_logits(tokens);
      tokens.push_back(static_cast<std::int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin()));
      ASSERT_LT(tokens.back(), 256);
      item.continuations[0] += static_cast<char>(tokens.back());
    }
    if (i % 2 == 1) item.continuations[0].back() ^= 1;
    expected.push_back(i % 2 == 0);
    right += i % 2 == 0;
  }
  const CoreResult result = m.run(work);
  EXPECT_EQ(result.chosen, expected);
  EXPECT_EQ(result.right, right);
}

class CoreCommand : public testing::RunTest {
 protected:
  void SetUp() override {
    RunTest::SetUp();
    const Result r = tessera("train tiny.yaml --set train.micro_batch=2");
    ASSERT_EQ(r.code, 0) << r;
  }
  /// Everything but what depends on time and threads.
  static Json found(const Result& r) {
    Json json = Json::parse(r.output.substr(r.output.find('{')));
    json.erase("seconds");
    json.erase("device");
    for (Json& task : json["tasks"]) task.erase("seconds");
    return json;
  }
};

TEST_F(CoreCommand, IsTheSameOnAnyNumberOfRanks) {
  const std::string arguments = "eval runs/default --core " + kToyBundle + " --json";
  const Result one = tessera(arguments);
  ASSERT_EQ(one.code, 0) << one;
  EXPECT_TRUE(one.says("note: coqa is left out: there is no " + kToyBundle + "/eval_data/reading/coqa.jsonl")) << one;
  const Json json = found(one);
  EXPECT_EQ(json["title"], "mean of 6 tasks (1 of CORE's 22)");
  EXPECT_EQ(json["missing"], Json({"coqa"}));
  EXPECT_EQ(json["not_selected"], Json::array());
  ASSERT_EQ(json["tasks"].size(), 6u);
  EXPECT_EQ(json["tasks"][0]["baseline"], 0.4);
  EXPECT_EQ(json["tasks"][0]["dclm_baseline"], 0.5);
  EXPECT_EQ(json["tasks"][1]["items"], 9);
  EXPECT_EQ(json["tasks"][1]["prompts_truncated"], json["tasks"][1]["prompts"]);  // a context of 32 bytes
  for (const int ranks : {2, 3}) {
    const Result several = tessera_on(ranks, arguments);
    ASSERT_EQ(several.code, 0) << several;
    EXPECT_EQ(several.count("is left out"), 1);
    EXPECT_EQ(found(several), json);
  }
}

TEST_F(CoreCommand, TableForPeopleAndPartsOfABundle) {
  const Result some = tessera("eval runs/default --core " + kToyBundle + " --tasks toy_words,copa --limit 4");
  ASSERT_EQ(some.code, 0) << some;
  for (const char* part :
       {"copa                             multiple_choice       0      4", "  0.400 ", "  0.500 ", "toy_words ",
        "mean of 2 tasks (1 of CORE's 22; at most 4 items a task): ",
        "not selected    toy_choices, toy_schema, toy_schema_shown, toy_chemistry, coqa", "were longer than the context and lost their first tokens"})
    EXPECT_TRUE(some.says(part)) << part << "\n" << some;
  EXPECT_FALSE(some.says("is left out")) << some;
  const Result one = tessera("eval runs/default --core " + kToyBundle + " --tasks copa");
  EXPECT_TRUE(one.says("\nCORE (1 of 22): ")) << one;
}

TEST_F(CoreCommand, BadUsageIsSaidInALine) {
  const auto expect_error = [&](const std::string& arguments, const std::string& message) {
    const Result r = tessera("eval runs/default " + arguments);
    EXPECT_EQ(r.code, 2) << r;
    EXPECT_TRUE(r.says("tessera: error: " + message)) << message << "\n" << r;
    EXPECT_EQ(r.count("\n"), 1) << r;
  };
  const std::string core = "--core " + kToyBundle;
  expect_error("--core nowhere", "nowhere/core.yaml: there is no such file");
  expect_error(core + " --tasks cpoa", "--tasks: there is no task \"cpoa\" in " + kToyBundle + "; nearest is \"copa\"");
  expect_error(core + " --tasks coqa", "--tasks: the items of coqa are not there");
  expect_error(core + " --limit 3", "--limit 3: task toy_choices shows 3 of these items before each other one; give at least 4");
  expect_error("--tasks copa", "--tasks requires --core");
  expect_error(core + " --data data", "--data excludes --core");
}

}  // namespace
}  // namespace tessera
