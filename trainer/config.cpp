// YAML text and --set to a checked Config, and back.

#include "trainer/config.h"

#include <fmt/core.h>
#include <yaml-cpp/depthguard.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <regex>

#include "trainer/schema_values.h"

namespace tessera {

namespace {

using Json = nlohmann::ordered_json;
constexpr std::size_t kMostBytes = 1 << 20;  // a configuration takes a few thousand

std::string read_file(const std::string& file) {
  std::error_code error;
  const auto status = std::filesystem::status(file, error);
  if (!std::filesystem::exists(status)) throw ConfigError(fmt::format("{}: there is no such file; expected a YAML configuration", file));
  if (std::filesystem::is_directory(status)) throw ConfigError(fmt::format("{}: this is a folder; expected a YAML configuration", file));
  std::ifstream in(file, std::ios::binary);
  if (!in) throw ConfigError(fmt::format("{}: cannot be opened: {}", file, std::strerror(errno)));
  std::string text(kMostBytes + 1, '\0');
  in.read(text.data(), static_cast<std::streamsize>(text.size()));
  if (in.bad()) throw ConfigError(fmt::format("{}: cannot be read: {}", file, std::strerror(errno)));
  text.resize(static_cast<std::size_t>(in.gcount()));
  return text;
}

void check_text(const std::string& text, const std::string& origin) {
  if (text.size() > kMostBytes)
    throw ConfigError(
        fmt::format("{}: more than {} bytes; a configuration has a few thousand: is this the file that was meant?", origin, kMostBytes));
  const std::size_t bad = find_not_text(text);
  if (bad == std::string::npos) return;
  const std::size_t start = text.rfind('\n', bad) + 1;  // npos + 1 is 0
  const auto line = std::count(text.begin(), text.begin() + static_cast<std::ptrdiff_t>(bad), '\n') + 1;
  throw ConfigError(fmt::format("{}:{}:{}: byte 0x{:02x} is not text; expected a YAML configuration in UTF-8", origin, line, bad - start + 1,
                                static_cast<unsigned char>(text[bad])));
}

/// yaml-cpp's words, which for its limit on nesting are "bad file".
std::string why(const YAML::Exception& e) { return dynamic_cast<const YAML::DeepRecursion*>(&e) ? "lists and maps are nested too deeply" : e.msg; }

class Assembly {
 public:
  Config config;

  void load_text(const std::string& text, const std::string& origin) {
    const std::vector<YAML::Node> documents = load_yaml(text, origin);
    if (documents.empty() || (documents.size() == 1 && documents[0].IsNull()))
      throw ConfigError(
          fmt::format("{}: there is no configuration in it; expected keys like train: {{steps: 1000}} ({{}} alone for all defaults)", origin));
    if (documents.size() > 1)
      throw ConfigError(
          fmt::format("{}: expected one YAML document, found {} (separated by ---)", place_of(origin, documents[1].Mark()), documents.size()));
    walk({documents[0], "", place_of(origin, documents[0].Mark()), origin});
  }

  void set(const std::string& assignment) {
    const std::size_t equals = assignment.find('=');
    if (equals == std::string::npos || equals == 0) return problems_.add("--set " + assignment, "", "expected key=value, as --set train.steps=100");
    const std::string path = assignment.substr(0, equals), text = assignment.substr(equals + 1);
    check_text(text, "--set " + path);
    const Key* key = find_key(path);
    const bool verbatim = text.empty() || (key && key->text && text[0] != '"' && text[0] != '\'');
    std::vector<YAML::Node> documents;
    try {
      if (verbatim)
        documents = {YAML::Node(text)};
      else
        documents = YAML::LoadAll(text);
    } catch (const YAML::Exception& e) {
      return problems_.add("--set", path, fmt::format("the value is not YAML: {}", why(e)));
    }
    if (documents.size() != 1) return problems_.add("--set", path, fmt::format("expected one YAML value, found {}", documents.size()));
    const Value value{documents[0], path, "--set", "--set"};
    if (!key && !is_section(path)) return unknown(value);
    walk(value);
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

  void unknown(const Value& value) {
    problems_.add(value.key_place, value.path.substr(0, 200),
                  fmt::format("unknown key; nearest valid key \"{}\" (tessera config --schema lists all)", nearest_key(value.path)));
  }

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
        unknown(child);
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

std::vector<YAML::Node> load_yaml(const std::string& text, const std::string& origin) {
  check_text(text, origin);
  try {
    return YAML::LoadAll(text);
  } catch (const YAML::Exception& e) {
    throw ConfigError(fmt::format("{}: this is not YAML: {}", place_of(origin, e.mark), why(e)));
  }
}

Config load_config(const std::string& file, const std::vector<std::string>& sets) {
  Assembly assembly;
  if (!file.empty()) assembly.load_text(read_file(file), file);
  for (const auto& s : sets) assembly.set(s);
  return assembly.finish();
}

Config parse_config(const std::string& yaml, const std::string& origin, const std::vector<std::string>& sets) {
  Assembly assembly;
  assembly.load_text(yaml, origin);
  for (const auto& s : sets) assembly.set(s);
  return assembly.finish();
}

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
