#pragma once
// Several ranks in one process, a thread each: enough of a Communicator to test what is built on one, without a launcher.

#include <algorithm>
#include <barrier>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <mutex>
#include <span>
#include <stdexcept>
#include <thread>
#include <vector>

#include "kernels/comm/arguments.h"
#include "kernels/comm/communicator.h"

namespace tessera::testing {

/// Does as another communicator, in all that a test does not change.
class Forwarding : public Communicator {
 public:
  explicit Forwarding(Communicator& to) : to_(to) {}
  int rank() const override { return to_.rank(); }
  int size() const override { return to_.size(); }
  int local_rank() const override { return to_.local_rank(); }
  int local_size() const override { return to_.local_size(); }
  void all_reduce_sum(const Tensor& x) override { to_.all_reduce_sum(x); }
  void reduce_scatter_sum(const Tensor& in, const Tensor& out) override { to_.reduce_scatter_sum(in, out); }
  void all_gather(const Tensor& in, const Tensor& out) override { to_.all_gather(in, out); }
  Ticket begin_exchange(const Tensor& in, std::span<const Part> send, const Tensor& out, std::span<const Part> receive) override {
    return to_.begin_exchange(in, send, out, receive);
  }
  void broadcast(const Tensor& x, int root) override { to_.broadcast(x, root); }
  void barrier() override { to_.barrier(); }
  std::int64_t max(std::int64_t value) override { return to_.max(value); }
  std::string broadcast(const std::string& text, int root) override { return to_.broadcast(text, root); }
  std::unique_ptr<Communicator> split(int color, int key) override { return to_.split(color, key); }
  void abort(int code, const std::string& message) override { to_.abort(code, message); }

 protected:
  Communicator& to_;
};

class ThreadRanks {
 public:
  /// Runs work(communicator) once on each of `size` ranks and waits.
  static void run(int size, const std::function<void(Communicator&)>& work) {
    Shared shared(size);
    std::vector<std::thread> threads;
    for (int r = 0; r < size; ++r)
      threads.emplace_back([&, r] {
        Rank rank(shared, r);
        work(rank);
      });
    for (auto& t : threads) t.join();
  }

 private:
  struct Shared {
    explicit Shared(int n) : size(n), barrier(n), data(n), text(n), number(n), mail(static_cast<std::size_t>(n * n)) {}
    int size;
    std::barrier<> barrier;
    std::vector<const void*> data;
    std::vector<const std::string*> text;
    std::vector<std::int64_t> number;
    std::mutex mutex;
    std::condition_variable arrived;
    std::vector<std::deque<std::vector<char>>> mail;  // [from * size + to]
  };

  class Rank final : public Communicator {
   public:
    Rank(Shared& shared, int rank) : s_(shared), rank_(rank) {}
    int rank() const override { return rank_; }
    int size() const override { return s_.size; }
    int local_rank() const override { return rank_; }
    int local_size() const override { return s_.size; }
    void barrier() override { s_.barrier.arrive_and_wait(); }

    void all_reduce_sum(const Tensor& x) override {
      if (x.dtype == DType::f64) return sum<double>(x, 0, x.numel(), x);
      if (x.dtype == DType::u64) return sum<std::uint64_t>(x, 0, x.numel(), x);
      sum<float>(x, 0, x.numel(), x);
    }
    void reduce_scatter_sum(const Tensor& in, const Tensor& out) override { sum<float>(in, rank_ * out.numel(), out.numel(), out); }
    void all_gather(const Tensor& in, const Tensor& out) override {
      const std::vector<char> mine(static_cast<const char*>(in.data), static_cast<const char*>(in.data) + in.bytes());
      share(mine.data());
      for (int r = 0; r < size(); ++r) std::memcpy(static_cast<char*>(out.data) + r * in.bytes(), s_.data[r], in.bytes());
      barrier();
    }
    Ticket begin_exchange(const Tensor& in, std::span<const Part> send, const Tensor& out, std::span<const Part> receive) override {
      sent_bytes_ += comm::check_exchange(in, send, out, receive, rank_, size());
      const auto box = [&](int from, int to) -> auto& { return s_.mail[static_cast<std::size_t>(from * size() + to)]; };
      std::unique_lock lock(s_.mutex);
      for (const Part& part : send) {
        const Tensor stretch = in.slice(part.first, part.count);
        const char* bytes = static_cast<const char*>(stretch.data);
        if (part.count > 0) box(rank_, part.rank).emplace_back(bytes, bytes + stretch.bytes());
      }
      s_.arrived.notify_all();
      for (const Part& part : receive) {
        if (part.count == 0) continue;
        const Tensor stretch = out.slice(part.first, part.count);
        auto& mail = box(part.rank, rank_);
        s_.arrived.wait(lock, [&] { return !mail.empty(); });
        if (mail.front().size() != stretch.bytes()) abort(1, "a part of another size");
        std::memcpy(stretch.data, mail.front().data(), stretch.bytes());
        mail.pop_front();
      }
      return 0;
    }
    void broadcast(const Tensor& x, int root) override {
      share(x.data);
      if (rank_ != root) std::memcpy(x.data, s_.data[root], x.bytes());
      barrier();
    }
    std::int64_t max(std::int64_t value) override {
      s_.number[rank_] = value;
      barrier();
      const std::int64_t result = *std::max_element(s_.number.begin(), s_.number.end());
      barrier();
      return result;
    }
    std::string broadcast(const std::string& text, int root) override {
      s_.text[rank_] = &text;
      barrier();
      std::string result = *s_.text[root];
      barrier();
      return result;
    }
    std::unique_ptr<Communicator> split(int, int) override { throw std::logic_error("not in this test"); }
    void abort(int, const std::string& message) override {
      std::fprintf(stderr, "%s\n", message.c_str());
      std::abort();
    }

   private:
    void share(const void* p) {
      s_.data[rank_] = p;
      barrier();
    }
    template <class T>
    void sum(const Tensor& in, std::int64_t first, std::int64_t count, const Tensor& out) {
      share(in.data);
      std::vector<T> total(static_cast<std::size_t>(count), T{});
      for (int r = 0; r < size(); ++r)
        for (std::int64_t i = 0; i < count; ++i) total[i] += static_cast<const T*>(s_.data[r])[first + i];
      barrier();
      std::copy(total.begin(), total.end(), static_cast<T*>(out.data));
    }
    Shared& s_;
    int rank_;
  };
};

}  // namespace tessera::testing
