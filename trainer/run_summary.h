#pragma once
// What a run folder says of a run, whether it still trains, has ended or was cut off: for tables and pages that put runs side by side. Reads files
// only, and takes nothing from the run.

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "trainer/config.h"

namespace tessera {

struct RunSummary {
  std::string directory, name;  // name: the last part of the path
  Config config;
  std::int64_t parameters = 0;  // elements; 0 while the vocabulary is not known
  std::int64_t step = 0;        // the last one in metrics.jsonl
  std::int64_t tokens = 0;      // seen up to it
  std::int64_t saved = 0;       // step of the newest complete checkpoint; 0: there is none
  bool finished = false;        // all of train.steps are done and saved
  double seconds = 0;           // sum of the steps' times: without evaluation and checkpoints

  std::optional<double> loss;             // of training: mean over the last tenth of the steps
  std::optional<double> validation_loss;  // the last one, nats a token
  std::optional<double> bits_per_byte;    // with it
  std::optional<double> accuracy;         // with it, of a synthetic task
  std::optional<double> best_validation_loss;
  std::int64_t best_step = 0;
  double edge_sparsity = 0, tile_skip_rate = 0, empty_rows = 0;  // of the last step; the tile is config.model.attention's
  std::optional<double> tokens_per_s;                            // median of the last half of the steps
  std::optional<double> attention_share;                         // of a step's time, timed at each evaluation: median over the last half of the steps
  std::optional<double> memory_bytes;                            // a rank: in use on the device where that can be asked, else as planned
  bool memory_planned = false;                                   // which of the two

  /// What `tessera eval RUN --output RUN/eval.json` and `tessera eval RUN --core BUNDLE --output RUN/core.json` left; null where they did not, or
  /// where they are of an earlier step.
  nlohmann::ordered_json evaluation, core;

  bool softmax() const { return config.model.attention.gate == Gate::softmax; }
};

/// `path`: a run folder. `results`: with evaluation and core. Throws std::invalid_argument when it is none, or holds a configuration, metrics or
/// results that cannot be read, naming the file. A run without a step yet has zeros.
RunSummary summarize_run(const std::string& path, bool results = true);

/// The attention as the configuration writes it: "softmax", or score, gate and normalizer as "cosine/relu2/sum"; then "+self", "+4sinks" and
/// "+output_gate".
std::string attention_name(const Config& config);

/// One object: what compares, under the names that metrics.jsonl and `tessera eval --json` use. The validation is the whole split's where
/// `evaluation` has it, else the run's own; "validation" says which.
nlohmann::ordered_json to_json(const RunSummary& summary);

}  // namespace tessera
