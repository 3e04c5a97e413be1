#pragma once
// What a report shows, gathered from run folders. Reads files only, but for the tiles of attention, which it computes from checkpoints.

#include <functional>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "trainer/report/measure_tiles.h"
#include "trainer/report/series.h"
#include "trainer/sweep/sweep_report.h"

namespace tessera {

/// A row of metrics.jsonl by layer and head, [layers][heads]; empty where the row has none.
struct HeadRow {
  std::int64_t step = 0;
  std::vector<std::vector<double>> active_share, thresholds;
};

/// An entry of accuracy_by_distance of metrics.jsonl: the answers that stand `from` to `to` tokens back.
struct DistanceAccuracy {
  std::int64_t from = 0, to = 0, answers = 0;
  double accuracy = 0;
};

struct ReportRun {
  std::string name, variant;
  RunState state;
  Config config;
  struct Loss {
    std::int64_t step = 0;
    double tokens = 0, seconds = 0, loss = 0;  // seconds: of steps, without evaluation and checkpoints
  };
  std::vector<Loss> training, validation;  // in nats, loss_unit()
  std::vector<HeadRow> heads;
  std::vector<DistanceAccuracy> accuracy;  // of the last evaluation; none of text
  std::optional<TileMeasurement> tiles;
  std::string no_tiles;  // why there are none
};

struct Report {
  std::string title;
  std::vector<ReportRun> runs;
  /// As report_json() has them: of a variant without a finished run, of its unfinished ones, with "provisional" true. More: "state" (text),
  /// "skip_rates" (by kTileSizes, means over the measured runs of those that count; null without one), "measured" (their number).
  nlohmann::ordered_json variants;
  std::vector<std::string> notices;  // what is missing or was left out, naming the file
  std::string base{};                // base_note() of a sweep
};

struct GatherOptions {
  MeasureOptions measure;  // no sequences: nothing is computed
  std::function<void(const std::string&)> progress = [](const std::string&) {};
};

/// Of a sweep, every run of its file. Throws as read_results().
Report gather(const Sweep& sweep, const GatherOptions& options);

/// Of run folders: named by their last part, or by what they were given as where two would be alike; those that differ in their seeds alone are one
/// variant. Throws std::invalid_argument for a folder that is no run's, is named twice or has a configuration or results that cannot be read.
Report gather(const std::vector<std::string>& folders, const GatherOptions& options);

/// What the report's losses are in: "nats a token", of synthetic tasks "nats an answer", of both "nats a token or answer".
std::string loss_unit(const Report& report);

}  // namespace tessera
