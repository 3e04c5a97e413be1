// Communicator over MPI, for tensors in host memory.
//
// Sums are made here and not by MPI_Reduce, whose order of additions is the implementation's affair: every rank receives the
// parts of all ranks for its share of the result and adds them in rank order. Messages go in pieces, so that no count
// leaves the range of int and the memory for parts stays bounded.

#include <fmt/format.h>
#include <mpi.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <span>
#include <vector>

#include "kernels/comm/arguments.h"
#include "kernels/comm/communicator.h"

namespace tessera {

namespace {

constexpr std::size_t kLargestMessage = std::size_t{1} << 24;  // bytes: far below the range of int, far above where speed depends on it
constexpr std::size_t kPartsBytes = std::size_t{1} << 23;      // of other ranks' parts held at a time
constexpr std::size_t kSmallBytes = std::size_t{1} << 16;      // all ranks' parts together: up to here one all-gather is quicker
constexpr int kTag = 0;

void check(int code, const char* call) {
  if (code == MPI_SUCCESS) return;
  char text[MPI_MAX_ERROR_STRING] = "";
  int length = 0;
  MPI_Error_string(code, text, &length);
  throw std::runtime_error(fmt::format("{} failed: {}", call, std::string_view(text, static_cast<std::size_t>(length))));
}

/// MPI from first use to the end of the process. MPI_Finalize waits for the other ranks; after a failure they may never come, so then
/// it is left out, and the launcher, which sees a process end without it, ends the others.
class Environment {
 public:
  static Environment& get() {
    static Environment environment;
    return environment;
  }
  void failed() { failed_ = true; }

 private:
  Environment() {
    int initialized = 0;
    check(MPI_Initialized(&initialized), "MPI_Initialized");
    if (initialized) return;  // whoever did it also finalizes
    int provided = 0;
    check(MPI_Init_thread(nullptr, nullptr, MPI_THREAD_FUNNELED, &provided), "MPI_Init_thread");
    ours_ = true;
    if (provided < MPI_THREAD_FUNNELED) throw std::runtime_error("this MPI cannot be used by programs with threads (MPI_THREAD_FUNNELED)");
  }
  ~Environment() {
    int finalized = 0;
    MPI_Finalized(&finalized);
    if (ours_ && !failed_ && !finalized) MPI_Finalize();
  }
  Environment(const Environment&) = delete;
  Environment& operator=(const Environment&) = delete;

  bool ours_ = false;
  bool failed_ = false;
};

class MpiCommunicator final : public Communicator {
 public:
  /// Takes `comm` over.
  explicit MpiCommunicator(MPI_Comm comm) : comm_(comm), exceptions_(std::uncaught_exceptions()) {
    check(MPI_Comm_set_errhandler(comm_, MPI_ERRORS_RETURN), "MPI_Comm_set_errhandler");
    check(MPI_Comm_rank(comm_, &rank_), "MPI_Comm_rank");
    check(MPI_Comm_size(comm_, &size_), "MPI_Comm_size");
    MPI_Comm host = MPI_COMM_NULL;
    check(MPI_Comm_split_type(comm_, MPI_COMM_TYPE_SHARED, rank_, MPI_INFO_NULL, &host), "MPI_Comm_split_type");
    check(MPI_Comm_rank(host, &local_rank_), "MPI_Comm_rank");
    check(MPI_Comm_size(host, &local_size_), "MPI_Comm_size");
    check(MPI_Comm_free(&host), "MPI_Comm_free");
  }
  ~MpiCommunicator() override {
    int finalized = 0;
    MPI_Finalized(&finalized);
    if (std::uncaught_exceptions() > exceptions_) {
      Environment::get().failed();  // MPI_Comm_free is collective as well
    } else if (!finalized) {
      MPI_Comm_free(&comm_);
    }
  }
  MpiCommunicator(const MpiCommunicator&) = delete;
  MpiCommunicator& operator=(const MpiCommunicator&) = delete;

  int rank() const override { return rank_; }
  int size() const override { return size_; }
  int local_rank() const override { return local_rank_; }
  int local_size() const override { return local_size_; }

  void all_reduce_sum(const Tensor& x) override {
    comm::check_all_reduce(x);
    switch (x.dtype) {
      case DType::f32: return all_reduce(x.as<float>(), x.numel());
      case DType::f64: return all_reduce(x.as<double>(), x.numel());
      default: return all_reduce(x.as<std::uint64_t>(), x.numel());
    }
  }

  void reduce_scatter_sum(const Tensor& in, const Tensor& out) override {
    comm::check_reduce_scatter(in, out, size_);
    const float* from = in.as<float>();
    float* to = out.as<float>();
    const std::int64_t block = out.numel(), piece = piece_of(sizeof(float));
    for (std::int64_t first = 0; first < block; first += piece) {
      const std::int64_t count = std::min(piece, block - first);
      exchange_and_sum([&](int r) { return Span<const float>{from + r * block + first, count}; }, Span<float>{to + first, count});
    }
  }

