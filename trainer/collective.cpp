#include "trainer/collective.h"

#include <chrono>
#include <exception>
#include <new>
#include <thread>

namespace tessera {
namespace {

int exit_code_of(const std::exception& e) {
  if (const auto* common = dynamic_cast<const CommonError*>(&e)) return common->exit_code();
  return dynamic_cast<const std::invalid_argument*>(&e) ? 2 : 1;
}

std::string message_of(const std::exception& e) { return dynamic_cast<const std::bad_alloc*>(&e) ? "out of memory" : e.what(); }

}  // namespace

void agree(Communicator& comm, const std::function<void()>& work) {
  std::exception_ptr error;
  std::string message;
  int code = 0;
  try {
    work();
  } catch (const std::exception& e) {
    error = std::current_exception();
    message = message_of(e);
    code = exit_code_of(e);
  }
  const std::int64_t failed = comm.max(error ? comm.size() - comm.rank() : 0);
  if (failed == 0) return;
  if (comm.size() == 1) std::rethrow_exception(error);
  const int root = comm.size() - static_cast<int>(failed);
  const std::string text = comm.broadcast(std::to_string(code) + message, root);
  throw CommonError(text[0] - '0', (root == 0 ? "" : "rank " + std::to_string(root) + ": ") + text.substr(1));
}

void run_on_ranks(Communicator& comm, const std::function<void()>& work) {
  try {
    work();
  } catch (const std::exception& e) {
    if (comm.size() == 1) throw;
    // Rank 0 says what all know, and takes the others with it.
    if (dynamic_cast<const CommonError*>(&e) && comm.rank() != 0) std::this_thread::sleep_for(std::chrono::seconds(10));
    comm.abort(exit_code_of(e), message_of(e));
  }
}

void all_reduce_sum(Communicator& host, std::span<double> values) {
  host.all_reduce_sum({values.data(), DType::f64, {static_cast<std::int64_t>(values.size())}});
}

void all_reduce_sum(Communicator& host, std::span<std::uint64_t> values) {
  host.all_reduce_sum({values.data(), DType::u64, {static_cast<std::int64_t>(values.size())}});
}

std::vector<std::string> all_gather(Communicator& comm, const std::string& text) {
  std::vector<std::string> all;
  for (int r = 0; r < comm.size(); ++r) all.push_back(comm.broadcast(text, r));
  return all;
}

}  // namespace tessera
