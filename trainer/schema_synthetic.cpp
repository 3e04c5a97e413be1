// data.synthetic: YAML to a task and back.

#include <fmt/ranges.h>

#include <algorithm>

#include "trainer/schema.h"
#include "trainer/schema_values.h"

namespace tessera {

namespace {

using Json = nlohmann::ordered_json;
using Kind = SyntheticTask::Kind;
using Filler = SyntheticTask::Filler;

constexpr std::int64_t kMostTokens = 1 << 20;
constexpr std::int64_t kMostVocabulary = 1 << 24;
const std::vector<std::string> kTasks = {"mqar", "copy", "needle"};  // by Kind

const char* list_name(Kind kind) { return kind == Kind::copy ? "lengths" : "distances"; }

std::vector<std::string> parameters_of(Kind kind) {
  if (kind == Kind::mqar) return {"vocabulary", "pairs", "power_a", "filler"};
  return {"vocabulary", list_name(kind), "shortest", "longest"};
}

/// One number or several.
std::optional<std::vector<std::int64_t>> read_distances(const Value& value, Problems& problems) {
  const Bounds<std::int64_t> bounds{1, kMostTokens};
  std::vector<std::int64_t> out;
  const std::size_t before = problems.count();
  if (!value.node.IsSequence()) {
    if (const auto one = read_integer(value, bounds, problems)) out.push_back(*one);
  } else {
    if (value.node.size() == 0) problems.add(value.place, value.path, "expected a list of at least one number, as [16, 64]");
    for (std::size_t i = 0; i < value.node.size(); ++i) {
      const YAML::Node node = value.node[i];
      if (const auto one = read_integer(value.child(node, fmt::format("{}[{}]", value.path, i)), bounds, problems)) out.push_back(*one);
    }
  }
  if (problems.count() > before) return {};
  return out;
}

void read_parameter(SyntheticTask& task, const std::string& name, const Value& value, Problems& problems) {
  const auto integer = [&](std::int64_t& member, std::int64_t low, std::int64_t high) {
    if (const auto v = read_integer(value, Bounds<std::int64_t>{low, high}, problems)) member = *v;
  };
  if (name == "vocabulary") return integer(task.vocabulary, 4, kMostVocabulary);
  if (name == "pairs") return integer(task.pairs, 1, kMostTokens);
  if (name == "shortest") return integer(task.shortest, 1, kMostTokens);
  if (name == "longest") return integer(task.longest, 0, kMostTokens);
  if (name == "power_a") {
    if (const auto v = read_number(value, {0, 100, true, false}, problems)) task.power_a = *v;
  } else if (name == "filler") {
    if (const auto v = read_choice(value, {"random", "padding"}, problems)) task.filler = *v == "random" ? Filler::random : Filler::padding;
  } else if (auto list = read_distances(value, problems)) {
    task.distances = std::move(*list);
  }
}

}  // namespace

void read_synthetic(std::optional<SyntheticTask>& task, const Value& value, Problems& problems) {
  const auto kind_of = [](const std::string& name) { return static_cast<Kind>(std::find(kTasks.begin(), kTasks.end(), name) - kTasks.begin()); };
  if (value.node.IsScalar()) {
    const auto name = read_choice(value, {"none", "mqar", "copy", "needle"}, problems);
    if (!name) return;
    task.reset();
    if (*name != "none") task.emplace().kind = kind_of(*name);
    return;
  }
  if (!value.node.IsMap() || value.node.size() != 1)
    return problems.add(value.place, value.path,
                        fmt::format("expected a task, as mqar, or one with parameters, as {{mqar: {{pairs: 16}}}}, found {}{}", describe(value.node),
                                    value.node.IsMap() ? fmt::format(" of {}", value.node.size()) : ""));
  const auto entries = read_map(value, problems);
  if (entries.empty()) return;
  const auto& [name, inner] = entries.front();
  if (std::ranges::find(kTasks, name) == kTasks.end())
    return problems.add(inner.key_place, inner.path, fmt::format("unknown task; nearest is \"{}\"", nearest(name, kTasks)));
  SyntheticTask made;
  made.kind = kind_of(name);
  const std::vector<std::string> known = parameters_of(made.kind);
  if (!inner.node.IsMap())
    return problems.add(inner.place, inner.path,
                        fmt::format("expected {{{}}}, each optional, found {}", fmt::join(known, ", "), describe(inner.node)));
  const std::size_t before = problems.count();
  std::vector<std::string> found;
  for (const auto& [parameter, child] : read_map(inner, problems)) {
    found.push_back(parameter);
    if (std::ranges::find(known, parameter) == known.end())
      problems.add(child.key_place, child.path, fmt::format("{} has no such parameter; nearest is \"{}\"", name, nearest(parameter, known)));
    else
      read_parameter(made, parameter, child, problems);
  }
  const auto has = [&](const char* parameter) { return std::ranges::find(found, parameter) != found.end(); };
  if (const char* list = list_name(made.kind); has(list) && (has("shortest") || has("longest")))
    problems.add(inner.place, inner.path, fmt::format("{0} is set, and shortest or longest too: expected either {0}, or the other two", list));
  if (problems.count() == before) task = std::move(made);
}

Json write_synthetic(const std::optional<SyntheticTask>& task) {
  if (!task) return "none";
  Json parameters = {{"vocabulary", task->vocabulary}};
  if (task->kind == Kind::mqar) {
    parameters["pairs"] = task->pairs;
    parameters["power_a"] = task->power_a;
    parameters["filler"] = task->filler == Filler::random ? "random" : "padding";
  } else if (!task->distances.empty()) {
    parameters[list_name(task->kind)] = task->distances;
  } else {
    parameters["shortest"] = task->shortest;
    parameters["longest"] = task->longest;
  }
  return {{name_of(task->kind), parameters}};
}

}  // namespace tessera
