#pragma once
// Stopping in order: the first signal that asks for it is remembered and the run ends after its step; a second one ends the process at once.
//
//   SIGTERM, SIGINT, SIGUSR1   Slurm and others send one of them some time before the end; mpirun passes SIGUSR1 on to every rank
//   SIGHUP                     the terminal is gone; not when nohup has it ignored
//   SIGCONT, under Open MPI    mpirun, told to stop by SIGTERM or Ctrl-C, sends the ranks SIGCONT first, SIGTERM only when
//                              odls_base_sigkill_timeout (1 s) has passed, SIGKILL when it has passed again. The time is needed for the checkpoint.
//                              (A job that was suspended and continues therefore stops as well; --resume goes on.)
//
// Meanwhile two signals are errors of the write that caused them: SIGXFSZ (file-size limit) and SIGPIPE (nobody reads the console).

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
