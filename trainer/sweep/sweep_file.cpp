#include "trainer/sweep/sweep_file.h"

#include <algorithm>
#include <filesystem>
#include <functional>
#include <limits>
#include <optional>
#include <regex>
#include <set>

#include "data/bpe_split.h"
#include "trainer/schema_values.h"
#include "trainer/yaml_text.h"

namespace tessera {

namespace {

namespace fs = std::filesystem;
constexpr YamlKind kSweep{"sweep file", "base: CONFIG.yaml and grid: {attention.gate: [relu, relu2]}"};
constexpr std::int64_t kMostSteps = 1'000'000'000;

/// The same value without its key's path, as what it is called in a message of the sweep file.
Value named(const Value& value, const std::string& path) {
  Value copy = value;
  copy.path = path;
  return copy;
}

class SweepReader {
 public:
  SweepFile sweep;

  SweepReader(const std::string& file) : problems_(file) { sweep.file = file; }

  void read(const YAML::Node& document) {
    const Value root{document, "", place_of(sweep.file, document.Mark()), sweep.file};
    if (!document.IsMap()) {
      problems_.add(root.place, "", fmt::format("expected a map of base, grid, seeds and so on, found {}", describe(document)));
      return;
    }
    const std::vector<std::string> names = {"base", "dir", "set", "grid", "zip", "list", "overrides", "skip_if", "seeds", "budget", "resources"};
    bool has_base = false;
    for (const auto& [name, value] : read_map(root, problems_)) {
      if (name == "base")
        has_base = true, base(value);
      else if (name == "dir")
        dir(value);
      else if (name == "set")
        settings(value, sweep.set);
      else if (name == "grid")
        axes(value, sweep.grid);
      else if (name == "zip")
        axes(value, sweep.zip);
      else if (name == "list")
        list(value);
      else if (name == "overrides")
        overrides(value);
      else if (name == "skip_if")
        skip_if(value);
      else if (name == "seeds")
        seeds(value);
      else if (name == "budget")
        budget(value);
      else if (name == "resources")
        resources(value);
      else
        problems_.add(value.key_place, name.substr(0, 100), unknown_of(name, names));
    }
    if (!has_base) problems_.add(sweep.file, "base", "the key is missing: base: CONFIG.yaml, relative to this file");
    if (sweep.dir.empty()) sweep.dir = fmt::format("runs/{}", fs::path(sweep.file).stem().string());
  }

  void sets(const std::vector<std::string>& assignments) {
    for (const std::string& assignment : assignments)
      if (const auto value = read_set(assignment, problems_))
        if (auto setting = read_setting(*value, "--set")) sweep.set.push_back(std::move(*setting));
  }

  SweepFile finish() {
    across();
    problems_.throw_if_any();
    return std::move(sweep);
  }

 private:
  Problems problems_;

  static std::string unknown_of(const std::string& name, const std::vector<std::string>& names) {
    return fmt::format("unknown key; nearest valid key \"{}\"", nearest(name, names));
  }
  void wrong(const Value& value, const std::string& expected) {
    problems_.add(value.place, value.path, fmt::format("expected {}, found {}", expected, describe(value.node)));
  }

  void base(const Value& value) {
    const auto text = read_text(value, false, problems_);
    if (!text) return;
    sweep.base = (fs::path(sweep.file).parent_path() / *text).lexically_normal().string();
    sweep.base_place = value.place;
  }

  void dir(const Value& value) {
    if (const auto text = read_text(value, false, problems_)) sweep.dir = *text;
  }

  static std::string key_in(const std::string& section) {
    return std::ranges::find_if(schema(), [&](const Key& key) { return key.path.starts_with(section + "."); })->path;
  }

