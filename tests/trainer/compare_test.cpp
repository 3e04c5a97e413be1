// tessera compare and launch/reproduce.sh, as a user runs them.

#include <fmt/core.h>

#include <algorithm>

#include "tests/trainer/run_support.h"
#include "trainer/run_summary.h"

namespace tessera {
namespace {

using testing::Json;
using testing::Result;
using testing::RunTest;
namespace fs = std::filesystem;

class Compare : public RunTest {
 protected:
  Json compare(const std::string& arguments) const {
    const Result r = tessera("compare " + arguments + " --json");
    EXPECT_EQ(r.code, 0) << r;
    return Json::parse(r.output);
  }
};

TEST(AttentionName, HasWhatTellsModelsApart) {
  const auto name = [](std::vector<std::string> sets) { return attention_name(load_config("", sets)); };
  EXPECT_EQ(name({}), "cosine/relu2/sum");
  EXPECT_EQ(name({"attention.always.self=true", "attention.output_gate=true"}), "cosine/relu2/sum+self+output_gate");
  EXPECT_EQ(name({"attention.always.self=true", "attention.always.sinks=4"}), "cosine/relu2/sum+self+4sinks");
  EXPECT_EQ(name({"attention.gate=softmax", "attention.always.sinks=4"}), "softmax");
  EXPECT_EQ(name({"attention.gate=softmax", "attention.always.self=true", "attention.output_gate=true"}), "softmax+output_gate");
}

TEST_F(Compare, SaysWhatTheRunsMeasured) {
  ASSERT_EQ(tessera("train tiny.yaml --set run.dir=runs/a").code, 0);
  ASSERT_EQ(tessera("train tiny.yaml --set run.dir=runs/b --set run.init=runs/a --set attention.gate=softmax --set train.steps=8 --set eval.every=0 "
                    "--set eval.batches=1")
                .code,
            0);
  Json table = compare("runs/a runs/b/");
  ASSERT_EQ(table.size(), 3u);
  const Json &a = table[0], &b = table[1], &release = table[2];
  const auto rows = metrics("a");
  EXPECT_EQ(a["name"], "a");
  EXPECT_EQ(a["attention"], "cosine/relu2/sum");
  EXPECT_EQ(a["step"], 24);
  EXPECT_EQ(a["tokens"], rows.back()["tokens"]);
  EXPECT_EQ(a["finished"], true);
  EXPECT_EQ(a["validation_loss"], rows.back()["validation_loss"]);
  EXPECT_EQ(a["validation"], "in the run");
  EXPECT_EQ(a["edge_sparsity"], rows.back()["edge_sparsity"]);
  EXPECT_EQ(a["tile"], Json::array({16, 16}));
  EXPECT_NEAR(a["loss"].get<double>(), (rows[21]["loss"].get<double>() + rows[22]["loss"].get<double>() + rows[23]["loss"].get<double>()) / 3, 1e-12);
  std::vector<double> speeds;
  for (std::size_t i = 12; i < 24; ++i) speeds.push_back(rows[i]["tokens_per_s"]);
  std::sort(speeds.begin(), speeds.end());
  EXPECT_EQ(a["tokens_per_s"], (speeds[5] + speeds[6]) / 2);
  EXPECT_EQ(a["memory_bytes"], rows[0]["planned_bytes"]);
  EXPECT_EQ(a["memory_planned"], true);
  EXPECT_EQ(a["parameters"], 320 * 32 + 2 * 12 * 32 * 32 + 5 * 32 + 2 * 2);  // embedding, matrices of two layers, gains of norms, scales of heads
  EXPECT_EQ(b["attention"], "softmax");
  EXPECT_EQ(a["differs"], (Json{{"run.init", ""}, {"train.steps", 24}}));
  EXPECT_EQ(b["differs"], (Json{{"run.init", "runs/a"}, {"train.steps", 8}}));
  EXPECT_TRUE(b["edge_sparsity"].is_null());
  EXPECT_EQ(release["validation_loss"], 2.8001);
  EXPECT_EQ(release["tokens"], 11534336000.0);

  EXPECT_TRUE(tessera("compare runs/a runs/b").says("Not twins: train.steps is 24, 8\n"));

  // Results for the newest checkpoint count, and only for that.
  ASSERT_EQ(tessera("eval runs/a --data data --output runs/a/eval.json").code, 0);
  const Json evaluation = Json::parse(read_file(folder / "runs/a/eval.json"));
  table = compare("runs/a --no-release");
  ASSERT_EQ(table.size(), 1u);
  EXPECT_EQ(table[0]["validation_loss"], evaluation["loss"]);
  EXPECT_EQ(table[0]["validation"], evaluation["tokens"].dump() + " tokens");
  write("runs/a/core.json", Json{{"step", 24}, {"title", "CORE (2 of 22)"}, {"score", {{"bundle_baselines", 0.125}}}}.dump());
  EXPECT_TRUE(tessera("compare runs/a").says("0.1250 (2 of 22)"));
  ASSERT_EQ(tessera("train runs/a/config.yaml --resume --set train.steps=25").code, 0);
  table = compare("runs/a --no-release");
  EXPECT_EQ(table[0]["validation_loss"], metrics("a").back()["validation_loss"]);
  EXPECT_FALSE(table[0].contains("core"));

  const auto refused = [&](const std::string& arguments, const std::string& says) {
    const Result r = tessera("compare " + arguments);
    EXPECT_EQ(r.code, 2) << r;
    EXPECT_TRUE(r.says(says)) << r;
  };
  refused("runs/a nowhere", "nowhere: not a run folder: there is no nowhere/config.yaml");
  write("runs/a/eval.json", "{\"loss\": 1");
  refused("runs/a", "runs/a/eval.json: not valid JSON");
  write("runs/a/eval.json", "[]");
  refused("runs/a", "runs/a/eval.json: not what `tessera eval --output` writes");
}

class Reproduce : public RunTest {
 protected:
  Result reproduce(const std::string& arguments, const std::string& environment = "") const {
    return shell(environment + " " TESSERA_CONFIGS "/../launch/reproduce.sh --binary " TESSERA_BINARY " " + arguments);
  }
  static constexpr const char* kTiny =
      "--scale tiny --corpus text.txt --tokenizer bytes --output out --set train.steps=10 --set checkpoint.every=5 --set eval.every=5 "
      "--set model.width=32 --set model.layers=2 --set model.context=64 --set train.tokens_per_step=1024";
};

TEST_F(Reproduce, TinyEndsInATableAndIsNotDoneTwice) {
  const Result first = reproduce(kTiny);
  ASSERT_EQ(first.code, 0) << first;
  EXPECT_TRUE(first.says("the release (RRT-355M)")) << first;
  EXPECT_TRUE(first.says("CORE was left out")) << first;
  for (const char* name : {"sparse", "softmax"}) {
    const Json e = Json::parse(read_file(folder / "out" / name / "eval.json"));
    EXPECT_EQ(e["step"], 10);
    EXPECT_GT(e["tokens"], 1000);
  }
  const auto written = [&](const char* file) { return fs::last_write_time(folder / "out" / file); };
  const auto before = std::pair(written("data/dataset.json"), written("sparse/eval.json"));
  const Result again = reproduce(kTiny);
  ASSERT_EQ(again.code, 0) << again;
  EXPECT_EQ(again.count("nothing to do"), 2) << again;
  EXPECT_EQ(std::pair(written("data/dataset.json"), written("sparse/eval.json")), before);
}

TEST_F(Reproduce, GoesOnWhereItWasKilled) {
  const Result killed = reproduce(kTiny, "TESSERA_FAULT=kill@0:7");
  EXPECT_NE(killed.code, 0) << killed;
  EXPECT_FALSE(fs::exists(folder / "out/sparse/eval.json"));
  // The twin has the configuration of the run that went on, not that of the command that went on with it.
  const Result rest = reproduce(kTiny + std::string(" --set optimizer.lr=2e-3"));
  ASSERT_EQ(rest.code, 0) << rest;
  EXPECT_TRUE(rest.says("going on after step 5")) << rest;
  EXPECT_TRUE(rest.says("the release (RRT-355M)")) << rest;
  const auto rate = [&](const char* run) { return parse_config(read_file(folder / "out" / run / "config.yaml"), run, {}).optimizer.lr; };
  EXPECT_EQ(rate("softmax"), rate("sparse"));
  EXPECT_NE(rate("softmax"), 2e-3);
}

TEST_F(Reproduce, PlansAndRefuses) {
  const Result plan = reproduce("--scale full --plan --price 2");
  EXPECT_EQ(plan.code, 0) << plan;
  EXPECT_TRUE(plan.says("11534336000 tokens for each of two runs")) << plan;
  EXPECT_TRUE(plan.says("8 GPUs")) << plan;
  EXPECT_FALSE(fs::exists(folder / "out"));
  const auto refused = [&](const std::string& arguments, const std::string& says) {
    const Result r = reproduce(arguments);
    EXPECT_EQ(r.code, 2) << r;
    EXPECT_TRUE(r.says(says)) << r;
  };
  refused("--scale huge", "expected full, small or tiny");
  refused("--scale full --output out", "--scale full needs --corpus");
  refused("--scale small --output out", "--scale small needs --corpus");
  refused("--corpus nowhere", "no such file or folder");
  refused("--core data", "there is no core.yaml in it");
  refused("--price cheap", "expected dollars");
  refused("--sclae tiny", "unknown argument");
  refused("--scale full --plan --set train.stpes=1", "train.steps");
}

}  // namespace
}  // namespace tessera
