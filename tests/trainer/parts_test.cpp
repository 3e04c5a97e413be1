// The trainer's small parts: thread shares, fault specifications, metrics.jsonl, choosing tokens, agreement between ranks, counters as shares.

#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <fstream>

#include "data/files.h"
#include "tests/trainer/thread_ranks.h"
#include "trainer/collective.h"
#include "trainer/config.h"
#include "trainer/device.h"
#include "trainer/fault.h"
#include "trainer/generate.h"
#include "trainer/host_threads.h"
#include "trainer/metrics.h"
#include "trainer/progress.h"
#include "trainer/run_folder.h"

namespace tessera {
namespace {

namespace fs = std::filesystem;

struct Folder {
  Folder() : path(fs::temp_directory_path() / ("tessera_parts_" + std::to_string(getpid()))) { fs::create_directories(path); }
  ~Folder() { fs::remove_all(path); }
  fs::path path;
};

TEST(HostThreads, FairShares) {
  const std::set<int> all{0, 1, 2, 3, 4, 5, 6, 7}, low{0, 1, 2, 3}, high{4, 5, 6, 7};
  EXPECT_EQ(fair_threads({{"a", all, 0}}, 0), 8);
  EXPECT_EQ(fair_threads({{"a", all, 0}, {"a", all, 0}}, 1), 4);
  EXPECT_EQ(fair_threads({{"a", low, 0}, {"a", high, 0}}, 0), 4);                                 // bound by the launcher: not divided again
  EXPECT_EQ(fair_threads({{"a", low, 0}, {"a", low, 0}, {"a", high, 0}, {"a", high, 0}}, 2), 2);  // two to a socket
  EXPECT_EQ(fair_threads({{"a", all, 0}, {"b", all, 0}}, 1), 8);                                  // two hosts
  EXPECT_EQ(fair_threads({{"a", all, 3.0}, {"a", all, 3.0}}, 0), 1);                              // a container's quota
  EXPECT_EQ(fair_threads({{"a", {0}, 0}, {"a", {0}, 0}, {"a", {0}, 0}}, 2), 1);                   // never 0
  EXPECT_GE(static_cast<int>(this_placement().cpus.size()), 1);
}

TEST(Fault, Specifications) {
  const FaultInjector f("nan@1:12", 1);
  EXPECT_TRUE(f.due(FaultInjector::Kind::nan, 12));
  EXPECT_FALSE(f.due(FaultInjector::Kind::nan, 13));
  EXPECT_FALSE(f.due(FaultInjector::Kind::kill, 12));
  EXPECT_FALSE(FaultInjector("nan@1:12", 0).due(FaultInjector::Kind::nan, 12));
  EXPECT_THROW(FaultInjector("exception@0:3", 0).strike(3), std::runtime_error);
  EXPECT_NO_THROW(FaultInjector("exception@0:3", 0).strike(2));
  for (const char* bad : {"kill", "kill@1", "explode@0:1", "kill@-1:2", "kill@0:1 "})
    EXPECT_THROW(FaultInjector(bad, 0), std::invalid_argument) << bad;
}

TEST(Agree, ThrowsEverywhereWhatOneRankThrew) {
  for (const int ranks : {2, 3}) {
    testing::ThreadRanks::run(ranks, [&](Communicator& comm) {
      EXPECT_NO_THROW(agree(comm, [] {}));
      try {
        agree(comm, [&] {
          if (comm.rank() == 1) throw std::invalid_argument("the folder is not there");
        });
        ADD_FAILURE() << "nothing was thrown";
      } catch (const CommonError& e) {
        EXPECT_EQ(e.exit_code(), 2);
        EXPECT_STREQ(e.what(), "rank 1: the folder is not there");
      }
      try {
        agree(comm, [&] { throw std::runtime_error("disk " + std::to_string(comm.rank())); });
        ADD_FAILURE() << "nothing was thrown";
      } catch (const CommonError& e) {
        EXPECT_EQ(e.exit_code(), 1);
        EXPECT_STREQ(e.what(), "disk 0");
      }
    });
  }
  const auto alone = make_single_communicator();
  EXPECT_THROW(agree(*alone, [] { throw std::invalid_argument("x"); }), std::invalid_argument);
  EXPECT_THROW(run_on_ranks(*alone, [] { throw std::invalid_argument("x"); }), std::invalid_argument);
}

TEST(Agree, GathersTexts) {
  testing::ThreadRanks::run(3, [&](Communicator& comm) {
    EXPECT_EQ(all_gather(comm, "r" + std::to_string(comm.rank())), (std::vector<std::string>{"r0", "r1", "r2"}));
  });
}

TEST(Device, ByName) {
  EXPECT_EQ(device_problem("cpu"), "");
  EXPECT_EQ(device_kind("cuda"), DeviceKind::cuda);
  EXPECT_THROW(device_kind("tpu"), std::invalid_argument);
  const auto alone = make_single_communicator();
  const Device device("cpu", 1, {}, *alone);
  EXPECT_EQ(device.ops().kind(), DeviceKind::cpu);
  EXPECT_EQ(&device.comm(), alone.get());
  EXPECT_EQ(device_memory_used(device.ops()), 0u);
  if (const std::string problem = device_problem("cuda"); !problem.empty()) {
    try {
      make_ops("cuda");
      ADD_FAILURE() << "nothing was thrown";
    } catch (const ConfigError& e) {
      EXPECT_EQ(e.what(), "device cuda: " + problem + "; or use device cpu");
    }
  }
}

TEST(Metrics, CutDropsLaterRowsAndBrokenLines) {
  const Folder folder;
  const std::string path = folder.path / "metrics.jsonl";
  {
    MetricsFile file(path);
    for (int s = 1; s <= 5; ++s) file.append({{"step", s}, {"loss", 1.0 / s}});
    file.append({{"step", 6}, {"loss", std::nan("")}});
  }
  EXPECT_EQ(MetricsFile::last(path)["step"], 6);
  EXPECT_TRUE(MetricsFile::last(path)["loss"].is_null());
  std::ofstream(path, std::ios::app) << R"({"step":7,"lo)";  // killed while writing
  MetricsFile::cut(path, 4);
  EXPECT_EQ(read_file(path),
            "{\"step\":1,\"loss\":1.0}\n{\"step\":2,\"loss\":0.5}\n{\"step\":3,\"loss\":0.3333333333333333}\n{\"step\":4,\"loss\":0.25}\n");
  MetricsFile::cut(path, 0);
  EXPECT_EQ(read_file(path), "");
  EXPECT_TRUE(MetricsFile::last(path).is_null());
  MetricsFile::cut(folder.path / "none", 3);
  EXPECT_FALSE(fs::exists(folder.path / "none"));
  EXPECT_THROW(MetricsFile(folder.path / "no" / "such"), std::runtime_error);
}

TEST(Metrics, CausalTilesByCounting) {
  for (const std::int64_t tokens : {1, 7, 64, 65, 200, 256}) {
    for (const auto& [tq, tk] : {std::pair{64, 64}, {16, 64}, {64, 16}, {128, 32}, {24, 40}}) {
      std::int64_t count = 0;
      for (std::int64_t a = 0; a * tq < tokens; ++a)
        for (std::int64_t b = 0; b * tk < tokens; ++b) {
          bool edge = false;
          for (std::int64_t i = a * tq; i < std::min<std::int64_t>((a + 1) * tq, tokens); ++i) edge = edge || b * tk <= i;
          count += edge;
        }
      EXPECT_EQ(causal_tiles(tokens, tq, tk), count) << tokens << " " << tq << " " << tk;
    }
  }
}

TEST(Metrics, Shares) {
  ModelConfig m;
  m.layers = 2;
  m.heads = 2;
  m.attention.tile_query = m.attention.tile_key = 16;
  std::vector<std::uint64_t> counters(2 * 2 * kAttentionCounters, 0);
  const auto at = [&](int l, int h, int c) -> std::uint64_t& { return counters[(l * 2 + h) * kAttentionCounters + c]; };
  // 3 sequences of 32 tokens: 528 causal edges and 3 causal tiles each.
  at(1, 0, kActiveEdges) = 3 * 528;
  at(1, 0, kActiveTiles) = 9;
  at(0, 1, kActiveEdges) = 792;
  at(0, 1, kActiveTiles) = 3;
  at(0, 0, kEmptyRows) = 96;
  const AttentionCounts counts(m, counters, 3, 32);
  EXPECT_DOUBLE_EQ(counts.all().edge_sparsity, 1 - 1.5 / 4);
  EXPECT_DOUBLE_EQ(counts.layer(0).edge_sparsity, 1 - 0.5 / 2);
  EXPECT_DOUBLE_EQ(counts.layer(1).tile_skip_rate, 0.5);
  EXPECT_DOUBLE_EQ(counts.layer(0).empty_rows, 0.5);
  EXPECT_DOUBLE_EQ(counts.active_share()[0][1], 0.5);
  EXPECT_DOUBLE_EQ(counts.active_share()[1][0], 1.0);
}

TEST(ChooseToken, GreedyTakesTheLowestOfEquals) {
  EXPECT_EQ(choose_token({0, 2, 1, 2}, {.temperature = 0}, 0.99), 1u);
  EXPECT_EQ(choose_token({5, 2, 1}, {.temperature = 0, .top_k = 2}, 0.5), 0u);
}

TEST(ChooseToken, DrawsInProportion) {
  const std::vector<float> logits{std::log(1.0f), std::log(2.0f), std::log(5.0f)};
  std::vector<int> drawn(3);
  const int n = 8000;
  for (int i = 0; i < n; ++i) ++drawn[choose_token(logits, {.temperature = 1}, (i + 0.5) / n)];
  EXPECT_NEAR(drawn[0], n * 1 / 8, 2);
  EXPECT_NEAR(drawn[1], n * 2 / 8, 2);
  EXPECT_NEAR(drawn[2], n * 5 / 8, 2);
  std::fill(drawn.begin(), drawn.end(), 0);
  for (int i = 0; i < n; ++i) ++drawn[choose_token(logits, {.temperature = 0.5}, (i + 0.5) / n)];  // squares: 1, 4, 25
  EXPECT_NEAR(drawn[1], n * 4.0 / 30, 2);
  std::fill(drawn.begin(), drawn.end(), 0);
  for (int i = 0; i < n; ++i) ++drawn[choose_token(logits, {.temperature = 1, .top_k = 2}, (i + 0.5) / n)];
  EXPECT_EQ(drawn[0], 0);
  EXPECT_NEAR(drawn[1], n * 2.0 / 7, 2);
}

TEST(ChooseToken, ExtremeLogits) {
  EXPECT_EQ(choose_token({-1e30f, 1e30f, 0}, {.temperature = 1}, 0.999999), 1u);
  EXPECT_EQ(choose_token({3.0f}, {.temperature = 1, .top_k = 40}, 0.0), 0u);
}

TEST(Progress, Words) {
  EXPECT_EQ(format_duration(12.2), "12s");
  EXPECT_EQ(format_duration(187), "3m07s");
  EXPECT_EQ(format_duration(3720), "1h02m");
  EXPECT_EQ(format_duration(2 * 86400 + 3 * 3600), "2d03h");
  EXPECT_EQ(format_count(850), "850");
  EXPECT_EQ(format_count(12345), "12.3k");
  EXPECT_EQ(format_bytes(1536), "1.5 KiB");
}

TEST(RunFolder, WhichChangesMatter) {
  const Config then = load_config("", {"train.steps=100"});
  EXPECT_TRUE(changes_that_matter(then, then).empty());
  const Config harmless =
      load_config("", {"train.steps=200", "run.threads=3", "eval.every=7", "checkpoint.keep=1", "log.every=9", "tensorboard.enabled=false",
                       "attention.visit=all", "run.dir=elsewhere", "train.micro_batch=2", "sample.every=4", "device=cuda", "train.precision=bf16",
                       "train.recompute=block", "parallel.bucket_mib=5"});
  EXPECT_TRUE(changes_that_matter(then, harmless).empty());
  const auto changes = changes_that_matter(then, load_config("", {"train.steps=100", "model.layers=3", "optimizer.lr=0.5", "run.seed=9"}));
  ASSERT_EQ(changes.size(), 3u);
  EXPECT_EQ(changes[0].substr(0, 9), "run.seed:");
  EXPECT_EQ(changes[1].substr(0, 13), "model.layers:");
  EXPECT_NE(changes[2].find("0.5 now"), std::string::npos);
}

TEST(RunFolder, WarmUpFollowsTheStepsOnlyWhereItIsNotSet) {
  const auto changes = [](std::vector<std::string> then, std::vector<std::string> now) {
    return changes_that_matter(load_config("", then), load_config("", now)).size();
  };
  EXPECT_EQ(changes({"train.steps=100"}, {"train.steps=200"}), 0u);  // 10, 20
  EXPECT_EQ(changes({"train.steps=100", "optimizer.warmup=7"}, {"train.steps=200", "optimizer.warmup=7"}), 0u);
  EXPECT_EQ(changes({"train.steps=100"}, {"train.steps=200", "optimizer.warmup=10"}), 0u);  // as a run's config.yaml has it
  EXPECT_EQ(changes({"train.steps=100"}, {"train.steps=200", "optimizer.warmup=50"}), 1u);
  EXPECT_EQ(changes({"train.steps=100", "optimizer.warmup=7"}, {"train.steps=200"}), 1u);
  EXPECT_EQ(changes({"train.steps=100"}, {"train.steps=100", "optimizer.warmup=11"}), 1u);
}

TEST(RunFolder, OneRunAtATime) {
  const Folder folder;
  const FolderLock first(folder.path);
  EXPECT_THROW(FolderLock second(folder.path), std::runtime_error);
}

}  // namespace
}  // namespace tessera
