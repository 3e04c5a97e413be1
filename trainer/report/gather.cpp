#include "trainer/report/gather.h"

#include <fmt/format.h>

#include <algorithm>
#include <filesystem>
#include <map>

#include "data/bpe_split.h"
#include "trainer/progress.h"
#include "trainer/run_folder.h"

namespace tessera {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;
using Kind = RunState::Kind;

namespace {

/// row[key] where it is numbers [layers][heads]; empty where it is not there.
std::vector<std::vector<double>> by_head(const Json& row, const char* key, const ModelConfig& model, std::vector<std::int64_t>& odd) {
  const auto found = row.find(key);
  if (found == row.end()) return {};
  const auto numbers = [&](const Json& layer) {
    return layer.is_array() && layer.size() == static_cast<std::size_t>(model.heads) &&
           std::ranges::all_of(layer, [](const Json& value) { return value.is_number(); });
  };
  if (found->is_array() && found->size() == static_cast<std::size_t>(model.layers) && std::ranges::all_of(*found, numbers))
    return found->get<std::vector<std::vector<double>>>();
  odd.push_back(row["step"].get<std::int64_t>());
  return {};
}

/// accuracy_by_distance of a row; empty, and its step in `odd`, where it is not what a run writes.
std::vector<DistanceAccuracy> read_accuracy(const Json& row, std::vector<std::int64_t>& odd) {
  std::vector<DistanceAccuracy> out;
  try {
    for (const Json& entry : row.at("accuracy_by_distance"))
      out.push_back({entry.at("from"), entry.at("to"), entry.at("answers"), entry.at("accuracy")});
  } catch (const Json::exception&) {
    out.clear();
    odd.push_back(row["step"].get<std::int64_t>());
  }
  return out;
}

void read_metrics(ReportRun& run, std::vector<std::string>& notices) {
  const std::string file = RunFolder{run.state.summary->directory}.metrics();
  std::vector<std::int64_t> odd, odd_accuracy, no_tokens;
  double seconds = 0;
  for (const Json& row : MetricsFile::rows(file, &notices)) {
    const std::int64_t step = row["step"].get<std::int64_t>();
    seconds += MetricsFile::number(row, "step_ms").value_or(0) / 1e3;
    const auto tokens = MetricsFile::number(row, "tokens");
    if (!tokens) no_tokens.push_back(step);
    if (const auto loss = MetricsFile::number(row, "loss"); tokens && loss) run.training.push_back({step, *tokens, seconds, *loss});
    if (const auto loss = MetricsFile::number(row, "validation_loss"); tokens && loss) run.validation.push_back({step, *tokens, seconds, *loss});
    if (row.contains("accuracy_by_distance"))
      if (auto accuracy = read_accuracy(row, odd_accuracy); !accuracy.empty()) run.accuracy = std::move(accuracy);
    HeadRow heads{step, by_head(row, "active_share", run.config.model, odd), by_head(row, "thresholds", run.config.model, odd)};
    if (!heads.active_share.empty() || !heads.thresholds.empty()) run.heads.push_back(std::move(heads));
  }
  if (!no_tokens.empty()) notices.push_back(fmt::format("{}: step {}: no number \"tokens\"; its losses are left out", file, no_tokens[0]));
  if (!odd.empty())
    notices.push_back(fmt::format("{}: step {}: active_share or thresholds are not numbers [{} layers, {} heads]; left out", file, odd[0],
                                  run.config.model.layers, run.config.model.heads));
  if (!odd_accuracy.empty())
    notices.push_back(
        fmt::format("{}: step {}: accuracy_by_distance is not a list of {{from, to, answers, accuracy}}; left out", file, odd_accuracy[0]));
  if (run.training.empty()) notices.push_back(fmt::format("{}: no step with a loss yet", file));
}

void measure(ReportRun& run, const GatherOptions& o, std::vector<std::string>& notices) {
  const std::string& folder = run.state.summary->directory;
  if (o.measure.sequences == 0) {
    run.no_tiles = "not measured (--sequences 0)";
    return;
  }
  const auto checkpoints = list_checkpoints(RunFolder{folder}.checkpoints());
  if (std::ranges::none_of(checkpoints, &CheckpointEntry::complete)) {
    run.no_tiles = "the run has no checkpoint";
    notices.push_back(fmt::format("{}: no checkpoint: its tiles are not measured", folder));
    return;
  }
  o.progress(fmt::format("{}: tiles on validation sequences", run.name));
  try {
    run.tiles = measure_tiles(folder, o.measure);
  } catch (const std::exception& e) {  // the page goes without: it is one run's
    run.no_tiles = e.what();
    notices.push_back(fmt::format("{}: its tiles are not measured: {}", folder, e.what()));
  }
}

std::string state_text(const std::vector<const ReportRun*>& runs) {
  std::vector<std::string> parts;
  for (const Kind kind : {Kind::finished, Kind::running, Kind::interrupted, Kind::failed, Kind::waiting}) {
    std::int64_t n = 0, least = 0, steps = 0;
    for (const ReportRun* run : runs) {
      if (run->state.kind != kind) continue;
      if (n++ == 0 || run->state.step < least) least = run->state.step, steps = run->state.steps;
    }
    if (n == 0) continue;
    std::string text = n == 1 && runs.size() == 1 ? name_of(kind) : fmt::format("{} {}", n, name_of(kind));
    if (kind != Kind::finished && kind != Kind::waiting) text += fmt::format(" at step {} of {}", least, steps);
    parts.push_back(std::move(text));
  }
  return fmt::format("{}", fmt::join(parts, ", "));
}

Report gather(const Sweep& sweep, SweepResults results, const GatherOptions& o) {
  Report report;
  report.notices = results.notices;
  std::map<std::string, std::vector<const ReportRun*>> of_variant;
  report.runs.resize(sweep.runs.size());
  for (std::size_t i = 0; i < sweep.runs.size(); ++i) {
    ReportRun& run = report.runs[i];
    run.name = sweep.runs[i].name;
    run.variant = sweep.runs[i].variant;
    run.state = results.states[i];
    run.config = run.state.summary ? run.state.summary->config : sweep.runs[i].config;
    of_variant[run.variant].push_back(&run);
    if (run.state.kind == Kind::failed) report.notices.push_back(fmt::format("{} failed: {}", run.name, run.state.error));
    if (!run.state.summary) {
      run.no_tiles = run.state.kind == Kind::failed ? "the run failed" : "the run has not begun";
      continue;
    }
    read_metrics(run, report.notices);
    measure(run, o, report.notices);
  }
  // A variant of which no run is finished is shown as far as it is.
  std::map<std::string, bool> provisional;
  for (const auto& [variant, runs] : of_variant)
    provisional[variant] = std::ranges::none_of(runs, [](const ReportRun* run) { return run->state.kind == Kind::finished; });
  for (std::size_t i = 0; i < sweep.runs.size(); ++i)
    if (provisional[sweep.runs[i].variant] && results.states[i].summary && results.states[i].step > 0) results.states[i].kind = Kind::finished;
  report.variants = report_json(sweep, results)["variants"];
  for (Json& row : report.variants) {
    const std::string variant = row["variant"].get<std::string>();
    const auto& runs = of_variant[variant];
    row["provisional"] = provisional[variant];
    // What is not finished does not compare.
    if (row["twin"].is_string() && (provisional[variant] || provisional[row["twin"].get<std::string>()])) row["over_twin"] = nullptr;
    row["state"] = state_text(runs);
    std::vector<double> sums(kTileSizes.size());
    int measured = 0;
    for (const ReportRun* run : runs) {
      if (!run->tiles || (!provisional[variant] && run->state.kind != Kind::finished)) continue;
      for (std::size_t size = 0; size < sums.size(); ++size) sums[size] += run->tiles->skip_rate[size];
      ++measured;
    }
    row["measured"] = measured;
    row["skip_rates"] = nullptr;
    for (const double sum : sums)
      if (measured > 0) row["skip_rates"].push_back(sum / measured);
  }
  return report;
}

}  // namespace

Report gather(const Sweep& sweep, const GatherOptions& o) {
  Report report = gather(sweep, read_results(sweep), o);
  report.title = sweep.file.file;
  report.base = base_note(sweep);
  return report;
}

Report gather(const std::vector<std::string>& folders, const GatherOptions& o) {
  Sweep sweep;
  SweepResults results;
  std::map<std::string, int> names;
  std::map<std::string, std::string> real;
  for (const std::string& folder : folders) {
    if (valid_utf8_prefix(folder) != folder.size())
      throw std::invalid_argument(fmt::format("{}: the folder's name is not UTF-8, as a page must be; rename it", folder));
    results.states.push_back(state_of_run(folder));
    const RunSummary& summary = *results.states.back().summary;
    const auto [other, added] = real.try_emplace(fs::weakly_canonical(summary.directory).string(), folder);
    if (!added) throw std::invalid_argument(fmt::format("{}: the same run as {}", folder, other->second));
    ++names[summary.name];
  }
  for (const RunState& state : results.states) {
    const RunSummary& summary = *state.summary;
    SweepRun run;
    run.name = names[summary.name] > 1 ? summary.directory : summary.name;
    run.config = summary.config;
    run.variant = run.name;
    for (const SweepRun& other : sweep.runs) {
      Config same_seed = other.config;
      same_seed.run.seed = run.config.run.seed;
      if (same_seed.run.seed != other.config.run.seed && sweep_changes(same_seed, run.config).empty()) {
        run.variant = other.variant;
        break;
      }
    }
    sweep.runs.push_back(std::move(run));
  }
  Report report = gather(sweep, std::move(results), o);
  report.title = folders.size() == 1 ? sweep.runs[0].name : fmt::format("{} runs", folders.size());
  return report;
}

std::string loss_unit(const Report& report) {
  const auto is_task = [](const ReportRun& run) { return run.config.data.synthetic.has_value(); };
  if (std::ranges::none_of(report.runs, is_task)) return "nats a token";
  return std::ranges::all_of(report.runs, is_task) ? "nats an answer" : "nats a token or answer";
}

}  // namespace tessera
