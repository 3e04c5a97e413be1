// attention.pattern: YAML to PatternConfig and back.

#include <algorithm>
#include <functional>
#include <limits>
#include <optional>

#include "data/sha256.h"
#include "trainer/schema.h"
#include "trainer/schema_values.h"

namespace tessera {

namespace {

using Json = nlohmann::ordered_json;
using Kind = PatternSpec::Kind;

const int kAll = PatternConfig::Override{}.layer_last;  // "every layer (head)" of an override
constexpr int kMostDepth = 16;
constexpr int kMostPatterns = 4096;  // over the whole value: aliases can make a short text mean very many

struct Parameter {
  const char* name;
  std::int64_t PatternSpec::*member;
  std::int64_t low;
  bool required;
};
struct Form {
  const char* name;
  Kind kind;
  std::vector<Parameter> parameters;
};

constexpr std::int64_t kMostTokens = std::int64_t{1} << 31;

const std::vector<Form>& numeric_forms() {
  static const std::vector<Form> forms = {
      {"window", Kind::window, {{"size", &PatternSpec::size, 1, true}}},
      {"strided", Kind::strided, {{"stride", &PatternSpec::size, 1, true}, {"width", &PatternSpec::width, 1, true}}},
      {"dilated", Kind::dilated, {{"window", &PatternSpec::size, 1, true}, {"dilation", &PatternSpec::width, 1, true}}},
      {"global", Kind::global, {{"tokens", &PatternSpec::size, 1, true}}},
      {"bigbird",
       Kind::bigbird,
       {{"window", &PatternSpec::size, 1, true},
        {"global", &PatternSpec::width, 0, true},
        {"random", &PatternSpec::random, 0, true},
        {"block", &PatternSpec::block, 1, false}}},
  };
  return forms;
}

const Form* find_form(const std::string& name) {
  for (const Form& form : numeric_forms())
    if (name == form.name) return &form;
  return nullptr;
}

const std::vector<std::string> kKinds = {"causal", "window", "strided", "dilated", "global", "bigbird", "blocks", "any", "all"};

class PatternReader {
 public:
  explicit PatternReader(Problems& problems) : problems_(problems) {}

  std::optional<PatternConfig> config(const Value& value) {
    PatternConfig result;
    if (!is_override(value.node, true)) {
      auto base = spec(value, 0);
      if (!base) return {};
      result.base = std::move(*base);
      return result;
    }
    // From the general to the particular: the last override that covers a layer and head wins.
    std::optional<Value> layers, heads;  // emplaced: assigning a YAML::Node would change the document
    for (auto& [name, child] : read_map(value, problems_)) {
      if (name == "default") {
        if (auto base = spec(child, 0)) result.base = std::move(*base);
      } else if (name == "per_layer") {
        layers.emplace(child);
      } else if (name == "per_head") {
        heads.emplace(child);
      } else {
        unknown(child, name, {"default", "per_layer", "per_head"});
      }
    }
    std::vector<PatternConfig::Override> particular;
    if (layers) each_range(*layers, "layer", [&](int first, int last, const Value& child) { layer(result, particular, first, last, child); });
    if (heads) each_range(*heads, "head", [&](int first, int last, const Value& child) { head(result.overrides, 0, kAll, first, last, child); });
    result.overrides.insert(result.overrides.end(), particular.begin(), particular.end());
    return result;
  }

 private:
  Problems& problems_;
  int count_ = 0;

  void fail(const Value& value, const std::string& message) { problems_.add(value.place, value.path, message); }
  void unknown(const Value& child, const std::string& name, const std::vector<std::string>& names) {
    problems_.add(child.key_place, child.path, fmt::format("unknown key; nearest valid key \"{}\"", nearest(name, names)));
  }

  /// {default, per_layer, per_head}, as opposed to a pattern: one of these names stands in it.
  static bool is_override(const YAML::Node& node, bool layers) {
    if (!node.IsMap()) return false;
    for (const auto& entry : node) {
      if (!entry.first.IsScalar()) continue;
      const std::string& name = entry.first.Scalar();
      if (name == "default" || name == "per_head" || (layers && name == "per_layer")) return true;
    }
    return false;
  }

