#pragma once
// run.init: a new run's parameters from a checkpoint.

#include <string>
#include <vector>

#include "trainer/checkpoint.h"
#include "trainer/config.h"
#include "trainer/train_state.h"

namespace tessera {

struct WarmStart {
  InitialCheckpoint from;
  std::vector<std::string> taken;  // names of the parameters that the checkpoint has too
  bool thresholds = false;         // mode controlled on both sides, with the same score: the checkpoint's go on
  bool self_biases = false;        // new self edges beside them: each has its head's threshold at first
  std::vector<std::string> notices;
};

/// Compares the model of run.init with that of `config`, whose vocabulary is resolved. What only one attention has (scale, threshold, gain of the
/// head norm) keeps its first values or is dropped, with a notice. Throws ConfigError with both values for anything else that differs: layers, heads,
/// width, mlp_ratio, positions and, where they are learned, their number, norm, bias, the tokenizer; and when run.init is no checkpoint.
WarmStart plan_warm_start(const Config& config, const std::string& tokenizer_hash);

/// After TrainState::initialize(): what is taken replaces the initial values. Rows of the embedding beyond the vocabulary keep theirs.
void apply_warm_start(const WarmStart& start, const Config& config, TrainState& state, Ops& ops);

}  // namespace tessera
