#pragma once
// A training run: from a configuration and a folder of data to checkpoints and metrics in run.dir.
//
// A step is a pure function of (parameters, moments, thresholds, step number), so a run that was cut short and resumed from a checkpoint has the
// same losses, bit for bit, as one that was not, on the same number of ranks. On another number it sees the same batches; losses then agree to
// rounding: the gradient is the same sum in another order.

#include "kernels/comm/communicator.h"
#include "trainer/config.h"

namespace tessera {

/// Trains on all ranks of `comm`. Ends by itself after train.steps steps, or in order, with a checkpoint, at a signal. Throws as commands do; a
/// failure of one rank of several is for run_on_ranks() (collective.h). Collective.
void train(const Config& config, bool resume, Communicator& comm);

}  // namespace tessera
