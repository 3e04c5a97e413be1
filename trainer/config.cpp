// YAML text and --set to a checked Config, and back.

#include "trainer/config.h"

#include <fmt/core.h>

#include <regex>

#include "trainer/schema_values.h"
#include "trainer/yaml_text.h"

namespace tessera {

namespace {

using Json = nlohmann::ordered_json;
constexpr YamlKind kConfiguration{"configuration", "train: {steps: 1000} ({} alone for all defaults)"};

class Assembly {
 public:
  Config config;

  void load_text(const std::string& text, const std::string& origin) {
    const YAML::Node document = parse_yaml(text, origin, kConfiguration);
    walk({document, "", place_of(origin, document.Mark()), origin});
  }

  void set(const Value& value) { walk(value); }
  void set(const std::string& assignment) {
    if (const auto value = read_set(assignment, problems_)) walk(*value);
  }

  Config finish() {
    problems_.throw_if_any();
    resolve(config, places_, problems_);
    problems_.throw_if_any();
    return std::move(config);
  }

 private:
  Places places_;
  Problems problems_;

  void walk(const Value& value) {
    if (const Key* key = find_key(value.path)) {
      places_[key->path] = value.place;
      return key->read(config, value, problems_);
    }
    if (!value.node.IsMap()) return problems_.add(value.place, value.path, fmt::format("expected a map of keys, found {}", describe(value.node)));
    for (const auto& [name, child] : read_map(value, problems_)) {
      // A dot in a name would make "train.steps" a key of its own beside train: {steps}.
      if (name.find('.') == std::string::npos && (find_key(child.path) || is_section(child.path)))
        walk(child);
      else if (name == "<<")
        problems_.add(child.key_place, child.path, "merge keys are not supported; write the keys out");
      else if (name.find('.') != std::string::npos && find_key(child.path))
        problems_.add(child.key_place, child.path, "dots are for --set; expected a map in a map");
      else
        unknown_key(child, problems_);
    }
  }
};

Json tree_of(const Config& config) {
  Json root = Json::object();
  for (const Key& key : schema()) {
    Json* node = &root;
    std::size_t start = 0;
    for (std::size_t dot; (dot = key.path.find('.', start)) != std::string::npos; start = dot + 1)
      node = &(*node)[key.path.substr(start, dot - start)];
    (*node)[key.path.substr(start)] = key.write(config);
  }
  return root;
}

/// A scalar or flow collection that YAML reads back as it is. A JSON string is a YAML double-quoted one.
std::string flow(const Json& value) {
  std::string text;
  if (value.is_object()) {
    for (const auto& [name, child] : value.items()) text += fmt::format("{}{}: {}", text.empty() ? "" : ", ", flow(name), flow(child));
    return fmt::format("{{{}}}", text);
  }
  if (value.is_array()) {
    for (const auto& child : value) text += (text.empty() ? "" : ", ") + flow(child);
    return fmt::format("[{}]", text);
  }
  text = value.dump();
  if (value.is_string()) {
    // Unquoted where no YAML reader could take it for anything but this text.
    static const std::regex plain("[A-Za-z/][A-Za-z0-9_./-]*|[0-9]+|[0-9]+-[0-9]+");
    static const std::regex reserved("true|false|yes|no|on|off|null|y|n", std::regex::icase);
    const auto& s = value.get_ref<const std::string&>();
    return std::regex_match(s, plain) && !std::regex_match(s, reserved) ? s : text;
  }
  // YAML 1.1 readers want a point in a number with an exponent.
  const std::size_t e = text.find('e');
  if (value.is_number_float() && e != std::string::npos && text.find('.') == std::string::npos) text.insert(e, ".0");
  return text;
}

void write_section(const Json& tree, const std::string& path, int indent, std::string& out) {
  for (const auto& [name, child] : tree.items()) {
    const std::string child_path = path.empty() ? name : path + "." + name;
    out += fmt::format("{:{}}{}:", "", indent, name);
    if (find_key(child_path)) {
      out += fmt::format(" {}\n", flow(child));
    } else {
      out += '\n';
      write_section(child, child_path, indent + 2, out);
    }
  }
}

}  // namespace

namespace {

/// {mqar: {pairs: leaf}} of the path "mqar.pairs".
YAML::Node nested(const std::string& path, const YAML::Node& leaf) {
  const std::size_t dot = path.find('.');
  YAML::Node outer;
  outer[path.substr(0, dot)] = dot == std::string::npos ? leaf : nested(path.substr(dot + 1), leaf);
  return outer;
}

/// Adds for "data.synthetic.mqar.pairs: 2", which is a part of the key `whole`, that "data.synthetic={mqar: {pairs: 2}}" sets it, or why that is
/// wrong.
void part_of_key(const Value& part, const Key& whole, const std::string& path, Problems& problems) {
  const std::string rest = part.path.substr(whole.path.size() + 1);
  const auto fits = [&](const YAML::Node& node, Problems& wrong) {
    const std::size_t before = wrong.count();
    Config scratch;
    whole.read(scratch, {node, whole.path, part.place, part.origin}, wrong);
    return wrong.count() == before;
  };
  Problems ignored;
  const bool axis = part.node.IsSequence() && part.node.size() > 0 && !fits(nested(rest, part.node), ignored);  // of a sweep: values of a key
  const YAML::Node node = nested(rest, axis ? part.node[0] : part.node);
  if (!fits(node, problems)) return;
  YAML::Emitter text;
  text.SetMapFormat(YAML::Flow);
  text.SetSeqFormat(YAML::Flow);
  text << node;
  problems.add(
      part.key_place, path,
      fmt::format("no key of its own: \"{}={}\" sets it (quoted for a shell), and what is left out there has its default", whole.path, text.c_str()));
}

}  // namespace

void unknown_key(const Value& value, Problems& problems, const std::string& section) {
  const std::string path = section + (section.empty() ? "" : ": ") + value.path.substr(0, 200);
  if (value.path.size() <= 200)
    for (std::size_t dot = value.path.find('.'); dot != std::string::npos; dot = value.path.find('.', dot + 1))
      if (const Key* whole = find_key(value.path.substr(0, dot))) return part_of_key(value, *whole, path, problems);
  problems.add(value.key_place, path,
               fmt::format("unknown key; nearest valid key \"{}\" (tessera config --schema lists all)", nearest_key(value.path)));
}

std::optional<Value> read_set(const std::string& assignment, Problems& problems, const std::string& option) {
  const std::size_t equals = assignment.find('=');
  if (equals == std::string::npos || equals == 0) {
    problems.add(option + " " + assignment, "", "expected key=value, as --set train.steps=100");
    return {};
  }
  const std::string path = assignment.substr(0, equals), text = assignment.substr(equals + 1);
  check_yaml_text(text, option + " " + path, kConfiguration);
  const Key* key = find_key(path);
  const bool verbatim = text.empty() || (key && key->text && text[0] != '"' && text[0] != '\'');
  std::vector<YAML::Node> documents;
  try {
    if (verbatim)
      documents = {YAML::Node(text)};
    else
      documents = YAML::LoadAll(text);
  } catch (const YAML::Exception& e) {
    problems.add(option, path, fmt::format("the value is not YAML: {}", yaml_problem(e)));
    return {};
  }
  if (documents.size() != 1) {
    problems.add(option, path, fmt::format("expected one YAML value, found {}", documents.size()));
    return {};
  }
  Value value{documents[0], path, option, option};
  if (key || is_section(path)) return value;
  unknown_key(value, problems);
  return {};
}

Config load_variant(const std::string& file, const std::vector<Value>& values) {
  Assembly assembly;
  if (!file.empty()) assembly.load_text(read_yaml_file(file, kConfiguration), file);
  for (const Value& value : values) assembly.set(value);
  return assembly.finish();
}

Config load_config(const std::string& file, const std::vector<std::string>& sets) {
  Assembly assembly;
  if (!file.empty()) assembly.load_text(read_yaml_file(file, kConfiguration), file);
  for (const auto& s : sets) assembly.set(s);
  return assembly.finish();
}

Config parse_config(const std::string& yaml, const std::string& origin, const std::vector<std::string>& sets) {
  Assembly assembly;
  assembly.load_text(yaml, origin);
  for (const auto& s : sets) assembly.set(s);
  return assembly.finish();
}

Config parse_stored_config(const std::string& yaml, const std::string& origin) {
  Assembly assembly;
  assembly.config.model.attention.threshold.balance = 0;
  assembly.load_text(yaml, origin);
  return assembly.finish();
}

Config load_stored_config(const std::string& file) { return parse_stored_config(read_yaml_file(file, kConfiguration), file); }

std::string to_yaml(const Config& config) {
  std::string text;
  write_section(tree_of(config), "", 0, text);
  return text;
}

std::string to_json(const Config& config) { return tree_of(config).dump(2); }

std::string schema_json() {
  const Config defaults;
  Json keys = Json::array();
  for (const Key& key : schema())
    keys.push_back({{"path", key.path}, {"type", key.type}, {"default", key.write(defaults)}, {"range", key.range}, {"meaning", key.meaning}});
  return keys.dump(2);
}

std::string schema_text() {
  const Config defaults;
  std::string text;
  for (const Key& key : schema()) {
    text += fmt::format("{}  ({}, default {})\n", key.path, key.type, flow(key.write(defaults)));
    if (!key.range.empty()) text += fmt::format("    {}\n", key.range);
    text += fmt::format("    {}\n", key.meaning);
  }
  return text;
}

}  // namespace tessera
