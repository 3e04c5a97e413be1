// tessera compare: runs side by side, and beside them the published release that the largest configurations reproduce.

#include <fmt/core.h>

#include <algorithm>
#include <functional>
#include <iostream>
#include <memory>
#include <string>
#include <vector>

#include "trainer/commands/commands.h"
#include "trainer/progress.h"
#include "trainer/run_summary.h"
#include "trainer/schema.h"
#include "trainer/sweep/sweep_folder.h"
#include "trainer/text_table.h"

namespace tessera {
namespace {

using Json = nlohmann::ordered_json;

/// What the release's model card states of its model (RRT-355M): 22,000 steps of 524,288 tokens of FineWeb-Edu.
Json release() {
  return {{"run", "the release (RRT-355M)"},
          {"parameters", 354e6},
          {"tokens", 22000.0 * 524288},
          {"validation_loss", 2.8001},
          {"validation", "FineWeb-Edu, step 21,000"},
          {"edge_sparsity", 0.9966},
          {"core", {{"title", "CORE"}, {"score", 0.1558}}}};
}

Json row_of(const RunSummary& s) {
  Json row = to_json(s);
  row["run"] = s.directory;
  return row;
}

/// Not what decides how a run is divided and how fast it is, and how often it is looked at, nor its seed.
bool key_decides_losses(const std::string& path) {
  for (const char* other : {"attention.", "run.seed", "eval.", "device", "train.micro_batch", "train.recompute"})
    if (path.starts_with(other)) return false;
  return key_counts(path);
}

/// row["differs"]: the keys beside attention.* that decide losses and in which the runs differ, each with this run's value. Twins have none.
void add_differences(std::vector<Json>& rows, const std::vector<RunSummary>& runs) {
  for (Json& row : rows) row["differs"] = Json::object();
  for (const Key& key : schema()) {
    if (!key_decides_losses(key.path)) continue;
    std::vector<Json> values;
    for (const RunSummary& run : runs) values.push_back(key.write(run.config));
    if (std::ranges::adjacent_find(values, std::not_equal_to<>()) == values.end()) continue;
    for (std::size_t i = 0; i < rows.size(); ++i) rows[i]["differs"][key.path] = values[i];
  }
}

std::string text(const Json& row, const char* key, const char* format) {
  const auto found = row.find(key);
  if (found == row.end() || !found->is_number()) return "-";
  return fmt::format(fmt::runtime(format), found->get<double>());
}
std::string count(const Json& row, const char* key) {
  const auto found = row.find(key);
  return found == row.end() || !found->is_number() ? "-" : format_count(found->get<double>());
}

std::vector<std::string> cells(const Json& row, bool accuracy) {
  std::string skip = text(row, "tile_skip_rate", "{:.4f}");
  if (row.contains("tile") && skip != "-") skip += fmt::format(" ({}x{})", row["tile"][0].get<int>(), row["tile"][1].get<int>());
  std::string memory = "-";
  if (row.contains("memory_bytes") && row["memory_bytes"].is_number())
    memory = format_bytes(row["memory_bytes"].get<double>()) + (row["memory_planned"] == true ? " planned" : "");
  std::string core = "-";
  if (row.contains("core") && row["core"].is_object()) {
    core = text(row["core"], "score", "{:.4f}");
    if (const std::string title = row["core"].value("title", "CORE"); title.starts_with("CORE ")) core += title.substr(4);  // " (21 of 22)"
  }
  const bool partial = row.value("validation", Json()) == "in the run";
  std::string progress = "";
  if (row.contains("finished") && !row["finished"].get<bool>())
    progress = fmt::format(" (step {} of {})", row["step"].get<std::int64_t>(), row["steps"].get<std::int64_t>());
  std::vector<std::string> out = {row["run"].get<std::string>() + progress,
                                  row.contains("attention") ? row["attention"].get<std::string>() : "-",
                                  count(row, "parameters"),
                                  count(row, "tokens"),
                                  text(row, "validation_loss", "{:.4f}") + (partial ? "*" : ""),
                                  text(row, "bits_per_byte", "{:.4f}")};
  if (accuracy) out.push_back(text(row, "accuracy", "{:.4f}"));
  out.insert(out.end(), {text(row, "edge_sparsity", "{:.4f}"), skip, core, count(row, "tokens_per_s"), memory});
  return out;
}

void print(const std::vector<Json>& rows) {
  const bool accuracy = std::ranges::any_of(rows, [](const Json& row) { return row.contains("accuracy") && row["accuracy"].is_number(); });
  std::vector<std::vector<std::string>> table = {{"run", "attention", "parameters", "tokens", "validation loss", "bits/byte"}};
  if (accuracy) table[0].push_back("accuracy");
  table[0].insert(table[0].end(), {"edges zero", "tiles skipped", "CORE", "tokens/s", "memory a rank"});
  for (const Json& row : rows) table.push_back(cells(row, accuracy));
  fmt::print("{}", text_table(table));
  fmt::print(
      "\nLosses are nats a token of a run's own tokenizer and text{}: they compare only where both are the same. Edges zero: of the causal edges; "
      "tiles skipped: of the causal tiles of that size.\n",
      accuracy ? ", and nats an answer of a synthetic task" : "");
  for (const auto& [key, value] : rows[0]["differs"].items()) {
    fmt::print("Not twins: {} is {}", key, value.dump());
    for (std::size_t i = 1; i < rows.size() && rows[i].contains("differs"); ++i) fmt::print(", {}", rows[i]["differs"][key].dump());
    fmt::print("\n");
  }
}

}  // namespace

void add_compare_command(CLI::App& app) {
  struct Options {
    std::vector<std::string> runs;
    bool json = false, without_release = false;
  };
  auto o = std::make_shared<Options>();
  CLI::App* command = app.add_subcommand("compare", "Runs side by side: losses, sparsity, CORE, speed, memory");
  command->add_option("RUN", o->runs, "Run folders")->type_name("")->required();
  command->add_flag("--no-release", o->without_release, "Leave out the row of the published release");
  command->add_flag("--json", o->json, "Print JSON");
  command->footer(
      "A run's own validation is of eval.batches micro-batches. The whole split's, and CORE, are shown where they were saved in the run's folder for "
      "its\n"
      "newest checkpoint:\n"
      "  tessera eval runs/mine --output runs/mine/eval.json\n"
      "  tessera eval runs/mine --core eval_bundle --output runs/mine/core.json\n"
      "Example:\n"
      "  tessera compare runs/mine runs/mine-softmax");
  command->callback([o] {
    std::vector<Json> rows;
    std::vector<RunSummary> runs;
    for (const std::string& run : o->runs) {
      runs.push_back(summarize_run(run));
      rows.push_back(row_of(runs.back()));
    }
    add_differences(rows, runs);
    if (!o->without_release) rows.push_back(release());
    if (o->json) {
      std::cout << Json(rows).dump(2) << "\n";
    } else {
      print(rows);
    }
  });
}

}  // namespace tessera
