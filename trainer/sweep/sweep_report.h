#pragma once
// What is known of a sweep's runs: how far each is, and what the finished ones found.

#include <optional>
#include <string>
#include <vector>

#include "trainer/sweep/sweep_folder.h"
#include "trainer/sweep/sweep_variants.h"

namespace tessera {

struct SweepResults {
  std::vector<RunState> states;      // of sweep.runs
  std::vector<std::string> notices;  // folders that hold another run than the sweep's, which count as waiting
};

/// Reads the folders of all runs. One whose files are damaged counts as failed, so that the others can be looked at. Throws ConfigError where the
/// sweep's folder is another sweep's.
SweepResults read_results(const Sweep& sweep);

/// {"file", "folder", "counts": {"waiting": N, ...}, "runs": [{"name", "state", "step", "steps", "seconds_left", "validation_loss", "error"}, ...]}
nlohmann::ordered_json status_json(const Sweep& sweep, const SweepResults& results);
std::string status_text(const Sweep& sweep, const SweepResults& results);

/// A row a variant: mean over its finished seeds; `*_sd` is the sample standard deviation of the loss over them, null of a single one. "twin": the
/// variant with gate softmax that differs from this one in nothing but attention.*, and of those the nearest; "over_twin" the loss above
/// its, over the seeds that both have. Losses are those of the runs themselves, not of a later `tessera eval`.
nlohmann::ordered_json report_json(const Sweep& sweep, const SweepResults& results);
/// The same as a table, lowest loss first.
std::string report_text(const Sweep& sweep, const SweepResults& results);
/// RFC 4180, one line a variant.
std::string report_csv(const Sweep& sweep, const SweepResults& results);

}  // namespace tessera
