#pragma once
// NCCL's communicator as kernels/comm/nccl.cpp uses it: without blocking calls. A call that waits for another rank (the first collective of a kind
// makes connections) returns "in progress" and is asked about until it is done, so that nothing but our own code decides how long to wait.

#include <fmt/format.h>
#include <nccl.h>

#include <chrono>
#include <future>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>

#include "kernels/comm/communicator.h"

namespace tessera::comm {

using Clock = std::chrono::steady_clock;

inline double seconds(Clock::duration d) { return std::chrono::duration<double>(d).count(); }

inline std::string nccl_problem(ncclResult_t code) {
  const char* detail = ncclGetLastError(nullptr);
  return fmt::format("{}{}{}", ncclGetErrorString(code), detail && *detail ? ": " : "", detail ? detail : "");
}

inline void check_nccl(ncclResult_t code, const char* what) {
  if (code != ncclSuccess) throw std::runtime_error(fmt::format("NCCL {}: {}", what, nccl_problem(code)));
}

/// NCCL's communicator and all calls on it: one at a time, since the watchdog asks for errors while the owner issues collectives.
class NcclLink {
 public:
  /// With the other ranks of `host`. What NCCL has begun may outlive an error: then abort().
  void open(Communicator& host, double limit) {
    std::string id;
    if (host.rank() == 0) {
      ncclUniqueId made;
      const ncclResult_t code = ncclGetUniqueId(&made);
      id = code == ncclSuccess ? "+" + std::string(made.internal, sizeof made.internal) : "-" + nccl_problem(code);
    }
    id = host.broadcast(id, 0);
    ncclUniqueId unique;
    if (id[0] != '+' || id.size() != 1 + sizeof unique.internal) throw std::runtime_error("NCCL unique id on rank 0: " + id.substr(1));
    id.copy(unique.internal, sizeof unique.internal, 1);
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 0;
    const auto join = [&] { return ncclCommInitRankConfig(&comm_, host.size(), unique, host.rank(), &config); };
    call("set-up", join, limit);
  }

  /// Makes a call of NCCL and waits until it is done, which for a collective means: it is on its stream. Throws std::runtime_error for an error, or
  /// when it takes longer than `limit` seconds (0: however long).
  template <class Call>
  void call(const std::string& what, Call&& function, double limit = 0) {
    const Clock::time_point start = Clock::now();
    ncclResult_t code = ncclSuccess;
    {
      const std::lock_guard lock(mutex_);
      code = function();
    }
    for (int polls = 0; code == ncclInProgress; ++polls) {
      if (limit > 0 && seconds(Clock::now() - start) > limit)
        throw std::runtime_error(
            fmt::format("NCCL {}: the other ranks did not answer for {:.0f} s. NCCL_DEBUG=INFO shows what it tries; "
                        "NCCL_SOCKET_IFNAME names the network to use",
                        what, limit));
      if (polls < 1000) {
        std::this_thread::yield();
      } else {
        std::this_thread::sleep_for(std::chrono::microseconds(100));
      }
      const std::lock_guard lock(mutex_);
      const ncclResult_t asked = ncclCommGetAsyncError(comm_, &code);
      if (asked != ncclSuccess) code = asked;
    }
    if (code == ncclSuccess) return;
    const bool remote = code == ncclRemoteError || code == ncclSystemError;
    throw std::runtime_error(fmt::format("NCCL {}: {}{}", what, nccl_problem(code),
                                         remote ? ". Another rank may have ended: see its output; NCCL_DEBUG=WARN says more" : ""));
  }

  ncclComm_t get() const { return comm_; }

  /// What NCCL reports of work under way; "" when nothing. For the watchdog, which shall not wait, also when the owner is in a call just now.
  std::string error(bool watchdog) {
    std::unique_lock lock(mutex_, std::defer_lock);
    if (!watchdog)
      lock.lock();
    else if (!lock.try_lock())
      return "";
    ncclResult_t code = ncclSuccess;
    const ncclResult_t asked = ncclCommGetAsyncError(comm_, &code);
    if (asked != ncclSuccess) code = asked;
    return code == ncclSuccess || code == ncclInProgress ? "" : nccl_problem(code);
  }

  // The ends, for the owner when nobody watches any more.

  /// In order, with the other ranks.
  void close(double limit) {
    const auto finalize = [&] { return ncclCommFinalize(comm_); };
    call("end", finalize, limit);
    const ncclResult_t code = ncclCommDestroy(std::exchange(comm_, nullptr));
    if (code != ncclInProgress) check_nccl(code, "end");  // there is nothing left to ask whether it is done
  }

  /// Stops what runs on the GPU, whose results are then garbage, and cuts the connections.
  static void abort(const std::shared_ptr<NcclLink>& link) {
    auto done = std::make_shared<std::promise<void>>();
    const auto future = done->get_future();
    std::thread([link, done] {
      if (link->comm_) ncclCommAbort(std::exchange(link->comm_, nullptr));
      done->set_value();
    }).detach();
    future.wait_for(std::chrono::seconds(3));  // it may itself hang
  }

 private:
  std::mutex mutex_;
  ncclComm_t comm_ = nullptr;
};

}  // namespace tessera::comm
