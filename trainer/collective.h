#pragma once
// What every rank must agree on, and how errors leave a run of several ranks: said once, never a hang.

#include <cstdint>
#include <functional>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/comm/communicator.h"

namespace tessera {

/// An error that every rank throws alike: rank 0 reports it.
class CommonError : public std::runtime_error {
 public:
  CommonError(int exit_code, const std::string& message) : std::runtime_error(message), exit_code_(exit_code) {}
  int exit_code() const { return exit_code_; }

 private:
  int exit_code_;
};

/// Runs `work` on every rank and waits for all. When it throws anywhere, every rank throws CommonError with the message of the lowest rank that
/// failed (a single rank: the exception itself). `work` must not communicate. Collective.
void agree(Communicator& comm, const std::function<void()>& work);

/// Runs `work`, which may communicate. An exception on any rank of several prints its message once and ends the whole job with exit code 2
/// (std::invalid_argument) or 1; with a single rank it passes through.
void run_on_ranks(Communicator& comm, const std::function<void()>& work);

/// Sums host values over the ranks in rank order; no device is involved. Collective.
void all_reduce_sum(Communicator& host, std::span<double> values);
void all_reduce_sum(Communicator& host, std::span<std::uint64_t> values);

/// The text of every rank, in rank order. Collective.
std::vector<std::string> all_gather(Communicator& comm, const std::string& text);

}  // namespace tessera