  /// The key that `value.path` names, if a sweep may set it.
  const Key* key_of(const Value& value, const std::string& section) {
    const auto fail = [&](const std::string& message) { problems_.add(value.key_place, fmt::format("{}: {:.200}", section, value.path), message); };
    const Key* key = find_key(value.path);
    if (value.path == "run.dir")
      fail("every run has a folder of its own; dir: names the folder that holds them");
    else if (value.path == "run.seed")
      fail("expected seeds: [1, 2, 3], with each of which every variant runs");
    else if (!key && !value.path.empty() && is_section(value.path))
      fail(fmt::format("this is a section; expected one of its keys with dots, as {}", key_in(value.path)));
    else if (!key)
      unknown_key(value, problems_, section);
    else
      return key;
    return nullptr;
  }

  std::optional<nlohmann::ordered_json> written(const Key& key, const Value& value) {
    Config scratch;
    const std::size_t before = problems_.count();
    key.read(scratch, value, problems_);
    if (problems_.count() > before) return {};
    return key.write(scratch);
  }

  /// `value.path` is the key.
  std::optional<Setting> read_setting(const Value& value, const std::string& section) {
    const Key* key = key_of(value, section);
    if (!key) return {};
    auto json = written(*key, value);
    if (!json) return {};
    return Setting{key, value, std::move(*json)};
  }

  /// The entries of a map from keys, each with the key as its path.
  std::vector<Value> keys_in(const Value& map) {
    std::vector<Value> entries;
    if (!map.node.IsMap())
      wrong(map, "a map of keys, as {attention.gate: relu2}");
    else
      for (const auto& [name, child] : read_map(map, problems_)) entries.push_back(named(child, name));
    return entries;
  }

  void settings(const Value& value, std::vector<Setting>& to) {
    for (const Value& entry : keys_in(value))
      if (auto setting = read_setting(entry, value.path)) to.push_back(std::move(*setting));
  }

  void axes(const Value& value, std::vector<SweepFile::Axis>& to) {
    for (const Value& entry : keys_in(value)) {
      const Key* key = key_of(entry, value.path);
      if (!key) continue;
      if (!entry.node.IsSequence() || entry.node.size() == 0) {
        wrong(named(entry, value.path + ": " + entry.path), "a list of values, as [A, B]");
        continue;
      }
      SweepFile::Axis axis{key, {}};
      for (const YAML::Node& node : entry.node)
        if (auto setting = read_setting(entry.child(node, entry.path), value.path)) axis.values.push_back(std::move(*setting));
      if (axis.values.size() == entry.node.size()) to.push_back(std::move(axis));
    }
  }

  /// Calls `use` with each entry of a list of maps.
  void each_map(const Value& value, const char* example, const std::function<void(const Value&)>& use) {
    if (!value.node.IsSequence()) return wrong(value, fmt::format("a list, as [{}]", example));
    std::size_t i = 0;
    for (const YAML::Node& node : value.node) {
      const Value child = value.child(node, fmt::format("{}[{}]", value.path, i++));
      if (node.IsMap())
        use(child);
      else
        wrong(child, example);
    }
  }

  void list(const Value& value) {
    each_map(value, "{name: softmax, set: {attention.gate: softmax}}", [&](const Value& entry) {
      SweepFile::Named variant;
      variant.place = entry.place;
      for (const auto& [name, child] : read_map(entry, problems_)) {
        if (name == "name") {
          if (const auto text = read_text(child, false, problems_))
            variant.name = *text, variant.place = child.place;
          else
            return;
        } else if (name == "set") {
          settings(child, variant.set);
        } else {
          problems_.add(child.key_place, child.path, unknown_of(name, {"name", "set"}));
        }
      }
      if (variant.name.empty())
        return problems_.add(entry.place, entry.path, "the name is missing: {name: NAME, set: KEYS}; its run's folder is called so");
      static const std::regex safe("[A-Za-z0-9][A-Za-z0-9._=,+-]{0,79}");
      if (!std::regex_match(variant.name, safe))
        problems_.add(
            variant.place, entry.path + ".name",
            fmt::format("expected the name of a folder: up to 80 letters, digits and . _ = , + -, a letter or digit first, found \"{:.100}\"",
                        variant.name));
      else if (variant.name == kSweepLogs)
        problems_.add(variant.place, entry.path + ".name", fmt::format("{} is the folder of what the runs print; expected another name", kSweepLogs));
      else if (variant.name == kSweepRecord)
        problems_.add(variant.place, entry.path + ".name", fmt::format("{} says whose the folder is; expected another name", kSweepRecord));
      else
        sweep.list.push_back(std::move(variant));
    });
  }

