#include "trainer/sweep/child_process.h"

#include <fcntl.h>
#include <fmt/core.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

namespace tessera {

namespace {

/// The environment as NAME=VALUE, with `added` in place of what has the same name.
std::vector<std::string> environment_with(const std::vector<std::pair<std::string, std::string>>& added) {
  std::vector<std::string> all;
  for (char** entry = environ; *entry; ++entry) {
    const std::string text = *entry;
    const auto same = [&](const auto& pair) { return text.starts_with(pair.first + "="); };
    if (std::find_if(added.begin(), added.end(), same) == added.end()) all.push_back(text);
  }
  for (const auto& [name, value] : added) all.push_back(name + "=" + value);
  return all;
}

std::vector<char*> pointers(std::vector<std::string>& texts) {
  std::vector<char*> out;
  for (std::string& text : texts) out.push_back(text.data());
  out.push_back(nullptr);
  return out;
}

}  // namespace

ChildProcess::ChildProcess(const Command& command) {
  std::vector<std::string> arguments = command.arguments, environment = environment_with(command.environment);
  const std::vector<char*> argv = pointers(arguments), envp = pointers(environment);
  int out[2], failure[2];  // what it prints; the errno of an exec that failed
  if (pipe2(out, O_CLOEXEC) != 0) throw std::runtime_error(fmt::format("{}: no pipe: {}", arguments[0], std::strerror(errno)));
  if (pipe2(failure, O_CLOEXEC) != 0) {
    close(out[0]), close(out[1]);
    throw std::runtime_error(fmt::format("{}: no pipe: {}", arguments[0], std::strerror(errno)));
  }
  const pid_t parent = getpid();
  id_ = fork();
  if (id_ == 0) {  // nothing from here to exec may allocate: another thread may have held the lock
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, nullptr);
    setsid();
    prctl(PR_SET_PDEATHSIG, SIGUSR1);
    const int null = open("/dev/null", O_RDONLY);
    if (getppid() == parent && dup2(null, STDIN_FILENO) >= 0 && dup2(out[1], STDOUT_FILENO) >= 0 && dup2(out[1], STDERR_FILENO) >= 0)
      execvpe(argv[0], argv.data(), envp.data());
    const int error = errno;
    if (write(failure[1], &error, sizeof error) < 0) _exit(126);
    _exit(127);
  }
  const int forked = errno;
  close(out[1]);
  close(failure[1]);
  output_ = out[0];
  fcntl(output_, F_SETFL, O_NONBLOCK);
  int error = id_ < 0 ? forked : 0;
  if (id_ > 0) {
    ssize_t got;
    while ((got = ::read(failure[0], &error, sizeof error)) < 0 && errno == EINTR) {
    }
    if (got > 0) waitpid(id_, nullptr, 0);
  }
  close(failure[0]);
  if (error == 0) return;
  close(output_);
  throw std::runtime_error(fmt::format("{}: cannot be started: {}", arguments[0], std::strerror(error)));
}

ChildProcess::~ChildProcess() {
  if (!code_ && !ended()) {
    kill(id_, SIGKILL);
    waitpid(id_, nullptr, 0);
  }
  if (output_ >= 0) close(output_);
}

void ChildProcess::read(const std::function<void(std::string_view)>& use) {
  char buffer[1 << 14];
  while (output_ >= 0) {
    const ssize_t got = ::read(output_, buffer, sizeof buffer);
    if (got > 0) {
      use({buffer, static_cast<std::size_t>(got)});
    } else if (got == 0) {
      close(output_);
      output_ = -1;
    } else if (errno != EINTR) {
      return;  // nothing there now
    }
  }
}

void ChildProcess::signal(int number) const {
  if (!code_) kill(id_, number);
}

std::optional<int> ChildProcess::ended() {
  int status = 0;
  if (!code_ && waitpid(id_, &status, WNOHANG) == id_) code_ = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  return code_;
}

}  // namespace tessera
