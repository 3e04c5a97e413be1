// CORE's rules against what Python recorded (tests/fixtures/core/record.py): random numbers, prompts, answers, choices; on any number of ranks, in
// any batches. What is wrong with a bundle is said with file and line.

#include <fmt/core.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <limits>
#include <set>

#include "tests/trainer/core_testing.h"
#include "tests/trainer/thread_ranks.h"
#include "trainer/config.h"
#include "trainer/core/prompts.h"
#include "trainer/core/python_random.h"
#include "trainer/core/report.h"

namespace tessera {
namespace {

namespace fs = std::filesystem;
using testing::kToyBundle;
using testing::made_up_model;
using testing::recorded;
using testing::small_tokenizer;
using testing::toy_task;
using Json = nlohmann::json;

const char* const kToyTasks[] = {"copa", "toy_choices", "toy_schema", "toy_schema_shown", "toy_words", "toy_chemistry"};

std::string utf8(std::uint32_t c) {
  const auto low = [](std::uint32_t bits) { return static_cast<char>(0x80 | (bits & 0x3F)); };
  if (c < 0x80) return {static_cast<char>(c)};
  if (c < 0x800) return {static_cast<char>(0xC0 | c >> 6), low(c)};
  return {static_cast<char>(0xE0 | c >> 12), low(c >> 6), low(c)};
}

TEST(PythonRandom, GivesCpythonsNumbers) {
  const Json record = recorded("random.json");
  for (const Json& r : record["seeds"]) {
    PythonRandom random(r["seed"].get<std::uint64_t>());
    const int bits[] = {32, 1, 5, 31, 32, 17};
    for (std::size_t i = 0; i < std::size(bits); ++i) EXPECT_EQ(random.random_bits(bits[i]), r["bits"][i]) << r["seed"] << " " << i;
    for (const Json& b : r["below"]) EXPECT_EQ(random.below(b[0].get<std::size_t>()), b[1]) << r["seed"] << " " << b;
    for (int i = 0; i < 1297; ++i) random.random_bits(32);
    for (const Json& far : r["far"]) EXPECT_EQ(random.random_bits(32), far) << r["seed"];
  }
  EXPECT_THROW(PythonRandom(1).below(0), std::logic_error);
}

TEST(PythonRandom, ShufflesAndSamplesAsCpython) {
  const Json record = recorded("random.json");
  for (const Json& expected : record["shuffles"]) {
    std::vector<std::size_t> items(expected.size());
    for (std::size_t i = 0; i < items.size(); ++i) items[i] = i;
    PythonRandom(1337).shuffle(items);
    EXPECT_EQ(items, expected.get<std::vector<std::size_t>>());
  }
  for (const Json& s : record["samples"]) {
    EXPECT_EQ(PythonRandom(s[2].get<std::uint64_t>()).sample(s[0], s[1]), s[3].get<std::vector<std::size_t>>()) << s[0] << " " << s[1] << " " << s[2];
  }
  EXPECT_THROW(PythonRandom(1).sample(3, 4), std::invalid_argument);
}

TEST(PythonStrip, TakesEveryWhiteSpaceOfUnicode) {
  const auto spaces = recorded("random.json")["spaces"].get<std::set<std::uint32_t>>();
  for (std::uint32_t c = 0; c < 0x10000; ++c) {
    if (c >= 0xD800 && c < 0xE000) continue;
    const std::string text = utf8(c);
    EXPECT_EQ(python_strip(text + "a b" + text), spaces.contains(c) ? "a b" : text + "a b" + text) << c;
  }
  EXPECT_EQ(python_strip(" \n\u00a0\u2003 "), "");
}

TEST(CorePrompts, OthersAreShownAndNeverTheItemItself) {
  for (const std::size_t n : {4, 30, 200}) {
    for (std::size_t index = 0; index < n; ++index) {
      const auto shown = few_shot_indices(n, index, 3);
      EXPECT_EQ(std::set(shown.begin(), shown.end()).size(), 3u);
      for (const std::size_t i : shown) EXPECT_TRUE(i < n && i != index);
    }
  }
  EXPECT_TRUE(few_shot_indices(1, 0, 0).empty());
}

TEST(CorePrompts, AreThoseOfPython) {
  const Json record = recorded("prompts.json");
  for (const std::string label : kToyTasks) {
    SCOPED_TRACE(label);
    const Json& expected = record[label];
    const CoreTask task = toy_task(label);
    const std::vector<CoreItem> unordered = read_core_items(task), items = select_items(unordered, 0);
    ASSERT_EQ(items.size(), expected["order"].size());
    for (std::size_t i = 0; i < items.size(); ++i) EXPECT_EQ(items[i].line, unordered[expected["order"][i].get<std::size_t>()].line);
    for (const auto& [context, found] : expected["contexts"].items()) {
      for (std::size_t i = 0; i < items.size(); ++i) {
        const std::vector<CorePrompt> prompts = make_prompts(task, items, i, small_tokenizer(), std::stoul(context));
        ASSERT_EQ(prompts.size(), expected["tokens"][i].size()) << i;
        for (std::size_t c = 0; c < prompts.size(); ++c) {
          SCOPED_TRACE(fmt::format("context {}, item {}, candidate {}", context, i, c));
          std::vector<std::int32_t> tokens = expected["tokens"][i][c];
          const bool cut = tokens.size() > std::stoul(context);
          if (cut) tokens.erase(tokens.begin(), tokens.end() - std::stol(context));
          EXPECT_EQ(prompts[c].tokens, tokens);
          EXPECT_EQ(prompts[c].cut, cut);
          const Json& answer = found["answers"][i][c];
          EXPECT_EQ(prompts[c].first, answer[0]);
          EXPECT_EQ(prompts[c].last, answer[1]);
          EXPECT_EQ(prompts[c].whole, answer[2] == 1);
        }
      }
    }
  }
}

TEST(CorePrompts, ALimitKeepsTheFirstOfTheShuffled) {
  const std::vector<CoreItem> unordered = read_core_items(toy_task("toy_chemistry"));
  const std::vector<CoreItem> all = select_items(unordered, 0), some = select_items(unordered, 5);
  ASSERT_EQ(some.size(), 5u);
  for (std::size_t i = 0; i < some.size(); ++i) EXPECT_EQ(some[i].line, all[i].line);
  EXPECT_EQ(select_items(unordered, 1000).size(), unordered.size());
}

/// Everything but time.
void expect_recorded(const CoreResult& result, const Json& expected) {
  EXPECT_EQ(result.chosen, expected["chosen"].get<std::vector<std::uint64_t>>());
  EXPECT_EQ(result.right, expected["right"]);
}

TEST(CoreScore, IsThatOfPythonInAnyBatchesAndOnAnyRanks) {
  const Json record = recorded("prompts.json");
  for (const std::string label : kToyTasks) {
    for (const auto& [context, expected] : record[label]["contexts"].items()) {
      const auto tokens = std::min<std::size_t>(std::stoul(context), 1000);
      std::uint64_t cut = 0, prompts = 0;
      for (const std::size_t sequences : {1, 3, 100}) {
        for (const int ranks : {1, 2, 3}) {
          SCOPED_TRACE(fmt::format("{}, context {}, batches of {}, {} ranks", label, context, sequences, ranks));
          testing::ThreadRanks::run(ranks, [&](Communicator& comm) {
            const BatchLimits limits{sequences, tokens};
            const CoreWork work(toy_task(label), 0, small_tokenizer(), limits);
            double done = 0;
            const auto model = [&](const HostBatch& batch, bool predictions, TokenScores& scores) {
              EXPECT_LE(batch.batch, static_cast<std::int64_t>(sequences));
              EXPECT_LE(batch.tokens, static_cast<std::int64_t>(tokens));
              made_up_model(batch, predictions, scores);
            };
            const CoreResult result = score_task(work, small_tokenizer(), limits, model, comm, [&](double part) { done += part; });
            expect_recorded(result, expected);
            EXPECT_DOUBLE_EQ(done, work.tokens(comm.rank(), comm.size()));
            if (comm.rank() != 0) return;
            if (prompts == 0) cut = result.cut, prompts = result.prompts;
            EXPECT_EQ(result.cut, cut);
            EXPECT_EQ(result.prompts, prompts);
          });
        }
      }
    }
  }
}

TEST(CoreScore, BatchesAreRightPaddedAndOfAboutOneLength) {
  const BatchLimits limits{4, 1000};
  const CoreWork work(toy_task("toy_chemistry"), 0, small_tokenizer(), limits);
  const auto alone = make_single_communicator();
  std::int64_t last = 1000, padded = 0;
  const auto model = [&](const HostBatch& batch, bool predictions, TokenScores& scores) {
    EXPECT_LE(batch.tokens, last + 8);  // longest first, by the bytes of the text
    last = batch.tokens;
    const auto end = static_cast<std::int32_t>(small_tokenizer().end_of_text());
    for (std::int64_t row = 0; row < batch.batch; ++row) {
      EXPECT_EQ(batch.token[row * batch.tokens], end);
      for (std::int64_t t = 0; t < batch.tokens; ++t) {
        EXPECT_EQ(batch.position[row * batch.tokens + t], t);
        EXPECT_EQ(batch.document_start[row * batch.tokens + t], 0);
        padded += t > 0 && batch.token[row * batch.tokens + t] == end;
      }
    }
    made_up_model(batch, predictions, scores);
  };
  const CoreResult result = score_task(work, small_tokenizer(), limits, model, *alone, [](double) {});
  EXPECT_LT(static_cast<double>(padded), 0.05 * static_cast<double>(result.tokens));
}

/// A task of one file that the test writes.
class CoreFiles : public ::testing::Test {
 protected:
  void SetUp() override {
    folder = fs::temp_directory_path() / ("tessera_core_" + std::to_string(getpid()));
    fs::create_directories(folder / "eval_data");
    write("core.yaml", "icl_tasks:\n- {label: t, dataset_uri: t.jsonl, num_fewshot: [0], icl_task_type: multiple_choice}\n");
    write("eval_meta_data.csv", "Eval Task,Random baseline\nt,25\n");
    write("eval_data/t.jsonl", R"({"query": "q", "choices": ["a", "b"], "gold": 1})");
  }
  void TearDown() override { fs::remove_all(folder); }
  void write(const std::string& name, const std::string& text) const { std::ofstream(folder / name, std::ios::binary) << text; }
  std::string path(const std::string& name) const { return (folder / name).string(); }

