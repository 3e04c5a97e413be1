#include "trainer/run_summary.h"

#include <fmt/core.h>

#include <algorithm>
#include <filesystem>
#include <numeric>
#include <stdexcept>

#include "data/files.h"
#include "data/json_file.h"
#include "model/parameters.h"
#include "trainer/run_folder.h"
#include "trainer/statistics.h"

namespace tessera {
namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;
namespace {

/// What the last 1/`part` of the rows have under `key`.
std::vector<double> last_values(const std::vector<Json>& rows, const char* key, std::size_t part) {
  std::vector<double> values;
  for (std::size_t i = rows.size() - (rows.size() + part - 1) / part; i < rows.size(); ++i)
    if (const auto value = MetricsFile::number(rows[i], key)) values.push_back(*value);
  return values;
}

/// RUN/eval.json or core.json: null when there is none or it is of another step than the newest checkpoint.
Json result_of(const std::string& file, std::int64_t step) {
  if (!fs::exists(file)) return nullptr;
  Json found = parse_json<Json>(read_file(file), file);
  if (!found.is_object() || !found.contains("step"))
    throw std::invalid_argument(fmt::format("{}: not what `tessera eval --output` writes; remove it, or run that again", file));
  return found["step"] == step ? found : Json(nullptr);
}

}  // namespace

RunSummary summarize_run(const std::string& path, bool results) {
  RunSummary s;
  s.directory = fs::path(path).lexically_normal().string();
  while (s.directory.size() > 1 && s.directory.back() == '/') s.directory.pop_back();
  s.name = fs::path(s.directory).filename().string();
  const RunFolder folder{s.directory};
  if (!fs::exists(folder.config())) throw std::invalid_argument(fmt::format("{}: not a run folder: there is no {}", path, folder.config()));
  s.config = load_stored_config(folder.config());
  if (s.config.model.vocabulary > 0) {
    resolve_vocabulary(s.config, s.config.model.vocabulary, folder.config());
    s.parameters = make_parameter_layout(s.config.model).count;
  }

  const std::vector<Json> rows = MetricsFile::rows(folder.metrics());
  const auto checkpoints = list_checkpoints(folder.checkpoints());
  const auto newest = std::find_if(checkpoints.rbegin(), checkpoints.rend(), [](const CheckpointEntry& c) { return c.complete; });
  const bool any = newest != checkpoints.rend();
  s.saved = any ? newest->step : 0;
  s.finished = any && s.saved >= s.config.train.steps;
  if (any && results) {
    s.evaluation = result_of(s.directory + "/eval.json", s.saved);
    s.core = result_of(s.directory + "/core.json", s.saved);
  }
  if (rows.empty()) return s;

  const Json& last = rows.back();
  s.step = last["step"].get<std::int64_t>();
  s.tokens = static_cast<std::int64_t>(MetricsFile::number(last, "tokens").value_or(0));
  s.edge_sparsity = MetricsFile::number(last, "edge_sparsity").value_or(0);
  s.tile_skip_rate = MetricsFile::number(last, "tile_skip_rate").value_or(0);
  s.empty_rows = MetricsFile::number(last, "empty_row_share").value_or(0);
  for (const Json& row : rows) {
    s.seconds += MetricsFile::number(row, "step_ms").value_or(0) / 1e3;
    if (const auto bytes = MetricsFile::number(row, "memory_bytes")) {
      s.memory_bytes = bytes;
      s.memory_planned = false;
    } else if (const auto planned = MetricsFile::number(row, "planned_bytes"); planned && (!s.memory_bytes || s.memory_planned)) {
      s.memory_bytes = planned;
      s.memory_planned = true;
    }
    const auto loss = MetricsFile::number(row, "validation_loss");
    if (!loss) continue;
    s.validation_loss = loss;
    s.bits_per_byte = MetricsFile::number(row, "bits_per_byte");
    s.accuracy = MetricsFile::number(row, "validation_accuracy");
    if (!s.best_validation_loss || *loss < *s.best_validation_loss) {
      s.best_validation_loss = loss;
      s.best_step = row["step"].get<std::int64_t>();
    }
  }
  if (const auto losses = last_values(rows, "loss", 10); !losses.empty())
    s.loss = std::accumulate(losses.begin(), losses.end(), 0.0) / static_cast<double>(losses.size());
  s.tokens_per_s = median(last_values(rows, "tokens_per_s", 2));
  s.attention_share = median(last_values(rows, "attention_share", 2));
  return s;
}

std::string attention_name(const Config& config) {
  const Json a = Json::parse(to_json(config)).at("attention");
  const auto word = [&](const char* key) { return a.at(key).get<std::string>(); };
  const AttentionConfig& c = config.model.attention;
  return (c.gate == Gate::softmax ? "softmax" : fmt::format("{}/{}/{}", word("score"), word("gate"), word("normalizer"))) +
         (c.self_edge() ? "+self" : "") + (c.sinks() > 0 ? fmt::format("+{}sinks", c.sinks()) : "") + (c.output_gate ? "+output_gate" : "");
}

Json to_json(const RunSummary& s) {
  const auto or_null = [](const std::optional<double>& value) { return value ? Json(*value) : Json(nullptr); };
  const AttentionConfig& a = s.config.model.attention;
  Json row = {{"name", s.name},
              {"directory", s.directory},
              {"attention", attention_name(s.config)},
              {"finished", s.finished},
              {"step", s.step},
              {"steps", s.config.train.steps},
              {"parameters", s.parameters},
              {"tokens", s.tokens},
              {"seconds", s.seconds},
              {"loss", or_null(s.loss)},
              {"validation_loss", or_null(s.validation_loss)},
              {"validation", s.validation_loss ? "in the run" : ""},
              {"bits_per_byte", or_null(s.bits_per_byte)},
              {"accuracy", or_null(s.accuracy)},
              {"best_validation_loss", or_null(s.best_validation_loss)},
              {"best_step", s.best_step},
              {"edge_sparsity", s.edge_sparsity},
              {"tile_skip_rate", s.tile_skip_rate},
              {"tile", {a.tile_query, a.tile_key}},
              {"empty_row_share", s.empty_rows},
              {"tokens_per_s", or_null(s.tokens_per_s)},
              {"attention_share", or_null(s.attention_share)},
              {"memory_bytes", or_null(s.memory_bytes)},
              {"memory_planned", s.memory_planned}};
  if (const Json& e = s.evaluation; !e.is_null()) {
    row["validation_loss"] = e.value("loss", Json(nullptr));
    row["validation"] = fmt::format("{} tokens", e.value("tokens", std::uint64_t{0}));
    for (const char* key : {"bits_per_byte", "accuracy", "edge_sparsity", "tile_skip_rate", "empty_row_share"})
      if (e.contains(key)) row[key] = e[key];  // the mixture of several datasets has only the first
  }
  if (const Json& c = s.core; !c.is_null() && c.contains("title") && c.contains("score"))
    row["core"] = {{"title", c["title"]}, {"score", c["score"].value("bundle_baselines", Json(nullptr))}};
  if (s.softmax()) row["edge_sparsity"] = row["tile_skip_rate"] = row["empty_row_share"] = nullptr;
  return row;
}

}  // namespace tessera