  void all_gather(const Tensor& in, const Tensor& out) override {
    comm::check_all_gather(in, out, size_);
    const std::size_t bytes = in.bytes();
    if (bytes == 0) return;
    char* to = static_cast<char*>(out.data);
    char* own = to + static_cast<std::size_t>(rank_) * bytes;
    if (in.data != own) std::memmove(own, in.data, bytes);
    for (std::size_t first = 0; first < bytes; first += kLargestMessage) {
      const auto count = static_cast<std::int64_t>(std::min(kLargestMessage, bytes - first));
      gather_spans([&](int r) { return Span<char>{to + static_cast<std::size_t>(r) * bytes + first, count}; });
    }
  }

  void broadcast(const Tensor& x, int root) override {
    comm::check_root(root, size_);
    broadcast_bytes(static_cast<char*>(x.data), x.bytes(), root);
  }

  Ticket begin_exchange(const Tensor& in, std::span<const Part> send, const Tensor& out, std::span<const Part> receive) override {
    sent_bytes_ += comm::check_exchange(in, send, out, receive, rank_, size_);
    const auto in_pieces = [&](const Tensor& t, const Part& part, auto&& call) {
      const Tensor stretch = t.slice(part.first, part.count);
      for (std::size_t done = 0; done < stretch.bytes() && part.rank != rank_; done += kLargestMessage)
        call(static_cast<char*>(stretch.data) + done, static_cast<int>(std::min(kLargestMessage, stretch.bytes() - done)), part.rank);
    };
    for (const Part& part : receive) in_pieces(out, part, [&](char* to, int bytes, int rank) { this->receive(to, bytes, rank); });
    for (const Part& part : send) in_pieces(in, part, [&](const char* from, int bytes, int rank) { this->send(from, bytes, rank); });
    comm::copy_own_part(in, send, out, receive, rank_, [](const Tensor& from, const Tensor& to) { std::memcpy(to.data, from.data, from.bytes()); });
    wait();
    return 0;
  }

  void barrier() override { check(MPI_Barrier(comm_), "MPI_Barrier"); }

  std::int64_t max(std::int64_t value) override {
    std::int64_t result = 0;
    check(MPI_Allreduce(&value, &result, 1, MPI_INT64_T, MPI_MAX, comm_), "MPI_Allreduce");
    return result;
  }

  std::string broadcast(const std::string& text, int root) override {
    comm::check_root(root, size_);
    std::uint64_t length = text.size();
    check(MPI_Bcast(&length, 1, MPI_UINT64_T, root, comm_), "MPI_Bcast");
    std::string result = rank_ == root ? text : std::string(length, '\0');
    broadcast_bytes(result.data(), length, root);
    return result;
  }

  std::unique_ptr<Communicator> split(int color, int key) override {
    comm::check_color(color);
    MPI_Comm part = MPI_COMM_NULL;
    check(MPI_Comm_split(comm_, color, key, &part), "MPI_Comm_split");
    return std::make_unique<MpiCommunicator>(part);
  }

  [[noreturn]] void abort(int exit_code, const std::string& message) override {
    int world_rank = rank_, world_size = size_;
    MPI_Comm_rank(MPI_COMM_WORLD, &world_rank);
    MPI_Comm_size(MPI_COMM_WORLD, &world_size);
    const std::string line = fmt::format("tessera: rank {} of {}: {}\n", world_rank, world_size, message);
    std::fwrite(line.data(), 1, line.size(), stderr);  // one write: lines of several ranks do not mix
    std::fflush(nullptr);
    MPI_Abort(MPI_COMM_WORLD, exit_code);
    std::_Exit(exit_code);
  }

 private:
  template <class T>
  struct Span {
    T* data;
    std::int64_t count;
    int bytes() const { return static_cast<int>(static_cast<std::size_t>(count) * sizeof(T)); }
  };

  /// Elements a rank for which all ranks' parts fit into the buffer.
  std::int64_t piece_of(std::size_t element) const {
    return std::max<std::int64_t>(1, static_cast<std::int64_t>(kPartsBytes / element / static_cast<std::size_t>(size_)));
  }

  template <class T>
  T* parts(std::int64_t count) {
    const std::size_t bytes = static_cast<std::size_t>(count) * sizeof(T);
    if (buffer_.size() < bytes) buffer_.resize(bytes);
    return reinterpret_cast<T*>(buffer_.data());  // from operator new: aligned for every element type
  }

