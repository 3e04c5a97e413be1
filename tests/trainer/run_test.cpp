// tessera train, eval, generate and inspect, as a user runs them.

#include <fmt/core.h>

#include <algorithm>
#include <csignal>
#include <sstream>

#include "tests/trainer/run_support.h"
#include "trainer/device.h"
#include "trainer/signals.h"

namespace tessera {
namespace {

using testing::Json;
using testing::Result;
using testing::RunTest;
namespace fs = std::filesystem;

TEST_F(RunTest, LearnsAndLeavesAWholeRunFolder) {
  const Result r = tessera("train tiny.yaml --set run.dir=runs/a --set sample.every=12 --set sample.tokens=5 --set run.peak_tflops=1");
  ASSERT_EQ(r.code, 0) << r;
  const auto rows = metrics("a");
  ASSERT_EQ(rows.size(), 24u);
  EXPECT_LT(rows[23]["loss"].get<double>(), rows[0]["loss"].get<double>() - 0.5);
  EXPECT_NEAR(rows[0]["loss"].get<double>(), std::log(257.0), 0.1);  // an untrained model guesses evenly
  for (const char* key : {"step", "tokens", "loss", "lr", "grad_norm", "tokens_per_s", "step_ms", "mfu", "edge_sparsity", "tile_skip_rate", "tile",
                          "empty_row_share", "data_wait_share", "skipped"})
    EXPECT_TRUE(rows[5].contains(key)) << key;
  EXPECT_EQ(rows[5]["tokens"], 6 * 256);
  EXPECT_EQ(rows[3]["active_share"].size(), 2u);
  EXPECT_EQ(rows[3]["thresholds"][1].size(), 2u);
  EXPECT_FALSE(rows[4].contains("active_share"));
  for (std::size_t i = 0; i < rows.size(); ++i) {
    EXPECT_EQ(rows[i].contains("validation_loss"), (i + 1) % 8 == 0) << i;
    ASSERT_EQ(rows[i].contains("attention_share"), (i + 1) % 8 == 0) << i;
    if (rows[i].contains("attention_share")) {
      EXPECT_GT(rows[i]["attention_share"].get<double>(), 0) << i;
    }
  }
  auto files = names("runs/a");
  EXPECT_EQ(std::erase_if(files, [](const std::string& name) { return name.starts_with("events.out.tfevents."); }), 1u);
  EXPECT_EQ(files, (std::vector<std::string>{"checkpoints", "config.yaml", "metrics.jsonl", "samples"}));
  EXPECT_EQ(names("runs/a/checkpoints"), (std::vector<std::string>{"step_00000020", "step_00000024"}));  // keep: 2
  EXPECT_EQ(names("runs/a/samples"), (std::vector<std::string>{"step_00000012.txt", "step_00000024.txt"}));
  EXPECT_EQ(r.count("\nstep "), 24 + 3 + 5);  // plain lines: no terminal here

  // The resolved configuration makes the same run.
  ASSERT_EQ(tessera("train runs/a/config.yaml --set run.dir=runs/again").code, 0);
  expect_same_bits("a", "again", 24);
}

// Ranks add up the same gradients in another order, so sums differ by a few 2^-24 of themselves. How much of that reaches the loss is the model's
// affair. Softmax is smooth: in these steps, at this learning rate, differences stay at rounding (at 3e-3 over hundreds of steps training is chaotic,
// and any two orders of adding part, also those of two micro-batch sizes on one rank). A gate is not smooth: an edge that one rounding makes
// active and another does not changes a row that has hardly any other by up to 1/epsilon, and such rows come up within some ten steps. So softmax
// is held to rounding for 24 steps, the default attention for its first steps, and with a larger epsilon, which bounds that factor, for 24 again.
TEST_F(RunTest, SameLossesOnOneTwoAndFourRanks) {
  struct Case {
    const char *name, *sets;
    std::size_t steps;
    double tolerance;
  };
  for (const Case& c :
       {Case{"softmax", "--set attention.gate=softmax --set attention.document_mask=true", 24, 1e-6},
        Case{"default", "--set train.steps=5 --set optimizer.warmup=4", 5, 1e-6}, Case{"epsilon", "--set attention.epsilon=0.1", 24, 1e-4},
        Case{"self", "--set attention.epsilon=0.1 --set attention.always.self=true", 24, 1e-4},
        Case{"sinks", "--set attention.epsilon=0.1 --set attention.always.sinks=2", 24, 1e-4},
        Case{"gated", "--set attention.epsilon=0.1 --set attention.output_gate=true", 24, 1e-4}}) {
    const auto name = [&](int ranks) { return c.name + std::to_string(ranks); };
    for (const int ranks : {1, 2, 4}) {
      const Result r = tessera_on(ranks, std::string("train tiny.yaml ") + c.sets + " --set run.dir=runs/" + name(ranks));
      ASSERT_EQ(r.code, 0) << r;
      EXPECT_EQ(r.count("\nstep 3/"), 1) << r;  // only rank 0 speaks
    }
    const auto one = metrics(name(1));
    for (const int ranks : {2, 4}) {
      const auto more = metrics(name(ranks));
      ASSERT_EQ(more.size(), c.steps);
      EXPECT_EQ(more[0]["edge_sparsity"], one[0]["edge_sparsity"]);  // counters are integers, and the first step's parameters the same
      for (std::size_t i = 0; i < c.steps; ++i) {
        EXPECT_NEAR(more[i]["loss"].get<double>(), one[i]["loss"].get<double>(), c.tolerance) << name(ranks) << " step " << i + 1;
        EXPECT_EQ(more[i]["tokens"], one[i]["tokens"]);
      }
    }
  }
}

// Buckets decide which rank owns an element, not what becomes of it. Six blocks of 0.75 MiB of gradients: one bucket of blocks, or three.
TEST_F(RunTest, SizesOfBucketsChangeNoLoss) {
  const std::string six = " --set model.layers=6 --set model.width=128 --set train.steps=5 --set optimizer.warmup=1";
  for (const int ranks : {1, 2, 4}) {
    std::vector<std::vector<Json>> rows;
    for (const char* mib : {"1", "100"}) {
      const std::string name = std::to_string(ranks) + "_" + mib;
      const Result r = tessera_on(ranks, "train tiny.yaml --set run.dir=runs/" + name + " --set parallel.bucket_mib=" + mib + six);
      ASSERT_EQ(r.code, 0) << r;
      rows.push_back(metrics(name));
    }
    ASSERT_EQ(rows[0].size(), 5u);
    for (std::size_t i = 0; i < 5; ++i) {
      for (const char* key : {"loss", "edge_sparsity", "thresholds", "validation_loss"})
        EXPECT_EQ(rows[0][i].value(key, Json()).dump(), rows[1][i].value(key, Json()).dump()) << ranks << " ranks, step " << i + 1 << " " << key;
    }
  }
}

TEST_F(RunTest, RecomputationChangesNothing) {
  for (const char* recompute : {"none", "gelu+norm", "block"}) {
    const Result r = tessera(std::string("train tiny.yaml --set train.recompute=") + recompute + " --set run.dir=runs/" + recompute);
    ASSERT_EQ(r.code, 0) << r;
  }
  expect_same_bits("none", "gelu+norm", 24);
  expect_same_bits("none", "block", 24);
}

TEST_F(RunTest, VisitingAllTilesChangesNothing) {
  for (const char* visit : {"all", "active"}) {
    const Result r = tessera(std::string("train tiny.yaml --set attention.visit=") + visit + " --set run.dir=runs/" + visit);
    ASSERT_EQ(r.code, 0) << r;
  }
  expect_same_bits("all", "active", 24);
}

TEST_F(RunTest, EvalGivesTheSameNumberOnAnyNumberOfRanks) {
  ASSERT_EQ(tessera("train tiny.yaml --set run.dir=runs/a").code, 0);
  const auto numbers = [](const Result& r) {
    EXPECT_EQ(r.code, 0) << r;
    Json j = Json::parse(r.output.substr(r.output.find('{')));
    j.erase("seconds");
    j.erase("visit");
    return j;
  };
  const Json one = numbers(tessera("eval runs/a --data data --json --threads 1"));
  for (const int ranks : {2, 3}) EXPECT_EQ(numbers(tessera_on(ranks, "eval runs/a --data data --json --threads 1")).dump(), one.dump()) << ranks;
  Json both = numbers(tessera("eval runs/a/checkpoints --data data --json --visit all"));
  EXPECT_EQ(both["losses_compared"], one["tokens"]);
  both["losses_compared"] = 0;
  EXPECT_EQ(both.dump(), one.dump());
  EXPECT_TRUE(tessera_on(2, "eval runs/a --data data --visit all").says(fmt::format("changed nothing: {} losses", one["tokens"].dump())));
  EXPECT_EQ(one["layers"].size(), 2u);
  EXPECT_NEAR(one["perplexity"].get<double>(), std::exp(one["loss"].get<double>()), 1e-9);
  // Bytes are tokens here, and only the end-of-text token has none.
  const double bytes = one["bytes"].get<double>(), tokens = one["tokens"].get<double>();
  EXPECT_LE(tokens - bytes, 20);
  EXPECT_NEAR(one["bits_per_byte"].get<double>(), one["loss"].get<double>() / std::log(2.0) * tokens / bytes, 1e-9);

  // The first batches are those that the run evaluated last.
  const Json some = numbers(tessera("eval runs/a/checkpoints/step_00000024 --data data --batches 3 --json"));
  EXPECT_EQ(some["loss"].dump(), metrics("a")[23]["validation_loss"].dump());
  EXPECT_EQ(numbers(tessera("eval runs/a --data data --split train --batches 2 --json"))["tokens"], 64);
  const double guess = numbers(tessera("eval runs/a --data data --batches 1 --json"))["unigram_loss"];
  EXPECT_GT(guess, 1.0);  // English letters: about 3 nats
  EXPECT_LT(guess, 5.0);
  EXPECT_TRUE(tessera("eval runs/a --data data").says("bits per byte"));
}

/// A learning rate so small that no parameter moves leaves first values, which do not depend on the context: each model is the other's reference.
TEST_F(RunTest, EvalAtAnotherContextIsThatOfAModelMadeForIt) {
  const auto train = [&](const std::string& name, int context, const char* positions) {
    const Result r = tessera(fmt::format(
        "train tiny.yaml --set train.steps=1 --set optimizer.lr=1e-30 --set optimizer.warmup=0 --set attention.threshold.mode=fixed --set "
        "model.context={} --set train.micro_batch=2 --set train.tokens_per_step=128 --set model.positions={} --set run.dir=runs/{}",
        context, positions, name));
    ASSERT_EQ(r.code, 0) << r;
  };
  const auto eval = [&](const std::string& arguments) {
    const Result r = tessera("eval runs/" + arguments + " --data data --json --output out.json");
    EXPECT_EQ(r.code, 0) << r;
    Json j = Json::parse(read_file(folder / "out.json"));
    EXPECT_EQ(j.dump(2) + "\n", r.output.substr(r.output.find("{\n")));
    return std::vector<double>{j["loss"], j["edge_sparsity"], j["tile_skip_rate"], j["sequence_tokens"], j["tokens"]};
  };
  for (const char* positions : {"rotary", "learned"}) {
    train(std::string("short_") + positions, 16, positions);
    train(std::string("long_") + positions, 32, positions);
    EXPECT_EQ(eval(fmt::format("long_{} --context 16", positions)), eval(fmt::format("short_{}", positions))) << positions;
  }
  const auto expected = eval("long_rotary");
  EXPECT_EQ(eval("short_rotary --context 32 --micro-batch 2"), expected);
  EXPECT_EQ(eval("short_rotary --context 32 --micro-batch 2 --visit all"), expected);
  EXPECT_NEAR(eval("short_rotary --context 32 --micro-batch 3")[0], expected[0], 1e-6);  // a matrix product of other rows may round otherwise
  const Result refused = tessera("eval runs/short_learned --data data --context 17");
  EXPECT_EQ(refused.code, 2) << refused;
  EXPECT_TRUE(refused.says("learned positions for 16 tokens")) << refused;
  const Result nowhere = tessera("eval runs/short_learned --data data --output nowhere/x.json");
  EXPECT_EQ(nowhere.code, 2) << nowhere;
  EXPECT_TRUE(nowhere.says("there is no folder nowhere")) << nowhere;
}

TEST_F(RunTest, GeneratesTheSameTextForTheSameSeed) {
  ASSERT_EQ(tessera("train tiny.yaml --set run.dir=runs/a").code, 0);
  const auto text = [&](const std::string& arguments) { return tessera("generate runs/a --tokens 60 " + arguments + " 2>/dev/null"); };
  const std::string prompt = "--prompt 'the model' ";
  const Result greedy = text(prompt + "--temperature 0");
  ASSERT_EQ(greedy.code, 0) << greedy;
  EXPECT_EQ(greedy.output.substr(0, 9), "the model");
  EXPECT_EQ(text(prompt + "--temperature 0 --seed 5").output, greedy.output);
  EXPECT_EQ(text(prompt + "--temperature 2 --top-k 1").output, greedy.output);
  EXPECT_EQ(text(prompt + "--temperature 2 --top-p 0.000001").output, greedy.output);
  EXPECT_EQ(text(prompt + "--temperature 0 --recompute").output, greedy.output);  // 60 tokens: well beyond the context of 32
  const Result drawn = text(prompt + "--temperature 1 --seed 1");
  EXPECT_EQ(text(prompt + "--temperature 1 --seed 1 --threads 2").output, drawn.output);
  EXPECT_NE(text(prompt + "--temperature 1 --seed 2").output, drawn.output);
  EXPECT_EQ(text("--prompt ''").code, 0);

  const Result told = tessera("generate runs/a --tokens 60 --ignore-end " + prompt);
  EXPECT_TRUE(told.says("then 59 tokens")) << told;
  EXPECT_EQ(told.count("tessera: note: beyond the context of 32 tokens"), 1) << told;
  const Result fast = tessera("generate runs/a --tokens 60 --temperature 0 --fast " + prompt);
  EXPECT_EQ(fast.count("tessera: note: --fast has no effect on the CPU"), 1) << fast;
  EXPECT_TRUE(fast.says(greedy.output.substr(0, 20))) << fast;
  const Json j = Json::parse(text(prompt + "--temperature 0 --ignore-end --json").output);
  EXPECT_EQ(j["tokens"].size(), 60u);
  EXPECT_EQ(j["step"], 24);
  EXPECT_EQ(j["prefill"]["tokens"], 10);
  EXPECT_EQ(j["decode"]["tokens"], 59);
  EXPECT_GT(j["decode"]["tokens_per_s"].get<double>(), 0);
}

TEST_F(RunTest, GeneratesManyTexts) {
  ASSERT_EQ(tessera("train tiny.yaml --set run.dir=runs/a").code, 0);
  const std::string command = "generate runs/a --tokens 12 --seed 3 ";
  const auto objects = [&](const std::string& arguments) {
    const Result r = tessera(command + "--json " + arguments);
    EXPECT_EQ(r.code, 0) << r;
    std::vector<Json> all;
    std::istringstream lines(r.output);
    for (std::string line; std::getline(lines, line);) all.push_back(Json::parse(line));
    return all;
  };
  write("prompts.jsonl", "{\"q\": \"the\"}\n{\"q\": \"a key and\"}\n{\"q\": \"\"}\n");
  const auto all = objects("--prompts prompts.jsonl --prompt-key q --samples 2 --batch 4");
  ASSERT_EQ(all.size(), 6u);
  for (std::size_t i = 0; i < all.size(); ++i) {
    EXPECT_EQ(all[i]["prompt_number"], i / 2 + 1);
    EXPECT_EQ(all[i]["sample"], i % 2 + 1);
    const auto alone = objects("--samples 2 --batch 1 --prompt '" + all[i]["prompt"].get<std::string>() + "'");
    ASSERT_EQ(alone.size(), 2u);
    EXPECT_EQ(alone[i % 2]["tokens"], all[i]["tokens"]) << i;
    EXPECT_EQ(alone[i % 2]["text"], all[i]["text"]) << i;
  }
  EXPECT_NE(all[0]["tokens"], all[1]["tokens"]);

  write("lines.txt", "the\na key and\n");
  const Result text = shell("cat lines.txt | " TESSERA_BINARY " " + command + "--prompts - --prompt one 2>/dev/null");
  EXPECT_EQ(text.code, 0) << text;
  EXPECT_EQ(text.output.find("== prompt 1\none"), 0u) << text;  // those of the command line first
  // Bytes of no character are printed as they are: compared with what one prompt prints alone.
  const auto alone = [&](const std::string& prompt) { return tessera(command + "--prompt '" + prompt + "' 2>/dev/null").output; };
  EXPECT_EQ(text.output, "== prompt 1\n" + alone("one") + "== prompt 2\n" + alone("the") + "== prompt 3\n" + alone("a key and")) << text;
}

TEST_F(RunTest, GenerationThatCannotBeIsTwo) {
  ASSERT_EQ(tessera("train tiny.yaml --set run.dir=runs/a --set train.steps=5 --set optimizer.warmup=1").code, 0);
  write("empty.txt", "\n");
  write("bad.txt", "fine\n\xff\n");
  write("key.jsonl", "{\"text\": \"x\"}\n");
  const auto error = [&](const std::string& arguments, const std::string& part) {
    const Result r = tessera("generate runs/a " + arguments);
    EXPECT_EQ(r.code, 2) << arguments << " " << r;
    EXPECT_EQ(r.output.rfind("tessera: error: ", 0), 0u) << r;
    EXPECT_EQ(std::count(r.output.begin(), r.output.end(), '\n'), 1) << r;
    EXPECT_TRUE(r.says(part)) << r;
  };
  error("--prompt x --tokens 0", "--tokens");
  for (const char* mistake : {"--temperature nan", "--temperature -1", "--seed -1", "--top-k -1", "--top-p 0", "--top-p 1.5", "--top-p nan",
                              "--batch 0", "--batch 17", "--samples 0"})
    error("--prompt x --tokens 3 " + std::string(mistake), std::string(mistake).substr(0, 6));
  error("--tokens 3", "--prompt TEXT or --prompts FILE");
  const Result two = tessera_on(2, "generate runs/a --prompt x --tokens 3");
  EXPECT_EQ(two.code, 2) << two;
  EXPECT_EQ(two.count("generate computes on one rank, and the launcher started 2: run it without mpirun"), 1) << two;
  error("--tokens 3 --prompt x --prompt-key y", "--prompt-key");
  error("--tokens 3 --prompts none.txt", "none.txt");
  error("--tokens 3 --prompts empty.txt", "found none");
  error("--tokens 3 --prompts bad.txt", "bad.txt:2: expected UTF-8");
  error("--tokens 3 --prompts key.jsonl", "no key \"prompt\"");
  error("--tokens 3 --prompt \"$(printf 'a\\377')\"", "UTF-8");
}

// A run that is to use a GPU can be planned without one, and says what is missing before it begins.
TEST_F(RunTest, ADeviceThatIsNotHere) {
  if (device_problem("cuda").empty()) GTEST_SKIP() << "there is a GPU here: tessera_run_cuda_tests is for it";
  const std::string gpu =
      "--set device=cuda --set model.width=64 --set model.heads=1 --set attention.tile.query=64 --set attention.tile.key=64 --set run.dir=runs/a ";
  const Result r = tessera("train tiny.yaml " + gpu);
  EXPECT_EQ(r.code, 2) << r;
  EXPECT_EQ(r.count("device cuda: " + device_problem("cuda")), 1) << r;
  EXPECT_FALSE(fs::exists(folder / "runs"));
  EXPECT_EQ(tessera("plan tiny.yaml --ranks 2 " + gpu).code, 0);

  ASSERT_EQ(tessera("train tiny.yaml " + gpu + "--set device=cpu --set train.steps=5 --set optimizer.warmup=1").code, 0);
  for (const char* command : {"eval runs/a --data data", "generate runs/a --prompt the --tokens 3"}) {
    EXPECT_EQ(tessera(command).count("note: "), 0);
    const Result asked = tessera(std::string(command) + " --device cuda");
    EXPECT_EQ(asked.code, 2) << asked;
    EXPECT_EQ(asked.count("device cuda: " + device_problem("cuda")), 1) << asked;
  }
}

TEST_F(RunTest, InspectsEveryKindOfThing) {
  ASSERT_EQ(tessera("train tiny.yaml --set run.dir=runs/a").code, 0);
  const auto kind = [&](const std::string& path) {
    const Result r = tessera("inspect " + path + " --json --verify");
    EXPECT_EQ(r.code, 0) << path << r;
    return Json::parse(r.output);
  };
  EXPECT_EQ(kind("runs/a")["kind"], "run");
  EXPECT_EQ(kind("runs/a")["last_metrics"]["step"], 24);
  EXPECT_EQ(kind("runs/a/checkpoints/step_00000020")["step"], 20);
  EXPECT_EQ(kind("runs/a/checkpoints")["step"], 24);
  EXPECT_EQ(kind("data")["verified"], true);
  EXPECT_EQ(kind("data/train/shard_00000.h5")["verified"], true);
  EXPECT_TRUE(tessera("inspect runs/a").says("runs/a"));
  EXPECT_EQ(tessera("inspect tiny.yaml").code, 2);
  EXPECT_EQ(tessera("inspect nowhere").code, 2);
  EXPECT_TRUE(tessera("inspect .").says("dataset.json"));
  EXPECT_EQ(tessera("inspect .").code, 2);
}

TEST_F(RunTest, StopsInOrderAtASignal) {
  const Result r = tessera_on(2, "train tiny.yaml --set run.dir=runs/a", "TESSERA_FAULT=stop@1:7");  // one rank gets it, all agree
  ASSERT_EQ(r.code, 0) << r;
  EXPECT_TRUE(r.says("after step 7. Continue: tessera train runs/a/config.yaml --resume")) << r;
  EXPECT_EQ(names("runs/a/checkpoints"), (std::vector<std::string>{"step_00000005", "step_00000007"}));
  ASSERT_EQ(tessera_on(2, "train runs/a/config.yaml --resume").code, 0);
  ASSERT_EQ(tessera_on(2, "train tiny.yaml --set run.dir=runs/b").code, 0);
  expect_same_bits("a", "b", 24);
}

TEST(StopSignals, SecondOneEndsTheProcess) {
  EXPECT_EXIT(
      {
        StopSignals signals;
        std::raise(SIGINT);
        if (!signals.requested() || std::string(signals.name()) != "SIGINT") _exit(1);
        std::raise(SIGTERM);
        _exit(2);
      },
      ::testing::ExitedWithCode(128 + SIGTERM), "");
}

TEST_F(RunTest, SkipsStepsThatAreNotFinite) {
  const Result r = tessera_on(2, "train tiny.yaml --set run.dir=runs/a", "TESSERA_FAULT=nan@1:6");
  ASSERT_EQ(r.code, 0) << r;
  const auto rows = metrics("a");
  ASSERT_EQ(rows.size(), 24u);
  EXPECT_EQ(rows[5]["skipped"], true);
  EXPECT_TRUE(rows[5]["grad_norm"].is_null());
  EXPECT_EQ(rows[6]["skipped"], false);
  EXPECT_EQ(rows[23]["skipped_total"], 1);
  EXPECT_LT(rows[23]["loss"].get<double>(), rows[0]["loss"].get<double>() - 0.5);
}

TEST_F(RunTest, StopsAfterTooManyStepsThatAreNotFinite) {
  const std::string command = "train tiny.yaml --set run.dir=runs/a --set train.max_nonfinite=1";
  const Result r = tessera(command, "TESSERA_FAULT=nan@0:8");
  EXPECT_EQ(r.code, 1) << r;
  EXPECT_TRUE(r.says("last good checkpoint is runs/a/checkpoints/step_00000005")) << r;
  EXPECT_EQ(tessera(command + " --resume").code, 0);
  EXPECT_EQ(metrics("a").size(), 24u);
  const Result none = tessera_on(2, "train tiny.yaml --set run.dir=runs/b --set train.max_nonfinite=1", "TESSERA_FAULT=nan@1:3");
  EXPECT_EQ(none.code, 1) << none;
  EXPECT_EQ(none.count("in a row"), 1) << none;
}

TEST_F(RunTest, BadStepsDoNotPushOutGoodCheckpoints) {
  // Far too large a rate: after some good steps, and perhaps some more between bad ones, every loss or gradient is not finite.
  const Result r = tessera(
      "train tiny.yaml --set run.dir=runs/a --set optimizer.lr=100 --set optimizer.warmup=0 --set train.steps=200 --set checkpoint.every=1 "
      "--set checkpoint.keep=2");
  ASSERT_EQ(r.code, 1) << r;
  std::vector<std::string> good;  // steps, each with its checkpoint
  for (const Json& row : metrics("a"))
    if (row["skipped"] == false) good.push_back(fmt::format("step_{:08}", row["step"].get<int>()));
  ASSERT_GE(good.size(), 3u);
  const std::vector<std::string> last_two(good.end() - 2, good.end());
  EXPECT_EQ(names("runs/a/checkpoints"), last_two);
  EXPECT_TRUE(r.says("last good checkpoint is runs/a/checkpoints/" + last_two[0] + " (")) << r;
}

TEST_F(RunTest, ACheckpointNeedsTheDataFolderNoMore) {
  ASSERT_EQ(shell("cp -r data gone").code, 0);
  const Result r = shell(TESSERA_BINARY
                         " train tiny.yaml --set run.dir=runs/a --set data.path=gone --set train.steps=5000 > log & p=$!; "
                         "until grep -q 'step 3/' log; do sleep 0.1; done; rm gone/tokenizer.json; kill -TERM $p; wait $p");
  EXPECT_EQ(r.code, 0) << r;
  EXPECT_EQ(tessera("inspect runs/a --verify").code, 0);
}

TEST_F(RunTest, RelativePathsOfTheDataAreFoundFromElsewhere) {
  ASSERT_EQ(tessera("train tiny.yaml --set run.dir=runs/a --set train.steps=3 --set optimizer.warmup=0").code, 0);
  write("x.txt", text() + "More text, which makes other data of it.\n");
  ASSERT_EQ(tessera("prepare --input x.txt --tokenizer bytes --output extra --validation-fraction 0.1").code, 0);
  ASSERT_EQ(tessera("train tiny.yaml --set run.dir=runs/mix --set data.path= --set 'data.mix=[{path: data, weight: 3}, {path: extra, weight: 1}]' "
                    "--set train.steps=3 --set optimizer.warmup=0")
                .code,
            0);
  fs::create_directories(folder / "else/where");
  for (const std::string run : {"a", "mix"}) {
    const Result here = tessera("eval runs/" + run + " --json"),
                 there = shell("cd else/where && " TESSERA_BINARY " eval ../../runs/" + run + " --json");
    ASSERT_EQ(there.code, 0) << there;
    EXPECT_EQ(Json::parse(there.output)["loss"], Json::parse(here.output)["loss"]);
  }
  const Result report = shell("cd else/where && " TESSERA_BINARY " report ../../runs/a -o page.html --sequences 1");
  EXPECT_EQ(report.code, 0) << report;
  EXPECT_FALSE(report.says("note:")) << report;
  // Data that is gone is named as the configuration names it.
  fs::rename(folder / "data", folder / "moved");
  const Result gone = shell("cd else && " TESSERA_BINARY " eval ../runs/a");
  EXPECT_EQ(gone.code, 2) << gone;
  EXPECT_TRUE(gone.says("data.path data: no prepared data")) << gone;
}

TEST_F(RunTest, AHeadThatAPatternBlindsTrains) {
  write("blind.mask", "block 8\n0\n");
  const Result r = tessera(
      "train tiny.yaml --set run.dir=runs/a --set 'attention.pattern={blocks: {file: blind.mask}}' --set train.steps=3 --set optimizer.warmup=0");
  EXPECT_EQ(r.code, 0) << r;
}

TEST_F(RunTest, AnExceptionOnOneRankEndsTheJob) {
  const Result r = tessera_on(3, "train tiny.yaml --set train.tokens_per_step=192 --set run.dir=runs/a", "TESSERA_FAULT=exception@2:4");
  EXPECT_NE(r.code, 0) << r;
  EXPECT_EQ(r.count("TESSERA_FAULT: exception on rank 2 at step 4"), 1) << r;
  EXPECT_FALSE(r.says("step 5/24")) << r;
}

TEST_F(RunTest, MistakesAreNamedWithTheirRemedy) {
  const auto expect = [&](const Result& r, std::vector<std::string> words) {
    EXPECT_EQ(r.code, 2) << r;
    for (const auto& word : words) EXPECT_TRUE(r.says(word)) << word << "\n" << r;
    EXPECT_EQ(r.count("error: "), 1) << r;
  };
  expect(tessera("train tiny.yaml --set data.path=''"), {"data.path", "tessera prepare"});
  expect(tessera("train tiny.yaml --set data.path=nowhere"), {"nowhere", "tessera prepare"});
  expect(tessera("train tiny.yaml --set data.tokenizer=gpt2"), {"gpt2", "bytes"});
  expect(tessera("train tiny.yaml --set model.vocabulary=100"), {"model.vocabulary", "100", "257"});
  expect(tessera("train tiny.yaml --set model.context=16384 --set train.tokens_per_step=16384 --set data.path=short"), {"short"});
  expect(tessera("train tiny.yaml", "TESSERA_FAULT=nonsense"), {"KIND@RANK:STEP"});
  expect(tessera("train nowhere.yaml"), {"nowhere.yaml"});
  expect(tessera("train tiny.yaml --set run.dir=text.txt/run"), {"text.txt/run"});
  expect(tessera("eval nowhere --data data"), {"nowhere"});
  expect(tessera("eval data --data data"), {"no complete checkpoint"});
  EXPECT_FALSE(fs::exists(folder / "runs"));  // nothing was begun

  const Result ranks = tessera_on(3, "train tiny.yaml");
  EXPECT_EQ(ranks.code, 2) << ranks;
  EXPECT_EQ(ranks.count("What would do"), 1) << ranks;

  ASSERT_EQ(tessera("train tiny.yaml --set run.dir=runs/a --set train.steps=6").code, 0);
  expect(tessera("train tiny.yaml --set run.dir=runs/a"), {"already holds a run", "--resume", "run.dir="});
  expect(tessera("train tiny.yaml --set run.dir=runs/a --set model.layers=3 --set optimizer.clip=2 --resume"),
         {"model.layers: 2 in the checkpoint, 3 now", "optimizer.clip"});
  EXPECT_TRUE(tessera("train tiny.yaml --set run.dir=runs/a --set train.steps=6 --resume").says("nothing to do"));

  write("other.txt", text() + "More text, which makes other data of it.\n");
  ASSERT_EQ(tessera("prepare --input other.txt --tokenizer bytes --output other --validation-fraction 0.1").code, 0);
  expect(tessera("train tiny.yaml --set run.dir=runs/a --set data.path=other --resume"), {"other training text"});
  EXPECT_EQ(tessera("eval runs/a --data other").code, 0);  // other text with the same tokenizer is fine to evaluate
  ASSERT_EQ(tessera("tokenizer train --input text.txt --vocabulary 300 --output bpe.json").code, 0);
  ASSERT_EQ(tessera("prepare --input text.txt --tokenizer bpe:bpe.json --output bpe --validation-fraction 0.1").code, 0);
  expect(tessera("eval runs/a --data bpe"), {"tokenizer", "tokenizer.json"});
}

}  // namespace
}  // namespace tessera
