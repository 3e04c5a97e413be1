#pragma once
// Knows the collectives of a rank until they are over, and ends the process when one never will be. A thread of its own does it, since the owner's
// may be anywhere, say in a wait for the GPU that never ends.

#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include <atomic>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "kernels/comm/nccl_link.h"
#include "kernels/cuda/check.h"
#include "kernels/tensor.h"

namespace tessera::comm {

/// A collective from its call to its end on the GPU.
struct Collective {
  std::int64_t number = 0;  // 1, 2, 3, ... in the order of the calls
  const char* name = "";
  std::int64_t count = 0;
  DType type = DType::f32;
  bool issued = false;                          // it is on its stream, and both events are recorded
  cudaEvent_t ready = nullptr, done = nullptr;  // what was asked of the device before it is over; it is over

  std::string text() const { return fmt::format("#{} {} of {} {}", number, name, fmt::group_digits(count), name_of(type)); }
};

/// Knows every collective until it is over, and ends the process when the oldest takes too long or NCCL reports an error.
class NcclWatchdog {
 public:
  NcclWatchdog(std::shared_ptr<NcclLink> link, int rank, int size, const std::string& host_name, int device, double deadline)
      : link_(std::move(link)), who_(fmt::format("rank {} of {} on {}", rank, size, host_name)), device_(device), deadline_(deadline) {
    watch_ = std::jthread([this](const std::stop_token& stop) { watch(stop); });
    guard_ = std::jthread([this](const std::stop_token& stop) { guard(stop); });
  }
  ~NcclWatchdog() {
    for (std::jthread* thread : {&watch_, &guard_}) {
      thread->request_stop();
      thread->join();
    }
    for (const Collective& c : pending_) free_.insert(free_.end(), {c.ready, c.done});
    for (const cudaEvent_t event : free_) cudaEventDestroy(event);
  }
  NcclWatchdog(const NcclWatchdog&) = delete;
  NcclWatchdog& operator=(const NcclWatchdog&) = delete;

  // For the owner's thread. The lock is never held in a call of CUDA, which may wait for the GPU: the owner's would then stop the watchdog.
  Collective begin(const char* name, std::int64_t count, DType type) {
    Collective c;
    c.number = ++last_number_;
    c.name = name;
    c.count = count;
    c.type = type;
    c.ready = take_event();
    c.done = take_event();
    const std::lock_guard lock(mutex_);
    pending_.push_back(c);
    return c;
  }
  void issued() {
    const std::lock_guard lock(mutex_);
    pending_.back().issued = true;
  }
  /// After a wait for the device. A collective that failed ends on the GPU as one that succeeded does; then this does not return, so that the owner
  /// never reads what it left.
  void check_after_wait() {
    if (const std::string error = link_->error(false); ending_ || !error.empty()) end("NCCL reports: " + error);
  }
  /// The event behind a collective, nullptr when it is known to be over. It keeps its meaning until the next begin().
  cudaEvent_t done(std::int64_t number) {
    if (number < 1 || number > last_number_) throw std::logic_error(fmt::format("wait: ticket {} was never given", number));
    const std::lock_guard lock(mutex_);
    if (pending_.empty() || number < pending_.front().number) return nullptr;
    return pending_[static_cast<std::size_t>(number - pending_.front().number)].done;
  }

 private:
  enum class Stage { issuing, behind_operations, running };

  cudaEvent_t take_event() {
    {
      const std::lock_guard lock(mutex_);
      if (!free_.empty()) {
        const cudaEvent_t event = free_.back();
        free_.pop_back();
        return event;
      }
    }
    cudaEvent_t event = nullptr;
    cuda::check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "event of a collective");
    return event;
  }

  bool reached(cudaEvent_t event) {
    if (cudaEventQuery(event) == cudaSuccess) return true;
    cudaGetLastError();  // a real error is the owner's to meet
    return false;
  }

