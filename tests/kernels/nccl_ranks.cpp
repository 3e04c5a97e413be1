// The program that nccl_test.cpp starts on several ranks. Its arguments say what to do:
//   collectives      every collective against closed forms of (rank, index), in place and not, behind and beside operations; errors of the caller
//   exit, hang       the last rank ends, or sleeps, while the others wait for it in a collective
//   queue            as hang, and the others have filled the GPU's queue behind it
//   throw            the last rank throws while the others wait for it, and main answers with abort(3)
//   patient          operations before a collective take longer than the deadline, and that is no failure
//   choose           each rank says which GPU it takes
// followed by: the deadline in seconds, and "share" if ranks may share a GPU.

#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "kernels/comm/nccl.h"
#include "kernels/cuda/ops.h"

namespace tessera {
namespace {

void expect(bool ok, const std::string& what, std::int64_t count = 0) {
  if (!ok) throw std::runtime_error(fmt::format("check failed: {}, count {}", what, count));
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

/// Device memory of an Ops, poisoned.
template <class T>
class Buffer {
 public:
  Buffer(Ops& ops, std::int64_t count) : ops_(&ops), tensor_(ops.allocate(std::max<std::size_t>(1, bytes(count))), dtype_of<T>::value, {count}) {
    std::vector<T> poison(static_cast<std::size_t>(count));
    if (count > 0) std::memset(static_cast<void*>(poison.data()), 0xff, bytes(count));
    ops.upload(tensor_, poison.data());
    ops.synchronize();
  }
  Buffer(Ops& ops, const std::vector<T>& values) : Buffer(ops, static_cast<std::int64_t>(values.size())) { set(values); }
  ~Buffer() { ops_->deallocate(tensor_.data); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  const Tensor& tensor() const { return tensor_; }
  Tensor slice(std::int64_t first, std::int64_t count) const { return tensor_.slice(first, count); }
  void set(const std::vector<T>& values) {
    ops_->upload(tensor_, values.data());
    ops_->synchronize();
  }
  std::vector<T> host() const {
    std::vector<T> values(static_cast<std::size_t>(tensor_.numel()));
    ops_->download(values.data(), tensor_);
    return values;
  }

 private:
  static std::size_t bytes(std::int64_t count) { return static_cast<std::size_t>(count) * sizeof(T); }
  Ops* ops_;
  Tensor tensor_;
};

template <class T, class F>
std::vector<T> filled(std::int64_t count, F&& f) {
  std::vector<T> v(static_cast<std::size_t>(count));
  for (std::int64_t i = 0; i < count; ++i) v[static_cast<std::size_t>(i)] = static_cast<T>(f(i));
  return v;
}

/// Small integers, whose sums are exact in every type and order: rank r holds start + 3 r + i mod 1000.
template <class T>
T value(int rank, std::int64_t i, T start) {
  return static_cast<T>(start + static_cast<T>(3 * rank + i % 1000));
}
template <class T>
T sum(int ranks, std::int64_t i, T start) {
  return static_cast<T>(static_cast<T>(ranks) * start + static_cast<T>(3 * ranks * (ranks - 1) / 2 + ranks * (i % 1000)));
}

struct World {
  Communicator& host;
  Ops& ops;
  Communicator& comm;
};

template <class T>
void check_all_reduce(const World& w, std::int64_t count, T start) {
  const Buffer<T> x(w.ops, filled<T>(count, [&](std::int64_t i) { return value<T>(w.comm.rank(), i, start); }));
  w.comm.all_reduce_sum(x.tensor());
  expect(x.host() == filled<T>(count, [&](std::int64_t i) { return sum<T>(w.comm.size(), i, start); }),
         std::string("all_reduce_sum of ") + name_of(x.tensor().dtype), count);
}

void check_reduce_scatter(const World& w, std::int64_t count) {
  const int n = w.comm.size(), rank = w.comm.rank();
  const auto wanted = filled<float>(count, [&](std::int64_t i) { return sum<float>(n, rank * count + i, 0); });
  for (const bool in_place : {false, true}) {
    for (const bool begun : {false, true}) {
      const Buffer<float> in(w.ops, filled<float>(count * n, [&](std::int64_t i) { return value<float>(rank, i, 0); })), apart(w.ops, count);
      const Tensor out = in_place ? in.slice(rank * count, count) : apart.tensor();
      if (begun) {
        w.comm.wait(w.comm.begin_reduce_scatter_sum(in.tensor(), out));
      } else {
        w.comm.reduce_scatter_sum(in.tensor(), out);
      }
      std::vector<float> found(static_cast<std::size_t>(count));
      w.ops.download(found.data(), out);
      expect(found == wanted, "reduce_scatter_sum", count);
    }
  }
}

template <class T>
void check_all_gather(const World& w, std::int64_t count) {
  const int n = w.comm.size(), rank = w.comm.rank();
  const auto own = [](int r, std::int64_t i) { return static_cast<T>((r * 7919 + i) % 1000003); };
  const auto wanted = filled<T>(count * n, [&](std::int64_t i) { return count > 0 ? own(static_cast<int>(i / count), i % count) : T{}; });
  for (const bool in_place : {false, true}) {
    for (const bool begun : {false, true}) {
      const Buffer<T> out(w.ops, count * n), apart(w.ops, count);
      const Tensor in = in_place ? out.slice(rank * count, count) : apart.tensor();
      const auto values = filled<T>(count, [&](std::int64_t i) { return own(rank, i); });
      w.ops.upload(in, values.data());
      if (begun) {
        w.comm.wait(w.comm.begin_all_gather(in, out.tensor()));
      } else {
        w.comm.all_gather(in, out.tensor());
      }
      expect(out.host() == wanted, std::string("all_gather of ") + name_of(in.dtype), count);
    }
  }
}

/// Ranks send each other parts of different sizes, none among them, with a gap between them; then neighbours by twos, the others not taking part.
template <class T>
void check_exchange(const World& w, std::int64_t unit) {
  const int n = w.comm.size(), me = w.comm.rank();
  const auto count = [&](int from, int to) { return (from * 5 + to * 3) % 4 * unit + (from == to ? 1 : 0); };
  const auto element = [](int from, int to, std::int64_t i) { return static_cast<T>((from * 7919 + to * 104729 + i) % 1000003); };
  std::vector<Communicator::Part> send, receive;
  std::vector<T> in, wanted;
  for (int r = 0; r < n; ++r) {
    send.push_back({n - 1 - r, static_cast<std::int64_t>(in.size()), count(me, n - 1 - r)});
    for (std::int64_t i = 0; i < send.back().count; ++i) in.push_back(element(me, n - 1 - r, i));
    in.push_back(T{});
    receive.push_back({r, static_cast<std::int64_t>(wanted.size()), count(r, me)});
    for (std::int64_t i = 0; i < receive.back().count; ++i) wanted.push_back(element(r, me, i));
    wanted.push_back(T{7});
  }
  const Buffer<T> from(w.ops, in), to(w.ops, std::vector<T>(wanted.size(), T{7}));
  w.comm.exchange(from.tensor(), send, to.tensor(), receive);
  expect(to.host() == wanted, "exchange", unit);
  if (me / 2 * 2 + 1 >= n) return;
  const Communicator::Part part{me ^ 1, 0, 3};
  const Buffer<T> mine(w.ops, std::vector<T>(3, static_cast<T>(me))), theirs(w.ops, 3);
  w.comm.exchange(mine.tensor(), {&part, 1}, theirs.tensor(), {&part, 1});
  expect(theirs.host() == std::vector<T>(3, static_cast<T>(me ^ 1)), "exchange of two ranks", unit);
}

void check_broadcast(const World& w, std::int64_t count) {
  for (int root = 0; root < w.comm.size(); ++root) {
    const auto wanted = filled<std::uint32_t>(count, [&](std::int64_t i) { return i * 2654435761u + static_cast<std::uint32_t>(root); });
    Buffer<std::uint32_t> x(w.ops, count);
    if (w.comm.rank() == root) x.set(wanted);
    w.comm.broadcast(x.tensor(), root);
    expect(x.host() == wanted, "broadcast", count);
  }
}

/// The gathering of bf16 parameters, as bits: NaNs among them stay as they are.
void check_bf16_gather(const World& w, std::int64_t count) {
  const int n = w.comm.size();
  std::vector<std::uint16_t> own(static_cast<std::size_t>(count)), found(static_cast<std::size_t>(count * n));
  for (std::int64_t i = 0; i < count; ++i) own[static_cast<std::size_t>(i)] = static_cast<std::uint16_t>(w.comm.rank() * 20011 + i);
  const Buffer<std::uint32_t> memory(w.ops, (count * n + 1) / 2);
  const Tensor all(memory.tensor().data, DType::bf16, {count * n});
  w.ops.upload(all.slice(w.comm.rank() * count, count), own.data());
  w.comm.all_gather(all.slice(w.comm.rank() * count, count), all);
  w.ops.download(found.data(), all);
  for (std::int64_t i = 0; i < count * n; ++i)
    expect(found[static_cast<std::size_t>(i)] == static_cast<std::uint16_t>(i / count * 20011 + i % count), "all_gather of bf16", count);
}

/// Sums whose bits depend on the order of additions: the same on every rank and in every repetition.
void check_bits(const World& w) {
  constexpr std::int64_t kCount = 1'000'003;
  constexpr float kValues[] = {1e8f, 3.14159f, -1e8f, 1.0f};
  const auto mine = filled<float>(kCount, [&](std::int64_t i) { return kValues[w.comm.rank() % 4] * (1.0f + 0.001f * static_cast<float>(i % 977)); });
  std::string first;
  for (int repetition = 0; repetition < 10; ++repetition) {
    const Buffer<float> x(w.ops, mine);
    w.comm.all_reduce_sum(x.tensor());
    const std::vector<float> found = x.host();
    const std::string bits(reinterpret_cast<const char*>(found.data()), found.size() * sizeof(float));
    if (repetition == 0) first = bits;
    expect(bits == first, "the same bits in each repetition of all_reduce_sum", repetition);
  }
  expect(w.host.broadcast(first, 0) == first, "the same bits of all_reduce_sum on each rank");

  std::vector<float> part;
  for (int repetition = 0; repetition < 10; ++repetition) {
    const std::int64_t block = kCount / w.comm.size();
    const Buffer<float> in(w.ops, mine), out(w.ops, block);
    w.comm.wait(w.comm.begin_reduce_scatter_sum(in.slice(0, block * w.comm.size()), out.tensor()));
    if (repetition == 0) part = out.host();
    const std::vector<float> found = out.host();
    expect(std::memcmp(found.data(), part.data(), found.size() * sizeof(float)) == 0, "the same bits in each repetition of reduce_scatter_sum",
           repetition);
  }
}

/// What is begun comes after the operations before it, and what comes after wait() after it; two may be under way, with other collectives between.
void check_order(const World& w) {
  const int n = w.comm.size(), rank = w.comm.rank();
  const std::int64_t block = 4'000'000, all = block * n;
  const Buffer<float> source(w.ops, filled<float>(all, [&](std::int64_t i) { return value<float>(rank, i, 0); })), x(w.ops, all), y(w.ops, all);
  const Buffer<float> reduced(w.ops, block), gathered(w.ops, all), scalar(w.ops, std::vector<float>{1.0f});
  for (int round = 0; round < 5; ++round) {
    w.ops.zero(reduced.tensor());
    w.ops.zero(gathered.tensor());
    for (int i = 0; i < 20; ++i) w.ops.zero(x.tensor());  // a while
    w.ops.copy(x.tensor(), source.tensor());
    const auto scatter = w.comm.begin_reduce_scatter_sum(x.tensor(), x.slice(rank * block, block));
    for (int i = 0; i < 20; ++i) w.ops.zero(y.tensor());
    w.ops.copy(y.slice(rank * block, block), source.slice(rank * block, block));
    const auto gather = w.comm.begin_all_gather(y.slice(rank * block, block), y.tensor());
    w.ops.copy(scalar.tensor(), source.slice(rank * block, 1));
    w.comm.all_reduce_sum(scalar.tensor());
    if (round == 2) std::this_thread::sleep_for(std::chrono::milliseconds(400));  // the watchdog has seen the end of both
    w.comm.wait(gather);
    w.ops.copy(gathered.tensor(), y.tensor());
    w.ops.zero(y.tensor());
    w.comm.wait(scatter);
    w.ops.copy(reduced.tensor(), x.slice(rank * block, block));
    w.ops.zero(x.tensor());
    expect(reduced.host() == filled<float>(block, [&](std::int64_t i) { return sum<float>(n, rank * block + i, 0); }), "begun reduce_scatter_sum",
           round);
    expect(gathered.host() == filled<float>(all, [&](std::int64_t i) { return value<float>(static_cast<int>(i / block), i, 0); }), "begun all_gather",
           round);
    float total = 0;
    for (int r = 0; r < n; ++r) total += value<float>(r, r * block, 0);
    expect(scalar.host()[0] == total, "all_reduce_sum between begun collectives", round);
  }
  // Many under way, waited for by the last alone: the stream beside has an order.
  std::vector<std::unique_ptr<Buffer<float>>> many;
  Communicator::Ticket last = 0;
  for (int i = 0; i < 300; ++i) {
    many.push_back(std::make_unique<Buffer<float>>(w.ops, filled<float>(64 * n, [&](std::int64_t k) { return value<float>(rank, k + i, 0); })));
    last = w.comm.begin_reduce_scatter_sum(many.back()->tensor(), many.back()->slice(rank * 64, 64));
  }
  w.comm.wait(last);
  for (int i = 0; i < 300; ++i) {
    std::vector<float> found(64);
    w.ops.download(found.data(), many[static_cast<std::size_t>(i)]->slice(rank * 64, 64));
    expect(found == filled<float>(64, [&](std::int64_t k) { return sum<float>(n, rank * 64 + k + i, 0); }), "many begun", i);
  }
}

void check_host_values(const World& w) {
  const int n = w.comm.size(), rank = w.comm.rank();
  expect(rank == w.host.rank() && n == w.host.size() && w.comm.local_size() == w.host.local_size(), "ranks are the host's");
  expect(w.comm.max(rank * 10) == (n - 1) * 10, "max");
  expect(w.comm.broadcast(std::to_string(rank), n - 1) == std::to_string(n - 1), "broadcast of a string");
  w.comm.barrier();
}

void check_split(const World& w) {
  const int n = w.comm.size(), rank = w.comm.rank();
  const auto part = w.comm.split(rank % 2, -rank);
  const int size = rank % 2 ? n / 2 : (n + 1) / 2;
  expect(part->size() == size && part->rank() == size - 1 - rank / 2, "split orders by key");
  const Buffer<float> x(w.ops, std::vector<float>{static_cast<float>(rank)});
  part->all_reduce_sum(x.tensor());
  float wanted = 0;
  for (int r = rank % 2; r < n; r += 2) wanted += static_cast<float>(r);
  expect(x.host()[0] == wanted, "all_reduce_sum within a part");
}

void check_misuse(const World& w) {
  const int n = w.comm.size(), rank = w.comm.rank();
  const Buffer<float> f(w.ops, 8 * n);
  const Buffer<std::int32_t> ints(w.ops, 4);
  const Tensor all = f.slice(0, 4 * n);
  expect_logic_error([&] { w.comm.all_reduce_sum(ints.tensor()); }, "all_reduce_sum of i32");
  expect_logic_error([&] { w.comm.reduce_scatter_sum(all, f.slice(4 * n, 3)); }, "reduce_scatter_sum of wrong counts");
  expect_logic_error([&] { w.comm.reduce_scatter_sum(all, f.slice(rank * 4 + 1, 4)); }, "reduce_scatter_sum into a part of two blocks");
  expect_logic_error([&] { w.comm.begin_all_gather(f.slice(rank * 4 + 1, 4), all); }, "all_gather from a part of two blocks");
  if (n > 1) expect_logic_error([&] { w.comm.all_gather(f.slice((rank + 1) % n * 4, 4), all); }, "all_gather from another rank's block");
  expect_logic_error([&] { w.comm.broadcast(all, n); }, "broadcast from no rank");
  expect_logic_error([&] { w.comm.wait(1'000'000); }, "wait for what was never begun");
  expect_logic_error([&] { w.comm.split(-1, 0); }, "split with a negative color");
  // Recording is left as it was found.
  cudaGraph_t graph = nullptr;
  expect(cudaStreamBeginCapture(cuda_stream(w.ops), cudaStreamCaptureModeThreadLocal) == cudaSuccess, "begin of a recording");
  expect_logic_error([&] { w.comm.all_reduce_sum(all); }, "all_reduce_sum while recording");
  std::this_thread::sleep_for(std::chrono::milliseconds(300));  // the watchdog looks meanwhile
  expect(cudaStreamEndCapture(cuda_stream(w.ops), &graph) == cudaSuccess, "end of a recording");
  cudaGraphDestroy(graph);
}

void check_collectives(const World& w) {
  for (const std::int64_t count : {0, 1, 2, 3, 7, 1000, 100'003, 10'000'000}) {
    check_all_reduce<float>(w, count, 0.0f);
    check_reduce_scatter(w, std::min<std::int64_t>(count, 2'500'001));
    if (count > 1'000'000) continue;
    check_all_reduce<double>(w, count, 1e15);
    check_all_reduce<std::uint64_t>(w, count, (std::uint64_t{1} << 60) + 1);
    check_all_gather<float>(w, count);
    check_all_gather<std::int32_t>(w, count);
    check_all_gather<std::uint64_t>(w, count);
    check_bf16_gather(w, count);
    check_exchange<float>(w, count);
    check_exchange<std::uint64_t>(w, count);
    check_broadcast(w, count);
  }
  check_all_gather<float>(w, 2'500'001);
  check_bf16_gather(w, 5'000'001);
  check_bits(w);
  check_order(w);
  check_host_values(w);
  check_split(w);
  check_misuse(w);
}

/// After a few collectives that succeed the last rank does `fail`, and the others wait for it.
template <class Fail>
void fail_on_last_rank(const World& w, bool fill_queue, Fail&& fail) {
  const Buffer<float> x(w.ops, filled<float>(1000, [](std::int64_t) { return 0; }));
  for (int i = 0; i < 3; ++i) w.comm.all_reduce_sum(x.tensor());
  w.ops.synchronize();
  std::this_thread::sleep_for(std::chrono::milliseconds(300));
  if (w.comm.rank() == w.comm.size() - 1) fail();
  const Buffer<float> y(w.ops, 1234);
  w.comm.all_reduce_sum(x.slice(0, 999));
  for (int i = 0; fill_queue && i < 100'000; ++i) w.ops.zero(y.tensor());
  w.ops.synchronize();
  std::printf("rank %d went on\n", w.comm.rank());  // never
}

void be_patient(const World& w, double deadline) {
  const Buffer<float> x(w.ops, filled<float>(1000, [](std::int64_t) { return 1; }));
  w.comm.all_reduce_sum(x.tensor());
  const auto slow = [](void* seconds) { std::this_thread::sleep_for(std::chrono::duration<double>(*static_cast<double*>(seconds))); };
  double time = 2 * deadline;
  expect(cudaLaunchHostFunc(cuda_stream(w.ops), slow, &time) == cudaSuccess, "a slow operation");
  w.comm.wait(w.comm.begin_reduce_scatter_sum(x.slice(0, 4 * w.comm.size()), x.slice(4 * w.comm.rank(), 4)));
  w.comm.all_reduce_sum(x.slice(500, 500));
  expect(x.host()[999] == static_cast<float>(w.comm.size() * w.comm.size()), "a sum behind a slow operation");
}

int run(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "";
  NcclOptions options;
  if (argc > 2) options.deadline_seconds = std::atof(argv[2]);
  options.share_gpu = argc > 3 && std::string(argv[3]) == "share";
  // As the trainer does: a signal is a request to stop in order. The launcher sends one to all ranks when the first ends.
  std::signal(SIGTERM, [](int) {});

  const auto host = make_mpi_communicator();
  int gpu = 0;
  try {
    gpu = choose_gpu(*host, options);
  } catch (const std::invalid_argument& e) {
    if (host->rank() > 0) std::this_thread::sleep_for(std::chrono::seconds(10));  // all ranks know it, rank 0 says it
    host->abort(2, e.what());
  }
  try {
    if (mode == "choose") {
      const char* id = std::getenv("NCCL_HOSTID");
      std::printf("rank %d takes GPU %d, host id %s\n", host->rank(), gpu, id ? id : "none");
      return 0;
    }
    const auto ops = make_cuda_ops(gpu);
    const auto comm = make_nccl_communicator(*host, *ops, options);
    const World w{*host, *ops, *comm};
    if (mode == "collectives") {
      check_collectives(w);
    } else if (mode == "exit") {
      fail_on_last_rank(w, false, [] { std::_Exit(7); });
    } else if (mode == "hang" || mode == "queue") {
      fail_on_last_rank(w, mode == "queue", [] { std::this_thread::sleep_for(std::chrono::minutes(5)); });
    } else if (mode == "throw") {
      fail_on_last_rank(w, false, [] { throw std::runtime_error("the disk of this rank is on fire"); });
    } else if (mode == "patient") {
      be_patient(w, options.deadline_seconds);
    } else {
      throw std::invalid_argument("say collectives, exit, hang, queue, throw, patient or choose");
    }
  } catch (const std::exception& e) {
    host->abort(3, e.what());
  }
  if (host->rank() == 0) std::printf("%d ranks are done\n", host->size());
  return 0;
}

}  // namespace
}  // namespace tessera

int main(int argc, char** argv) { return tessera::run(argc, argv); }
