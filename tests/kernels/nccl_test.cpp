// The choice of GPUs, and nccl_ranks.cpp on ranks that share GPUs: exit codes and output. What needs a GPU is skipped, saying so, where there is
// none.

#include <gtest/gtest.h>
#include <sys/wait.h>

#include <array>
#include <chrono>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/comm/gpu_choice.h"
#include "kernels/cuda/ops.h"

namespace tessera {
namespace {

// -- the choice

std::vector<VisibleGpus> on_one_host(const std::vector<std::vector<std::string>>& addresses) {
  std::vector<VisibleGpus> ranks;
  for (const auto& a : addresses) ranks.push_back({"node1", "node1 boot", "", a});
  return ranks;
}

std::string error_of(const std::vector<VisibleGpus>& ranks, bool share = false) {
  try {
    choose_gpus(ranks, share);
  } catch (const std::invalid_argument& e) {
    return e.what();
  }
  return "";
}

void expect_parts(const std::string& text, std::initializer_list<const char*> parts) {
  for (const char* part : parts) EXPECT_NE(text.find(part), std::string::npos) << "expected: " << part << "\nfound: " << text;
}

TEST(GpuChoice, TheNthRankOfAHostTakesItsNthGpu) {
  EXPECT_EQ(choose_gpus(on_one_host({{"a", "b", "c"}, {"a", "b", "c"}, {"a", "b", "c"}}), false), (std::vector{0, 1, 2}));
  std::vector<VisibleGpus> two_hosts = on_one_host({{"a", "b"}, {"a", "b"}, {"a", "b"}, {"a", "b"}});
  two_hosts[1].machine = two_hosts[3].machine = "node2 boot";
  EXPECT_EQ(choose_gpus(two_hosts, false), (std::vector{0, 0, 1, 1}));
}

TEST(GpuChoice, ARankWhoseLauncherShowsItOneGpuTakesThatOne) {
  EXPECT_EQ(choose_gpus(on_one_host({{"b"}, {"a"}, {"c"}}), false), (std::vector{0, 0, 0}));
  EXPECT_EQ(choose_gpus(on_one_host({{"a", "b"}, {"b", "a"}}), false), (std::vector{0, 0}));
}

TEST(GpuChoice, MoreRanksThanGpusIsAnErrorUnlessTheyMayShare) {
  const auto ranks = on_one_host({{"a", "b"}, {"a", "b"}, {"a", "b"}, {"a", "b"}, {"a", "b"}});
  expect_parts(error_of(ranks), {"host node1 has 5 ranks and 2 GPUs", "at most 2 ranks", "parallel.share_gpu: true"});
  expect_parts(error_of(on_one_host({{"a"}, {"a"}})), {"host node1 has 2 ranks and 1 GPU:", "at most 1 rank on it"});
  EXPECT_EQ(choose_gpus(ranks, true), (std::vector{0, 1, 0, 1, 0}));
  EXPECT_EQ(choose_gpus(on_one_host({{"a"}, {"a"}}), true), (std::vector{0, 0}));
}

TEST(GpuChoice, TwoRanksThatAreShownTheSameGpuIsAnErrorThatSaysSo) {
  expect_parts(error_of(on_one_host({{"a"}, {"b"}, {"b"}, {"c"}, {"d"}})), {"host node1 has 5 ranks and 4 GPUs"});
  expect_parts(error_of(on_one_host({{"a"}, {"a"}, {"b", "c"}})), {"rank 1 on host node1 sees 1 GPU", "CUDA_VISIBLE_DEVICES", "3 GPUs in all"});
}

TEST(GpuChoice, ARankWithoutAGpuIsNamedWithTheReason) {
  auto ranks = on_one_host({{"a"}, {}});
  expect_parts(error_of(ranks, true), {"rank 1 on host node1", "no GPU is visible"});
  ranks[1].problem = "the driver is too old";
  expect_parts(error_of(ranks, true), {"rank 1 on host node1", "the driver is too old"});
}

// -- ranks

struct Result {
  int code;  // the shell's: 124 after a timeout
  std::string output;
  double seconds;
  bool says(const std::string& text) const { return output.find(text) != std::string::npos; }
  int count(const std::string& text) const {
    int n = 0;
    for (std::size_t at = output.find(text); at != std::string::npos; at = output.find(text, at + 1)) ++n;
    return n;
  }
};

/// As comm_test.cpp starts its ranks. `environment` is for all of them.
Result on_ranks(int ranks, const std::string& arguments, const std::string& environment = "") {
  const std::string line =
      "OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_rmaps_base_oversubscribe=1 PRTE_ALLOW_RUN_AS_ROOT=1 "
      "PRTE_ALLOW_RUN_AS_ROOT_CONFIRM=1 PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe OMP_NUM_THREADS=1 " +
      environment + " timeout -k 5 300 " TESSERA_MPIEXEC " -n " + std::to_string(ranks) + " " TESSERA_NCCL_RANKS " " + arguments + " 2>&1";
  const auto start = std::chrono::steady_clock::now();
  FILE* pipe = popen(line.c_str(), "r");
  if (!pipe) throw std::runtime_error("popen failed");
  Result result{0, "", 0};
  std::array<char, 4096> buffer;
  for (std::size_t n; (n = fread(buffer.data(), 1, buffer.size(), pipe)) > 0;) result.output.append(buffer.data(), n);
  const int status = pclose(pipe);
  result.code = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  result.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return result;
}

std::ostream& operator<<(std::ostream& out, const Result& r) {
  return out << "exit code " << r.code << " after " << r.seconds << " s:\n" << r.output;
}

#define SKIP_WITHOUT_GPU() \
  if (const std::string problem = cuda_problem(); !problem.empty()) GTEST_SKIP() << "no GPU: " << problem

TEST(Nccl, WithoutAGpuEveryRankStopsAndOneSaysWhy) {
  if (cuda_problem().empty()) GTEST_SKIP() << "this machine has a GPU";
  const Result r = on_ranks(2, "choose 5 share");
  EXPECT_EQ(r.code, 2) << r;
  EXPECT_EQ(r.count("cannot use a GPU: " + cuda_problem()), 1) << r;
  EXPECT_TRUE(r.says("tessera: rank 0 of 2: rank 0 on host ")) << r;
}

TEST(Nccl, TwoRanksOnOneGpuIsAnErrorOfUse) {
  SKIP_WITHOUT_GPU();
  const Result r = on_ranks(2, "choose 5", "CUDA_VISIBLE_DEVICES=0");
  EXPECT_EQ(r.code, 2) << r;
  EXPECT_EQ(r.count("has 2 ranks and 1 GPU: each rank needs a GPU of its own. Start at most 1 rank on it, or set parallel.share_gpu: true"), 1) << r;
}

TEST(Nccl, RanksThatShareAGpuAreHostsOfTheirOwn) {
  SKIP_WITHOUT_GPU();
  const Result r = on_ranks(2, "choose 5 share", "CUDA_VISIBLE_DEVICES=0");
  EXPECT_EQ(r.code, 0) << r;
  EXPECT_TRUE(r.says("rank 0 takes GPU 0, host id tessera-rank-0\n")) << r;
  EXPECT_TRUE(r.says("rank 1 takes GPU 0, host id tessera-rank-1\n")) << r;
}

class NcclRanks : public ::testing::TestWithParam<int> {};

TEST_P(NcclRanks, CollectivesGiveTheirClosedForms) {
  SKIP_WITHOUT_GPU();
  const Result r = on_ranks(GetParam(), "collectives 120 share");
  EXPECT_EQ(r.code, 0) << r;
  EXPECT_TRUE(r.says(std::to_string(GetParam()) + " ranks are done\n")) << r;
  EXPECT_FALSE(r.says("tessera: ")) << r;
}

INSTANTIATE_TEST_SUITE_P(Nccl, NcclRanks, ::testing::Values(1, 2, 4));

TEST(Nccl, ALongOperationBeforeACollectiveIsNoFailure) {
  SKIP_WITHOUT_GPU();
  const Result r = on_ranks(2, "patient 6 share");
  EXPECT_EQ(r.code, 0) << r;
}

/// What rank 0 says of the collective that never ends, within the deadline and what ending takes.
void expect_the_end(const Result& r) {
  EXPECT_NE(r.code, 0) << r;
  EXPECT_NE(r.code, 124) << r;
  EXPECT_LT(r.seconds, 60) << r;
  EXPECT_TRUE(r.says("tessera: rank 0 of 2 on ")) << r;
  EXPECT_TRUE(r.says("under way: #4 all_reduce_sum of 999 f32; last finished: #3 all_reduce_sum of 1,000 f32.")) << r;
  EXPECT_FALSE(r.says("rank 0 went on")) << r;
}

TEST(Nccl, ARankThatEndsTakesTheOthersWithIt) {
  SKIP_WITHOUT_GPU();
  expect_the_end(on_ranks(2, "exit 10 share"));
}

TEST(Nccl, ARankThatHangsIsNotWaitedForLongerThanTheDeadline) {
  SKIP_WITHOUT_GPU();
  for (const char* arguments : {"hang 10 share", "queue 10 share"}) {
    const Result r = on_ranks(2, arguments);
    expect_the_end(r);
    EXPECT_EQ(r.code, 1) << r;
    EXPECT_TRUE(r.says(": waited 10 s in a collective; ") || r.says(": CUDA has not answered for ")) << r;
  }
}

TEST(Nccl, ARankThatThrowsEndsTheJobWithItsMessageAndCode) {
  SKIP_WITHOUT_GPU();
  const Result r = on_ranks(2, "throw 60 share");
  EXPECT_EQ(r.code, 3) << r;
  EXPECT_EQ(r.count("tessera: rank 1 of 2: the disk of this rank is on fire\n"), 1) << r;
  EXPECT_LT(r.seconds, 40) << r;
}

}  // namespace
}  // namespace tessera