  void receive(void* data, int bytes, int from) {
    if (bytes == 0) return;
    check(MPI_Irecv(data, bytes, MPI_BYTE, from, kTag, comm_, &requests_.emplace_back()), "MPI_Irecv");
  }
  void send(const void* data, int bytes, int to) {
    if (bytes == 0) return;
    check(MPI_Isend(data, bytes, MPI_BYTE, to, kTag, comm_, &requests_.emplace_back()), "MPI_Isend");
  }
  void wait() {
    std::vector<MPI_Status> statuses(requests_.size());
    const int code = MPI_Waitall(static_cast<int>(requests_.size()), requests_.data(), statuses.data());
    requests_.clear();
    if (code == MPI_ERR_IN_STATUS) {
      for (const MPI_Status& s : statuses) {
        if (s.MPI_ERROR != MPI_ERR_PENDING) check(s.MPI_ERROR, "MPI_Waitall");
      }
    }
    check(code, "MPI_Waitall");
  }

  /// Sends part(r) to each rank r, and writes own = the sum of what all ranks sent here (own.count elements each), in rank order. `own` may be
  /// the same memory as part(rank()).
  template <class T, class Part>
  void exchange_and_sum(Part&& part, Span<T> own) {
    T* received = parts<T>(own.count * size_);
    for (int step = 1; step < size_; ++step) {
      const int from = (rank_ - step + size_) % size_;
      receive(received + from * own.count, own.bytes(), from);
    }
    for (int step = 1; step < size_; ++step) {
      const int to = (rank_ + step) % size_;
      const Span<const T> outgoing = part(to);
      send(outgoing.data, outgoing.bytes(), to);
    }
    wait();
    if (own.count > 0) std::copy_n(part(rank_).data, own.count, received + rank_ * own.count);
    sum_parts(received, own.data, own.count);
  }

  /// to[i] = parts[0][i] + parts[1][i] + ...
  template <class T>
  void sum_parts(const T* parts, T* to, std::int64_t count) const {
    std::copy_n(parts, count, to);
    for (int r = 1; r < size_; ++r) {
      const T* part = parts + r * count;
#pragma omp simd
      for (std::int64_t i = 0; i < count; ++i) to[i] += part[i];
    }
  }

  /// Every rank's span(rank()) comes to all others.
  template <class SpanOf>
  void gather_spans(SpanOf&& span) {
    for (int step = 1; step < size_; ++step) {
      const int from = (rank_ - step + size_) % size_;
      receive(span(from).data, span(from).bytes(), from);
    }
    for (int step = 1; step < size_; ++step) send(span(rank_).data, span(rank_).bytes(), (rank_ + step) % size_);
    wait();
  }

  template <class T>
  void all_reduce(T* x, std::int64_t count) {
    if (size_ == 1 || count == 0) return;
    const std::size_t bytes = static_cast<std::size_t>(count) * sizeof(T);
    if (bytes <= kSmallBytes / static_cast<std::size_t>(size_)) {
      T* received = parts<T>(count * size_);
      check(MPI_Allgather(x, static_cast<int>(bytes), MPI_BYTE, received, static_cast<int>(bytes), MPI_BYTE, comm_), "MPI_Allgather");
      return sum_parts(received, x, count);
    }
    // Stretches of one piece a rank: rank r sums piece r, then all exchange their sums.
    const std::int64_t largest = piece_of(sizeof(T));
    for (std::int64_t first = 0; first < count; first += largest * size_) {
      const std::int64_t stretch = std::min(largest * size_, count - first);
      const std::int64_t piece = (stretch + size_ - 1) / size_;
      const auto span = [&](int r) {
        const std::int64_t start = std::min(stretch, r * piece);
        return Span<T>{x + first + start, std::min(piece, stretch - start)};
      };
      exchange_and_sum([&](int r) { return Span<const T>{span(r).data, span(r).count}; }, span(rank_));
      gather_spans(span);
    }
  }

  void broadcast_bytes(char* data, std::size_t bytes, int root) {
    for (std::size_t first = 0; first < bytes; first += kLargestMessage) {
      check(MPI_Bcast(data + first, static_cast<int>(std::min(kLargestMessage, bytes - first)), MPI_BYTE, root, comm_), "MPI_Bcast");
    }
  }

  MPI_Comm comm_;
  int exceptions_;  // in flight when this was made
  int rank_ = 0, size_ = 1, local_rank_ = 0, local_size_ = 1;
  std::vector<char> buffer_;
  std::vector<MPI_Request> requests_;
};

/// Whether a launcher (mpirun, mpiexec, srun) started this process: each sets one of these for the MPI library to find the others by.
bool launched() {
  constexpr std::array kVariables{"OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "PMI_RANK", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "MPI_LOCALNRANKS"};
  return std::any_of(kVariables.begin(), kVariables.end(), [](const char* name) { return std::getenv(name) != nullptr; });
}

}  // namespace

std::unique_ptr<Communicator> make_mpi_communicator() {
  if (!launched()) return make_single_communicator();
  Environment::get();
  MPI_Comm world = MPI_COMM_NULL;
  check(MPI_Comm_dup(MPI_COMM_WORLD, &world), "MPI_Comm_dup");
  return std::make_unique<MpiCommunicator>(world);
}

}  // namespace tessera
