// The preflight: silent when all is well, and for each thing that can be wrong one line that says what and what to do, the same on every rank.

#include "trainer/preflight.h"

#include <gtest/gtest.h>

#include <functional>
#include <memory>
#include <mutex>
#include <set>

#include "tests/trainer/thread_ranks.h"
#include "trainer/collective.h"

namespace tessera {
namespace {

constexpr std::size_t kGiB = std::size_t{1} << 30;

void expect_line(const std::string& text, std::initializer_list<const char*> parts) {
  EXPECT_EQ(text.find('\n'), std::string::npos) << text;
  for (const char* part : parts) EXPECT_NE(text.find(part), std::string::npos) << "expected: " << part << "\nfound: " << text;
}

/// A communicator that does as `comm`, and adds `error` to sums, `gather_error` to what is gathered, `exchange_error` to what is exchanged.
class Wrong final : public testing::Forwarding {
 public:
  Wrong(Communicator& comm, float error, float gather_error = 0, float exchange_error = 0)
      : Forwarding(comm), error_(error), gather_error_(gather_error), exchange_error_(exchange_error) {}
  void all_reduce_sum(const Tensor& x) override {
    to_.all_reduce_sum(x);
    if (x.dtype == DType::f32) x.as<float>()[x.numel() - 1] += error_;
  }
  void all_gather(const Tensor& in, const Tensor& out) override {
    to_.all_gather(in, out);
    if (out.dtype == DType::f32) out.as<float>()[0] += gather_error_;
  }
  Ticket begin_exchange(const Tensor& in, std::span<const Part> send, const Tensor& out, std::span<const Part> receive) override {
    to_.exchange(in, send, out, receive);
    out.as<float>()[out.numel() - 1] += exchange_error_;
    return 0;
  }