  void layer(PatternConfig& result, std::vector<PatternConfig::Override>& particular, int first, int last, const Value& value) {
    if (!is_override(value.node, false)) {
      if (auto pattern = spec(value, 0)) result.overrides.push_back({first, last, 0, kAll, std::move(*pattern)});
      return;
    }
    for (auto& [name, child] : read_map(value, problems_)) {
      if (name == "default") {
        if (auto pattern = spec(child, 0)) result.overrides.push_back({first, last, 0, kAll, std::move(*pattern)});
      } else if (name == "per_head") {
        each_range(child, "head", [&](int h0, int h1, const Value& v) { head(particular, first, last, h0, h1, v); });
      } else {
        unknown(child, name, {"default", "per_head"});
      }
    }
  }

  void head(std::vector<PatternConfig::Override>& to, int layer_first, int layer_last, int first, int last, const Value& value) {
    if (auto pattern = spec(value, 0)) to.push_back({layer_first, layer_last, first, last, std::move(*pattern)});
  }

  /// Calls `use` for each range of keys like 3, "4-7" and "0,2,4-7". Ranges of one map may not overlap.
  void each_range(const Value& value, const char* what, const std::function<void(int, int, const Value&)>& use) {
    if (!value.node.IsMap())
      return fail(value, fmt::format("expected a map from {}s to patterns, as {{0: causal, \"1-3\": {{window: {{size: 256}}}}}}, found {}", what,
                                     describe(value.node)));
    std::vector<std::pair<int, int>> seen;
    for (auto& [name, child] : read_map(value, problems_)) {
      std::vector<std::pair<int, int>> ranges;
      if (!parse_ranges(name, ranges)) {
        fail(child, fmt::format("expected a {0} or a range of {0}s, as 3, \"4-7\" or \"0,2,4-7\", found \"{1}\"", what, name));
        continue;
      }
      for (const auto& [first, last] : ranges) {
        const auto clash = std::find_if(seen.begin(), seen.end(), [&, f = first, l = last](const auto& s) { return f <= s.second && l >= s.first; });
        if (clash != seen.end()) {
          fail(child, fmt::format("{} {} already has a pattern in this map", what, std::max(first, clash->first)));
          continue;
        }
        seen.emplace_back(first, last);
        use(first, last, child);
      }
    }
  }

  static bool parse_ranges(const std::string& text, std::vector<std::pair<int, int>>& ranges) {
    const char* p = text.data();
    const char* const end = p + text.size();
    const auto index = [&](int& v) {
      const auto [next, error] = std::from_chars(p, end, v);
      const bool good = error == std::errc() && *p != '-' && v < kAll;
      p = next;
      return good;
    };
    for (;;) {
      int first = 0, last = 0;
      if (p == end || !index(first)) return false;
      last = first;
      if (p != end && *p == '-') {
        ++p;
        if (p == end || !index(last) || last < first) return false;
      }
      ranges.emplace_back(first, last);
      if (p == end) return true;
      if (*p++ != ',') return false;
    }
  }

  std::optional<PatternSpec> spec(const Value& value, int depth) {
    if (depth > kMostDepth || ++count_ > kMostPatterns) {
      if (count_ <= kMostPatterns + 1) fail(value, fmt::format("patterns nest at most {} deep and are at most {}", kMostDepth, kMostPatterns));
      count_ = kMostPatterns + 1;
      return {};
    }
    if (value.node.IsScalar()) return named(value);
    if (!value.node.IsMap()) {
      fail(value, fmt::format("expected a pattern: causal, or a map like {{window: {{size: 256}}}}, found {}", describe(value.node)));
      return {};
    }
    auto entries = read_map(value, problems_);
    if (entries.size() != 1 || value.node.size() != 1) {
      if (value.node.size() != 1)
        fail(value, fmt::format("expected one pattern, found a map of {}; any: [...] is the union and all: [...] the intersection of several",
                                value.node.size()));
      return {};
    }
    auto& [name, inner] = entries.front();
    if (name == "any" || name == "all") return combination(name == "any" ? Kind::any : Kind::all, inner, depth);
    if (name == "blocks") return blocks(inner);
    if (const Form* form = find_form(name)) return numeric(*form, inner);
    if (name == "causal")
      fail(inner, "causal has no parameters: write attention.pattern: causal");
    else
      unknown(inner, name, kKinds);
    return {};
  }

