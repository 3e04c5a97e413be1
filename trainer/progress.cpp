#include "trainer/progress.h"

#include <fcntl.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>

namespace tessera {
namespace {

/// Open MPI gives each rank's output a pseudo-terminal whether or not mpirun's own output is one, so ask about mpirun's.
bool launcher_on_terminal(int descriptor) {
  const int out = open(fmt::format("/proc/{}/fd/{}", getppid(), descriptor).c_str(), O_WRONLY | O_NOCTTY | O_CLOEXEC);
  if (out < 0) return false;
  const bool terminal = isatty(out);
  close(out);
  return terminal;
}

std::size_t terminal_width(int descriptor) {
  winsize size = {};
  return ioctl(descriptor, TIOCGWINSZ, &size) == 0 && size.ws_col > 20 ? size.ws_col : 120;
}

}  // namespace

Console::Mode Console::mode_for(int rank, std::FILE* out) {
  if (rank != 0) return Mode::silent;
  const char* term = std::getenv("TERM");
  if (!isatty(fileno(out)) || (term && std::string(term) == "dumb")) return Mode::plain;
  if (std::getenv("OMPI_COMM_WORLD_RANK") && !launcher_on_terminal(fileno(out))) return Mode::plain;
  return Mode::live;
}

Console::~Console() {
  if (live_line_) put("\n");
}

void Console::put(const std::string& text) {
  if (std::fwrite(text.data(), 1, text.size(), out_) == text.size() && std::fflush(out_) == 0) return;
  // Nobody reads any more (a closed terminal or pipe). A run goes on without: what it is for goes to its folder.
  mode_ = Mode::silent;
  live_line_ = false;
  if (!std::freopen("/dev/null", "w", out_)) std::clearerr(out_);
}

void Console::print(const std::string& line) {
  if (mode_ == Mode::silent) return;
  clear();
  put(line + "\n");
}

void Console::progress(const std::string& line, bool log) {
  if (mode_ == Mode::silent) return;
  if (mode_ == Mode::plain) {
    if (log) print(line);
    return;
  }
  const auto now = std::chrono::steady_clock::now();
  if (live_line_ && now - last_ < std::chrono::milliseconds(100)) return;
  last_ = now;
  live_line_ = true;
  put("\r\033[K" + line.substr(0, terminal_width(fileno(out_)) - 1));
}

void Console::clear() {
  if (live_line_) put("\r\033[K");
  live_line_ = false;
}

std::string format_duration(double seconds) {
  const auto s = static_cast<std::int64_t>(seconds + 0.5);
  if (s >= 86400) return fmt::format("{}d{:02}h", s / 86400, s % 86400 / 3600);
  if (s >= 3600) return fmt::format("{}h{:02}m", s / 3600, s % 3600 / 60);
  if (s >= 60) return fmt::format("{}m{:02}s", s / 60, s % 60);
  return fmt::format("{}s", s);
}

std::string format_count(double n) {
  if (n >= 1e9) return fmt::format("{:.2f}B", n / 1e9);
  if (n >= 1e6) return fmt::format("{:.2f}M", n / 1e6);
  if (n >= 1e3) return fmt::format("{:.1f}k", n / 1e3);
  return fmt::format("{:.0f}", n);
}

std::string format_bytes(double bytes) {
  const char* units[] = {"B", "KiB", "MiB", "GiB", "TiB"};
  int u = 0;
  for (; bytes >= 1024 && u < 4; ++u) bytes /= 1024;
  return fmt::format("{:.{}f} {}", bytes, u == 0 ? 0 : 1, units[u]);
}

}  // namespace tessera
