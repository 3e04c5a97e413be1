#pragma once
// What a run says on the console: a live line with ETA on a terminal, plain lines otherwise. Only rank 0 speaks.

#include <fmt/core.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <string>

namespace tessera {

class Console {
 public:
  enum class Mode { silent, plain, live };
  /// silent on ranks above 0; live when `out` (stdout or stderr) is shown on a terminal, through mpirun or directly.
  static Mode mode_for(int rank, std::FILE* out = stdout);

  explicit Console(Mode mode, std::FILE* out = stdout) : mode_(mode), out_(out) {}
  ~Console();
  Console(const Console&) = delete;
  Console& operator=(const Console&) = delete;

  /// A line that stays.
  template <typename... Args>
  void say(fmt::format_string<Args...> format, Args&&... args) {
    print(fmt::format(format, std::forward<Args>(args)...));
  }
  /// The progress line: replaces the last one on a terminal, at most ten times a second; otherwise a line of its own when `log` says so.
  void progress(const std::string& line, bool log);
  /// Takes the progress line away: something else is about to be written.
  void clear();

 private:
  void print(const std::string& line);
  void put(const std::string& text);
  Mode mode_;
  std::FILE* out_;
  bool live_line_ = false;
  std::chrono::steady_clock::time_point last_{};
};

/// "2d03h", "1h02m", "3m07s", "12s".
std::string format_duration(double seconds);
/// "850", "12.3k", "4.57M".
std::string format_count(double n);
/// "512 B", "1.5 MiB".
std::string format_bytes(double bytes);

}  // namespace tessera