  Condition condition(const Value& value) {
    Condition result;
    result.place = value.place;
    for (const Value& entry : keys_in(value)) {
      const Key* key = key_of(entry, value.path);
      if (!key) continue;
      Condition::Term term{key, {}};
      // A list is several values, but for keys whose value is a list.
      const bool several = entry.node.IsSequence() && !key->write(Config()).is_array();
      if (several && entry.node.size() == 0) wrong(named(entry, value.path + ": " + entry.path), "a value or a list of values");
      if (several) {
        for (const YAML::Node& node : entry.node)
          if (auto json = written(*key, entry.child(node, entry.path))) term.values.push_back(std::move(*json));
      } else if (auto json = written(*key, entry)) {
        term.values.push_back(std::move(*json));
      }
      result.terms.push_back(std::move(term));
    }
    if (value.node.IsMap() && value.node.size() == 0)
      wrong(value, "a condition, as {attention.gate: softmax}; without keys it would meet every variant");
    return result;
  }

  void overrides(const Value& value) {
    each_map(value, "{if: {attention.gate: softmax}, set: {attention.score: dot}}", [&](const Value& entry) {
      SweepFile::Override o;
      bool has_if = false, has_set = false;
      for (const auto& [name, child] : read_map(entry, problems_)) {
        if (name == "if")
          has_if = true, o.condition = condition(child);
        else if (name == "set")
          has_set = true, settings(child, o.set);
        else
          problems_.add(child.key_place, child.path, unknown_of(name, {"if", "set"}));
      }
      if (!has_if || !has_set)
        problems_.add(entry.place, entry.path, fmt::format("{} is missing: {{if: CONDITION, set: KEYS}}", has_if ? "set" : "if"));
      sweep.overrides.push_back(std::move(o));
    });
  }

  void skip_if(const Value& value) {
    each_map(value, "{attention.gate: relu, attention.score: [dot, fidelity]}",
             [&](const Value& entry) { sweep.skip_if.push_back(condition(entry)); });
  }

  void seeds(const Value& value) {
    if (!value.node.IsSequence() || value.node.size() == 0) return wrong(value, "a list of seeds, as [1, 2, 3]");
    std::size_t i = 0;
    for (const YAML::Node& node : value.node) {
      const Value child = value.child(node, fmt::format("seeds[{}]", i++));
      const auto seed = read_integer<std::uint64_t>(child, {0, std::numeric_limits<std::uint64_t>::max()}, problems_);
      if (!seed) continue;
      if (std::ranges::find(sweep.seeds, *seed) != sweep.seeds.end())
        problems_.add(child.place, child.path, fmt::format("seed {} stands here a second time", *seed));
      else
        sweep.seeds.push_back(*seed);
    }
  }

  void budget(const Value& value) {
    const std::string expected = "one of {steps: N}, {tokens: N} and {minutes: M}";
    if (!value.node.IsMap() || value.node.size() == 0) return wrong(value, expected);
    const auto entries = read_map(value, problems_);
    if (entries.size() > 1)
      return problems_.add(value.place, value.path, fmt::format("expected {}, found {} keys; keep one", expected, entries.size()));
    for (const auto& [name, child] : entries) {
      sweep.budget.place = child.place;
      if (name == "steps") {
        if (const auto n = read_integer<std::int64_t>(child, {1, kMostSteps}, problems_)) sweep.budget.steps = *n;
      } else if (name == "tokens") {  // a number, so that 5.0e+6 may be written
        if (const auto n = read_number(child, {1, 1e18}, problems_)) sweep.budget.tokens = static_cast<std::int64_t>(*n);
      } else if (name == "minutes") {
        if (const auto m = read_number(child, {0, 1e6, true, false}, problems_)) sweep.budget.minutes = *m;
      } else {
        problems_.add(child.key_place, child.path, unknown_of(name, {"steps", "tokens", "minutes"}));
      }
    }
  }

