// tessera sweep as a user has it: tiny runs, which are killed, stopped, fail and go on.

#include <gtest/gtest.h>

#include <cmath>
#include <map>

#include "tests/trainer/run_support.h"

namespace tessera {
namespace {

using namespace testing;

class SweepTest : public RunTest {
 protected:
  /// sweep.yaml over tiny.yaml with this; runs in runs/s.
  void sweep_file(const std::string& yaml, const std::string& name = "sweep.yaml") const { write(name, "base: tiny.yaml\ndir: runs/s\n" + yaml); }

  Json json(const std::string& arguments) const {
    const Result r = shell(TESSERA_BINARY " sweep " + arguments + " --json 2>stderr");
    EXPECT_EQ(r.code, 0) << r;
    return r.code == 0 ? Json::parse(r.output) : Json();
  }
  /// Of each run, its state.
  std::map<std::string, std::string> states() const {
    std::map<std::string, std::string> out;
    const Json status = json("status sweep.yaml");
    for (const Json& run : status["runs"]) out[run["name"]] = run["state"];
    return out;
  }
  std::string contents(const std::string& name) const { return read_file((folder / name).string()); }
  /// What each step of a run computed.
  std::vector<std::string> steps(const std::string& run) const {
    std::vector<std::string> out;
    for (const Json& row : metrics(run)) out.push_back(computed(row).dump());
    return out;
  }
  /// A shell command that waits until a file holds a text, 120 s at most.
  static std::string until(const std::string& text, const std::string& file) {
    return "for i in $(seq 6000); do grep -qs '" + text + "' " + file + " && break; sleep 0.02; done; ";
  }
};

TEST_F(SweepTest, PlanShowsAllAndWritesNothing) {
  sweep_file("grid: {attention.gate: [relu, relu2], model.layers: [1, 2]}\nseeds: [1, 2]\nskip_if: [{attention.gate: relu, model.layers: 1}]\n");
  const std::vector<std::string> before = names(".");
  const Json plan = json("plan sweep.yaml");
  ASSERT_EQ(plan["runs"].size(), 6u);
  EXPECT_EQ(plan["runs"][0]["name"], "gate=relu");
  EXPECT_EQ(plan["runs"][1]["differs"], (Json{{"model.layers", 1}}));
  EXPECT_EQ(plan["runs"][3]["name"], "gate=relu,seed=2");
  EXPECT_EQ(plan["skipped"], Json{"gate=relu,layers=1"});
  // As `tessera plan` says of the same configuration.
  const Result one = tessera("plan tiny.yaml --set model.layers=1 --json");
  EXPECT_EQ(plan["runs"][1]["parameters"], Json::parse(one.output)["parameters"]);
  EXPECT_EQ(plan["runs"][1]["bytes_per_rank"], Json::parse(one.output)["bytes_per_rank"]["total"]);
  EXPECT_TRUE(tessera("sweep plan sweep.yaml").says("layers=1,seed=2")) << tessera("sweep plan sweep.yaml");
  EXPECT_EQ(states()["base"], "waiting");
  std::vector<std::string> after = names(".");
  std::erase(after, "stderr");
  EXPECT_EQ(after, before);
}

TEST_F(SweepTest, RunsReportsAndRunsOnlyWhatIsNew) {
  sweep_file("grid: {attention.gate: [relu, softmax]}\nseeds: [1, 2]\nbudget: {steps: 12}\n");
  const Result first = tessera("sweep run sweep.yaml");
  ASSERT_EQ(first.code, 0) << first;
  EXPECT_EQ(first.count(": finished, validation loss "), 4) << first;
  EXPECT_EQ(metrics("s/gate=relu,seed=2").size(), 12u);
  // A run of a sweep is a run like any other.
  ASSERT_EQ(tessera("train tiny.yaml --set train.steps=12 --set optimizer.warmup=4 --set attention.gate=relu --set run.dir=runs/alone").code, 0);
  EXPECT_EQ(steps("s/gate=relu"), steps("alone"));

  const Json report = json("report sweep.yaml");
  ASSERT_EQ(report["variants"].size(), 2u);
  const Json &relu = report["variants"][0], &softmax = report["variants"][1];
  const auto loss = [&](const std::string& run) { return metrics("s/" + run).back()["validation_loss"].get<double>(); };
  const double a = loss("gate=relu"), b = loss("gate=relu,seed=2");
  EXPECT_NEAR(relu["validation_loss"].get<double>(), (a + b) / 2, 1e-12);
  EXPECT_NEAR(relu["validation_loss_sd"].get<double>(), std::abs(a - b) / std::sqrt(2), 1e-12);  // n - 1
  EXPECT_EQ(softmax["softmax"], true);
  EXPECT_EQ(relu["twin"], "gate=softmax");
  EXPECT_NEAR(relu["over_twin"].get<double>(), (a + b) / 2 - (loss("gate=softmax") + loss("gate=softmax,seed=2")) / 2, 1e-12);
  EXPECT_TRUE(softmax["twin"].is_null());
  EXPECT_TRUE(softmax["edge_sparsity"].is_null());
  const Result text = tessera("sweep report sweep.yaml");
  EXPECT_TRUE(text.says("gate=softmax *")) << text;
  const Result csv = tessera("sweep report sweep.yaml --csv");
  EXPECT_TRUE(csv.says("variant,softmax,seeds,finished,validation_loss,")) << csv;
  EXPECT_EQ(csv.count("\r\n"), 3) << csv;

  // Again: nothing; with a variant and a seed more: only those.
  const auto before = fs::last_write_time(folder / "runs/s/gate=relu/metrics.jsonl");
  const Result again = tessera("sweep run sweep.yaml");
  EXPECT_EQ(again.code, 0) << again;
  EXPECT_TRUE(again.says("4 of 4 runs are finished already")) << again;
  sweep_file(
      "grid: {attention.gate: [relu4, relu, softmax]}\nseeds: [1, 2, 3]\nskip_if: [{attention.gate: relu4, model.layers: 9}]\nbudget: {steps: 12}\n");
  const Result more = tessera("sweep run sweep.yaml");
  EXPECT_EQ(more.code, 0) << more;
  EXPECT_EQ(more.count(": training to step 12"), 5) << more;
  EXPECT_EQ(fs::last_write_time(folder / "runs/s/gate=relu/metrics.jsonl"), before);
}

TEST_F(SweepTest, KilledItGoesOnWithTheSameBits) {
  sweep_file("grid: {attention.gate: [relu, relu2]}\nset: {train.steps: 1500, checkpoint.every: 10}\nresources: {at_once: 1}\n");
  // The sweep: its run is told to stop by the kernel, and stops in order.
  const Result killed = shell(TESSERA_BINARY " sweep run sweep.yaml > log 2>&1 & p=$!; " + until("\"step\":25,", "runs/s/gate=relu/metrics.jsonl") +
                              "kill -9 $p; wait $p; cat log");
  EXPECT_FALSE(killed.says("finished")) << killed;
  // Its run may still be at its last checkpoint: the next sweep waits for that. A run (of this folder: other tests have runs of that name): the
  // other one goes on.
  const Result run =
      shell(TESSERA_BINARY " sweep run sweep.yaml > log 2>&1 & p=$!; " + until("gate=relu: going on", "log") +
            "rows() { wc -l < runs/s/gate=relu/metrics.jsonl; }; n=$(rows); "
            "for i in $(seq 6000); do [ $(rows) -gt $((n + 20)) ] && break; sleep 0.02; done; "
            "for q in $(pgrep -f 'train runs/s/[g]ate=relu/config.yaml'); do [ \"$(readlink /proc/$q/cwd)\" = \"$(pwd -P)\" ] && kill -9 $q; done; "
            "wait $p; c=$?; cat log; exit $c");
  EXPECT_EQ(run.code, 1) << run;
  EXPECT_TRUE(run.says("gate=relu: failed: ended by signal 9 (Killed)")) << run;
  EXPECT_TRUE(run.says("base: finished")) << run;
  EXPECT_EQ(states(), (std::map<std::string, std::string>{{"gate=relu", "failed"}, {"base", "finished"}}));
  EXPECT_TRUE(tessera("sweep status sweep.yaml").says("ended by signal 9"));
  const Result last = tessera("sweep run sweep.yaml");
  EXPECT_EQ(last.code, 0) << last;
  EXPECT_TRUE(last.says("gate=relu: going on to step 1500")) << last;
  EXPECT_EQ(states()["gate=relu"], "finished");
  ASSERT_EQ(tessera("train tiny.yaml --set train.steps=1500 --set attention.gate=relu --set run.dir=runs/alone").code, 0);
  EXPECT_EQ(steps("s/gate=relu"), steps("alone"));
}

TEST_F(SweepTest, CtrlCStopsTheRunsWithCheckpoints) {
  for (const int ranks : {1, 2}) {
    SCOPED_TRACE(ranks);
    fs::remove_all(folder / "runs");
    sweep_file("set: {train.steps: 10000000, checkpoint.every: 0}\nresources: {ranks: " + std::to_string(ranks) + "}\n");
    const Result r = shell(TESSERA_BINARY " sweep run sweep.yaml > log 2>&1 & p=$!; " + until("\"step\":5,", "runs/s/base/metrics.jsonl") +
                           TESSERA_BINARY " sweep status sweep.yaml --json > status; kill -INT $p; wait $p; c=$?; cat log; exit $c");
    EXPECT_EQ(r.code, 1) << r;
    EXPECT_TRUE(r.says("base: stopped after step ")) << r;
    EXPECT_TRUE(r.says("Go on: tessera sweep run sweep.yaml")) << r;
    EXPECT_EQ(Json::parse(contents("status"))["runs"][0]["state"], "running");
    EXPECT_GT(Json::parse(contents("status"))["runs"][0]["seconds_left"], 0.0);
    EXPECT_EQ(names("runs/s/base/checkpoints").size(), 1u);
    EXPECT_EQ(states()["base"], "interrupted");
  }
}

TEST_F(SweepTest, OneThatFailsDoesNotStopTheRest) {
  // Far too large a rate: after some steps nothing is finite.
  sweep_file("list:\n  - {name: bad, set: {optimizer.lr: 100, optimizer.warmup: 0, train.steps: 200}}\n  - {name: good}\nresources: {at_once: 1}\n");
  const Result r = tessera("sweep run sweep.yaml");
  EXPECT_EQ(r.code, 1) << r;
  EXPECT_TRUE(r.says("bad: failed: 10 steps in a row")) << r;
  EXPECT_TRUE(r.says("good: finished")) << r;
  EXPECT_TRUE(r.says("1 of 2 runs are finished, 1 failed\n  bad: 10 steps in a row")) << r;
  const Json status = json("status sweep.yaml");
  EXPECT_EQ(status["runs"][0]["state"], "failed");
  EXPECT_TRUE(status["runs"][0]["error"].get<std::string>().starts_with("10 steps in a row, up to step ")) << status;
  EXPECT_EQ(status["counts"]["finished"], 1);
  EXPECT_TRUE(contents("runs/s/logs/bad.log").find("10 steps in a row") != std::string::npos);
  EXPECT_EQ(json("report sweep.yaml")["variants"][0]["finished"], 0);
}

TEST_F(SweepTest, ADiskThatFillsIsThatRunsError) {
  sweep_file("list:\n  - {name: large, set: {model.width: 256}}\n  - {name: small}\nbudget: {steps: 6}\nresources: {at_once: 1}\n");
  const Result r = shell("ulimit -f 2000; " TESSERA_BINARY " sweep run sweep.yaml");  // 1 MB: the large one's checkpoint is more
  EXPECT_EQ(r.code, 1) << r;
  EXPECT_TRUE(r.says("large: failed: ")) << r;
  EXPECT_TRUE(r.says("File too large")) << r;
  EXPECT_TRUE(r.says("small: finished")) << r;
  EXPECT_EQ(tessera("sweep run sweep.yaml").code, 0);  // with room again
}

TEST_F(SweepTest, FoldersOfOthersAreRefused) {
  sweep_file("grid: {attention.gate: [relu, relu4]}\nbudget: {steps: 6}\n");
  ASSERT_EQ(tessera("sweep run sweep.yaml").code, 0);
  const std::string before = contents("runs/s/gate=relu/metrics.jsonl"), config = contents("runs/s/gate=relu/config.yaml");
  const auto refused = [&](const std::string& arguments, std::vector<std::string> words) {
    const Result r = tessera("sweep " + arguments);
    EXPECT_EQ(r.code, 2) << r;
    for (const std::string& word : words) EXPECT_TRUE(r.says(word)) << word << "\n" << r;
    EXPECT_EQ(r.count("error: "), 1) << r;
    EXPECT_EQ(contents("runs/s/gate=relu/metrics.jsonl"), before);
    EXPECT_EQ(contents("runs/s/gate=relu/config.yaml"), config);
  };
  sweep_file("grid: {attention.gate: [relu, relu4]}\nbudget: {steps: 6}\n", "other.yaml");
  for (const char* command : {"plan", "run", "status", "report"})
    refused(command + std::string(" other.yaml"), {"runs/s: the folder belongs to another sweep, sweep.yaml", "dir:"});
  // The same sweep, whose base or budget has changed since.
  sweep_file("grid: {attention.gate: [relu, relu4]}\nbudget: {steps: 7}\n");
  refused("run sweep.yaml", {"gate=relu: runs/s/gate=relu holds a run with another configuration: train.steps: 6 there, 7 in the sweep"});
  sweep_file("grid: {attention.gate: [relu, relu4]}\nbudget: {steps: 6}\nset: {optimizer.lr: 0.1, log.every: 3}\n");
  refused("plan sweep.yaml", {"optimizer.lr: 0.003 there, 0.1 in the sweep"});
  const Result report = tessera("sweep report sweep.yaml");
  EXPECT_EQ(report.code, 0);
  EXPECT_TRUE(report.says("holds a run with another configuration, and is left out")) << report;
  // The data has been prepared anew, of other text.
  sweep_file("grid: {attention.gate: [relu, relu4]}\nbudget: {steps: 6}\nset: {data.path: other}\n");
  fs::rename(folder / "runs/s", folder / "runs/before");
  fs::copy(folder / "data", folder / "other", fs::copy_options::recursive);
  ASSERT_EQ(tessera("sweep run sweep.yaml").code, 0);
  fs::remove_all(folder / "other");
  write("other.txt", std::string(40000, 'x') + "\n");
  ASSERT_EQ(tessera("prepare --input other.txt --tokenizer bytes --output other --validation-fraction 0").code, 0);
  const Result anew = tessera("sweep run sweep.yaml");
  EXPECT_EQ(anew.code, 2) << anew;
  EXPECT_TRUE(anew.says("data.path other: other training text")) << anew;
  EXPECT_EQ(tessera("sweep status sweep.yaml").code, 0);  // what is there can be looked at
  fs::remove_all(folder / "runs/s");
  fs::rename(folder / "runs/before", folder / "runs/s");
  // What changes nothing of what a run finds may change.
  sweep_file("grid: {attention.gate: [relu, relu4]}\nbudget: {steps: 6}\nset: {log.every: 3, checkpoint.keep: 1}\n");
  EXPECT_EQ(tessera("sweep run sweep.yaml").code, 0);
}

TEST_F(SweepTest, TwoAtOnce) {
  sweep_file("set: {train.steps: 5000}\n");
  const Result r = shell(TESSERA_BINARY " sweep run sweep.yaml > log 2>&1 & p=$!; " + until("\"step\":3,", "runs/s/base/metrics.jsonl") +
                         TESSERA_BINARY " sweep run sweep.yaml; c=$?; kill -TERM $p; wait $p; exit $c");
  EXPECT_EQ(r.code, 1) << r;
  EXPECT_TRUE(r.says("runs/s: another `tessera sweep run` is at work in it now")) << r;
}

TEST_F(SweepTest, MistakesBeforeTheFirstRun) {
  const auto refused = [&](const std::string& yaml, std::vector<std::string> words) {
    sweep_file(yaml);
    const Result r = tessera("sweep run sweep.yaml");
    EXPECT_EQ(r.code, 2) << r;
    for (const std::string& word : words) EXPECT_TRUE(r.says(word)) << word << "\n" << r;
    EXPECT_EQ(r.count("error: "), 1) << r;
    EXPECT_FALSE(fs::exists(folder / "runs")) << yaml;
  };
  refused("grid: {attention.gat: [relu]}", {"sweep.yaml:3:8: grid: attention.gat: unknown key; nearest valid key \"attention.gate\""});
  refused("grid: {model.heads: [2, 3]}", {"variant heads=3", "sweep.yaml:3:25: model.heads"});
  refused("set: {data.path: nowhere}", {"base: ", "nowhere"});
  EXPECT_FALSE(tessera("sweep plan sweep.yaml").says("memory a rank"));  // no table of nothing
  refused("resources: {ranks: 3}", {"3 ranks", "What would do"});
  refused("list: [{name: huge, set: {model.width: 65536, model.heads: 256, model.layers: 1000}}]",
          {"huge: needs ", " TiB of memory, and this host has "});
  refused("set: {device: cuda, model.width: 64, model.heads: 1, attention.tile.query: 64, attention.tile.key: 64}", {"base: device cuda: "});
  EXPECT_EQ(tessera("sweep run nowhere.yaml").code, 2);
  EXPECT_EQ(tessera("sweep").code, 2);
  EXPECT_EQ(tessera("sweep report sweep.yaml --json --csv").code, 2);
}

TEST_F(SweepTest, SeveralRanksARun) {
  sweep_file("grid: {attention.gate: [relu, relu4]}\nbudget: {steps: 6}\nresources: {ranks: 2}\n");
  const Result r = tessera("sweep run sweep.yaml");
  ASSERT_EQ(r.code, 0) << r;
  EXPECT_TRUE(contents("runs/s/logs/gate=relu.log").find(", 2 ranks, ") != std::string::npos) << contents("runs/s/logs/gate=relu.log");
}

// Nothing is asserted of time itself: the steps are decided once, and stay.
TEST_F(SweepTest, MinutesBecomeSteps) {
  sweep_file("grid: {attention.gate: [relu, relu4]}\nbudget: {minutes: 0.01}\n");
  EXPECT_TRUE(json("plan sweep.yaml")["runs"][0]["steps"].is_null());
  const Result r = tessera("sweep run sweep.yaml");
  ASSERT_EQ(r.code, 0) << r;
  EXPECT_EQ(r.count("timing 12 steps for a budget of 0.01 minutes"), 2) << r;
  std::map<std::string, std::int64_t> steps;
  const Json plan = json("plan sweep.yaml");
  for (const Json& run : plan["runs"]) {
    steps[run["name"]] = run["steps"];
    EXPECT_TRUE(r.says(run["name"].get<std::string>() + ": training to step " + run["steps"].dump())) << r;
    EXPECT_EQ(metrics("s/" + run["name"].get<std::string>()).size(), run["steps"]);
  }
  EXPECT_TRUE(tessera("sweep run sweep.yaml").says("2 of 2 runs are finished already"));
  EXPECT_EQ(json("report sweep.yaml")["variants"][0]["finished"], 1);
  // Those steps are not of other minutes.
  sweep_file("grid: {attention.gate: [relu, relu4]}\nbudget: {minutes: 0.02}\n");
  const Result other = tessera("sweep run sweep.yaml");
  EXPECT_EQ(other.code, 2) << other;
  EXPECT_TRUE(other.says("runs/s: its runs have the steps of budget.minutes 0.01, not of budget.minutes 0.02. Put that back, ")) << other;
  EXPECT_EQ(other.count("gate=relu"), 1) << other;  // one mistake, said once
  EXPECT_EQ(names("runs/s"), (std::vector<std::string>{"gate=relu", "gate=relu4", "logs", "sweep.json"}));
}

// The shipped sweeps resolve, run by run, without their data and without a GPU.
TEST_F(SweepTest, TheShippedSweepsHavePlans) {
  const auto plan = [&](const std::string& name) {
    std::map<std::string, Json> runs;
    const Json all = json("plan " TESSERA_CONFIGS "/sweeps/" + name + ".yaml --set data.path= --set data.tokenizer=gpt2");
    for (const Json& run : all["runs"]) runs[run["name"]] = run;
    return runs;
  };
  EXPECT_EQ(plan("tiny").size(), 5u * 2);
  EXPECT_EQ(plan("gates").size(), (3u * 3 * 4 + 2) * 2);
  EXPECT_EQ(plan("sparsity").size(), (5u + 11) * 2);
  EXPECT_EQ(plan("context").size(), (3u * 3 + 3) * 2);
  EXPECT_EQ(plan("length").size(), 7u * 2);
  EXPECT_EQ(json("plan " TESSERA_CONFIGS "/sweeps/probes.yaml")["runs"].size(), 4u * 2 + 2);  // needs no text
  // Keys that a query sees on average, from the FLOPs: causal at 1,024 tokens is 512.5, and a key takes 12 x width x layers.
  const auto patterns = plan("patterns");
  EXPECT_EQ(patterns.size(), 7u * 2);
  const auto flops = [&](const std::string& name) { return patterns.at(name)["flops_per_token"]["pattern_visible"].get<double>(); };
  for (const char* name : {"window", "strided", "dilated", "global+window", "bigbird"})
    EXPECT_NEAR(512.5 - (flops("causal") - flops(name)) / (12.0 * 384 * 6), 130, 5) << name;
}

// The sweep that the README types, on the text at hand.
TEST_F(SweepTest, TheShippedTinySweepRuns) {
  std::string text = read_file(TESSERA_CONFIGS "/sweeps/tiny.yaml");
  const auto replace = [&](const std::string& from, const std::string& to) {
    const std::size_t at = text.find(from);
    ASSERT_NE(at, std::string::npos) << from;
    text.replace(at, from.size(), to);
  };
  replace("base: ../quickstart.yaml", "base: " TESSERA_CONFIGS "/quickstart.yaml");
  write("tiny-sweep.yaml", text);
  const Result r = tessera("sweep run tiny-sweep.yaml --set data.path=data");
  ASSERT_EQ(r.code, 0) << r;
  const Json report = json("report tiny-sweep.yaml --set data.path=data");
  EXPECT_EQ(report["variants"].size(), 5u);
  for (const Json& variant : report["variants"]) EXPECT_EQ(variant["finished"], 2) << variant;
}

}  // namespace
}  // namespace tessera
