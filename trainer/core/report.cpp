#include "trainer/core/report.h"

#include <fmt/format.h>

#include <algorithm>
#include <numeric>

namespace tessera {
namespace {

using Json = nlohmann::ordered_json;

double centred(double accuracy, double percent) { return (accuracy - percent / 100) / (1 - percent / 100); }

/// By DataComp-LM's table, or the bundle's where that has no such task.
double dclm_baseline(const CoreTask& task) {
  const DclmTask* dclm = find_dclm_task(task.label);
  return dclm ? dclm->baseline : task.baseline;
}

bool is_core(const CoreTask& task) {
  const DclmTask* dclm = find_dclm_task(task.label);
  return dclm && dclm->type == task.type && dclm->shots == task.shots;
}

std::size_t core_tasks(std::span<const CoreRow> rows) {
  return static_cast<std::size_t>(std::count_if(rows.begin(), rows.end(), [](const CoreRow& r) { return is_core(r.work->task); }));
}

struct Means {
  double bundle = 0, dclm = 0;
};
Means means(std::span<const CoreRow> rows) {
  Means m;
  for (const CoreRow& r : rows) {
    m.bundle += centred(r.result.accuracy(), r.work->task.baseline) / static_cast<double>(rows.size());
    m.dclm += centred(r.result.accuracy(), dclm_baseline(r.work->task)) / static_cast<double>(rows.size());
  }
  return m;
}

std::uint64_t total(std::span<const CoreRow> rows, std::uint64_t CoreResult::*part) {
  return std::accumulate(rows.begin(), rows.end(), std::uint64_t{0}, [&](std::uint64_t sum, const CoreRow& r) { return sum + r.result.*part; });
}

std::vector<std::string> labels(const std::vector<CoreTask>& tasks) {
  std::vector<std::string> names;
  for (const CoreTask& t : tasks) names.push_back(t.label);
  return names;
}

}  // namespace

std::string core_title(std::span<const CoreRow> rows) {
  const std::size_t all = dclm_tasks().size(), n = core_tasks(rows);
  std::size_t most = 0;
  for (const CoreRow& r : rows)
    if (r.work->items.size() < r.work->available) most = std::max(most, r.work->items.size());
  const std::string items = most == 0 ? "" : fmt::format("; at most {} items a task", most);
  if (n < rows.size()) return fmt::format("mean of {} task{} ({} of CORE's {}{})", rows.size(), rows.size() == 1 ? "" : "s", n, all, items);
  if (n < all || most > 0) return fmt::format("CORE ({} of {}{})", n, all, items);
  return "CORE";
}

Json core_json(std::span<const CoreRow> rows, const CoreScope& scope) {
  Json tasks = Json::array();
  for (const CoreRow& r : rows) {
    const CoreTask& t = r.work->task;
    tasks.push_back({{"label", t.label},
                     {"type", name_of(t.type)},
                     {"shots", t.shots},
                     {"items", r.work->items.size()},
                     {"items_available", r.work->available},
                     {"right", r.result.right},
                     {"accuracy", r.result.accuracy()},
                     {"baseline", t.baseline / 100},
                     {"centered", centred(r.result.accuracy(), t.baseline)},
                     {"dclm_baseline", dclm_baseline(t) / 100},
                     {"dclm_centered", centred(r.result.accuracy(), dclm_baseline(t))},
                     {"prompts", r.result.prompts},
                     {"prompts_truncated", r.result.cut},
                     {"answers_empty", r.result.empty},
                     {"tokens", r.result.tokens},
                     {"seconds", r.result.seconds}});
  }
  const Means m = means(rows);
  return {{"title", core_title(rows)},
          {"score", {{"bundle_baselines", m.bundle}, {"dclm_baselines", m.dclm}}},
          {"complete", core_title(rows) == "CORE"},
          {"core_tasks", core_tasks(rows)},
          {"core_tasks_of", dclm_tasks().size()},
          {"limit", scope.limit > 0 ? Json(scope.limit) : Json(nullptr)},
          {"missing", labels(scope.missing)},
          {"not_selected", labels(scope.not_selected)},
          {"prompts", total(rows, &CoreResult::prompts)},
          {"prompts_truncated", total(rows, &CoreResult::cut)},
          {"tokens", total(rows, &CoreResult::tokens)},
          {"tasks", tasks}};
}

std::string core_table_head() {
  return fmt::format("{:<32} {:<17} {:>5} {:>6} {:>9} {:>6} {:>8} {:>11} {:>9}", "task", "type", "shots", "items", "accuracy", "guess", "centered",
                     "DCLM guess", "centered");
}

std::string core_table_row(const CoreRow& row) {
  const CoreTask& t = row.work->task;
  const double accuracy = row.result.accuracy(), dclm = dclm_baseline(t);
  std::string line = fmt::format("{:<32} {:<17} {:>5} {:>6} {:>9.4f} {:>6.3f} {:>8.4f}", t.label, name_of(t.type), t.shots, row.work->items.size(),
                                 accuracy, t.baseline / 100, centred(accuracy, t.baseline));
  if (dclm != t.baseline) line += fmt::format(" {:>11.3f} {:>9.4f}", dclm / 100, centred(accuracy, dclm));
  return line;
}

std::string core_summary(std::span<const CoreRow> rows, const CoreScope& scope) {
  const Means m = means(rows);
  std::string text = fmt::format("{}: {:.4f} by the bundle's baselines, {:.4f} by DataComp-LM's\n", core_title(rows), m.bundle, m.dclm);
  const std::uint64_t cut = total(rows, &CoreResult::cut), prompts = total(rows, &CoreResult::prompts), empty = total(rows, &CoreResult::empty);
  text += fmt::format("prompts         {}, of {} tokens together", prompts, total(rows, &CoreResult::tokens));
  if (cut > 0)
    text += fmt::format("; {} ({:.1f} %) were longer than the context and lost their first tokens", cut,
                        100.0 * static_cast<double>(cut) / static_cast<double>(prompts));
  if (empty > 0) text += fmt::format("; {} have an answer without tokens", empty);
  text += "\n";
  if (!scope.missing.empty()) text += fmt::format("missing         {}\n", fmt::join(labels(scope.missing), ", "));
  if (!scope.not_selected.empty()) text += fmt::format("not selected    {}\n", fmt::join(labels(scope.not_selected), ", "));
  return text;
}

}  // namespace tessera