  void resources(const Value& value) {
    if (!value.node.IsMap()) return wrong(value, "a map of ranks, gpus and at_once, as {ranks: 2, at_once: 4}");
    auto& r = sweep.resources;
    r.place = value.place;
    const std::map<std::string, std::pair<int*, int>> members = {{"ranks", {&r.ranks, 1}}, {"gpus", {&r.gpus, 0}}, {"at_once", {&r.at_once, 0}}};
    for (const auto& [name, child] : read_map(value, problems_)) {
      const auto member = members.find(name);
      if (member == members.end())
        problems_.add(child.key_place, child.path, unknown_of(name, {"ranks", "gpus", "at_once"}));
      else if (const auto n = read_integer<std::int64_t>(child, {member->second.second, 1 << 16}, problems_))
        *member->second.first = static_cast<int>(*n);
    }
    if (r.gpus > r.ranks)
      problems_.add(value.place, value.path, fmt::format("gpus {} are more than ranks {}, of which each computes on one GPU", r.gpus, r.ranks));
  }

  /// What no part of the file can check alone.
  void across() {
    for (const auto& axis : sweep.zip) {
      if (axis.values.size() != sweep.zip[0].values.size())
        problems_.add(axis.values[0].value.key_place, "zip: " + axis.key->path,
                      fmt::format("a list of {} beside {} of {}; expected lists of one length", axis.values.size(), sweep.zip[0].key->path,
                                  sweep.zip[0].values.size()));
      if (std::ranges::find(sweep.grid, axis.key, &SweepFile::Axis::key) != sweep.grid.end())
        problems_.add(axis.values[0].value.place, "zip: " + axis.key->path, "the key stands in grid too; expected it in one of them");
    }
    std::set<std::string> names;
    for (const auto& variant : sweep.list)
      if (!names.insert(variant.name).second)
        problems_.add(variant.place, "list",
                      fmt::format("the name {} stands here a second time; expected each variant to have its own", variant.name));
    if (sweep.budget.place.empty()) return;
    const auto refuse = [&](const Setting& s) {
      if (s.key->path == "train.steps") problems_.add(s.value.place, "train.steps", "budget says how long every run is; expected one of the two");
    };
    std::ranges::for_each(sweep.set, refuse);
    for (const auto* axes : {&sweep.grid, &sweep.zip})
      for (const auto& axis : *axes) std::ranges::for_each(axis.values, refuse);
    for (const auto& variant : sweep.list) std::ranges::for_each(variant.set, refuse);
    for (const auto& o : sweep.overrides) std::ranges::for_each(o.set, refuse);
  }
};

}  // namespace

bool Condition::holds(const Config& config) const {
  return std::ranges::all_of(terms, [&](const Term& term) { return std::ranges::find(term.values, term.key->write(config)) != term.values.end(); });
}

SweepFile parse_sweep_file(const std::string& yaml, const std::string& file, const std::vector<std::string>& sets) {
  SweepReader reader(file);
  reader.read(parse_yaml(yaml, file, kSweep));
  reader.sets(sets);
  return reader.finish();
}

SweepFile read_sweep_file(const std::string& file, const std::vector<std::string>& sets) {
  if (valid_utf8_prefix(file) != file.size()) throw ConfigError(file + ": the file's name is not UTF-8, as what is written of it must be; rename it");
  return parse_sweep_file(read_yaml_file(file, kSweep), file, sets);
}

}  // namespace tessera