 private:
  float error_, gather_error_, exchange_error_;
};

/// What each of `ranks` threw from work(communicator, ops).
std::multiset<std::string> errors(int ranks, const std::function<void(Communicator&, Ops&)>& work) {
  std::multiset<std::string> all;
  std::mutex mutex;
  testing::ThreadRanks::run(ranks, [&](Communicator& comm) {
    std::string text;
    try {
      const auto ops = make_cpu_ops(1);
      work(comm, *ops);
    } catch (const std::exception& e) {
      text = e.what();
    }
    const std::lock_guard lock(mutex);
    all.insert(text);
  });
  return all;
}

TEST(Preflight, IsSilentWhenAllIsWell) {
  for (const int ranks : {1, 2, 3}) {
    const auto all = errors(ranks, [](Communicator& comm, Ops& ops) { preflight({comm, comm, ops, 1 << 20}); });
    EXPECT_EQ(all.count(""), static_cast<std::size_t>(ranks)) << *all.rbegin();
  }
}

TEST(Preflight, AddsUpWhatTheRanksOfADevicePlan) {
  const auto two_thirds = [](Communicator& comm, Ops& ops) { preflight({comm, comm, ops, ops.memory_available() / 3 * 2}); };
  EXPECT_EQ(errors(1, two_thirds).count(""), 1u);
  const auto all = errors(2, two_thirds);
  ASSERT_EQ(all.count(*all.begin()), 2u) << "the ranks throw alike";
  expect_line(*all.begin(), {"preflight: ", "2 ranks on it need ", "GiB", "train.micro_batch"});
}

TEST(Preflight, ALookAtMemoryAloneTouchesNoDevice) {
  const auto two_thirds = [](Communicator& comm, Ops& ops) { check_memory(comm, ops, ops.memory_available() / 3 * 2); };
  EXPECT_EQ(errors(1, two_thirds).count(""), 1u);
  const auto all = errors(3, two_thirds);
  ASSERT_EQ(all.count(*all.begin()), 3u) << "the ranks throw alike";
  expect_line(*all.begin(), {"3 ranks on it need "});
}

TEST(Preflight, FindsAWrongSumOnOneRank) {
  for (const int ranks : {1, 2, 4}) {
    for (const bool gathered : {false, true}) {
      const auto all = errors(ranks, [&](Communicator& comm, Ops& ops) {
        const float error = comm.rank() == ranks - 1 ? 1.0f : 0.0f;
        Wrong wrong(comm, gathered ? 0 : error, gathered ? error : 0);
        preflight({comm, wrong, ops, 0});
      });
      ASSERT_EQ(all.count(*all.begin()), static_cast<std::size_t>(ranks)) << "the ranks throw alike";
      expect_line(*all.begin(), {"preflight: ", "a sum over the ", " in place of ", "MPI corrupts data"});
    }
  }
}

TEST(Preflight, TriesTheConnectionsOfRanksThatShareSequences) {
  const auto neighbours = [](const Communicator& comm) { return std::vector{comm.rank() / 2 * 2, comm.rank() / 2 * 2 + 1}; };
  std::mutex mutex;
  std::multiset<std::uint64_t> sent;
  auto all = errors(4, [&](Communicator& comm, Ops& ops) {
    preflight({.host = comm, .device = comm, .ops = ops, .planned_bytes = 1 << 20, .partners = neighbours(comm)});
    const std::lock_guard lock(mutex);
    sent.insert(comm.sent_bytes());
  });
  EXPECT_EQ(all.count(""), 4u) << *all.rbegin();
  EXPECT_EQ(sent.count(4000), 4u) << "a message to one other rank";

  all = errors(4, [&](Communicator& comm, Ops& ops) {
    Wrong wrong(comm, 0, 0, comm.rank() == 2 ? 1.0f : 0.0f);
    preflight({.host = comm, .device = wrong, .ops = ops, .partners = neighbours(comm)});
  });
  ASSERT_EQ(all.count(*all.begin()), 4u) << "the ranks throw alike";
  expect_line(*all.begin(), {"preflight: ", "rank 3 sent 1013 to rank 2 on host ", "and 1014 arrived", "MPI corrupts data"});
}

TEST(Preflight, SaysWhenMpiDoesNotKnowTheRanksThatWereLaunched) {
  EXPECT_EQ(launch_problem(0, 4, 4), "");
  EXPECT_EQ(launch_problem(4, 4, 4), "");
  expect_line(launch_problem(4, 1, 1), {"the launcher started 4 processes", "MPI here knows of 1", "mpirun"});
  expect_line(launch_problem(0, 4, 3), {"a one from each of 4 ranks to 3"});
}

TEST(Preflight, NamesTheFirstRankOfAnotherBuild) {
  EXPECT_EQ(build_problem({"a"}, {"h0"}), "");
  EXPECT_EQ(build_problem({"a", "a", "a"}, {"h0", "h0", "h1"}), "");
  expect_line(build_problem({"tessera 2", "tessera 2", "tessera 1"}, {"h0", "h0", "h1"}),
              {"rank 2 on host h1 is tessera 1", "rank 0 on host h0 is tessera 2", "the same build"});
}

TEST(Preflight, NamesTheGpuWithoutTheSharedMemoryForHeadsOf128) {
  const std::size_t kib = 1024;
  for (const std::size_t has : {161 * kib, 163 * kib, 227 * kib}) EXPECT_EQ(head_size_problem(8, 1024, 161 * kib, "GPU 0", has), "");
  expect_line(head_size_problem(8, 1024, 161 * kib, "GPU 0 of host a", 99 * kib),
              {"model.heads 8 of model.width 1024 are heads of 128", "takes 161 KiB of shared memory", "GPU 0 of host a has 99 KiB",
               "heads of 64 (model.heads 16)", "8.0, 9.0 or 10.0"});
  const auto all = errors(2, [](Communicator& comm, Ops& ops) { preflight({.host = comm, .device = comm, .ops = ops, .heads = 8, .width = 1024}); });
  EXPECT_EQ(all.count(""), 2u) << *all.rbegin();
}

TEST(Preflight, NamesTheDeviceWithoutEnoughMemory) {
  const std::size_t gib = kGiB;
  EXPECT_EQ(memory_problem({{"gpu 0", 10 * gib, 20 * gib}, {"gpu 1", 20 * gib, 20 * gib}}), "");
  EXPECT_EQ(memory_problem({{"gpu 0", 10 * gib, 20 * gib}, {"gpu 0", 10 * gib, 20 * gib}}), "");
  expect_line(memory_problem({{"gpu 0", 10 * gib, 20 * gib}, {"gpu 1", 21 * gib, 20 * gib}}),
              {"gpu 1 has 20.00 GiB", "1 rank on it needs 21.00 GiB", "train.micro_batch", "train.recompute gelu+norm or block"});
  expect_line(memory_problem({{"gpu 0", 10 * gib, 20 * gib}, {"gpu 0", 10 * gib, 19 * gib}}),
              {"gpu 0 has 19.00 GiB", "2 ranks on it need 20.00 GiB"});
  EXPECT_EQ(memory_problem({{"host a", 10 * gib, 15 * gib, "1"}, {"host a", 10 * gib, 15 * gib, "2"}}), "") << "two hosts of one name";
}

}  // namespace
}  // namespace tessera
