#include "trainer/signals.h"

#include <unistd.h>

#include <array>
#include <csignal>
#include <cstdlib>

namespace tessera {
namespace {

volatile std::sig_atomic_t received = 0;
constexpr std::array kStop{SIGTERM, SIGINT, SIGUSR1, SIGHUP, SIGCONT};
constexpr std::array kIgnored{SIGXFSZ, SIGPIPE};
std::array<struct sigaction, kStop.size()> stop_before;
std::array<struct sigaction, kIgnored.size()> ignored_before;

extern "C" void on_stop(int signal) {
  if (signal == SIGCONT && received) return;
  if (received && received != SIGCONT) _exit(128 + signal);  // SIGTERM after mpirun's SIGCONT is the same request
  received = signal;
}

}  // namespace

StopSignals::StopSignals() {
  received = 0;
  struct sigaction action = {};
  action.sa_handler = on_stop;
  action.sa_flags = SA_RESTART;  // reads and writes under way go on
  sigemptyset(&action.sa_mask);
  for (std::size_t i = 0; i < kStop.size(); ++i) {
    sigaction(kStop[i], nullptr, &stop_before[i]);
    if (kStop[i] == SIGHUP && stop_before[i].sa_handler == SIG_IGN) continue;
    if (kStop[i] == SIGCONT && !std::getenv("OMPI_COMM_WORLD_RANK")) continue;
    sigaction(kStop[i], &action, nullptr);
  }
  action.sa_handler = SIG_IGN;
  for (std::size_t i = 0; i < kIgnored.size(); ++i) sigaction(kIgnored[i], &action, &ignored_before[i]);
}

StopSignals::~StopSignals() {
  for (std::size_t i = 0; i < kStop.size(); ++i) sigaction(kStop[i], &stop_before[i], nullptr);
  for (std::size_t i = 0; i < kIgnored.size(); ++i) sigaction(kIgnored[i], &ignored_before[i], nullptr);
}

bool StopSignals::requested() const { return received != 0; }

const char* StopSignals::name() const {
  switch (received) {
    case SIGTERM: return "SIGTERM";
    case SIGINT: return "SIGINT";
    case SIGUSR1: return "a request (SIGUSR1)";  // train.sh and sweeps pass Ctrl-C and SIGTERM on so
    case SIGHUP: return "SIGHUP";
    case SIGCONT: return "mpirun";
    default: return "";
  }
}

}  // namespace tessera
