#include "trainer/sweep/sweep_variants.h"

#include <fmt/core.h>

#include <algorithm>
#include <map>
#include <set>

#include "data/sha256.h"

namespace tessera {

namespace {

using Json = nlohmann::ordered_json;

constexpr const char* kBase = "base";  // the variant that differs in nothing
constexpr std::size_t kMostRuns = 10'000;
constexpr std::size_t kMostValue = 40, kMostName = 120, kHash = 6;

/// `text` cut to leave room for a hash of `whole`.
std::string hashed(const std::string& text, const std::string& whole, std::size_t most) {
  return text.substr(0, most - kHash - 1) + "-" + sha256_hex(whole).substr(0, kHash);
}

/// The characters of `text` that names may have; `loses` becomes true where there are others.
std::string plain(const std::string& text, bool& loses) {
  std::string out;
  for (const char c : text) {
    const bool good = (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '.' || c == '_' || c == '-';
    loses = loses || !good;
    if (good)
      out += c;
    else if (!out.empty() && out.back() != '_')
      out += '_';
  }
  return out;
}

bool is_scalar(const Json& value) { return !value.is_structured(); }

/// "window-64", "any-window-64+global-4", "0.9+0.95": form and parameters of a pattern, items of a list.
std::string shape(const Json& value, bool in_list, bool& loses) {
  if (value.is_string()) return plain(value.get_ref<const std::string&>(), loses);
  if (is_scalar(value)) return plain(value.dump(), loses);
  std::string out;
  if (value.is_array()) {
    loses = loses || in_list || value.empty();
    for (const Json& item : value) out += fmt::format("{}{}", out.empty() ? "" : "+", shape(item, true, loses));
  } else if (std::ranges::all_of(value, is_scalar)) {  // parameters: each form has its own, always all of them, in one order
    for (const Json& item : value) out += fmt::format("{}{}", out.empty() ? "" : "-", shape(item, in_list, loses));
  } else {
    loses = loses || value.size() != 1;
    for (const auto& [name, item] : value.items())
      out += fmt::format("{}{}-{}", out.empty() ? "" : "_", plain(name, loses), shape(item, in_list, loses));
  }
  return out;
}

class Expansion {
 public:
  explicit Expansion(SweepFile file) : problems_(file.file) {
    sweep_.file = std::move(file);
    for (const Setting& s : sweep_.file.set) common_.push_back(s.value);
    try {
      sweep_.base = load_variant(sweep_.file.base, common_);
    } catch (const ConfigError& e) {
      throw ConfigError(fmt::format("{}: base: {}", sweep_.file.base_place, e.what()));
    }
  }

  Sweep run() {
    const SweepFile& f = sweep_.file;
    check_resources();
    if (!f.grid.empty() || !f.zip.empty()) combinations();
    for (const auto& named : f.list) variant(named.name, named.place, pointers(named.set));
    if (f.grid.empty() && f.zip.empty() && f.list.empty()) variant("", f.file, {});
    problems_.throw_if_any();
    if (variants_.empty())
      throw ConfigError(
          fmt::format("{}: skip_if leaves out all of {} variants; expected it to leave one", f.skip_if[0].place, sweep_.skipped.size()));
    for (std::size_t i = 0; i < f.skip_if.size(); ++i)
      if (!met_.contains(&f.skip_if[i])) sweep_.notices.push_back(fmt::format("{}: skip_if[{}] meets no variant", f.skip_if[i].place, i));
    for (std::size_t i = 0; i < f.overrides.size(); ++i)
      if (!met_.contains(&f.overrides[i].condition))
        sweep_.notices.push_back(fmt::format("{}: overrides[{}] meets no variant", f.overrides[i].condition.place, i));
    seeds();
    return std::move(sweep_);
  }

 private:
  Problems problems_;
  Sweep sweep_;
  std::vector<Value> common_;  // of `set`
  std::vector<SweepRun> variants_;
  std::map<std::string, std::string> names_;    // of variants, with their places
  std::map<std::string, std::string> configs_;  // resolved, without run.dir, with the first variant's name
  std::map<const Condition*, bool> met_;

  using Settings = std::vector<const Setting*>;

  static Settings pointers(const std::vector<Setting>& settings) {
    Settings out;
    for (const Setting& s : settings) out.push_back(&s);
    return out;
  }

  void check_resources() {
    const auto& r = sweep_.file.resources;
    if (r.gpus > 0 && sweep_.base.device != "cuda") problems_.add(r.place, "resources", fmt::format("gpus {} with device cpu: leave it out", r.gpus));
    if (r.gpus > 0 && r.gpus < r.ranks && !sweep_.base.parallel.share_gpu)
      problems_.add(r.place, "resources", fmt::format("{} ranks on {} GPUs need parallel.share_gpu: true", r.ranks, r.gpus));
  }

  /// Every row of zip with every combination of the grid, whose last axis moves fastest.
  void combinations() {
    const SweepFile& f = sweep_.file;
    std::size_t rows = f.zip.empty() ? 1 : f.zip[0].values.size(), total = rows;
    for (const auto& axis : f.grid) {
      total *= axis.values.size();
      if (total > kMostRuns) return problems_.add(f.file, "", fmt::format("grid and zip make more than {} variants; expected fewer", kMostRuns));
    }
    for (std::size_t i = 0; i < total; ++i) {
      Settings settings(f.grid.size());
      std::size_t rest = i;
      for (std::size_t a = f.grid.size(); a-- > 0; rest /= f.grid[a].values.size()) settings[a] = &f.grid[a].values[rest % f.grid[a].values.size()];
      for (const auto& axis : f.zip) settings.push_back(&axis.values[rest]);
      variant("", settings.empty() ? f.file : settings.back()->value.place, settings);
    }
  }

  void variant(std::string name, const std::string& place, const Settings& settings) {
    SweepRun run;
    for (const Setting* s : settings)
      if (s->written != s->key->write(sweep_.base)) run.differs.emplace_back(s->key->path, s->written);
    if (name.empty()) name = name_of(run.differs);
    const auto [same, fresh] = names_.emplace(name, place);
    if (!fresh)
      return problems_.add(place, "",
                           fmt::format("the variant {} is there already ({}); expected each once: leave a value or a name out", name, same->second));
    run.variant = name;
    run.values = common_;

    // As set so far, before what follows from it.
    Config as_set = sweep_.base;
    Problems none;
    const auto apply = [&](const Setting& s) {
      s.key->read(as_set, s.value, none);
      run.values.push_back(s.value);
    };
    for (const Setting* s : settings) apply(*s);
    for (const auto& o : sweep_.file.overrides)
      if (meets(o.condition, as_set))
        for (const Setting& s : o.set) {
          apply(s);
          std::erase_if(run.differs, [&](const auto& d) { return d.first == s.key->path; });
          if (s.written != s.key->write(sweep_.base)) run.differs.emplace_back(s.key->path, s.written);
        }
    if (skipped(as_set)) return sweep_.skipped.push_back(name);
    const auto& budget = sweep_.file.budget;
    const std::int64_t per_step = as_set.train.tokens_per_step;
    if (const std::int64_t steps = budget.steps > 0 ? budget.steps : (budget.tokens + per_step - 1) / per_step; steps > 0)
      run.values.push_back(value_of("train.steps", std::to_string(steps), budget.place));
    try {
      run.config = load_variant(sweep_.file.base, run.values);
    } catch (const ConfigError& e) {
      return problems_.add("variant " + name, "", e.what());
    }
    if (skipped(run.config)) return sweep_.skipped.push_back(name);
    const auto [twin, first] = configs_.emplace(to_yaml(run.config), name);
    if (!first) return sweep_.notices.push_back(fmt::format("{} is the same run as {}, and left out", name, twin->second));
    sweep_.variants.push_back(name);
    variants_.push_back(std::move(run));
    if (variants_.size() * std::max<std::size_t>(1, sweep_.file.seeds.size()) > kMostRuns)
      throw ConfigError(fmt::format("{}: more than {} runs; expected fewer", sweep_.file.file, kMostRuns));
  }

  bool meets(const Condition& condition, const Config& config) {
    const bool holds = condition.holds(config);
    if (holds) met_[&condition] = true;
    return holds;
  }
  bool skipped(const Config& config) {
    bool any = false;
    for (const Condition& c : sweep_.file.skip_if) any = meets(c, config) || any;
    return any;
  }

  static std::string name_of(const std::vector<std::pair<std::string, Json>>& differs) {
    std::string name;
    for (const auto& [key, value] : differs) name += fmt::format("{}{}={}", name.empty() ? "" : ",", short_key(key), short_value(value));
    if (name.empty()) return kBase;
    return name.size() > kMostName ? hashed(name, name, kMostName) : name;
  }

  static Value value_of(const std::string& key, const std::string& text, const std::string& place) { return {YAML::Node(text), key, place, place}; }

  void seeds() {
    std::vector<std::uint64_t> all = sweep_.file.seeds;
    if (all.empty()) all = {sweep_.base.run.seed};
    std::set<std::string> names;
    for (const std::uint64_t seed : all)
      for (const SweepRun& v : variants_) {
        SweepRun run = v;
        run.name = seed == sweep_.base.run.seed ? v.variant : fmt::format("{},seed={}", v.variant, seed);
        run.values.push_back(value_of("run.seed", std::to_string(seed), sweep_.file.file));
        run.values.push_back(value_of("run.dir", sweep_.file.dir + "/" + run.name, sweep_.file.file));
        run.config.run.seed = seed;
        run.config.run.dir = sweep_.file.dir + "/" + run.name;
        if (!names.insert(run.name).second)
          throw ConfigError(fmt::format("{}: two runs are called {}; expected another name in list", sweep_.file.file, run.name));
        sweep_.runs.push_back(std::move(run));
      }
  }
};

}  // namespace

std::string short_key(const std::string& path) {
  const auto tail = [](const std::string& p, int parts) {
    std::size_t at = p.size();
    for (; parts > 0 && at != std::string::npos; --parts) at = at == 0 ? std::string::npos : p.rfind('.', at - 1);
    return at == std::string::npos ? p : p.substr(at + 1);
  };
  for (int parts = 1;; ++parts) {
    const std::string name = tail(path, parts);
    if (name == path || std::ranges::count_if(schema(), [&](const Key& key) { return tail(key.path, parts) == name; }) == 1) return name;
  }
}

std::string short_value(const Json& value) {
  bool loses = false;
  const std::string text = shape(value, false, loses);
  return loses || text.empty() || text.size() > kMostValue ? hashed(text, value.dump(), kMostValue) : text;
}

Sweep expand_sweep(SweepFile file) { return Expansion(std::move(file)).run(); }

std::string setting_text(const std::string& key, const Json& value) {
  return key + ": " + (value.is_string() ? value.get<std::string>() : value.dump());
}

std::string base_note(const Sweep& sweep) {
  if (std::ranges::find(sweep.variants, kBase) == sweep.variants.end()) return "";
  std::string text;
  for (const auto* axes : {&sweep.file.grid, &sweep.file.zip})
    for (const SweepFile::Axis& axis : *axes)
      text += fmt::format("{} {}", text.empty() ? " is" : ",", setting_text(axis.key->path, axis.key->write(sweep.base)));
  return text.empty() ? "" : kBase + text;
}

SweepRun with_steps(const Sweep& sweep, const SweepRun& run, std::int64_t steps) {
  SweepRun out = run;
  out.values.push_back({YAML::Node(std::to_string(steps)), "train.steps", sweep.file.budget.place, sweep.file.budget.place});
  out.config = load_variant(sweep.file.base, out.values);
  return out;
}

}  // namespace tessera