  bool sleep(const std::stop_token& stop, Clock::duration time) {
    std::unique_lock lock(sleep_mutex_);
    sleep_.wait_for(lock, stop, time, [] { return false; });
    return !stop.stop_requested();
  }

  void watch(const std::stop_token& stop) {
    cudaSetDevice(device_);
    // Asking for an event is allowed while another thread records a graph, whichever way that thread records.
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    cudaThreadExchangeStreamCaptureMode(&mode);
    while (sleep(stop, std::chrono::milliseconds(100))) {
      alive_ = Clock::now();
      if (const std::string error = link_->error(true); !error.empty()) end("NCCL reports: " + error);
      look();
    }
  }

  /// The watchdog's calls of CUDA could hang with the owner's.
  void guard(const std::stop_token& stop) {
    while (sleep(stop, std::chrono::seconds(1))) {
      const double silent = seconds(Clock::now() - alive_.load());
      if (silent > deadline_) end(fmt::format("CUDA has not answered for {:.0f} s", silent));
    }
  }

  void look() {
    while (true) {
      Collective c;
      {
        const std::lock_guard lock(mutex_);
        if (pending_.empty()) return;
        c = pending_.front();
      }
      if (c.issued && reached(c.done)) {
        const std::lock_guard lock(mutex_);
        finished_ = c;
        free_.insert(free_.end(), {c.ready, c.done});
        pending_.pop_front();
        continue;
      }
      // The clock starts anew when a collective becomes the oldest and when what was asked of the device before it is over: a long backward pass
      // is not the other ranks' fault.
      const Stage stage = !c.issued ? Stage::issuing : reached(c.ready) ? Stage::running : Stage::behind_operations;
      const Clock::time_point now = Clock::now();
      if (c.number != oldest_ || stage != stage_) {
        oldest_ = c.number;
        stage_ = stage;
        since_ = now;
      }
      if (stage != Stage::behind_operations && seconds(now - since_) > deadline_)
        end(fmt::format("waited {:.0f} s in a collective", seconds(now - since_)));
      return;
    }
  }

  /// One line on stderr, then the end of the process, at which the launcher ends the other ranks. The collectives are not aborted: the owner's
  /// thread, which waits for them, would go on with garbage, and might save it.
  [[noreturn]] void end(const std::string& what) {
    if (ending_.exchange(true)) {
      while (true) std::this_thread::sleep_for(std::chrono::hours(1));
    }
    std::string under_way = "nothing", finished = "nothing";
    {
      const std::lock_guard lock(mutex_);
      if (!pending_.empty()) under_way = pending_.front().text();
      if (pending_.size() > 1) under_way += fmt::format(" and {} behind it", pending_.size() - 1);
      if (finished_.number) finished = finished_.text();
    }
    const std::string line =
        fmt::format("tessera: {}: {}; under way: {}; last finished: {}. Another rank has probably ended or hangs: see its output. The job ends\n",
                    who_, what, under_way, finished);
    std::fwrite(line.data(), 1, line.size(), stderr);  // one write: lines of several ranks do not mix
    std::fflush(stderr);
    // Other ranks that wait as long say their line before the launcher ends them.
    std::this_thread::sleep_for(std::chrono::seconds(1));
    std::_Exit(1);
  }

  const std::shared_ptr<NcclLink> link_;
  const std::string who_;
  const int device_;
  const double deadline_;
  std::int64_t last_number_ = 0;  // the owner's

  std::mutex mutex_;  // for these
  std::deque<Collective> pending_;
  Collective finished_;
  std::vector<cudaEvent_t> free_;

  // The watchdog's: the oldest collective as it was found last.
  std::int64_t oldest_ = 0;
  Stage stage_ = Stage::issuing;
  Clock::time_point since_;

  std::atomic<Clock::time_point> alive_ = Clock::now();
  std::atomic<bool> ending_ = false;
  std::mutex sleep_mutex_;
  std::condition_variable_any sleep_;
  std::jthread watch_, guard_;
};

}  // namespace tessera::comm