  CoreTask task() const { return read_core_bundle(folder).tasks.at(0); }
  CoreResult score(const CoreTask& t, std::size_t context, const ScoreBatch& model) const {
    const auto alone = make_single_communicator();
    const BatchLimits limits{8, context};
    return score_task(CoreWork(t, 0, *bytes, limits), *bytes, limits, model, *alone, [](double) {});
  }
  static std::string error_of(const std::function<void()>& work) {
    try {
      work();
    } catch (const std::invalid_argument& e) {
      return e.what();
    }
    return "nothing was thrown";
  }
  void expect_bundle_error(const std::string& message) const {
    EXPECT_EQ(error_of([&] { read_core_bundle(folder); }), message);
  }
  void expect_item_error(const std::string& line, const std::string& message) const {
    write("eval_data/t.jsonl", "{\"query\": \"q\", \"choices\": [\"a\", \"b\"], \"gold\": 1}\n" + line + "\n");
    EXPECT_EQ(error_of([&] { read_core_items(task()); }), path("eval_data/t.jsonl") + ":2: " + message);
  }

  fs::path folder;
  std::unique_ptr<Tokenizer> bytes = load_tokenizer("bytes");
};

/// Loss 1 for everything but `cheap`, and only `known` predicted.
ScoreBatch model_of(std::int32_t cheap, std::set<std::int32_t> known) {
  return [=](const HostBatch& batch, bool, TokenScores& scores) {
    scores.losses.clear();
    scores.predictions.clear();
    for (std::size_t i = 0; i < batch.token.size(); ++i) {
      scores.losses.push_back(batch.target[i] == cheap ? 0.5f : 1.0f);
      scores.predictions.push_back(known.contains(batch.target[i]) ? batch.target[i] : -2);
    }
  };
}

TEST_F(CoreFiles, EqualCandidatesTieForTheFirst) {
  write("eval_data/t.jsonl", R"({"query": "q", "choices": ["za", "a", "za", "zb"], "gold": 2})");
  EXPECT_EQ(score(task(), 100, model_of('z', {})).chosen, std::vector<std::uint64_t>{0});
  EXPECT_EQ(score(task(), 100, model_of('b', {})).chosen, std::vector<std::uint64_t>{3});
}

TEST_F(CoreFiles, TheMeanCountsAndNotTheSum) {
  write("eval_data/t.jsonl", R"({"query": "q", "choices": ["abbb", "c"], "gold": 0})");
  EXPECT_EQ(score(task(), 100, model_of('b', {})).chosen, std::vector<std::uint64_t>{0});  // 4 tokens of mean 0.625, against 1
}

TEST_F(CoreFiles, AnEmptyAnswerIsChosenOnlyWhenAllAre) {
  write("eval_data/t.jsonl",
        "{\"query\": \"q\", \"choices\": [\"a\", \"ab\"], \"gold\": 1}\n{\"query\": \"q\", \"choices\": [\"a\", \"a\"], \"gold\": 1}\n");
  const CoreResult result = score(task(), 100, model_of('z', {}));
  std::vector<CoreItem> items = select_items(read_core_items(task()), 0);
  for (std::size_t i = 0; i < 2; ++i) EXPECT_EQ(result.chosen[i], items[i].line == 1 ? 1u : 0u);
  EXPECT_EQ(result.empty, 3u);
}

TEST_F(CoreFiles, APredictionMustCoverTheWholeContinuation) {
  const auto words = [&](const std::string& text, const std::string& continuation, const std::string& delimiter) {
    write("core.yaml",
          "icl_tasks:\n- {label: t, dataset_uri: t.jsonl, num_fewshot: [0], icl_task_type: language_modeling, continuation_delimiter: \"" +
              delimiter + "\"}\n");
    write("eval_data/t.jsonl", "{\"context\": \"" + text + "\", \"continuation\": \"" + continuation + "\"}");
    return task();
  };
  const ScoreBatch knows = model_of(0, {' ', 'a', 'b'}), does_not = model_of(0, {' ', 'b'});
  EXPECT_EQ(score(words("x", "ab", " "), 100, knows).right, 1u);
  EXPECT_EQ(score(words("x", "ab", " "), 100, does_not).right, 0u);
  EXPECT_EQ(score(words("x", "ab", " "), 4, knows).right, 1u);  // "x ab": one token before the answer is left
  EXPECT_EQ(score(words("x", "ab", " "), 3, knows).right, 0u);  // " ab": nothing is left to predict its first token from
  EXPECT_EQ(score(words("x", "ab", " "), 1, knows).right, 0u);
  EXPECT_EQ(score(words("x", "", ""), 100, knows).right, 0u);  // nothing to predict
  EXPECT_EQ(score(words("x", "", ""), 100, knows).empty, 1u);
}

TEST_F(CoreFiles, ALossThatIsNoNumberIsAnError) {
  const ScoreBatch broken = [](const HostBatch& batch, bool, TokenScores& scores) {
    scores.losses.assign(batch.token.size(), std::numeric_limits<float>::quiet_NaN());
  };
  try {
    score(task(), 100, broken);
    ADD_FAILURE() << "nothing was thrown";
  } catch (const std::runtime_error& e) {
    EXPECT_EQ(e.what(), path("eval_data/t.jsonl") + ":1: the model's loss on this item is not a number");
  }
}

TEST_F(CoreFiles, BadItemsAreNamed) {
  expect_item_error("{\"query\": ",
                    "not valid JSON at byte 10: parse error at line 1, column 10: syntax error while parsing value - unexpected end of input; "
                    "expected '[', '{', or a literal");
  expect_item_error("[1]", "expected a JSON object, found array");
  expect_item_error(R"({"question": "q", "choices": ["a", "b"], "gold": 1})", "the key \"query\" is missing; there is choices, gold, question");
  expect_item_error(R"({"query": 7, "choices": ["a", "b"], "gold": 1})", "\"query\" is number, expected text");
  expect_item_error(R"({"query": "q", "choices": ["a"], "gold": 0})", "\"choices\" is not a list of at least two texts");
  expect_item_error(R"({"query": "q", "choices": ["a", 2], "gold": 0})", "\"choices\" is not a list of at least two texts");
  for (const std::string gold : {"2", "-1", "1.0", "\"a\"", "null", "18446744073709551615"})
    expect_item_error("{\"query\": \"q\", \"choices\": [\"a\", \"b\"], \"gold\": " + gold + "}",
                      "\"gold\" is " + gold + ", expected the index of one of 2 candidates, 0 to 1");
}

TEST_F(CoreFiles, TooFewItemsForTheExamples) {
  write("core.yaml", "icl_tasks:\n- {label: t, dataset_uri: t.jsonl, num_fewshot: [1], icl_task_type: multiple_choice}\n");
  EXPECT_EQ(error_of([&] { read_core_items(task()); }), path("eval_data/t.jsonl") + ": 1 items, and task t shows 1 others before each");
}

TEST_F(CoreFiles, BadBundlesAreNamed) {
  const std::string yaml = path("core.yaml"), csv = path("eval_meta_data.csv");
  const auto with_task = [&](const std::string& entry) { write("core.yaml", "icl_tasks:\n- " + entry + "\n"); };
  write("core.yaml", "icl_tasks: [\n");
  EXPECT_TRUE(error_of([&] { read_core_bundle(folder); }).starts_with(yaml + ":2:1: this is not YAML: "));
  write("core.yaml", "tasks: []\n");
  expect_bundle_error(yaml + ": icl_tasks: expected a list of tasks, found nothing (null)");
  with_task("{label: t, dataset_uri: t.jsonl, icl_task_type: schema}");
  expect_bundle_error(yaml + ":2:3: icl_tasks[0]: the key \"num_fewshot\" is missing");
  with_task("{label: t, dataset_uri: t.jsonl, num_fewshot: [0, 10], icl_task_type: schema}");
  expect_bundle_error(yaml + ":2:49: icl_tasks[0].num_fewshot: expected a list of one number, as [10], found a list");
  with_task("{label: t, dataset_uri: t.jsonl, num_fewshot: [0], icl_task_type: schemas}");
  expect_bundle_error(
      yaml + ":2:69: icl_tasks[0].icl_task_type: expected multiple_choice | schema | language_modeling, found schemas; nearest is \"schema\"");
  with_task("{label: t, dataset_uri: t.jsonl, num_fewshot: [0], icl_task_type: schema, delimiter: x}");
  expect_bundle_error(yaml + ":2:77: icl_tasks[0].delimiter: unknown key; nearest valid key \"label\"");
  with_task("{label: u, dataset_uri: t.jsonl, num_fewshot: [0], icl_task_type: schema}");
  expect_bundle_error(csv + ": there is no row for u, which core.yaml lists");
  with_task("{label: t, dataset_uri: t.jsonl, num_fewshot: [0], icl_task_type: schema}");
  write("eval_meta_data.csv", "Eval Task,Random baseline\n\"t\n");
  expect_bundle_error(csv + ":2: a quoted field does not end");
  write("eval_meta_data.csv", "Eval Task,Baseline\nt,1\n");
  expect_bundle_error(csv + ":1: there is no column \"Random baseline\"");
  write("eval_meta_data.csv", "Eval Task,Random baseline\nt,100\n");
  expect_bundle_error(csv + ":2: \"Random baseline\" of t is \"100\", expected percent, at least 0 and below 100");
  write("eval_meta_data.csv", "Eval Task,Random baseline\nt\n");
  expect_bundle_error(csv + ":2: 1 fields, expected 2 as in line 1");
  fs::remove(csv);
  expect_bundle_error(csv + ": there is no such file; expected a folder with core.yaml, eval_meta_data.csv and eval_data/");
}

TEST(CoreBundle, IsReadAsItStands) {
  const CoreBundle bundle = read_core_bundle(kToyBundle);
  ASSERT_EQ(bundle.tasks.size(), 7u);
  EXPECT_EQ(bundle.tasks[1].label, "toy_choices");
  EXPECT_EQ(bundle.tasks[1].shots, 3u);
  EXPECT_EQ(bundle.tasks[1].delimiter, "\nAnswer: ");
  EXPECT_EQ(bundle.tasks[0].delimiter, " ");
  EXPECT_DOUBLE_EQ(bundle.tasks[0].baseline, 40);    // of a row whose text holds quotes and a line end
  EXPECT_DOUBLE_EQ(bundle.tasks[1].baseline, 33.3);  // of the row after it
  EXPECT_TRUE(bundle.tasks[5].file.ends_with("toys/chemistry.jsonl.zst"));
  EXPECT_EQ(read_core_items(bundle.tasks[5]).size(), 26u);
  EXPECT_TRUE(bundle.tasks[6].missing);
  const auto two = select_tasks(bundle, "toy_words,copa");
  ASSERT_EQ(two.size(), 2u);
  EXPECT_EQ(two[0].label, "copa");  // the bundle's order
  try {
    select_tasks(bundle, "copa,toy_word");
    ADD_FAILURE() << "nothing was thrown";
  } catch (const ConfigError& e) {
    EXPECT_EQ(e.what(), "--tasks: there is no task \"toy_word\" in " + kToyBundle + "; nearest is \"toy_words\"");
  }
  EXPECT_THROW(select_tasks(bundle, "coqa"), ConfigError);
  EXPECT_THROW(select_tasks(bundle, "copa,"), ConfigError);
}

TEST(CoreReport, WhatIsNotAllOfCoreIsNotCalledCore) {
  std::vector<CoreWork> works;
  for (const DclmTask& t : dclm_tasks()) {
    CoreWork work(toy_task("copa"), 0, small_tokenizer(), {1, 1000});
    work.task.label = t.label;
    work.task.type = t.type;
    work.task.shots = t.shots;
    work.task.baseline = t.label == std::string("commonsense_qa") ? 20 : t.baseline;
    works.push_back(work);
  }
  std::vector<CoreRow> rows;
  for (const CoreWork& work : works) {
    CoreRow row;
    row.work = &work;
    row.result.chosen.resize(10);
    row.result.right = 5;
    rows.push_back(row);
  }
  EXPECT_EQ(core_title(rows), "CORE");
  const auto json = core_json(rows, {});
  double bundle = 0, dclm = 0;  // by the formula of the paper
  for (const DclmTask& t : dclm_tasks()) {
    const bool differs = t.label == std::string("commonsense_qa");
    dclm += (0.5 - t.baseline / 100) / (1 - t.baseline / 100) / 22;
    bundle += (0.5 - (differs ? 20 : t.baseline) / 100) / (1 - (differs ? 20 : t.baseline) / 100) / 22;
  }
  EXPECT_NEAR(json["score"]["bundle_baselines"].get<double>(), bundle, 1e-12);
  EXPECT_NEAR(json["score"]["dclm_baselines"].get<double>(), dclm, 1e-12);
  EXPECT_EQ(json["complete"], true);
  EXPECT_NE(core_table_row(rows[6]).find("0.403"), std::string::npos) << core_table_row(rows[6]);

  EXPECT_EQ(core_title(std::span(rows).first(21)), "CORE (21 of 22)");
  works[3].items.resize(5);
  EXPECT_EQ(core_title(rows), "CORE (22 of 22; at most 5 items a task)");
  EXPECT_EQ(core_json(rows, {})["complete"], false);
  works[3].items.resize(9);
  works[3].available = 9;
  works[4].task.shots = 5;
  EXPECT_EQ(core_title(rows), "mean of 22 tasks (21 of CORE's 22)");
  EXPECT_EQ(core_title(std::span(rows).subspan(4, 1)), "mean of 1 task (0 of CORE's 22)");
}

}  // namespace
}  // namespace tessera
