// TensorBoard's events of whole runs: what they show is what metrics.jsonl says, also after a kill and on a full disk.

#include <fmt/core.h>

#include <algorithm>
#include <map>

#include "tests/trainer/event_reader.h"
#include "tests/trainer/run_support.h"

namespace tessera {
namespace {

using testing::Json;
using testing::read_events;
using testing::ReadEvent;
using testing::ReadValue;
using testing::Result;
using testing::RunTest;
namespace fs = std::filesystem;

class EventRunTest : public RunTest {
 protected:
  /// The event files of a run, in the order in which TensorBoard reads them.
  std::vector<std::string> event_files(const std::string& name) const {
    std::vector<std::string> files = names("runs/" + name);
    std::erase_if(files, [](const std::string& file) { return !file.starts_with("events.out.tfevents."); });
    return files;
  }
  std::vector<ReadEvent> events(const std::string& name, const std::string& file, bool* cut_off = nullptr) const {
    return read_events(read_file((folder / "runs" / name / file).string()), cut_off);
  }
  /// The events with values as TensorBoard shows them: a start drops what was there from its step on.
  std::vector<ReadEvent> shown(const std::string& name) const {
    std::vector<ReadEvent> shown;
    for (const std::string& file : event_files(name))
      for (ReadEvent& event : events(name, file)) {
        if (event.session == 1u) std::erase_if(shown, [&](const ReadEvent& e) { return e.step >= event.step; });
        if (!event.values.empty()) shown.push_back(std::move(event));
      }
    return shown;
  }
  static std::vector<std::int64_t> steps_with(const std::vector<ReadEvent>& events, const std::string& tag) {
    std::vector<std::int64_t> steps;
    for (const ReadEvent& event : events)
      if (event.find(tag)) steps.push_back(event.step);
    return steps;
  }
  void expect_metrics(const std::string& name, std::size_t steps) const {
    const std::vector<std::pair<const char*, const char*>> tags = {{"loss", "train/loss"},
                                                                   {"lr", "train/lr"},
                                                                   {"grad_norm", "train/grad_norm"},
                                                                   {"tokens", "train/tokens"},
                                                                   {"validation_loss", "validation/loss"},
                                                                   {"bits_per_byte", "validation/bits_per_byte"},
                                                                   {"edge_sparsity", "attention/edge_sparsity"},
                                                                   {"tile_skip_rate", "attention/tile_skip_rate"},
                                                                   {"empty_row_share", "attention/empty_row_share"},
                                                                   {"tokens_per_s", "speed/tokens_per_s"},
                                                                   {"step_ms", "speed/step_ms"},
                                                                   {"attention_share", "speed/attention_share"},
                                                                   {"planned_bytes", "memory/planned_bytes"}};
    const auto rows = metrics(name);
    const auto events = shown(name);
    ASSERT_EQ(rows.size(), steps);
    ASSERT_EQ(events.size(), steps);
    for (std::size_t i = 0; i < steps; ++i) {
      EXPECT_EQ(events[i].step, static_cast<std::int64_t>(i) + 1);
      for (const auto& [key, tag] : tags) {
        const ReadValue* value = events[i].find(tag);
        ASSERT_EQ(value != nullptr, rows[i].contains(key)) << tag << " of step " << i + 1;
        if (!value) continue;
        EXPECT_EQ(value->scalar, static_cast<float>(rows[i][key].get<double>())) << tag << " of step " << i + 1;
      }
      for (const ReadValue& value : events[i].values) EXPECT_FALSE(value.tag.starts_with("other/")) << value.tag;
    }
  }
};

TEST_F(EventRunTest, ShowsWhatMetricsSay) {
  const Result r =
      tessera_on(2,
                 "train tiny.yaml --set run.dir=runs/a --set log.heads_every=8 --set tensorboard.histogram_every=5 --set attention.always.self=true "
                 "--set attention.always.sinks=1");
  ASSERT_EQ(r.code, 0) << r;
  ASSERT_EQ(event_files("a").size(), 1u);  // rank 0's
  expect_metrics("a", 24);
  const auto events = shown("a");
  const auto rows = metrics("a");
  const std::vector<std::int64_t> with_heads = {5, 8, 10, 15, 16, 20, 24};
  for (const char* tag : {"active_share/layer_01", "thresholds/layer_00", "balances/layer_00", "scales/layer_01", "self_biases/layer_00",
                          "sink_biases/layer_01", "edge_sparsity/layer_00", "tile_skip_rate/layer_01", "occupancy/active_share"})
    EXPECT_EQ(steps_with(events, tag), with_heads) << tag;
  for (const std::size_t step : {8, 16, 24})
    for (const char* what : {"active_share", "thresholds", "balances", "scales", "self_biases", "sink_biases"})
      for (int layer = 0; layer < 2; ++layer) {
        const auto heads = rows[step - 1][what][layer].get<std::vector<double>>();
        const ReadValue* value = events[step - 1].find(fmt::format("{}/layer_{:02}", what, layer));
        ASSERT_NE(value, nullptr);
        EXPECT_EQ(value->histogram->num, 2);
        EXPECT_EQ(value->histogram->min, std::min(heads[0], heads[1]));
        EXPECT_EQ(value->histogram->max, std::max(heads[0], heads[1]));
      }
  const ReadEvent& last = events[23];
  EXPECT_NEAR((*last.find("edge_sparsity/layer_00")->scalar + *last.find("edge_sparsity/layer_01")->scalar) / 2,
              rows[23]["edge_sparsity"].get<double>(), 1e-6);
}

TEST_F(EventRunTest, OffWritesNoneAndChangesNoBit) {
  ASSERT_EQ(tessera("train tiny.yaml --set run.dir=runs/on --set tensorboard.histogram_every=1").code, 0);
  const Result r = tessera("train tiny.yaml --set run.dir=runs/off --set tensorboard.enabled=false --set tensorboard.histogram_every=1");
  ASSERT_EQ(r.code, 0) << r;
  EXPECT_TRUE(r.says("note: tensorboard.histogram_every has no effect with tensorboard.enabled false")) << r;
  EXPECT_EQ(event_files("off"), std::vector<std::string>{});
  EXPECT_EQ(steps_with(shown("on"), "occupancy/active_share").size(), 24u);
  expect_same_bits("on", "off", 24);
}

TEST_F(EventRunTest, KilledAndResumedShowsEachStepOnce) {
  ASSERT_EQ(tessera("train tiny.yaml --set run.dir=runs/whole").code, 0);
  const std::string run = "train tiny.yaml --set run.dir=runs/cut --resume";
  for (const char* fault : {"kill@0:4", "kill@0:14", "kill-saving@0:20"}) EXPECT_NE(tessera(run, std::string("TESSERA_FAULT=") + fault).code, 0);
  // As a kill in the middle of a write leaves it.
  const std::string torn = (folder / "runs/cut" / event_files("cut").back()).string();
  fs::resize_file(torn, fs::file_size(torn) - 5);
  ASSERT_EQ(tessera(run).code, 0);
  const auto files = event_files("cut");
  ASSERT_EQ(files.size(), 4u);
  std::vector<std::int64_t> starts;
  for (const std::string& file : files) {
    bool cut_off = false;
    starts.push_back(events("cut", file, &cut_off)[1].step);
    EXPECT_EQ(cut_off, file == files[2]) << file;
  }
  EXPECT_EQ(starts, (std::vector<std::int64_t>{1, 1, 11, 16}));
  expect_metrics("cut", 24);
  expect_same_bits("whole", "cut", 24);
  // Nothing to do, nothing to show.
  ASSERT_EQ(tessera(run).code, 0);
  EXPECT_EQ(event_files("cut"), files);
  // Changes that are allowed.
  ASSERT_EQ(tessera(run + " --set train.steps=26 --set tensorboard.enabled=false").code, 0);
  EXPECT_EQ(event_files("cut"), files);
}

TEST_F(EventRunTest, AFullDiskIsAnErrorThatNamesTheFile) {
  // A limit on the size of files stands in for a full disk; histograms at every step make the events the first to reach it.
  const std::string run = "train tiny.yaml --set run.dir=runs/a --set checkpoint.every=0 --set tensorboard.histogram_every=1";
  const Result r = shell("ulimit -f 32; exec " TESSERA_BINARY " " + run);
  EXPECT_EQ(r.code, 1) << r;
  EXPECT_EQ(r.count("tessera: error: runs/a/events.out.tfevents."), 1) << r;
  EXPECT_TRUE(r.says("failed: File too large (a limit on the size of files: see ulimit -f)")) << r;
  bool cut_off = false;
  const auto kept = events("a", event_files("a").at(0), &cut_off);
  EXPECT_TRUE(cut_off);
  EXPECT_GT(kept.size(), 4u);
  ASSERT_EQ(tessera(run + " --resume").code, 0);
  expect_metrics("a", 24);
}

TEST_F(EventRunTest, RunsOfASweepHaveTheirOwn) {
  write("sweep.yaml", "base: tiny.yaml\ndir: runs/sweep\ngrid: {attention.gate: [relu, relu2]}\nresources: {ranks: 1, at_once: 1}\n");
  const Result r = tessera("sweep run sweep.yaml");
  ASSERT_EQ(r.code, 0) << r;
  int runs = 0;
  for (const std::string& name : names("runs/sweep"))
    if (fs::exists(folder / "runs/sweep" / name / "metrics.jsonl")) {
      ++runs;
      EXPECT_EQ(event_files("sweep/" + name).size(), 1u) << name;
      expect_metrics("sweep/" + name, 24);
    }
  EXPECT_EQ(runs, 2);
}

// With TensorBoard's own package: everything that it reads, and what it serves over HTTP. See check_events.py.
TEST_F(EventRunTest, TensorBoardReadsAndServesThem) {
  const char* named = std::getenv("TESSERA_TENSORBOARD_PYTHON");
  const std::string python = named ? named : "python3";
  if (std::system((python + " -c 'import tensorboard, PIL' >/dev/null 2>&1").c_str()) != 0)
    GTEST_SKIP() << "NOT TESTED: " << python << " has no tensorboard and pillow (TESSERA_TENSORBOARD_PYTHON names another)";
  ASSERT_EQ(tessera("train tiny.yaml --set run.dir=runs/whole --set run.peak_tflops=1").code, 0);
  const std::string run = "train tiny.yaml --set run.dir=runs/cut --resume";
  EXPECT_NE(tessera(run, "TESSERA_FAULT=kill@0:14").code, 0);
  ASSERT_EQ(tessera(run).code, 0);
  const std::string check = python + " " TESSERA_FIXTURES "/tensorboard/check_events.py ";
  for (const std::string arguments : {"runs/whole", "runs/cut", "--serve runs"}) {
    const Result r = shell(check + arguments);
    EXPECT_EQ(r.code, 0) << r;
    std::cout << r.output;
  }
}

}  // namespace
}  // namespace tessera
