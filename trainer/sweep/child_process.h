#pragma once
// A process that this one starts, hears and ends.

#include <sys/types.h>

#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace tessera {

class ChildProcess {
 public:
  struct Command {
    std::vector<std::string> arguments;                              // the program, found on PATH, and its arguments
    std::vector<std::pair<std::string, std::string>> environment{};  // added to this process's
  };

  /// Starts it in a session of its own, out of reach of the terminal's Ctrl-C. When this process ends, however it ends, it gets SIGUSR1, at which
  /// `tessera train` and mpirun stop in order. Throws std::runtime_error when it cannot be started.
  explicit ChildProcess(const Command& command);
  /// Kills it when it has not ended.
  ~ChildProcess();
  ChildProcess(const ChildProcess&) = delete;
  ChildProcess& operator=(const ChildProcess&) = delete;

  pid_t id() const { return id_; }
  /// Readable when it has printed something, or has closed its output; -1 when that is all read.
  int output() const { return output_; }
  /// Gives `use` what it has printed, standard output and error together, without waiting for more.
  void read(const std::function<void(std::string_view)>& use);
  void signal(int number) const;
  /// Whether it has ended, without waiting; then its exit status, or 128 + the signal that ended it.
  std::optional<int> ended();

 private:
  pid_t id_ = -1;
  int output_ = -1;
  std::optional<int> code_;
};

}  // namespace tessera
