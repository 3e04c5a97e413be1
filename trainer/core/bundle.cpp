#include "trainer/core/bundle.h"

#include <fmt/core.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <filesystem>
#include <map>
#include <set>

#include "data/byte_source.h"
#include "data/files.h"
#include "data/json_file.h"
#include "trainer/core/prompts.h"
#include "trainer/schema_values.h"
#include "trainer/yaml_text.h"

namespace tessera {
namespace {

namespace fs = std::filesystem;
constexpr const char* kTypes[] = {"multiple_choice", "schema", "language_modeling"};

// -- eval_meta_data.csv ---------------------------------------------------------------------------------------------------

struct CsvRow {
  std::size_t line = 1;  // on which it begins
  std::vector<std::string> fields;
};

/// RFC 4180: fields between commas, in quotes where they hold commas, quotes (doubled) or line ends.
std::vector<CsvRow> parse_csv(const std::string& text, const std::string& file) {
  std::vector<CsvRow> rows;
  std::size_t line = 1, quote_line = 0;
  bool row_open = false, quoted = false;
  for (std::size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (!row_open) rows.push_back({line, {""}});
    row_open = true;
    std::string& field = rows.back().fields.back();
    if (c == '\n') ++line;
    if (quoted) {
      if (c != '"') {
        field += c;
      } else if (text.compare(i, 2, "\"\"") == 0) {
        field += c;
        ++i;
      } else {
        quoted = false;
      }
    } else if (c == '"' && field.empty()) {
      quoted = true;
      quote_line = line;
    } else if (c == ',') {
      rows.back().fields.emplace_back();
    } else if (c == '\n') {
      if (field.ends_with('\r')) field.pop_back();
      row_open = false;
    } else {
      field += c;
    }
  }
  if (quoted) throw ConfigError(fmt::format("{}:{}: a quoted field does not end", file, quote_line));
  return rows;
}

/// Percent by task.
std::map<std::string, double> read_baselines(const std::string& file) {
  const std::vector<CsvRow> rows = parse_csv(read_file(file), file);
  const auto column = [&](const char* name) {
    if (rows.empty()) throw ConfigError(file + ": empty; expected a table with the columns \"Eval Task\" and \"Random baseline\"");
    const auto& names = rows[0].fields;
    const auto found = std::find(names.begin(), names.end(), name);
    if (found == names.end()) throw ConfigError(fmt::format("{}:1: there is no column \"{}\"", file, name));
    return static_cast<std::size_t>(found - names.begin());
  };
  const std::size_t task = column("Eval Task"), baseline = column("Random baseline");
  std::map<std::string, double> baselines;
  for (const CsvRow& row : std::span(rows).subspan(1)) {
    if (row.fields.size() == 1 && row.fields[0].empty()) continue;
    if (row.fields.size() <= std::max(task, baseline))
      throw ConfigError(fmt::format("{}:{}: {} fields, expected {} as in line 1", file, row.line, row.fields.size(), rows[0].fields.size()));
    const std::string& text = row.fields[baseline];
    double value = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (error != std::errc() || end != text.data() + text.size() || !(value >= 0 && value < 100))
      throw ConfigError(fmt::format("{}:{}: \"Random baseline\" of {} is \"{}\", expected percent, at least 0 and below 100", file, row.line,
                                    row.fields[task], text));
    baselines[row.fields[task]] = value;
  }
  return baselines;
}

// -- core.yaml ------------------------------------------------------------------------------------------------------------

std::size_t read_shots(const Value& value, Problems& problems) {
  if (!value.node.IsSequence() || value.node.size() != 1) {
    problems.add(value.place, value.path, fmt::format("expected a list of one number, as [10], found {}", describe(value.node)));
    return 0;
  }
  return static_cast<std::size_t>(read_integer<std::int64_t>(value.child(value.node[0], value.path + "[0]"), {0, 1000}, problems).value_or(0));
}

/// The file of a task's items: itself, or compressed.
void find_file(CoreTask& task, const std::string& path) {
  task.file = path;
  task.missing = false;
  for (const char* extension : {"", ".zst", ".gz"}) {
    if (!fs::is_regular_file(path + extension)) continue;
    task.file = path + extension;
    return;
  }
  task.missing = true;
}

CoreTask read_task(const Value& value, const std::string& directory, Problems& problems) {
  CoreTask task;
  if (!value.node.IsMap()) {
    problems.add(value.place, value.path, fmt::format("expected a map that describes a task, found {}", describe(value.node)));
    return task;
  }
  std::set<std::string> seen;
  for (const auto& [name, child] : read_map(value, problems)) {
    seen.insert(name);
    if (name == "label") {
      task.label = read_text(child, false, problems).value_or("");
    } else if (name == "dataset_uri") {
      if (const auto uri = read_text(child, false, problems)) find_file(task, directory + "/eval_data/" + *uri);
    } else if (name == "num_fewshot") {
      task.shots = read_shots(child, problems);
    } else if (name == "icl_task_type") {
      if (const auto type = read_choice(child, {std::begin(kTypes), std::end(kTypes)}, problems))
        task.type = static_cast<CoreType>(std::find(std::begin(kTypes), std::end(kTypes), *type) - std::begin(kTypes));
    } else if (name == "continuation_delimiter") {
      task.delimiter = read_text(child, true, problems).value_or("");
    } else if (name == "has_categories") {  // of its items, for averages that CORE does not take
      read_boolean(child, problems);
    } else {
      const std::vector<std::string> known{"label", "dataset_uri", "num_fewshot", "icl_task_type", "continuation_delimiter", "has_categories"};
      problems.add(child.key_place, child.path, fmt::format("unknown key; nearest valid key \"{}\"", nearest(name, known)));
    }
  }
  for (const char* name : {"label", "dataset_uri", "num_fewshot", "icl_task_type"})
    if (!seen.contains(name)) problems.add(value.place, value.path, fmt::format("the key \"{}\" is missing", name));
  return task;
}

std::vector<CoreTask> read_tasks(const std::string& directory, const std::string& file) {
  constexpr YamlKind kind{"list of CORE tasks", "icl_tasks: [...]"};
  const YAML::Node document = parse_yaml(read_yaml_file(file, kind), file, kind);
  if (!document.IsMap()) throw ConfigError(file + ": expected a map with the list icl_tasks");
  const std::string path = "icl_tasks";
  const YAML::Node list = document[path];
  if (!list || !list.IsSequence() || list.size() == 0)
    throw ConfigError(fmt::format("{}: icl_tasks: expected a list of tasks, found {}", file, describe(list)));
  const Value all{list, path, place_of(file, list.Mark()), file};
  Problems problems;
  std::vector<CoreTask> tasks;
  std::set<std::string> labels;
  for (std::size_t i = 0; i < list.size(); ++i) {
    const Value value = all.child(list[i], fmt::format("{}[{}]", path, i));
    tasks.push_back(read_task(value, directory, problems));
    if (!labels.insert(tasks.back().label).second) problems.add(value.place, value.path, fmt::format("a second task {}", tasks.back().label));
  }
  problems.throw_if_any();
  return tasks;
}

// -- Items ----------------------------------------------------------------------------------------------------------------

std::string read_all(const std::string& path) {
  const auto source = open_source(path);
  std::string text;
  for (std::size_t used = 0;;) {
    text.resize(used + (1 << 20));
    const std::size_t n = source->read(std::span(text).subspan(used));
    used += n;
    if (n == 0) {
      text.resize(used);
      return text;
    }
  }
}

/// The parts of an item out of its line; `where` is file:line.
class ItemReader {
 public:
  ItemReader(const std::string& line, std::string where) : where_(std::move(where)), json_(parse_json(line, where_)) {
    if (!json_.is_object()) fail(fmt::format("expected a JSON object, found {}", json_.type_name()));
  }