  std::optional<PatternSpec> named(const Value& value) {
    const auto text = read_scalar(value, "a pattern", problems_);
    if (!text) return {};
    if (*text == "causal") return PatternSpec{};
    if (const Form* form = find_form(*text))
      fail(value, fmt::format("{0} needs its parameters: {{{0}: {{{1}}}}}", *text, parameter_names(*form)));
    else
      fail(value, fmt::format("expected a pattern: causal, or a map like {{window: {{size: 256}}}}, found {}; nearest is \"{}\"",
                              describe(value.node), nearest(*text, kKinds)));
    return {};
  }

  static std::string parameter_names(const Form& form) {
    std::string names;
    for (const auto& p : form.parameters) names += fmt::format("{}{}: N", names.empty() ? "" : ", ", p.name);
    return names;
  }

  std::optional<PatternSpec> numeric(const Form& form, const Value& value) {
    if (!value.node.IsMap()) {
      fail(value, fmt::format("expected {{{}}}, found {}", parameter_names(form), describe(value.node)));
      return {};
    }
    PatternSpec result;
    result.kind = form.kind;
    std::vector<std::string> names, found;
    for (const auto& p : form.parameters) names.push_back(p.name);
    if (form.kind == Kind::bigbird) names.push_back("seed");
    bool good = true;
    for (auto& [name, child] : read_map(value, problems_)) {
      found.push_back(name);
      const auto p = std::find_if(form.parameters.begin(), form.parameters.end(), [&, n = name](const auto& q) { return n == q.name; });
      if (p != form.parameters.end()) {
        const auto v = read_integer<std::int64_t>(child, {p->low, kMostTokens}, problems_);
        if (v) result.*(p->member) = *v;
        good = good && v;
      } else if (name == "seed" && form.kind == Kind::bigbird) {
        const auto v = read_integer<std::uint64_t>(child, {0, std::numeric_limits<std::uint64_t>::max()}, problems_);
        if (v) result.seed = *v;
        good = good && v;
      } else {
        unknown(child, name, names);
        good = false;
      }
    }
    for (const auto& p : form.parameters)
      if (p.required && std::find(found.begin(), found.end(), p.name) == found.end()) {
        fail(value, fmt::format("{} is missing: {}: {{{}}}", p.name, form.name, parameter_names(form)));
        good = false;
      }
    if (good && form.kind == Kind::strided && result.width > result.size) {
      fail(value,
           fmt::format("strided.width {} is more than strided.stride {}: that is every key; expected width <= stride", result.width, result.size));
      good = false;
    }
    return good ? std::optional(result) : std::nullopt;
  }

  std::optional<PatternSpec> blocks(const Value& value) {
    if (!value.node.IsMap()) {
      fail(value, fmt::format("expected {{file: PATH}}, found {}", describe(value.node)));
      return {};
    }
    PatternSpec result;
    result.kind = Kind::blocks;
    bool good = true;
    std::optional<std::pair<std::string, Value>> wanted;
    for (auto& [name, child] : read_map(value, problems_)) {
      if (name == "sha256") {
        const auto hash = read_text(child, false, problems_);
        if (!hash) return {};
        wanted.emplace(*hash, child);
        continue;
      }
      if (name != "file") {
        unknown(child, name, {"file", "sha256"});
        good = false;
        continue;
      }
      const auto file = read_text(child, false, problems_);
      if (!file) return {};
      result.file = *file;
      try {
        result.mask = read_block_mask(*file);
      } catch (const std::invalid_argument& e) {
        fail(child, e.what());
        good = false;
      }
    }
    if (good && !result.mask) {
      fail(value, "file is missing: blocks: {file: PATH}");
      good = false;
    }
    if (good && wanted && wanted->first != hash_of(*result.mask)) {
      fail(wanted->second,
           fmt::format("the mask in {} is another one than when this was written: its SHA-256 is {}, expected {}. Put that mask back; "
                       "for a new run leave the key sha256 out",
                       result.file, hash_of(*result.mask), wanted->first));
      good = false;
    }
    return good ? std::optional(result) : std::nullopt;
  }

