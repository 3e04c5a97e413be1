#include "trainer/signals.h"

#include <unistd.h>

#include <array>
#include <csignal>

namespace tessera {
namespace {

volatile std::sig_atomic_t received = 0;
constexpr std::array kSignals{SIGTERM, SIGINT, SIGUSR1};
std::array<struct sigaction, kSignals.size() + 1> before;

extern "C" void on_stop(int signal) {
  if (received) _exit(128 + signal);
  received = signal;
}

}  // namespace

StopSignals::StopSignals() {
  received = 0;
  struct sigaction action = {};
  action.sa_handler = on_stop;
  action.sa_flags = SA_RESTART;  // reads and writes under way go on
  sigemptyset(&action.sa_mask);
  for (std::size_t i = 0; i < kSignals.size(); ++i) sigaction(kSignals[i], &action, &before[i]);
  // A file-size limit shall be an error of the write, with a message, not the end of the process.
  action.sa_handler = SIG_IGN;
  sigaction(SIGXFSZ, &action, &before.back());
}

StopSignals::~StopSignals() {
  for (std::size_t i = 0; i < kSignals.size(); ++i) sigaction(kSignals[i], &before[i], nullptr);
  sigaction(SIGXFSZ, &before.back(), nullptr);
}

bool StopSignals::requested() const { return received != 0; }

const char* StopSignals::name() const {
  switch (received) {
    case SIGTERM: return "SIGTERM";
    case SIGINT: return "SIGINT";
    case SIGUSR1: return "SIGUSR1";
    default: return "";
  }
}

}  // namespace tessera
