#include "trainer/sweep/sweep_report.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <map>

#include "trainer/progress.h"
#include "trainer/text_table.h"

namespace tessera {

namespace {

using Json = nlohmann::ordered_json;
using Kind = RunState::Kind;

Json or_null(const std::optional<double>& value) { return value ? Json(*value) : Json(nullptr); }

/// The softmax variant that a variant is to be compared with: equal in all that counts but attention.*, and there in as much as can be.
std::string twin_of(const std::vector<const SweepRun*>& variants, const SweepRun& run) {
  const SweepRun* best = nullptr;
  int least = 0;
  for (const SweepRun* other : variants) {
    if (other->config.model.attention.gate != Gate::softmax) continue;
    int differs = 0;
    bool same = true;
    for (const Key& key : schema()) {
      if (key.path.starts_with("run.") || !key_counts(key.path) || key.write(other->config) == key.write(run.config)) continue;
      if (key.path.starts_with("attention."))
        ++differs;
      else
        same = false;
    }
    if (same && (!best || differs < least)) best = other, least = differs;
  }
  return best ? best->variant : "";
}

/// Means over seeds of what the finished runs have under `key`; null where none has it.
Json mean(const std::vector<Json>& runs, const char* key) {
  double sum = 0;
  int n = 0;
  for (const Json& run : runs)
    if (run[key].is_number()) sum += run[key].get<double>(), ++n;
  return n > 0 ? Json(sum / n) : Json(nullptr);
}

Json spread(const std::vector<Json>& runs, const char* key) {
  const Json middle = mean(runs, key);
  double sum = 0;
  int n = 0;
  for (const Json& run : runs)
    if (run[key].is_number()) sum += std::pow(run[key].get<double>() - middle.get<double>(), 2), ++n;
  return n > 1 ? Json(std::sqrt(sum / (n - 1))) : Json(nullptr);
}

/// Loss over the twin's: the mean over the seeds that both have; null where they share none.
Json over(const std::vector<Json>& runs, const std::vector<Json>& twins) {
  double sum = 0;
  int n = 0;
  for (const Json& run : runs)
    for (const Json& twin : twins)
      if (run["seed"] == twin["seed"] && run["validation_loss"].is_number() && twin["validation_loss"].is_number())
        sum += run["validation_loss"].get<double>() - twin["validation_loss"].get<double>(), ++n;
  return n > 0 ? Json(sum / n) : Json(nullptr);
}

std::string number(const Json& value, const char* format) { return value.is_number() ? fmt::format(fmt::runtime(format), value.get<double>()) : "-"; }

}  // namespace

SweepResults read_results(const Sweep& sweep) {
  const SweepFolder folder(sweep.file);
  folder.check_owner();
  SweepResults results;
  for (const SweepRun& run : sweep.runs) {
    RunState state;
    try {
      state = state_of(folder, run);
    } catch (const std::invalid_argument& e) {  // the others are shown all the same
      state.kind = Kind::failed;
      state.steps = run.config.train.steps;
      state.error = e.what();
    }
    if (state.summary) {
      Config here = run.config;
      const Config& there = state.summary->config;
      if (sweep.file.budget.minutes > 0) here = with_steps(sweep, run, there.train.steps).config;
      if (here.model.vocabulary == 0) here.model.vocabulary = there.model.vocabulary;
      if (const auto changes = sweep_changes(there, here); !changes.empty()) {
        results.notices.push_back(
            fmt::format("{} holds a run with another configuration, and is left out: {}", folder.run(run.name), fmt::join(changes, "; ")));
        state = {};
        state.steps = here.train.steps;
      }
    }
    results.states.push_back(std::move(state));
  }
  return results;
}

Json status_json(const Sweep& sweep, const SweepResults& results) {
  Json counts = Json::object(), runs = Json::array();
  for (const Kind kind : {Kind::finished, Kind::running, Kind::interrupted, Kind::failed, Kind::waiting}) counts[name_of(kind)] = 0;
  for (std::size_t i = 0; i < sweep.runs.size(); ++i) {
    const RunState& state = results.states[i];
    counts[name_of(state.kind)] = counts[name_of(state.kind)].get<int>() + 1;
    Json run = {{"name", sweep.runs[i].name}, {"state", name_of(state.kind)}, {"step", state.step}, {"steps", state.steps}};
    run["seconds_left"] = state.seconds_left > 0 ? Json(state.seconds_left) : Json(nullptr);
    run["validation_loss"] = state.summary ? or_null(state.summary->validation_loss) : Json(nullptr);
    if (state.kind == Kind::failed) run["error"] = state.error;
    runs.push_back(run);
  }
  return {{"file", sweep.file.file}, {"folder", sweep.file.dir}, {"counts", counts}, {"runs", runs}};
}

std::string status_text(const Sweep& sweep, const SweepResults& results) {
  const Json status = status_json(sweep, results);
  std::vector<std::string> counts;
  for (const auto& [name, n] : status["counts"].items())
    if (n != 0) counts.push_back(fmt::format("{} {}", n.get<int>(), name));
  std::vector<std::vector<std::string>> rows = {{"run", "state", "step", "validation loss", ""}};
  for (const Json& run : status["runs"]) {
    std::string more = run.value("error", "");
    if (run["state"] == "running" && run["seconds_left"].is_number()) more = fmt::format("ETA {}", format_duration(run["seconds_left"]));
    rows.push_back({run["name"], run["state"], fmt::format("{}/{}", run["step"].get<std::int64_t>(), run["steps"].get<std::int64_t>()),
                    number(run["validation_loss"], "{:.4f}"), more.substr(0, more.find('\n'))});
  }
  return fmt::format("{}: {} runs, {}\n{}", sweep.file.dir, sweep.runs.size(), fmt::join(counts, ", "), text_table(rows));
}

Json report_json(const Sweep& sweep, const SweepResults& results) {
  std::vector<const SweepRun*> variants;  // the first seed of each
  std::map<std::string, std::vector<Json>> finished;
  std::map<std::string, int> seeds;
  for (std::size_t i = 0; i < sweep.runs.size(); ++i) {
    const SweepRun& run = sweep.runs[i];
    if (++seeds[run.variant] == 1) variants.push_back(&run);
    if (results.states[i].kind == Kind::finished) {
      Json summary = to_json(*results.states[i].summary);
      summary["seed"] = run.config.run.seed;
      finished[run.variant].push_back(std::move(summary));
    }
  }
  Json rows = Json::array();
  for (const SweepRun* variant : variants) {
    const auto& runs = finished[variant->variant];
    const AttentionConfig& a = variant->config.model.attention;
    const std::string twin = twin_of(variants, *variant);
    Json differs = Json::object();
    for (const auto& [key, value] : variant->differs) differs[key] = value;
    Json row = {{"variant", variant->variant},
                {"differs", differs},
                {"softmax", a.gate == Gate::softmax},
                {"finished", runs.size()},
                {"seeds", seeds[variant->variant]},
                {"validation_loss", mean(runs, "validation_loss")},
                {"validation_loss_sd", spread(runs, "validation_loss")},
                {"accuracy", mean(runs, "accuracy")},
                {"accuracy_sd", spread(runs, "accuracy")},
                {"twin", twin.empty() || twin == variant->variant ? Json(nullptr) : Json(twin)},
                {"over_twin", nullptr},
                {"edge_sparsity", mean(runs, "edge_sparsity")},
                {"tile_skip_rate", mean(runs, "tile_skip_rate")},
                {"tile", {a.tile_query, a.tile_key}},
                {"tokens_per_s", mean(runs, "tokens_per_s")},
                {"attention_share", mean(runs, "attention_share")},
                {"memory_bytes", mean(runs, "memory_bytes")},
                {"seconds", mean(runs, "seconds")},
                {"parameters", runs.empty() ? Json(nullptr) : runs[0]["parameters"]},
                {"tokens", mean(runs, "tokens")}};
    if (!row["twin"].is_null()) row["over_twin"] = over(runs, finished[twin]);
    row["runs"] = runs;
    rows.push_back(std::move(row));
  }
  return {{"file", sweep.file.file}, {"folder", sweep.file.dir}, {"variants", rows}};
}

std::string report_text(const Sweep& sweep, const SweepResults& results) {
  const Json report = report_json(sweep, results);
  std::vector<Json> variants(report["variants"].begin(), report["variants"].end());
  std::ranges::stable_sort(variants, {},
                           [](const Json& v) { return v["validation_loss"].is_number() ? v["validation_loss"].get<double>() : INFINITY; });
  const auto any = [&](const char* key) { return std::ranges::any_of(variants, [&](const Json& v) { return !v[key].is_null(); }); };
  const bool sd = any("validation_loss_sd"), twins = any("twin"), accuracy = any("accuracy");
  std::vector<std::vector<std::string>> rows = {{"variant", "seeds", "validation loss"}};
  if (accuracy) rows[0].push_back("accuracy");
  if (twins) rows[0].push_back("over softmax");
  for (const char* title : {"edges zero", "tiles skipped", "tile", "tokens/s", "attention", "memory a rank", "time a run"})
    rows[0].emplace_back(title);
  for (const Json& v : variants) {
    const auto with_spread = [&](const char* key, const char* spread_key) {
      std::string text = number(v[key], "{:.4f}");
      if (v[spread_key].is_number()) text += fmt::format(" +- {:.4f}", v[spread_key].get<double>());
      return text;
    };
    std::vector<std::string> row = {
        v["variant"].get<std::string>() + (v["softmax"] == true ? " *" : ""),
        v["finished"] == v["seeds"] ? v["seeds"].dump() : fmt::format("{} of {}", v["finished"].dump(), v["seeds"].dump()),
        with_spread("validation_loss", "validation_loss_sd")};
    if (accuracy) row.push_back(with_spread("accuracy", "accuracy_sd"));
    if (twins) row.push_back(number(v["over_twin"], "{:+.4f}"));
    row.push_back(number(v["edge_sparsity"], "{:.4f}"));
    row.push_back(number(v["tile_skip_rate"], "{:.4f}"));
    row.push_back(fmt::format("{}x{}", v["tile"][0].get<int>(), v["tile"][1].get<int>()));
    row.push_back(v["tokens_per_s"].is_number() ? format_count(v["tokens_per_s"]) : "-");
    row.push_back(number(v["attention_share"], "{:.3f}"));
    row.push_back(v["memory_bytes"].is_number() ? format_bytes(v["memory_bytes"]) : "-");
    row.push_back(v["seconds"].is_number() ? format_duration(v["seconds"]) : "-");
    rows.push_back(std::move(row));
  }
  std::string text = text_table(rows);
  text += fmt::format(
      "\nMeans over finished seeds{}{}.\nEdges zero and tiles skipped: of the causal ones, in the last step. Attention: its share of a step's time.",
      sd ? "; +- is the standard deviation over seeds (n - 1)" : "", twins ? "; over softmax: over the seeds that both have" : "");
  if (any("softmax") && std::ranges::any_of(variants, [](const Json& v) { return v["softmax"] == true; }))
    text += fmt::format("\n* softmax{}.", twins ? ", the twin that \"over softmax\" compares with: the same but for attention" : "");
  if (const std::string base = base_note(sweep); !base.empty()) text += "\n" + base + ".";
  return text + "\n";
}

std::string report_csv(const Sweep& sweep, const SweepResults& results) {
  const auto field = [](const Json& value) {
    if (value.is_null()) return std::string();
    std::string text = value.is_string() ? value.get<std::string>() : value.dump();
    if (text.find_first_of(",\"\n") == std::string::npos) return text;
    std::string quoted = "\"";
    for (const char c : text) quoted += c == '"' ? "\"\"" : std::string(1, c);
    return quoted + "\"";
  };
  const std::vector<std::string> columns = {"variant",    "softmax",     "seeds",        "finished",        "validation_loss", "validation_loss_sd",
                                            "accuracy",   "accuracy_sd", "twin",         "over_twin",       "edge_sparsity",   "tile_skip_rate",
                                            "tile_query", "tile_key",    "tokens_per_s", "attention_share", "memory_bytes",    "seconds",
                                            "parameters", "tokens"};
  std::string text = fmt::format("{}\r\n", fmt::join(columns, ","));
  const Json report = report_json(sweep, results);
  for (Json v : report["variants"]) {
    v["tile_query"] = v["tile"][0];
    v["tile_key"] = v["tile"][1];
    std::vector<std::string> fields;
    for (const std::string& column : columns) fields.push_back(field(v[column]));
    text += fmt::format("{}\r\n", fmt::join(fields, ","));
  }
  return text;
}

}  // namespace tessera