  std::optional<PatternSpec> combination(Kind kind, const Value& value, int depth) {
    const char* name = kind == Kind::any ? "any" : "all";
    if (!value.node.IsSequence() || value.node.size() == 0) {
      fail(value, fmt::format("expected a list of patterns, as {}: [{{window: {{size: 256}}}}, {{global: {{tokens: 4}}}}], found {}", name,
                              describe(value.node)));
      return {};
    }
    refuse_tag(value, "seq", problems_);
    PatternSpec result;
    result.kind = kind;
    bool good = true;
    std::size_t i = 0;
    for (const YAML::Node& node : value.node) {
      auto child = spec(value.child(node, fmt::format("{}[{}]", value.path, i++)), depth + 1);
      good = good && child;
      if (child) result.children.push_back(std::move(*child));
    }
    return good ? std::optional(result) : std::nullopt;
  }
};

Json write_spec(const PatternSpec& p) {
  switch (p.kind) {
    case Kind::causal: return "causal";
    case Kind::blocks: return {{"blocks", {{"file", p.file}, {"sha256", hash_of(*p.mask)}}}};
    case Kind::any:
    case Kind::all: {
      Json children = Json::array();
      for (const auto& child : p.children) children.push_back(write_spec(child));
      return {{p.kind == Kind::any ? "any" : "all", children}};
    }
    default: break;
  }
  for (const Form& form : numeric_forms())
    if (form.kind == p.kind) {
      Json parameters = Json::object();
      for (const auto& q : form.parameters) parameters[q.name] = p.*(q.member);
      if (p.kind == Kind::bigbird) parameters["seed"] = p.seed;
      return {{form.name, parameters}};
    }
  throw std::logic_error("a pattern of unknown kind");
}

std::string range_name(int first, int last) { return first == last ? std::to_string(first) : fmt::format("{}-{}", first, last); }

}  // namespace

/// Its file but for empty lines and the kind of line ends.
std::string text_of(const BlockMask& mask) {
  std::string text = fmt::format("block {}\n", mask.block);
  for (std::size_t i = 0; i < mask.visible.size(); ++i) {
    text += mask.visible[i] ? '1' : '0';
    if ((i + 1) % static_cast<std::size_t>(mask.rows) == 0) text += '\n';
  }
  return text;
}

std::string hash_of(const BlockMask& mask) { return sha256_hex(text_of(mask)); }

void read_pattern(PatternConfig& pattern, const Value& value, Problems& problems) {
  const std::size_t before = problems.count();
  auto result = PatternReader(problems).config(value);
  if (result && problems.count() == before) pattern = std::move(*result);
}

Json write_pattern(const PatternConfig& pattern) {
  Json base = write_spec(pattern.base);
  if (pattern.overrides.empty()) return base;
  Json per_layer = Json::object(), per_head = Json::object(), inner = Json::object();
  for (const auto& o : pattern.overrides) {
    const std::string layers = range_name(o.layer_first, o.layer_last), heads = range_name(o.head_first, o.head_last);
    if (o.head_last == kAll)
      per_layer[layers] = write_spec(o.pattern);
    else if (o.layer_last == kAll)
      per_head[heads] = write_spec(o.pattern);
    else
      inner[layers][heads] = write_spec(o.pattern);
  }
  for (const auto& [layers, heads] : inner.items()) {
    Json both = Json::object();
    if (per_layer.contains(layers)) both["default"] = per_layer[layers];
    both["per_head"] = heads;
    per_layer[layers] = both;
  }
  Json result = {{"default", base}};
  if (!per_layer.empty()) result["per_layer"] = per_layer;
  if (!per_head.empty()) result["per_head"] = per_head;
  return result;
}

void check_pattern(const PatternConfig& pattern, int layers, int heads, const std::string& place, Problems& problems) {
  const auto check = [&](int last, int count, const char* what) {
    if (last != kAll && last >= count)
      problems.add(place, "attention.pattern",
                   fmt::format("there is no {} {}: model.{}s is {}, so they are 0 to {}", what, last, what, count, count - 1));
  };
  for (const auto& o : pattern.overrides) {
    check(o.layer_last, layers, "layer");
    check(o.head_last, heads, "head");
  }
}

}  // namespace tessera
