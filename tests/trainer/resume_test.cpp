// A run that is cut short goes on as if nothing had happened; what is damaged is noticed and never used.

#include <fmt/core.h>

#include <csignal>
#include <random>

#include "tests/trainer/run_support.h"

namespace tessera {
namespace {

using testing::Json;
using testing::Result;
using testing::RunTest;
namespace fs = std::filesystem;

class ResumeTest : public RunTest {
 protected:
  void flip_byte(const fs::path& file) const {
    std::fstream f(folder / file, std::ios::in | std::ios::out | std::ios::binary);
    const auto middle = static_cast<std::streamoff>(fs::file_size(folder / file) / 2);
    f.seekg(middle);
    const char byte = static_cast<char>(f.get() ^ 0x10);
    f.seekp(middle);
    f.put(byte);
  }
};

TEST_F(ResumeTest, KilledAtChosenStepsOnTwoRanks) {
  ASSERT_EQ(tessera_on(2, "train tiny.yaml --set run.dir=runs/whole").code, 0);
  const std::string command = "train tiny.yaml --set run.dir=runs/cut --resume";
  // Before the first checkpoint, right after one, between two, and while one is written (by either rank).
  for (const char* fault : {"kill@1:3", "kill@0:6", "kill@1:9", "kill-saving@0:10", "kill-saving@1:15", "kill@0:16"}) {
    const Result r = tessera_on(2, command, std::string("TESSERA_FAULT=") + fault);
    EXPECT_NE(r.code, 0) << fault << r;
  }
  const Result last = tessera_on(2, command);
  ASSERT_EQ(last.code, 0) << last;
  EXPECT_TRUE(last.says("going on after step 15")) << last;
  expect_same_bits("whole", "cut", 24);
  for (const std::string& name : names("runs/cut/checkpoints")) EXPECT_EQ(name.find(".tmp"), std::string::npos);
  EXPECT_EQ(tessera("inspect runs/cut --verify").code, 0);
}

TEST_F(ResumeTest, KilledAtRandomMoments) {
  const std::string steps = " --set train.steps=120 --set optimizer.warmup=4 --set eval.every=40 --set checkpoint.every=7";
  ASSERT_EQ(tessera("train tiny.yaml --set run.dir=runs/whole" + steps).code, 0);
  std::mt19937 random(std::random_device{}());
  int kills = 0;
  for (bool done = false; !done; ++kills) {
    ASSERT_LT(kills, 200);
    const pid_t child = fork();
    if (child == 0) {
      if (chdir(folder.c_str()) != 0 || !freopen("/dev/null", "w", stdout)) _exit(99);
      execl(TESSERA_BINARY, "tessera", "train", "tiny.yaml", "--set", "run.dir=runs/cut", "--set", "train.steps=120", "--set", "optimizer.warmup=4",
            "--set", "eval.every=40", "--set", "checkpoint.every=7", "--resume", nullptr);
      _exit(99);
    }
    // Longer each time, so that the run gets through on any machine.
    usleep(static_cast<useconds_t>(std::uniform_int_distribution<>(5000, 60000 + 8000 * kills)(random)));
    kill(child, SIGKILL);
    int status = 0;
    waitpid(child, &status, 0);
    done = WIFEXITED(status);
    if (done) {
      ASSERT_EQ(WEXITSTATUS(status), 0);
    }
  }
  expect_same_bits("whole", "cut", 120);
  EXPECT_GE(kills, 2) << "nothing was cut short";
}

TEST_F(ResumeTest, OnOtherNumbersOfRanks) {
  // Softmax, for the reason given at SameLossesOnOneTwoAndFourRanks: the batches and the optimizer's state are what is tested here.
  const std::string softmax = " --set attention.gate=softmax", command = "train tiny.yaml --set run.dir=runs/cut --resume" + softmax;
  ASSERT_EQ(tessera("train tiny.yaml --set run.dir=runs/whole" + softmax).code, 0);
  ASSERT_EQ(tessera_on(2, command, "TESSERA_FAULT=stop@0:4").code, 0);
  ASSERT_EQ(tessera(command, "TESSERA_FAULT=stop@0:9").code, 0);
  const Result r = tessera_on(4, command);
  ASSERT_EQ(r.code, 0) << r;
  const auto whole = metrics("whole"), cut = metrics("cut");
  ASSERT_EQ(cut.size(), 24u);
  for (std::size_t i = 0; i < 24; ++i) EXPECT_NEAR(cut[i]["loss"].get<double>(), whole[i]["loss"].get<double>(), 1e-6) << "step " << i + 1;
}

TEST_F(ResumeTest, WithOtherSizesOfBuckets) {
  const std::string six = " --set model.layers=6 --set model.width=128 --set train.steps=9 --set optimizer.warmup=1 --set eval.every=0";
  const std::string command = "train tiny.yaml --set run.dir=runs/cut --resume" + six;
  ASSERT_EQ(tessera_on(2, "train tiny.yaml --set run.dir=runs/whole" + six).code, 0);
  ASSERT_EQ(tessera_on(2, command + " --set parallel.bucket_mib=1", "TESSERA_FAULT=stop@0:3").code, 0);
  ASSERT_EQ(tessera_on(2, command + " --set parallel.bucket_mib=100", "TESSERA_FAULT=stop@0:6").code, 0);
  ASSERT_EQ(tessera_on(2, command + " --set parallel.bucket_mib=2").code, 0);
  const auto whole = metrics("whole"), cut = metrics("cut");
  ASSERT_EQ(cut.size(), 9u);
  for (std::size_t i = 0; i < 9; ++i) EXPECT_EQ(cut[i]["loss"].dump(), whole[i]["loss"].dump()) << "step " << i + 1;
}

TEST_F(ResumeTest, DamagedCheckpointsArePassedOver) {
  ASSERT_EQ(tessera("train tiny.yaml --set run.dir=runs/whole").code, 0);
  const std::string command = "train tiny.yaml --set run.dir=runs/cut --set checkpoint.keep=0 --resume";
  const auto cut = [&](const std::string& step) { return "runs/cut/checkpoints/step_000000" + step; };
  ASSERT_EQ(tessera(command, "TESSERA_FAULT=stop@0:16").code, 0);

  flip_byte(cut("16") + "/optimizer_0000_of_0001.h5");
  fs::resize_file(folder / cut("15") / "model.h5", 1000);
  fs::remove(folder / cut("10") / "COMPLETE.json");
  const Result verified = tessera("inspect runs/cut --verify");
  EXPECT_EQ(verified.code, 1);
  EXPECT_TRUE(verified.says(cut("16") + "/optimizer_0000_of_0001.h5")) << verified;
  EXPECT_TRUE(verified.says(cut("15") + "/model.h5: 1000 bytes")) << verified;
  EXPECT_EQ(tessera("inspect " + cut("15") + " --verify --json").code, 1);
  const Result eval = tessera("eval " + cut("15") + " --data data");
  EXPECT_EQ(eval.code, 1) << eval;
  EXPECT_TRUE(eval.says("model.h5")) << eval;
  const Result incomplete = tessera("eval " + cut("10") + " --data data");
  EXPECT_EQ(incomplete.code, 2) << incomplete;
  EXPECT_TRUE(incomplete.says("COMPLETE.json")) << incomplete;

  const Result r = tessera(command);
  ASSERT_EQ(r.code, 0) << r;
  EXPECT_EQ(r.count("damaged checkpoint passed over"), 2) << r;
  EXPECT_TRUE(r.says("going on after step 5")) << r;
  expect_same_bits("whole", "cut", 24);
  EXPECT_EQ(names("runs/cut/checkpoints"), (std::vector<std::string>{"step_00000005", "step_00000010", "step_00000015", "step_00000015.damaged",
                                                                     "step_00000016.damaged", "step_00000020", "step_00000024"}));
}

TEST_F(ResumeTest, NeverStartsOverBecauseAllCheckpointsAreDamaged) {
  ASSERT_EQ(tessera("train tiny.yaml --set run.dir=runs/a --set train.steps=10").code, 0);
  for (const auto& entry : fs::directory_iterator(folder / "runs/a/checkpoints")) flip_byte(fs::relative(entry.path() / "model.h5", folder));
  const Result r = tessera("train tiny.yaml --set run.dir=runs/a --resume");
  EXPECT_EQ(r.code, 1) << r;
  EXPECT_TRUE(r.says("every checkpoint") && r.says("step_00000010/model.h5") && r.says("step_00000005/model.h5")) << r;
  EXPECT_EQ(metrics("a").size(), 10u);
}

TEST_F(ResumeTest, StartsFromScratchWhereThereIsNoCheckpoint) {
  const Result r = tessera("train tiny.yaml --set run.dir=runs/a --set train.steps=6 --resume");
  EXPECT_EQ(r.code, 0) << r;
  EXPECT_TRUE(r.says("from scratch")) << r;
}

TEST_F(ResumeTest, AFullDiskLosesNothing) {
  ASSERT_EQ(tessera("train tiny.yaml --set run.dir=runs/whole").code, 0);
  for (const int ranks : {1, 2}) {
    const std::string name = fmt::format("r{}", ranks), dir = "runs/" + name, run = "train tiny.yaml --set run.dir=" + dir;
    ASSERT_EQ(tessera_on(ranks, run, "TESSERA_FAULT=stop@0:5").code, 0);
    // A limit on the size of files stands in for a full disk: a write fails in the middle. On two ranks it is the one without the model that fails,
    // and only once MPI has made its own files.
    const Result r = ranks == 1 ? shell("ulimit -f 64; exec " TESSERA_BINARY " " + run + " --resume")
                                : tessera_on(2, run + " --resume", "TESSERA_FAULT=full@1:10");
    EXPECT_EQ(r.code, 1) << r;
    EXPECT_EQ(r.count("step_00000010.tmp/"), 1) << r;
    EXPECT_EQ(names(dir + "/checkpoints"), (std::vector<std::string>{"step_00000005"})) << r;
    EXPECT_EQ(tessera("inspect " + dir + " --verify").code, 0);
    ASSERT_EQ(tessera_on(ranks, run + " --resume").code, 0);
    EXPECT_EQ(metrics(name).size(), 24u);
  }
  expect_same_bits("whole", "r1", 24);
}

TEST_F(ResumeTest, TwoRunsInOneFolderAreKeptApart) {
  const Result r = shell("mkdir -p runs/a && flock runs/a " TESSERA_BINARY " train tiny.yaml --set run.dir=runs/a");
  EXPECT_EQ(r.code, 1) << r;
  EXPECT_TRUE(r.says("another run is writing to it")) << r;
}

}  // namespace
}  // namespace tessera
