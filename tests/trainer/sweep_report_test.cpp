// What is read of runs' folders: states, means and spread, twins. The folders are written here, number by number.

#include "trainer/sweep/sweep_report.h"

#include <fmt/core.h>

#include <algorithm>
#include <map>

#include "data/files.h"
#include "tests/trainer/config_testing.h"
#include "tests/trainer/sweep_testing.h"
#include "trainer/run_folder.h"

namespace tessera {
namespace {

namespace fs = std::filesystem;
using testing::SweepFiles;

class SweepReports : public SweepFiles {
 protected:
  Sweep of(const std::string& yaml) const { return sweep("dir: " + (folder / "runs").string() + "\n" + yaml); }

  /// A run's folder after `steps` steps with these last losses; finished when a checkpoint of the last step is there.
  static void run(const SweepRun& r, std::int64_t steps, double loss, bool finished) {
    fs::create_directories(r.config.run.dir);
    write_file(r.config.run.dir + "/config.yaml", to_yaml(r.config));
    std::string rows;
    for (std::int64_t t = 1; t <= steps; ++t)
      rows += fmt::format(R"({{"step":{},"tokens":{},"loss":5,"tokens_per_s":1000,"step_ms":500,"edge_sparsity":0.9,"tile_skip_rate":0.4{}}})", t,
                          512 * t, t == steps ? fmt::format(R"(,"validation_loss":{},"attention_share":0.125)", loss) : "") +
              "\n";
    write_file(r.config.run.dir + "/metrics.jsonl", rows);
    if (!finished) return;
    const std::string checkpoint = r.config.run.dir + "/checkpoints/" + fmt::format("step_{:08}", steps);
    fs::create_directories(checkpoint);
    write_file(checkpoint + "/COMPLETE.json", "{}");
  }
};

TEST_F(SweepReports, StatesFollowFromTheFolders) {
  const Sweep s = of("grid: {attention.gate: [relu, relu2, relu4]}\nseeds: [1, 2]");
  run(s.runs[0], 20, 2, true);
  run(s.runs[1], 5, 3, false);
  run(s.runs[2], 4, 3, false);
  fs::create_directories(folder / "runs/logs");
  write_file((folder / "runs/logs/gate=relu4.failed.json").string(), R"({"error":"the disk is full"})");
  const SweepResults results = read_results(s);
  EXPECT_TRUE(results.notices.empty());
  const auto status = status_json(s, results);
  EXPECT_EQ(status["counts"], (nlohmann::ordered_json{{"finished", 1}, {"running", 0}, {"interrupted", 1}, {"failed", 1}, {"waiting", 3}}));
  EXPECT_EQ(status["runs"][0]["validation_loss"], 2);
  EXPECT_EQ(status["runs"][1]["state"], "interrupted");
  EXPECT_EQ(status["runs"][1]["seconds_left"], 7.5);  // 15 steps of half a second
  EXPECT_EQ(status["runs"][2]["error"], "the disk is full");
  EXPECT_EQ(status["runs"][3]["step"], 0);
  const std::string text = status_text(s, results);
  for (const char* part : {"6 runs, 1 finished, 1 interrupted, 1 failed, 3 waiting", "the disk is full", "5/20"})
    EXPECT_NE(text.find(part), std::string::npos) << text;
  // Under lock it is running.
  const FolderLock lock(s.runs[1].config.run.dir);
  EXPECT_TRUE(folder_in_use(s.runs[1].config.run.dir));
  EXPECT_FALSE(folder_in_use(s.runs[0].config.run.dir));
  EXPECT_EQ(read_results(s).states[1].kind, RunState::Kind::running);
}

TEST_F(SweepReports, MeansSpreadAndTwins) {
  const Sweep s =
      of("grid: {optimizer.lr: [0.01, 0.02]}\nlist:\n  - {name: soft, set: {attention.gate: softmax, optimizer.lr: 0.01}}\n"
         "  - {name: soft-dot, set: {attention.gate: softmax, attention.score: dot, optimizer.lr: 0.01}}\nseeds: [1, 2, 3]");
  const std::map<std::string, std::vector<double>> losses = {
      {"lr=0.01", {2.0, 2.1, 2.6}}, {"lr=0.02", {3.0}}, {"soft", {1.5, 1.7, 1.6}}, {"soft-dot", {1.0, 1.0, 1.0}}};
  for (const SweepRun& r : s.runs)
    if (const auto& of_variant = losses.at(r.variant); r.config.run.seed <= of_variant.size()) run(r, 20, of_variant[r.config.run.seed - 1], true);
  const auto report = report_json(s, read_results(s));
  const auto& v = report["variants"];
  ASSERT_EQ(v.size(), 4u);
  EXPECT_NEAR(v[0]["validation_loss"].get<double>(), 2.2333333333, 1e-9);
  EXPECT_NEAR(v[0]["validation_loss_sd"].get<double>(), 0.3214550254, 1e-9);  // numpy.std([2, 2.1, 2.6], ddof=1)
  EXPECT_EQ(v[0]["twin"], "soft");                                            // nearer than with another score
  EXPECT_NEAR(v[0]["over_twin"].get<double>(), 2.2333333333 - 1.6, 1e-9);
  EXPECT_EQ(v[1]["finished"], 1);
  EXPECT_EQ(v[1]["seeds"], 3);
  EXPECT_TRUE(v[1]["validation_loss_sd"].is_null());
  EXPECT_TRUE(v[1]["twin"].is_null());  // no softmax at this rate
  EXPECT_EQ(v[0]["tokens_per_s"], 1000);
  EXPECT_EQ(v[0]["attention_share"], 0.125);
  EXPECT_EQ(v[0]["seconds"], 10);
  EXPECT_EQ(v[0]["edge_sparsity"], 0.9);
  EXPECT_TRUE(v[2]["edge_sparsity"].is_null());
  const std::string text = report_text(s, read_results(s));
  EXPECT_LT(text.find("soft-dot *"), text.find("soft *"));  // lowest loss first
  EXPECT_LT(text.find("soft *"), text.find("lr=0.01"));
  EXPECT_NE(text.find("2.2333 +- 0.3215"), std::string::npos) << text;
  EXPECT_NE(text.find("1 of 3"), std::string::npos) << text;
  const std::string csv = report_csv(s, read_results(s));
  EXPECT_EQ(std::count(csv.begin(), csv.end(), '\n'), 5);
  EXPECT_NE(csv.find("\r\nsoft,true,3,3,1.6"), std::string::npos) << csv;
}

TEST_F(SweepReports, SpeedAndAttentionAreMediansOfTheLaterHalf) {
  const Sweep s = of("");
  run(s.runs[0], 20, 2, true);
  std::string rows;
  const std::map<int, double> shares = {{5, 0.9}, {12, 0.1}, {16, 0.5}, {18, 0.2}, {20, 0.3}};
  for (int t = 1; t <= 20; ++t) {
    nlohmann::ordered_json row = {{"step", t}, {"tokens", 512 * t}, {"loss", 5}, {"tokens_per_s", t <= 10 ? 1 : 100 * t}};
    if (const auto share = shares.find(t); share != shares.end()) row["attention_share"] = share->second;
    rows += row.dump() + "\n";
  }
  write_file(s.runs[0].config.run.dir + "/metrics.jsonl", rows);
  const auto report = report_json(s, read_results(s));
  EXPECT_NEAR(report["variants"][0]["attention_share"].get<double>(), 0.25, 1e-12);  // of 0.1, 0.5, 0.2, 0.3
  EXPECT_NEAR(report["variants"][0]["tokens_per_s"].get<double>(), 1550, 1e-9);
}

TEST_F(SweepReports, OverSoftmaxIsOfTheSeedsThatBothHave) {
  const Sweep s = of("list: [{name: a}, {name: soft, set: {attention.gate: softmax}}]\nseeds: [1, 2, 3]");
  const std::map<std::string, std::vector<double>> losses = {{"a", {2.0, 3.0}}, {"soft", {1.5, 2.75, 9.0}}};
  for (const SweepRun& r : s.runs)
    if (const auto& of_variant = losses.at(r.variant); r.config.run.seed <= of_variant.size()) run(r, 20, of_variant[r.config.run.seed - 1], true);
  EXPECT_EQ(report_json(s, read_results(s))["variants"][0]["over_twin"], 0.375);
  EXPECT_NE(report_text(s, read_results(s)).find("over softmax: over the seeds that both have"), std::string::npos);
  for (const SweepRun& r : s.runs)  // a: seed 2, soft: 1 and 3
    if ((r.variant == "soft") == (r.config.run.seed == 2)) fs::remove_all(r.config.run.dir);
  EXPECT_EQ(report_json(s, read_results(s))["variants"][0]["validation_loss"], 3);
  EXPECT_TRUE(report_json(s, read_results(s))["variants"][0]["over_twin"].is_null());
}

// What somebody evaluated later, on whatever text and context, is not what the other runs have.
TEST_F(SweepReports, AnEvaluationOfOneRunDoesNotCount) {
  const Sweep s = of("list: [{name: a}]\nseeds: [1, 2]");
  for (const SweepRun& r : s.runs) run(r, 20, 2, true);
  write_file(s.runs[0].config.run.dir + "/eval.json", R"({"step":20,"loss":1.0,"tokens":128,"split":"train","edge_sparsity":0.1})");
  const auto report = report_json(s, read_results(s));
  EXPECT_EQ(report["variants"][0]["validation_loss"], 2);
  EXPECT_EQ(report["variants"][0]["edge_sparsity"], 0.9);
  write_file(s.runs[0].config.run.dir + "/eval.json", "{");  // nor its damage
  EXPECT_EQ(report_json(s, read_results(s))["variants"][0]["finished"], 2);
}

TEST_F(SweepReports, DamagedRunsAreShownAsFailedBesideTheOthers) {
  const Sweep s = of("grid: {optimizer.lr: [0.01, 0.02, 0.03, 0.04, 0.05]}");
  for (const SweepRun& r : s.runs) run(r, 20, 2, true);
  write_file(s.runs[0].config.run.dir + "/config.yaml", "\x01: [");
  write_file(s.runs[1].config.run.dir + "/metrics.jsonl", "");
  const std::string metrics = read_file(s.runs[2].config.run.dir + "/metrics.jsonl");
  write_file(s.runs[2].config.run.dir + "/metrics.jsonl", metrics.substr(0, metrics.size() - 5));
  fs::remove_all(s.runs[3].config.run.dir);
  fs::create_directories(folder / "runs/logs");
  write_file((folder / "runs/logs/lr=0.04.failed.json").string(), R"({"error":5})");
  const auto status = status_json(s, read_results(s));
  for (const int i : {0, 1, 2, 3}) EXPECT_EQ(status["runs"][i]["state"], "failed") << i;
  EXPECT_EQ(status["runs"][4]["state"], "finished");
  expect_error(status["runs"][0]["error"].get<std::string>(), "lr=0.01/config.yaml");
  expect_error(status["runs"][1]["error"].get<std::string>(), "lr=0.02/metrics.jsonl", "ends at step 0 of a run that finished 20");
  expect_error(status["runs"][2]["error"].get<std::string>(), "lr=0.03/metrics.jsonl", "ends at step 19");
  const auto report = report_json(s, read_results(s));
  EXPECT_TRUE(report["variants"][1]["edge_sparsity"].is_null());
  EXPECT_EQ(report["variants"][4]["validation_loss"], 2);
}

TEST_F(SweepReports, NamesWithCommasAreQuotedInCsv) {
  const Sweep s = of("grid: {attention.gate: [relu], model.layers: [1]}");
  EXPECT_NE(report_csv(s, read_results(s)).find("\"gate=relu,layers=1\",false,1,0,"), std::string::npos);
}

TEST_F(SweepReports, AnotherConfigurationInTheFolderIsLeftOut) {
  const Sweep s = of("grid: {optimizer.lr: [0.01, 0.02]}");
  run(s.runs[0], 20, 2, true);
  run(s.runs[1], 20, 2, true);
  const Sweep changed = of("grid: {optimizer.lr: [0.01, 0.02]}\noverrides: [{if: {optimizer.lr: 0.02}, set: {optimizer.clip: 5}}]");
  const SweepResults results = read_results(changed);
  EXPECT_EQ(results.states[0].kind, RunState::Kind::finished);
  EXPECT_EQ(results.states[1].kind, RunState::Kind::waiting);
  expect_error(results.notices.at(0), "lr=0.02 holds a run with another configuration", "optimizer.clip: 1.0 there, 5.0 in the sweep");
}

TEST_F(SweepReports, FoldersHaveOneSweep) {
  const Sweep s = of("");
  const SweepFolder folder_of_s(s.file);
  folder_of_s.check_owner();
  folder_of_s.claim();
  folder_of_s.claim();
  SweepFile other = s.file;
  other.file = folder / "sweeps/t.yaml";
  try {
    SweepFolder(other).check_owner();
    FAIL();
  } catch (const ConfigError& e) {
    expect_error(e.what(), "belongs to another sweep", "sweeps/s.yaml", "sweep.json");
  }
  // A run by itself is none either.
  SweepFile of_a_run = s.file;
  of_a_run.dir = (folder / "alone").string();
  fs::create_directories(of_a_run.dir);
  write_file(of_a_run.dir + "/config.yaml", "");  // the base of a sweep may have that name
  SweepFolder(of_a_run).check_owner();
  write_file(of_a_run.dir + "/metrics.jsonl", "");
  try {
    SweepFolder(of_a_run).claim();
    FAIL();
  } catch (const ConfigError& e) {
    expect_error(e.what(), "alone: the folder holds a run of its own, with ", "dir:");
  }
  EXPECT_FALSE(fs::exists(of_a_run.dir + "/sweep.json"));
  // The minutes by which its runs were timed are on record, once it has some.
  SweepFile timed = s.file;
  EXPECT_EQ(SweepFolder(timed).minutes(), 0);
  timed.budget.minutes = 2.5;
  SweepFolder(timed).claim();
  EXPECT_EQ(SweepFolder(timed).minutes(), 2.5);
  EXPECT_EQ(folder_of_s.minutes(), 2.5);
  // Moved together they still belong together.
  fs::create_directories(folder / "elsewhere");
  fs::rename(folder / "sweeps", folder / "elsewhere/sweeps");
  fs::rename(folder / "runs", folder / "elsewhere/runs");
  SweepFile moved = s.file;
  moved.file = folder / "elsewhere/sweeps/s.yaml";
  moved.dir = folder / "elsewhere/runs";
  SweepFolder(moved).check_owner();
}

}  // namespace
}  // namespace tessera
