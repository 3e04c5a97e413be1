// Starts comm_ranks.cpp on 1, 2 and 4 ranks, and alone, and looks at exit codes and output.

#include <gtest/gtest.h>
#include <sys/wait.h>

#include <array>
#include <cstdio>
#include <stdexcept>
#include <string>

namespace tessera {
namespace {

struct Result {
  int code;  // the shell's: 124 after a timeout
  std::string output;
};

/// Runs a command of this test for at most two minutes. Variables of Open MPI let it start as root and with more ranks than cores; other
/// MPIs do not look at them.
Result run(const std::string& command) {
  const std::string line =
      "OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_rmaps_base_oversubscribe=1 "
      "PRTE_ALLOW_RUN_AS_ROOT=1 PRTE_ALLOW_RUN_AS_ROOT_CONFIRM=1 PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe OMP_NUM_THREADS=1 "
      "ASAN_OPTIONS=detect_leaks=0 "  // of the MPI library, when the address sanitizer is on
      "timeout -k 5 120 " +
      command + " 2>&1";
  FILE* pipe = popen(line.c_str(), "r");
  if (!pipe) throw std::runtime_error("popen failed");
  Result result{0, ""};
  std::array<char, 4096> buffer;
  for (std::size_t n; (n = fread(buffer.data(), 1, buffer.size(), pipe)) > 0;) result.output.append(buffer.data(), n);
  const int status = pclose(pipe);
  result.code = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  return result;
}

Result on_ranks(int ranks, const std::string& mode) {
  return run(TESSERA_MPIEXEC " -n " + std::to_string(ranks) + " " TESSERA_COMM_RANKS " " + mode);
}

std::size_t count(const std::string& text, const std::string& part) {
  std::size_t n = 0;
  for (std::size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) ++n;
  return n;
}

class Ranks : public ::testing::TestWithParam<int> {};

TEST_P(Ranks, CollectivesGiveTheirClosedForms) {
  const Result r = on_ranks(GetParam(), "collectives");
  EXPECT_EQ(r.code, 0) << r.output;
  EXPECT_NE(r.output.find(std::to_string(GetParam()) + " ranks are done"), std::string::npos) << r.output;
}

INSTANTIATE_TEST_SUITE_P(Comm, Ranks, ::testing::Values(1, 2, 3, 4));

TEST(Comm, ARankThatThrowsEndsTheJobWithItsMessageAndCode) {
  for (const int ranks : {1, 2, 4}) {
    const Result r = on_ranks(ranks, "throw");
    EXPECT_EQ(r.code, 3) << r.output;  // and not 124: no rank waited
    const std::string line = "tessera: rank " + std::to_string(ranks - 1) + " of " + std::to_string(ranks) + ": the disk of this rank is on fire\n";
    EXPECT_EQ(count(r.output, line), 1u) << r.output;
  }
}

TEST(Comm, AnExceptionThatPassesTheCommunicatorDoesNotHangTheJob) {
  const Result r = on_ranks(2, "unwind");
  EXPECT_NE(r.code, 0) << r.output;
  EXPECT_NE(r.code, 124) << r.output;
}

TEST(Comm, WithoutALauncherAProcessIsAlone) {
  const Result r = run("env -u OMPI_COMM_WORLD_SIZE -u PMIX_RANK -u PMI_RANK -u PMI_SIZE " TESSERA_COMM_RANKS " collectives");
  EXPECT_EQ(r.code, 0) << r.output;
  EXPECT_NE(r.output.find("1 ranks are done"), std::string::npos) << r.output;
  const Result failed = run("env -u OMPI_COMM_WORLD_SIZE -u PMIX_RANK -u PMI_RANK -u PMI_SIZE " TESSERA_COMM_RANKS " throw");
  EXPECT_EQ(failed.code, 3);
  EXPECT_EQ(failed.output, "tessera: the disk of this rank is on fire\n");
}

}  // namespace
}  // namespace tessera
