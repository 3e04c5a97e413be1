#pragma once
// The figures of a report.

#include <utility>
#include <vector>

#include "trainer/report/gather.h"
#include "trainer/report/svg.h"

namespace tessera {

enum class Against { tokens, time, sparsity, speed, memory };

/// Training and validation loss of every run, decimated (series.h), against tokens or against time in steps.
Figure loss_curves(const Report& report, Against against);  // tokens, time
/// Validation loss of every variant with its spread against edge sparsity or tokens a second, and the Pareto front of the finished ones.
Figure loss_scatter(const Report& report, Against against);  // sparsity, speed

/// Tokens a second, or memory, against the context: a line for the variants that are one but for it. The runs must have several contexts.
Figure context_curves(const Report& report, Against against);  // speed, memory
bool has_several_contexts(const Report& report);

/// Accuracy at the answers of synthetic tasks against their distance, a line a run that has it. One run at least must.
Figure accuracy_curves(const Report& report);

/// Active / causal edges over training, a row a layer and head. The run must have such rows.
Figure active_share_map(const ReportRun& run);
/// Thresholds over training, a line a layer and head. The run must have such rows.
Figure threshold_curves(const ReportRun& run);

using Head = std::pair<int, int>;  // layer, head
/// `wanted` as far as the model has them, else all heads where they are few, else some, from the one that skips least to the one that skips most.
std::vector<Head> chosen_heads(const TileMeasurement& tiles, const std::vector<Head>& wanted);
/// Tiles of these heads on the first validation sequence. The run must have been measured.
Figure tile_maps(const ReportRun& run, const std::vector<Head>& heads);
/// The static patterns of the configuration, each once: the share of the edges that a query may see.
Figure pattern_maps(const ReportRun& run);

/// All that the report has numbers for, those of all runs first.
std::vector<Figure> draw_figures(const Report& report, const std::vector<Head>& heads);

/// A file's name from a run's: letters, digits, - and _; others become _, and a name that is taken gets a number.
class FigureNames {
 public:
  std::string of(const std::string& name);

 private:
  std::vector<std::string> taken_;
};

}  // namespace tessera
