// The program that comm_test.cpp starts on several ranks. Its argument says what to do:
//   collectives   checks every collective against closed forms of (rank, index); the first difference ends the job
//   throw         the last rank throws while the others wait for it, and main answers with abort(3)
//   unwind        the same, and main does not call abort

#include <cstdio>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <vector>

#include "kernels/comm/communicator.h"

namespace tessera {
namespace {

void expect(bool ok, const char* what, std::int64_t count = 0) {
  if (!ok) throw std::runtime_error(std::string("check failed: ") + what + ", count " + std::to_string(count));
}

template <class Call>
void expect_logic_error(Call&& call, const std::string& what) {
  try {
    call();
  } catch (const std::logic_error&) {
    return;
  }
  throw std::runtime_error("no error from " + what);
}

template <class T>
Tensor tensor(std::vector<T>& v) {
  return {v.data(), dtype_of<T>::value, {static_cast<std::int64_t>(v.size())}};
}

/// Small integers, exact in every type: rank r holds start + 3 r + i mod 1000.
template <class T>
void check_all_reduce(Communicator& comm, std::int64_t count, T start) {
  std::vector<T> x(static_cast<std::size_t>(count));
  for (std::int64_t i = 0; i < count; ++i) x[i] = static_cast<T>(start + static_cast<T>(3 * comm.rank() + i % 1000));
  comm.all_reduce_sum(tensor(x));
  const int n = comm.size();
  for (std::int64_t i = 0; i < count; ++i) {
    const T wanted = static_cast<T>(static_cast<T>(n) * start + static_cast<T>(3 * n * (n - 1) / 2 + n * (i % 1000)));
    expect(x[i] == wanted, "all_reduce_sum", count);
  }
}

/// A float whose sum over ranks depends on the order of the additions.
float awkward(int rank, std::int64_t i) {
  constexpr float kValues[] = {1e8f, 3.14159f, -1e8f, 1.0f};
  return kValues[rank % 4] * (1.0f + 0.001f * static_cast<float>(i % 977));
}

float awkward_sum(int ranks, std::int64_t i) {
  float sum = awkward(0, i);
  for (int r = 1; r < ranks; ++r) sum += awkward(r, i);
  return sum;
}

void check_order(Communicator& comm, std::int64_t count) {
  const int n = comm.size();
  std::vector<float> x(static_cast<std::size_t>(count));
  for (std::int64_t i = 0; i < count; ++i) x[i] = awkward(comm.rank(), i);
  comm.all_reduce_sum(tensor(x));
  for (std::int64_t i = 0; i < count; ++i) expect(x[i] == awkward_sum(n, i), "all_reduce_sum in rank order", count);

  for (const bool in_place : {false, true}) {
    std::vector<float> in(static_cast<std::size_t>(count * n)), apart(static_cast<std::size_t>(count));
    for (std::int64_t i = 0; i < count * n; ++i) in[i] = awkward(comm.rank(), i);
    const Tensor out = in_place ? tensor(in).slice(comm.rank() * count, count) : tensor(apart);
    comm.reduce_scatter_sum(tensor(in), out);
    for (std::int64_t i = 0; i < count; ++i) {
      expect(out.as<float>()[i] == awkward_sum(n, comm.rank() * count + i), "reduce_scatter_sum in rank order", count);
    }
  }
}

template <class T>
void check_all_gather(Communicator& comm, std::int64_t count) {
  for (const bool in_place : {false, true}) {
    const auto value = [](int rank, std::int64_t i) { return static_cast<T>((rank * 7919 + i) % 1000003); };
    std::vector<T> out(static_cast<std::size_t>(count * comm.size())), apart(static_cast<std::size_t>(count));
    const Tensor in = in_place ? tensor(out).slice(comm.rank() * count, count) : tensor(apart);
    for (std::int64_t i = 0; i < count; ++i) in.as<T>()[i] = value(comm.rank(), i);
    comm.all_gather(in, tensor(out));
    for (int r = 0; r < comm.size(); ++r) {
      for (std::int64_t i = 0; i < count; ++i) expect(out[r * count + i] == value(r, i), "all_gather", count);
    }
  }
}

/// Ranks send each other parts of different sizes: none, few, and more than one message of bytes; in the order of the ranks or backwards, with a gap
/// between them.
template <class T>
void check_exchange(Communicator& comm, std::int64_t unit) {
  const int n = comm.size(), me = comm.rank();
  const auto count = [&](int from, int to) { return (from * 5 + to * 3) % 4 * unit + (from == to ? 1 : 0); };
  const auto value = [](int from, int to, std::int64_t i) { return static_cast<T>((from * 7919 + to * 104729 + i) % 1000003); };
  std::vector<Communicator::Part> send, receive;
  std::vector<T> in, out;
  std::uint64_t bytes = 0;
  for (int r = 0; r < n; ++r) {
    send.push_back({n - 1 - r, std::ssize(in), count(me, n - 1 - r)});
    for (std::int64_t i = 0; i < send.back().count; ++i) in.push_back(value(me, n - 1 - r, i));
    in.push_back(T{});
    if (n - 1 - r != me) bytes += static_cast<std::uint64_t>(send.back().count) * sizeof(T);
    receive.push_back({r, std::ssize(out), count(r, me)});
    out.resize(out.size() + static_cast<std::size_t>(receive.back().count) + 1, T{7});
  }
  const std::uint64_t before = comm.sent_bytes();
  comm.exchange(tensor(in), send, tensor(out), receive);
  expect(comm.sent_bytes() - before == bytes, "bytes sent by exchange", unit);
  std::size_t at = 0;
  for (int r = 0; r < n; ++r) {
    for (std::int64_t i = 0; i < count(r, me); ++i) expect(out[at++] == value(r, me, i), "exchange", unit);
    expect(out[at++] == T{7}, "exchange: between two parts", unit);
  }
  // Neighbours by twos, the others not taking part.
  if (me / 2 * 2 + 1 >= n) return;
  const int other = me ^ 1;
  std::vector<T> mine(3, static_cast<T>(me)), theirs(3);
  const Communicator::Part part{other, 0, 3};
  comm.exchange(tensor(mine), {&part, 1}, tensor(theirs), {&part, 1});
  expect(theirs == std::vector<T>(3, static_cast<T>(other)), "exchange of two ranks");
}

void check_broadcast(Communicator& comm) {
  for (int root = 0; root < comm.size(); ++root) {
    for (const std::int64_t count : {0, 1, 1000, 5'000'000}) {
      if (count > 1000 && root > 0) continue;  // larger than one message: once is enough
      std::vector<std::uint32_t> x(static_cast<std::size_t>(count), 0);
      if (comm.rank() == root) {
        for (std::int64_t i = 0; i < count; ++i) x[i] = static_cast<std::uint32_t>(i * 2654435761u + static_cast<std::uint32_t>(root));
      }
      comm.broadcast(tensor(x), root);
      for (std::int64_t i = 0; i < count; ++i) {
        expect(x[i] == static_cast<std::uint32_t>(i * 2654435761u + static_cast<std::uint32_t>(root)), "broadcast", count);
      }
    }
    const std::string texts[] = {"", "text", std::string("nul\0inside", 10), std::string(1 << 20, 'x')};
    for (const std::string& text : texts) expect(comm.broadcast(comm.rank() == root ? text : "other", root) == text, "broadcast of a string");
  }
}

void check_scalars(Communicator& comm) {
  expect(comm.max(comm.rank() * 10) == (comm.size() - 1) * 10, "max");
  expect(comm.max(-5 - comm.rank()) == -5, "max of negative values");
  constexpr auto kLowest = std::numeric_limits<std::int64_t>::min();
  expect(comm.max(kLowest) == kLowest, "max of the lowest value");
  expect(comm.local_rank() == comm.rank() && comm.local_size() == comm.size(), "all ranks of this test are on one host");
  comm.barrier();
}

void check_split(Communicator& comm) {
  const int rank = comm.rank(), n = comm.size();
  const auto reversed = comm.split(0, -rank);
  expect(reversed->size() == n && reversed->rank() == n - 1 - rank, "split orders by key");
  const auto same_key = comm.split(7, 0);
  expect(same_key->rank() == rank, "split orders equal keys by rank");
  const auto part = comm.split(rank % 2, rank);
  expect(part->size() == (rank % 2 ? n / 2 : (n + 1) / 2) && part->rank() == rank / 2, "split by color");
  std::vector<float> x{static_cast<float>(rank)};
  part->all_reduce_sum(tensor(x));
  float wanted = 0;
  for (int r = rank % 2; r < n; r += 2) wanted += static_cast<float>(r);
  expect(x[0] == wanted, "all_reduce_sum within a part");
  const auto alone = part->split(part->rank(), 0);
  expect(alone->size() == 1 && alone->rank() == 0, "split into single ranks");
  expect(comm.max(rank) == n - 1, "the communicator that was split still works");
}

void check_misuse(Communicator& comm) {
  const int n = comm.size();
  std::vector<float> f(static_cast<std::size_t>(4 * n)), part(3);
  std::vector<std::int32_t> ints(static_cast<std::size_t>(4));
  std::vector<double> d(static_cast<std::size_t>(4 * n));
  expect_logic_error([&] { comm.all_reduce_sum(tensor(ints)); }, "all_reduce_sum of i32");
  expect_logic_error([&] { comm.reduce_scatter_sum(tensor(f), tensor(part)); }, "reduce_scatter_sum of wrong counts");
  expect_logic_error([&] { comm.reduce_scatter_sum(tensor(d), tensor(d)); }, "reduce_scatter_sum of f64");
  expect_logic_error([&] { comm.all_gather(tensor(part), tensor(f)); }, "all_gather of wrong counts");
  expect_logic_error([&] { comm.all_gather(tensor(ints), tensor(f)); }, "all_gather of different types");
  std::vector<float> other(f.size());
  using Parts = std::vector<Communicator::Part>;
  const Parts own{{comm.rank(), 0, 4}};
  expect_logic_error([&] { comm.exchange(tensor(f), own, tensor(other), Parts{}); }, "exchange of wrong counts");
  expect_logic_error([&] { comm.exchange(tensor(f), own, tensor(d), own); }, "exchange of different types");
  expect_logic_error([&] { comm.exchange(tensor(f), own, tensor(f), own); }, "exchange in place");
  expect_logic_error([&] { comm.exchange(tensor(f), Parts{{0, 4 * n, 1}}, tensor(other), Parts{}); }, "exchange of a part outside the tensor");
  expect_logic_error([&] { comm.exchange(tensor(f), Parts{{n, 0, 1}}, tensor(other), Parts{}); }, "exchange with no rank");
  expect_logic_error([&] { comm.exchange(tensor(f), Parts{{0, 0, 0}, {0, 0, 0}}, tensor(other), Parts{}); }, "exchange of two parts with a rank");
  expect_logic_error([&] { comm.broadcast(tensor(f), n); }, "broadcast from no rank");
  expect_logic_error([&] { comm.broadcast(std::string("x"), -1); }, "broadcast from rank -1");
  expect_logic_error([&] { comm.split(-1, 0); }, "split with a negative color");
}

void check_collectives(Communicator& comm) {
  for (const std::int64_t count : {0, 1, 2, 3, 7, 1000, 100'003, 4'500'001}) {  // the last is more than the buffer of parts holds
    check_all_reduce<float>(comm, count, 0.0f);
    check_order(comm, std::min<std::int64_t>(count, 2'200'017));
    if (count > 1'000'000) continue;
    check_all_reduce<double>(comm, count, 1e15);
    check_all_reduce<std::uint64_t>(comm, count, (std::uint64_t{1} << 60) + 1);
    check_all_gather<float>(comm, count);
    check_all_gather<std::int32_t>(comm, count);
    check_all_gather<std::uint64_t>(comm, count);
  }
  for (const std::int64_t unit : {0, 1, 1000}) {
    check_exchange<float>(comm, unit);
    check_exchange<std::uint64_t>(comm, unit);
  }
  check_exchange<float>(comm, 3'000'000);    // parts of more than one message
  check_all_gather<float>(comm, 4'200'000);  // more than one message
  check_broadcast(comm);
  check_scalars(comm);
  check_split(comm);
  check_misuse(comm);
}

/// The last rank fails while the others wait for it.
void fail_on_last_rank(Communicator& comm) {
  comm.barrier();
  if (comm.rank() == comm.size() - 1) throw std::runtime_error("the disk of this rank is on fire");
  std::vector<float> x(1000);
  comm.all_reduce_sum(tensor(x));
}

int run(int argc, char** argv) {
  const std::string mode = argc == 2 ? argv[1] : "";
  if (mode == "unwind") {
    try {
      const auto comm = make_mpi_communicator();
      fail_on_last_rank(*comm);
    } catch (const std::exception&) {
      return 5;
    }
    return 0;
  }
  const auto comm = make_mpi_communicator();
  try {
    if (mode == "collectives") {
      check_collectives(*comm);
    } else if (mode == "throw") {
      fail_on_last_rank(*comm);
    } else {
      throw std::invalid_argument("say collectives, throw or unwind");
    }
  } catch (const std::exception& e) {
    comm->abort(3, e.what());
  }
  if (comm->rank() == 0) std::printf("%d ranks are done\n", comm->size());
  return 0;
}

}  // namespace
}  // namespace tessera

int main(int argc, char** argv) { return tessera::run(argc, argv); }
