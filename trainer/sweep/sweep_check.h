#pragma once
// What is looked at before a sweep's first run starts, all of it for every run.

#include <string>
#include <vector>

#include "trainer/sweep/sweep_folder.h"
#include "trainer/sweep/sweep_room.h"
#include "trainer/sweep/sweep_variants.h"

namespace tessera {

struct CheckedRun {
  SweepRun run;                 // its configuration with the vocabulary, and with budget.minutes the steps that its folder says
  nlohmann::ordered_json plan;  // plan_run()
  RunState state;
  bool steps_known = true;  // false: with budget.minutes, before they are timed
  double seconds = 0;       // of its training steps, measured or expected from others; 0: not known

  std::size_t bytes_per_rank() const { return plan["bytes_per_rank"]["total"].get<std::size_t>(); }
};

struct SweepCheck {
  std::vector<CheckedRun> runs;       // as in the sweep
  std::vector<std::string> problems;  // of runs that cannot be: each names its run
};

/// Plans every run, compares it with what its folder holds, and with what the host has. Writes nothing. `to_run`: the data must be there, be
/// what the runs of the folder were trained on, and the device usable. Throws ConfigError where the folder is another sweep's.
SweepCheck check_sweep(const Sweep& sweep, const HostRoom& host, bool to_run);

/// Throws ConfigError with all problems when there are any.
void throw_if_any(const Sweep& sweep, const std::vector<std::string>& problems);

}  // namespace tessera
