#pragma once
// Runs what a sweep still lacks: each run in a process of its own, as many at a time as there is room for.

#include "trainer/progress.h"
#include "trainer/sweep/sweep_check.h"

namespace tessera {

/// Runs those of `check` that are not finished, in its order, from their newest checkpoints. A run that fails is said, with its last error, and does
/// not stop the others. At a signal (StopSignals) the runs finish their step, write a checkpoint and end; a second one ends all at once. Throws
/// std::runtime_error when another process runs this sweep, and at the end when a run failed or was stopped.
void run_sweep(const Sweep& sweep, const SweepCheck& check, const HostRoom& host, Console& console);

/// The last error in what a run printed: what stands behind "error: ", else the last line; `code` is its exit status (128 + signal).
std::string last_error(const std::string& output, int code);

}  // namespace tessera
