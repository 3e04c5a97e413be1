#include "trainer/host_threads.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <sstream>
#include <thread>

#include "trainer/collective.h"

namespace tessera {
namespace {

/// The smallest quota on the way from a control group up to the root, in cores; 0: none.
double quota_of(const std::string& root, std::string group, bool v2) {
  double least = 0;
  while (true) {
    double quota = -1, period = 0;
    if (v2) {
      std::ifstream file(root + group + "/cpu.max");
      std::string limit;
      if (file >> limit >> period && limit != "max") quota = std::atof(limit.c_str());
    } else {
      std::ifstream(root + group + "/cpu.cfs_quota_us") >> quota;
      std::ifstream(root + group + "/cpu.cfs_period_us") >> period;
    }
    if (quota > 0 && period > 0 && (least == 0 || quota / period < least)) least = quota / period;
    const auto slash = group.rfind('/');
    if (group.empty() || slash == std::string::npos) return least;
    group.resize(slash);
  }
}

double control_group_quota() {
  std::ifstream groups("/proc/self/cgroup");
  std::string line;
  double least = 0;
  while (std::getline(groups, line)) {  // "0::/path" (v2) or "4:cpu,cpuacct:/path" (v1)
    const auto first = line.find(':'), second = line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1), path = line.substr(second + 1);
    double quota = 0;
    if (controllers.empty()) {
      quota = quota_of("/sys/fs/cgroup", path, true);
    } else if ((',' + controllers + ',').find(",cpu,") != std::string::npos) {
      quota = quota_of("/sys/fs/cgroup/cpu", path, false);
    }
    if (quota > 0 && (least == 0 || quota < least)) least = quota;
  }
  return least;
}

std::string to_text(const Placement& p) {
  std::ostringstream out;
  out << p.host << ' ' << p.quota;
  for (const int cpu : p.cpus) out << ' ' << cpu;
  return out.str();
}

Placement from_text(const std::string& text) {
  std::istringstream in(text);
  Placement p;
  in >> p.host >> p.quota;
  for (int cpu; in >> cpu;) p.cpus.insert(cpu);
  return p;
}

}  // namespace

Placement this_placement() {
  Placement p;
  char name[256] = "";
  gethostname(name, sizeof name - 1);
  p.host = *name ? name : "localhost";
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof set, &set) == 0) {
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu)
      if (CPU_ISSET(cpu, &set)) p.cpus.insert(cpu);
  } else {  // more CPUs than the set holds
    for (unsigned cpu = 0; cpu < std::max(1u, std::thread::hardware_concurrency()); ++cpu) p.cpus.insert(static_cast<int>(cpu));
  }
  p.quota = control_group_quota();
  return p;
}

int fair_threads(const std::vector<Placement>& ranks, int rank) {
  const Placement& mine = ranks.at(static_cast<std::size_t>(rank));
  double share = 0;
  for (const int cpu : mine.cpus)
    share += 1.0 / static_cast<double>(
                       std::count_if(ranks.begin(), ranks.end(), [&](const Placement& p) { return p.host == mine.host && p.cpus.contains(cpu); }));
  if (mine.quota > 0)
    share = std::min(
        share, mine.quota / static_cast<double>(std::count_if(ranks.begin(), ranks.end(), [&](const Placement& p) { return p.host == mine.host; })));
  return std::max(1, static_cast<int>(std::floor(share + 1e-6)));
}

int threads_for_rank(Communicator& comm, int configured) {
  std::vector<Placement> ranks;
  for (const std::string& text : all_gather(comm, to_text(this_placement()))) ranks.push_back(from_text(text));
  if (configured > 0) return configured;
  const char* omp = std::getenv("OMP_NUM_THREADS");
  if (omp && std::atoi(omp) > 0) return std::atoi(omp);
  return fair_threads(ranks, comm.rank());
}

}  // namespace tessera