  CoreItem item(CoreType type) const {
    CoreItem item;
    switch (type) {
      case CoreType::multiple_choice:
        item.contexts = {text("query")};
        item.continuations = texts("choices");
        item.gold = gold(item.continuations.size());
        break;
      case CoreType::schema:
        item.contexts = texts("context_options");
        item.continuations = {text("continuation")};
        item.gold = gold(item.contexts.size());
        break;
      case CoreType::language_modeling:
        item.contexts = {std::string(python_strip(text("context")))};
        item.continuations = {text("continuation")};
        break;
    }
    return item;
  }

 private:
  [[noreturn]] void fail(const std::string& message) const { throw ConfigError(where_ + ": " + message); }
  const nlohmann::json& at(const char* key) const {
    const auto found = json_.find(key);
    if (found == json_.end()) {
      std::string keys;
      for (const auto& [name, value] : json_.items()) keys += (keys.empty() ? "" : ", ") + name.substr(0, 40);
      fail(fmt::format("the key \"{}\" is missing; there is {}", key, keys.empty() ? "none" : keys.substr(0, 200)));
    }
    return *found;
  }
  std::string text(const char* key) const {
    const nlohmann::json& value = at(key);
    if (!value.is_string()) fail(fmt::format("\"{}\" is {}, expected text", key, value.type_name()));
    return value;
  }
  std::vector<std::string> texts(const char* key) const {
    const nlohmann::json& value = at(key);
    const bool good = value.is_array() && value.size() >= 2 && std::all_of(value.begin(), value.end(), [](const auto& v) { return v.is_string(); });
    if (!good) fail(fmt::format("\"{}\" is not a list of at least two texts", key));
    return value;
  }
  std::size_t gold(std::size_t candidates) const {
    const nlohmann::json& value = at("gold");
    if (!value.is_number_integer() || value < 0 || value >= candidates)
      fail(
          fmt::format("\"gold\" is {}, expected the index of one of {} candidates, 0 to {}", value.dump().substr(0, 40), candidates, candidates - 1));
    return value;
  }

