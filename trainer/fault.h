#pragma once
// Failures on demand, for tests of what a run does when a part of it fails. The environment variable
//
//   TESSERA_FAULT=KIND@RANK:STEP
//
// makes rank RANK do this during step STEP (counted from 1):
//   kill         SIGKILL to itself before the step's gradient exchange
//   kill-saving  SIGKILL to itself in the middle of writing the step's checkpoint
//   exception    throws std::runtime_error before the step's gradient exchange
//   stop         SIGTERM to itself: the orderly stop
//   full         from here on this rank's files may not grow beyond 64 KiB, as on a full disk
//   nan          makes one element of the step's gradient NaN
// A value of another form is a std::invalid_argument, so that a test cannot pass because of a typing error.

#include <cstdint>
#include <string>

namespace tessera {

class FaultInjector {
 public:
  enum class Kind { none, kill, kill_saving, exception, stop, full, nan };

  /// From TESSERA_FAULT; no fault when that is not set.
  explicit FaultInjector(int rank);
  FaultInjector(const std::string& specification, int rank);

  /// Whether the fault of this kind is due on this rank.
  bool due(Kind kind, std::int64_t step) const { return kind == kind_ && step == step_; }
  /// Does kill, exception, stop and full when one is due.
  void strike(std::int64_t step) const;
  /// Does kill-saving when it is due.
  void strike_saving(std::int64_t step) const;

 private:
  Kind kind_ = Kind::none;
  std::int64_t step_ = 0;
  int rank_;
};

}  // namespace tessera
