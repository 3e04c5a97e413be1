// launch/train.sh: which command it gives mpirun. An mpirun that writes down its arguments stands before the real one on PATH.

#include <gtest/gtest.h>
#include <sys/wait.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>

#include "tests/cli/expect_usage_error.h"

namespace tessera {
namespace {

namespace fs = std::filesystem;

class TrainScript : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = (fs::temp_directory_path() / "tessera-launch-XXXXXX").string();
    ASSERT_TRUE(::mkdtemp(pattern.data()));
    folder = pattern;
    std::ofstream(folder / "mpirun") << "#!/bin/sh\nprintf '%s\\n' \"$@\" >'" << (folder / "arguments").string() << "'\nexit ${MPIRUN_EXIT:-0}\n";
    fs::permissions(folder / "mpirun", fs::perms::owner_all);
  }
  void TearDown() override { fs::remove_all(folder); }

  std::string read(const std::string& file) const {
    std::ostringstream text;
    text << std::ifstream(folder / file).rdbuf();
    return text.str();
  }

  /// Exit code of the script. `environment` is what is set beside PATH: the rest is this process's, without variables that would be passed on.
  int train(const std::string& arguments, const std::string& environment = "") const {
    fs::remove(folder / "arguments");
    const std::string line = "for v in $(env | sed -n 's/^\\(\\(NCCL\\|OMP\\|TESSERA\\)_[^=]*\\)=.*/\\1/p'); do unset $v; done; " + environment +
                             " PATH='" + folder.string() + "':$PATH '" TESSERA_CONFIGS "/../launch/train.sh' --binary '" TESSERA_BINARY "' " +
                             arguments + " >'" + (folder / "out").string() + "' 2>'" + (folder / "err").string() + "'";
    const int status = std::system(line.c_str());
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  }

  /// What mpirun was given, a space between arguments.
  std::string given() const {
    std::string text = read("arguments");
    for (char& c : text) c = c == '\n' ? ' ' : c;
    return text;
  }

  fs::path folder;
  const std::string tiny = TESSERA_CONFIGS "/tiny.yaml", gpu = TESSERA_CONFIGS "/gpt2-medium-sparse.yaml";
};

TEST_F(TrainScript, RanksHostsLogsAndArgumentsReachMpirun) {
  std::ofstream(folder / "hosts") << "a slots=4\nb slots=4\n";
  const std::string hosts = (folder / "hosts").string(), logs = (folder / "logs").string();
  ASSERT_EQ(train("-n 3 --hostfile " + hosts + " --logs " + logs + " " + tiny + " --resume --set 'run.dir=a b'"), 0) << read("err");
  EXPECT_EQ(given(), "--bind-to none -n 3 --hostfile " + hosts + " --output-filename " + logs + " " TESSERA_BINARY " train " + tiny +
                         " --resume --set run.dir=a b ");
}

TEST_F(TrainScript, VariablesOfNcclOpenMpAndTesseraGoToEveryRank) {
  ASSERT_EQ(train(tiny, "NCCL_DEBUG=WARN OMP_NUM_THREADS=2 TESSERA_FAULT= OTHER=1"), 0) << read("err");
  for (const char* passed : {"-x NCCL_DEBUG ", "-x OMP_NUM_THREADS ", "-x TESSERA_FAULT "}) EXPECT_TRUE(has(given(), passed)) << given();
  EXPECT_FALSE(has(given(), "OTHER")) << given();
}

TEST_F(TrainScript, WithoutANumberARankAGpu) {
  ASSERT_EQ(train(gpu, "CUDA_VISIBLE_DEVICES=0,1,2"), 0) << read("err");
  EXPECT_TRUE(has(given(), " -n 3 ")) << given();
  ASSERT_EQ(train(gpu + " --set device=cpu", "CUDA_VISIBLE_DEVICES=0,1,2"), 0) << read("err");
  EXPECT_TRUE(has(given(), " -n 1 ")) << given();
  ASSERT_EQ(train(tiny + " --resume", "CUDA_VISIBLE_DEVICES=0,1,2"), 0) << read("err");
  EXPECT_TRUE(has(given(), " -n 1 ")) << given();
  ASSERT_EQ(train(gpu, "CUDA_VISIBLE_DEVICES="), 0) << read("err");
  EXPECT_TRUE(has(given(), " -n 1 ")) << given();
  std::ofstream(folder / "hosts") << "a slots=4\n";  // its slots say how many
  ASSERT_EQ(train("--hostfile " + (folder / "hosts").string() + " " + gpu, "CUDA_VISIBLE_DEVICES=0,1,2"), 0) << read("err");
  EXPECT_FALSE(has(given(), " -n ")) << given();
}

TEST_F(TrainScript, TheRunsExitCodeIsItsOwn) { EXPECT_EQ(train(tiny, "MPIRUN_EXIT=7"), 7); }

TEST_F(TrainScript, Mistakes) {
  const auto refused = [&](const std::string& arguments, const std::string& says) {
    EXPECT_EQ(train(arguments), 2) << arguments;
    EXPECT_EQ(read("err"), "train.sh: error: " + says + "\n");
    EXPECT_EQ(given(), "") << arguments;
  };
  refused("", "no CONFIG.yaml given. See --help");
  refused("-n 0 " + tiny, "-n 0: expected a number of ranks, 1 or more");
  refused("-n two " + tiny, "-n two: expected a number of ranks, 1 or more");
  refused("-n", "-n needs a value. See --help");
  refused("--logs", "--logs needs a value. See --help");
  refused("--hostfile /no/such " + tiny, "--hostfile /no/such: no such file");
  EXPECT_EQ(train("--help"), 0);
  EXPECT_TRUE(has(read("out"), "./launch/train.sh [-n RANKS] [--hostfile FILE]")) << read("out");
}

// lib.sh's choose_blas, given a program that says about OpenBLAS what `tessera bench gemm` says.
TEST_F(TrainScript, OpenBlasIsToldTheKernelsItDoesNotFind) {
  const auto chosen = [&](const std::string& says, const std::string& environment) {
    std::ofstream(folder / "tessera") << "#!/bin/sh\n[ \"$1 $2\" = 'bench gemm' ] && echo '" << says << "'\n";
    fs::permissions(folder / "tessera", fs::perms::owner_all);
    const std::string line = "unset OPENBLAS_CORETYPE; export " + environment +
                             " PATH; set -euo pipefail; . '" TESSERA_CONFIGS "/../launch/lib.sh'; choose_blas '" + (folder / "tessera").string() +
                             "' >/dev/null; env | sed -n 's/^OPENBLAS_CORETYPE=//p'";
    std::ofstream(folder / "script") << line;
    EXPECT_EQ(std::system(("bash '" + (folder / "script").string() + "' >'" + (folder / "out").string() + "'").c_str()), 0) << line;
    return read("out");
  };
  const std::string unknown = "cpu (1 thread, OpenBLAS 0.3.21 Prescott for want of a better match: faster with OPENBLAS_CORETYPE=SkylakeX)";
  EXPECT_EQ(chosen(unknown, ""), "SkylakeX\n");
  EXPECT_EQ(chosen(unknown, "OPENBLAS_CORETYPE=Haswell"), "Haswell\n");
  EXPECT_EQ(chosen("cpu (1 thread, OpenBLAS 0.3.21 SkylakeX)", ""), "");
  EXPECT_EQ(chosen("", ""), "");
}

}  // namespace
}  // namespace tessera
