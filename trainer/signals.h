#pragma once
// Stopping in order: the first SIGTERM, SIGINT or SIGUSR1 (which mpirun and Slurm pass on) is remembered and the run ends after its step; a
// second one ends the process at once.

namespace tessera {

/// Handles the signals while it lives; one at a time.
class StopSignals {
 public:
  StopSignals();
  ~StopSignals();
  StopSignals(const StopSignals&) = delete;
  StopSignals& operator=(const StopSignals&) = delete;

  bool requested() const;
  /// "SIGTERM", ...; "" while none has come.
  const char* name() const;
};

}  // namespace tessera
