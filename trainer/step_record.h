#pragma once
// What a run says of a step and of an evaluation: rows of metrics.jsonl, and lines on the console.

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "kernels/ops.h"
#include "model/gpt.h"
#include "trainer/checkpoint.h"
#include "trainer/config.h"
#include "trainer/evaluate.h"
#include "trainer/metrics.h"
#include "trainer/open_data.h"

namespace tessera {

/// What one step measured, over all ranks.
struct StepReport {
  double loss = 0, lr = 0, grad_norm = 0, seconds = 0, data_wait = 0;  // nats a target token; seconds of the step, and of it waiting for data
  std::uint64_t exchanged = 0;                                         // bytes that ranks of a sequence sent each other
  bool skipped = false;                                                // not finite: nothing was changed
};

/// The row of a step, after which the run is at `position`. `peak_flops`: of all ranks, for the MFU; 0: not known, and left out.
nlohmann::ordered_json step_row(const Config& config, const StepReport& report, const AttentionCounts& counts, const RunPosition& position,
                                const Gpt::Flops& flops_per_token, double peak_flops);
/// "step 8/24  loss 4.0919 ...": the same row as a line. `seconds_left`: of the run.
std::string step_line(const nlohmann::ordered_json& row, std::int64_t steps, double seconds_left);

/// {"active_share", "thresholds", "balances", "scales", "self_biases"}: [layers][heads], and "sink_biases": [layers][heads x sinks], those that the
/// model has. The learned ones must have arrived (ShardedAdamW::await_all).
nlohmann::ordered_json head_values(const Gpt& model, Ops& ops, const AttentionCounts& counts);

struct EvaluationRecord {
  nlohmann::ordered_json row;      // what the step's row has more
  std::vector<std::string> lines;  // without the step; each dataset of several, then all
};
/// Of evaluations of the datasets of `data`, or of its task.
EvaluationRecord evaluation_record(const TrainingData& data, const std::vector<Evaluation>& parts);

}  // namespace tessera
