// The communicator of a process that is alone.

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "kernels/comm/arguments.h"
#include "kernels/comm/communicator.h"

namespace tessera {

namespace {

class SingleCommunicator final : public Communicator {
 public:
  int rank() const override { return 0; }
  int size() const override { return 1; }
  int local_rank() const override { return 0; }
  int local_size() const override { return 1; }

  void all_reduce_sum(const Tensor& x) override { comm::check_all_reduce(x); }
  void reduce_scatter_sum(const Tensor& in, const Tensor& out) override {
    comm::check_reduce_scatter(in, out, 1);
    copy(in, out);
  }
  void all_gather(const Tensor& in, const Tensor& out) override {
    comm::check_all_gather(in, out, 1);
    copy(in, out);
  }
  Ticket begin_exchange(const Tensor& in, std::span<const Part> send, const Tensor& out, std::span<const Part> receive) override {
    comm::check_exchange(in, send, out, receive, 0, 1);
    comm::copy_own_part(in, send, out, receive, 0, copy);
    return 0;
  }
  void broadcast(const Tensor&, int root) override { comm::check_root(root, 1); }
  void barrier() override {}
  std::int64_t max(std::int64_t value) override { return value; }
  std::string broadcast(const std::string& text, int root) override {
    comm::check_root(root, 1);
    return text;
  }
  std::unique_ptr<Communicator> split(int color, int) override {
    comm::check_color(color);
    return make_single_communicator();
  }
  [[noreturn]] void abort(int exit_code, const std::string& message) override {
    std::fprintf(stderr, "tessera: %s\n", message.c_str());
    std::fflush(nullptr);
    std::_Exit(exit_code);
  }

 private:
  static void copy(const Tensor& from, const Tensor& to) {
    if (from.data != to.data && from.bytes() > 0) std::memmove(to.data, from.data, from.bytes());
  }
};

}  // namespace

std::unique_ptr<Communicator> make_single_communicator() { return std::make_unique<SingleCommunicator>(); }

}  // namespace tessera
