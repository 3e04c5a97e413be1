// Room for several runs at a time, processes, and what is read from what they print.

#include "trainer/sweep/sweep_room.h"

#include <poll.h>

#include <csignal>
#include <cstdlib>
#include <thread>

#include "tests/trainer/config_testing.h"
#include "trainer/sweep/child_process.h"
#include "trainer/sweep/sweep_run.h"

namespace tessera {
namespace {

using Gpus = std::vector<std::size_t>;

TEST(SweepRoom, CoresLimitRunsAtATime) {
  HostRoom host{.cores = 4, .gpus = {}, .gpu_memory = 0, .memory = 1000};
  RoomLedger room(host, 0);
  const RunDemand two{.cores = 2, .gpus = 0, .memory = 1};
  EXPECT_TRUE(room.take(two));
  EXPECT_TRUE(room.take(two));
  EXPECT_FALSE(room.take(two));
  room.give_back(two, {});
  EXPECT_TRUE(room.take(two));
}

TEST(SweepRoom, MemoryAndAtOnceLimitTooAndOneAloneIsLetIn) {
  HostRoom host{.cores = 64, .gpus = {}, .gpu_memory = 0, .memory = 1000};
  RoomLedger memory(host, 0);
  EXPECT_TRUE(memory.take({.cores = 1, .gpus = 0, .memory = 600}));
  EXPECT_FALSE(memory.take({.cores = 1, .gpus = 0, .memory = 600}));
  RoomLedger most(host, 2);
  EXPECT_TRUE(most.take({.cores = 1}));
  EXPECT_TRUE(most.take({.cores = 1}));
  EXPECT_FALSE(most.take({.cores = 1}));
  RoomLedger alone(host, 0);
  EXPECT_TRUE(alone.take({.cores = 100}));
  EXPECT_FALSE(alone.take({.cores = 1}));
}

TEST(SweepRoom, GpusAreDealtOut) {
  HostRoom host{.cores = 1, .gpus = {"2", "5", "GPU-7"}, .gpu_memory = 0, .memory = 0};
  RoomLedger room(host, 0);
  const RunDemand one{.cores = 0, .gpus = 1}, two{.cores = 0, .gpus = 2};
  const auto a = room.take(one), b = room.take(two);
  ASSERT_TRUE(a && b);
  EXPECT_EQ(room.names(*a), "2");
  EXPECT_EQ(room.names(*b), "5,GPU-7");
  EXPECT_FALSE(room.take(one));
  room.give_back(one, *a);
  EXPECT_EQ(room.take(one), (Gpus{0}));
}

TEST(SweepRoom, WhatARunTakes) {
  const HostRoom host{.cores = 8, .gpus = {"0", "1"}, .gpu_memory = std::size_t{80} << 30, .memory = 1 << 30};
  unsetenv("OMP_NUM_THREADS");
  Config c;
  EXPECT_EQ(demand_of(c, {.ranks = 2}, 100, host).cores, 8);  // all of the host
  EXPECT_EQ(demand_of(c, {.ranks = 2}, 100, host).memory, 200u);
  EXPECT_EQ(demand_of(c, {.ranks = 1, .at_once = 4}, 100, host).cores, 2);
  c.run.threads = 3;
  EXPECT_EQ(demand_of(c, {.ranks = 2, .at_once = 4}, 100, host).cores, 6);
  c.device = "cuda";
  EXPECT_EQ(demand_of(c, {.ranks = 2}, 100, host).gpus, 2);
  EXPECT_EQ(demand_of(c, {.ranks = 2}, 100, host).cores, 0);
  EXPECT_EQ(demand_of(c, {.ranks = 4, .gpus = 2}, 100, host).gpus, 2);
  c.parallel.share_gpu = true;
  EXPECT_EQ(demand_of(c, {.ranks = 4}, 100, host).gpus, 1);
}

TEST(SweepRoom, WhatCannotBe) {
  const std::size_t gib = std::size_t{1} << 30;
  const HostRoom host{.cores = 8, .gpus = {"0", "1"}, .gpu_memory = 80 * gib, .memory = 16 * gib};
  Config c;
  EXPECT_EQ(room_problem(c, {.ranks = 2}, 8 * gib, host), "");
  expect_error(room_problem(c, {.ranks = 2}, 9 * gib, host), "needs 18.0 GiB of memory for 2 ranks, and this host has 16.0 GiB");
  c.device = "cuda";
  EXPECT_EQ(room_problem(c, {.ranks = 2}, 79 * gib, host), "");
  expect_error(room_problem(c, {.ranks = 2}, 81 * gib, host), "needs 81.0 GiB of memory, and a GPU has 80.0 GiB");
  expect_error(room_problem(c, {.ranks = 3}, gib, host), "a run takes 3 GPUs, and 2 can be seen here");
  EXPECT_EQ(room_problem(c, {.ranks = 8}, 200 * gib, HostRoom{}), "");  // planned where there is no GPU
}

struct Ended {
  int code;
  std::string output;
};
Ended finish(ChildProcess& child) {
  Ended e{-1, ""};
  while (true) {
    const auto code = child.ended();
    child.read([&](std::string_view text) { e.output += text; });
    if (code) return e.code = *code, e;
    pollfd file{child.output(), POLLIN, 0};
    poll(&file, 1, 10);
  }
}

TEST(ChildProcesses, SayWhatTheyPrintAndHowTheyEnd) {
  ChildProcess child({{"sh", "-c", "echo out $CUDA_VISIBLE_DEVICES $HOME_OF_TEST; echo err >&2; exit 3"}, {{"CUDA_VISIBLE_DEVICES", "1,2"}}});
  const Ended e = finish(child);
  EXPECT_EQ(e.code, 3);
  EXPECT_EQ(e.output, "out 1,2\nerr\n");
  ChildProcess killed({{"sh", "-c", "kill -9 $$"}});
  EXPECT_EQ(finish(killed).code, 128 + SIGKILL);
  EXPECT_THROW(ChildProcess({{"no-such-program-here"}}), std::runtime_error);
}

TEST(ChildProcesses, AreOutOfTheTerminalsReachAndEndWithTheirParent) {
  ChildProcess child({{"sh", "-c", "ps -o sid= -p $$"}});
  EXPECT_EQ(std::stoi(finish(child).output), child.id());
  // A parent that is killed: its child gets SIGUSR1.
  int said[2];
  ASSERT_EQ(pipe(said), 0);
  const pid_t parent = fork();
  if (parent == 0) {
    dup2(said[1], 2);
    const std::string command = "trap 'echo told >&9; exit' USR1; echo ready; while :; do sleep 0.05; done";
    dup2(said[1], 9);
    ChildProcess grandchild({{"sh", "-c", command}});
    std::string text;
    while (text.empty()) grandchild.read([&](std::string_view t) { text += t; });
    kill(getpid(), SIGKILL);
  }
  close(said[1]);
  int status = 0;
  waitpid(parent, &status, 0);
  std::string text;
  char buffer[64];
  for (ssize_t n; (n = read(said[0], buffer, sizeof buffer)) > 0;) text.append(buffer, static_cast<std::size_t>(n));
  close(said[0]);
  EXPECT_NE(text.find("told"), std::string::npos) << text;
}

TEST(SweepRuns, LastError) {
  EXPECT_EQ(last_error("step 1\ntessera: error: a.yaml: bad\n", 2), "a.yaml: bad");
  EXPECT_EQ(last_error("tessera: error: first\ntessera: rank 1: error: second:\n  indented\nmpirun: and more\n", 1), "second:\n  indented");
  EXPECT_EQ(last_error("something\nodd happened\n\n", 5), "exit code 5: odd happened");
  EXPECT_EQ(last_error("", 1), "exit code 1, and nothing was printed");
  EXPECT_EQ(last_error("step 1\n", 137), "ended by signal 9 (Killed)");
  EXPECT_EQ(last_error("tessera: error: x\n", 139), "ended by signal 11 (Segmentation fault); x");
}

}  // namespace
}  // namespace tessera