  std::string where_;
  nlohmann::json json_;
};

}  // namespace

const char* name_of(CoreType type) { return kTypes[static_cast<int>(type)]; }

CoreBundle read_core_bundle(const std::string& directory) {
  CoreBundle bundle;
  bundle.directory = directory;
  const std::string yaml = directory + "/core.yaml", csv = directory + "/eval_meta_data.csv";
  for (const std::string& file : {yaml, csv})
    if (!fs::exists(file))
      throw ConfigError(fmt::format("{}: there is no such file; expected a folder with core.yaml, eval_meta_data.csv and eval_data/", file));
  bundle.tasks = read_tasks(directory, yaml);
  const auto baselines = read_baselines(csv);
  for (CoreTask& task : bundle.tasks) {
    const auto found = baselines.find(task.label);
    if (found == baselines.end()) throw ConfigError(fmt::format("{}: there is no row for {}, which core.yaml lists", csv, task.label));
    task.baseline = found->second;
  }
  return bundle;
}

std::vector<CoreTask> select_tasks(const CoreBundle& bundle, const std::string& labels) {
  if (labels.empty()) return bundle.tasks;
  std::vector<std::string> known;
  for (const CoreTask& task : bundle.tasks) known.push_back(task.label);
  std::set<std::string> wanted;
  for (std::size_t first = 0; first <= labels.size();) {
    const std::size_t comma = std::min(labels.find(',', first), labels.size());
    const std::string label = labels.substr(first, comma - first);
    if (std::find(known.begin(), known.end(), label) == known.end())
      throw ConfigError(fmt::format("--tasks: there is no task \"{}\" in {}; nearest is \"{}\"", label, bundle.directory, nearest(label, known)));
    wanted.insert(label);
    first = comma + 1;
  }
  std::vector<CoreTask> tasks;
  for (const CoreTask& task : bundle.tasks) {
    if (!wanted.contains(task.label)) continue;
    if (task.missing) throw ConfigError(fmt::format("--tasks: the items of {} are not there: {}", task.label, task.file));
    tasks.push_back(task);
  }
  return tasks;
}

std::vector<CoreItem> read_core_items(const CoreTask& task) {
  const std::string text = read_all(task.file);
  std::vector<CoreItem> items;
  std::uint64_t line = 0;
  for (std::size_t first = 0; first < text.size();) {
    const std::size_t end = std::min(text.find('\n', first), text.size());
    const std::string content(python_strip(std::string_view(text).substr(first, end - first)));
    first = end + 1;
    ++line;
    if (content.empty()) continue;
    items.push_back(ItemReader(content, fmt::format("{}:{}", task.file, line)).item(task.type));
    items.back().line = line;
  }
  if (items.size() <= task.shots)
    throw ConfigError(fmt::format("{}: {} items, and task {} shows {} others before each", task.file, items.size(), task.label, task.shots));
  return items;
}

std::span<const DclmTask> dclm_tasks() {
  static constexpr DclmTask kTasks[] = {
      {"hellaswag_zeroshot", CoreType::multiple_choice, 0, 25},
      {"jeopardy", CoreType::language_modeling, 10, 0},
      {"bigbench_qa_wikidata", CoreType::language_modeling, 10, 0},
      {"arc_easy", CoreType::multiple_choice, 10, 25},
      {"arc_challenge", CoreType::multiple_choice, 10, 25},
      {"copa", CoreType::multiple_choice, 0, 50},
      {"commonsense_qa", CoreType::multiple_choice, 10, 40.3},
      {"piqa", CoreType::multiple_choice, 10, 50},
      {"openbook_qa", CoreType::multiple_choice, 0, 25},
      {"lambada_openai", CoreType::language_modeling, 0, 0},
      {"hellaswag", CoreType::multiple_choice, 10, 25},
      {"winograd", CoreType::schema, 0, 50},
      {"winogrande", CoreType::schema, 0, 50},
      {"bigbench_dyck_languages", CoreType::language_modeling, 10, 0},
      {"agi_eval_lsat_ar", CoreType::multiple_choice, 3, 25},
      {"bigbench_cs_algorithms", CoreType::language_modeling, 10, 0},
      {"bigbench_operators", CoreType::language_modeling, 10, 0},
      {"bigbench_repeat_copy_logic", CoreType::language_modeling, 10, 0},
      {"squad", CoreType::language_modeling, 10, 0},
      {"coqa", CoreType::language_modeling, 0, 0},
      {"boolq", CoreType::multiple_choice, 10, 62},
      {"bigbench_language_identification", CoreType::multiple_choice, 10, 25},
  };
  return kTasks;
}

const DclmTask* find_dclm_task(const std::string& label) {
  for (const DclmTask& task : dclm_tasks())
    if (task.label == label) return &task;
  return nullptr;
}

}  // namespace tessera
