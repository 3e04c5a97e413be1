#pragma once
// How many CPU threads a rank should use: its fair share of the cores that it may run on.

#include <set>
#include <string>
#include <vector>

#include "kernels/comm/communicator.h"

namespace tessera {

/// Where a rank may run: CPU affinity (sched_getaffinity) and the quota of its control groups, in cores (cpu.max, v2; cpu.cfs_quota_us, v1).
struct Placement {
  std::string host;
  std::set<int> cpus;
  double quota = 0;  // 0: none
};
Placement this_placement();

/// Threads for ranks[rank], at least 1. Each CPU is divided evenly among the ranks of its host that may use it, then a quota among the ranks of
/// the host. So 2 unbound ranks on 8 cores take 4 each, and so do 2 ranks that the launcher has bound to 4 cores each.
int fair_threads(const std::vector<Placement>& ranks, int rank);

/// `configured` (run.threads) when that is not 0; else OMP_NUM_THREADS when that is set; else fair_threads() of all ranks. Collective.
int threads_for_rank(Communicator& comm, int configured);

}  // namespace tessera
