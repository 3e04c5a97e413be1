#include "trainer/fault.h"

#include <fmt/core.h>
#include <sys/resource.h>

#include <csignal>
#include <cstdlib>
#include <map>
#include <regex>
#include <stdexcept>

namespace tessera {

FaultInjector::FaultInjector(int rank) : FaultInjector(std::getenv("TESSERA_FAULT") ? std::getenv("TESSERA_FAULT") : "", rank) {}

FaultInjector::FaultInjector(const std::string& specification, int rank) : rank_(rank) {
  if (specification.empty()) return;
  static const std::map<std::string, Kind> kinds{{"kill", Kind::kill},           {"kill-saving", Kind::kill_saving},
                                                 {"exception", Kind::exception}, {"stop", Kind::stop},
                                                 {"full", Kind::full},           {"nan", Kind::nan}};
  std::smatch part;
  if (!std::regex_match(specification, part, std::regex("([a-z-]+)@([0-9]{1,6}):([0-9]{1,9})")) || !kinds.contains(part[1]))
    throw std::invalid_argument(
        fmt::format("TESSERA_FAULT={}: expected KIND@RANK:STEP with KIND kill, kill-saving, exception, stop, full or nan", specification));
  if (std::stoi(part[2]) != rank) return;
  kind_ = kinds.at(part[1]);
  step_ = std::stoll(part[3]);
}

void FaultInjector::strike(std::int64_t step) const {
  if (due(Kind::kill, step)) std::raise(SIGKILL);
  if (due(Kind::stop, step)) std::raise(SIGTERM);
  if (due(Kind::full, step)) {
    const rlimit limit{65536, RLIM_INFINITY};
    setrlimit(RLIMIT_FSIZE, &limit);
  }
  if (due(Kind::exception, step)) throw std::runtime_error(fmt::format("TESSERA_FAULT: exception on rank {} at step {}", rank_, step));
}

void FaultInjector::strike_saving(std::int64_t step) const {
  if (due(Kind::kill_saving, step)) std::raise(SIGKILL);
}

}  // namespace tessera
