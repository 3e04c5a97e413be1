#pragma once
// The keys of the configuration. schema.cpp holds the one table of them; reading, writing, --set and `tessera config --schema` walk it.

#include <yaml-cpp/yaml.h>

#include <functional>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "trainer/config.h"
#include "trainer/schema_nearest.h"

namespace tessera {

/// Collects what is wrong, so that one start shows every mistake.
class Problems {
 public:
  explicit Problems(std::string subject = "the configuration") : subject_(std::move(subject)) {}
  /// `place` is "file:line:column", the flag, or "" where a message has no single place.
  void add(const std::string& place, const std::string& path, const std::string& message);
  std::size_t count() const { return messages_.size(); }
  /// Throws ConfigError with all messages when there are any.
  void throw_if_any() const;

 private:
  std::string subject_;
  std::vector<std::string> messages_;
};

/// A YAML value under way into the configuration: where it stands and which key it is for.
struct Value {
  YAML::Node node;
  std::string path;               // "train.steps", "attention.pattern.any[1].window.size"
  std::string place;              // "file:line:column" or "--set"
  std::string origin;             // the file or flag alone: places of children are made from it
  std::string key_place = place;  // where its key stands, in a map

  Value child(const YAML::Node& node, const std::string& path) const;
};

struct Key {
  std::string path;
  std::string type;
  std::string range;  // "" where the type says it all
  std::string meaning;
  bool text = false;  // --set takes the value as it stands
  std::function<void(Config&, const Value&, Problems&)> read;
  std::function<nlohmann::ordered_json(const Config&)> write;
};

/// All keys, in the order in which they are printed.
const std::vector<Key>& schema();
/// The key of this path, or null.
const Key* find_key(const std::string& path);
/// Whether `path` is a section: a proper prefix of keys ("" is the whole).
bool is_section(const std::string& path);
/// The valid key or section most like `path`, for error messages.
std::string nearest_key(const std::string& path);

/// Adds that there is no such key, with the nearest one; or, for a part of a key whose value is a map (data.synthetic.mqar.pairs), how the whole is
/// set. `section`: of a sweep file, in which it stands.
void unknown_key(const Value& value, Problems& problems, const std::string& section = "");
/// "key=value" of --set, or of another option that stands for a key, as the value of a key or section; nothing, and a problem, when it is none.
std::optional<Value> read_set(const std::string& assignment, Problems& problems, const std::string& option = "--set");
/// As load_config() of config.h, with values of keys that stand in other files or options, in their order: a mistake is reported at the value's own
/// place.
Config load_variant(const std::string& file, const std::vector<Value>& values);

/// "file:line:column" of a node (columns and lines from 1), or `origin` alone where YAML knows no place.
std::string place_of(const std::string& origin, const YAML::Mark& mark);
/// What a value is, for "found ...": `the text "abc"`, `12`, "a list", "nothing".
std::string describe(const YAML::Node& node);
/// The entries of a map with plain keys, each once; mistakes are added to `problems` and left out.
std::vector<std::pair<std::string, Value>> read_map(const Value& value, Problems& problems);

/// attention.pattern (schema_pattern.cpp). `pattern` stays as it is when there are mistakes.
void read_pattern(PatternConfig& pattern, const Value& value, Problems& problems);
nlohmann::ordered_json write_pattern(const PatternConfig& pattern);
/// A block mask as the text of its file, and the SHA-256 of that text, by which a resolved configuration names it.
std::string text_of(const BlockMask& mask);
std::string hash_of(const BlockMask& mask);
/// Names of layers and heads in overrides that a model of this shape does not have are added to `problems`.
void check_pattern(const PatternConfig& pattern, int layers, int heads, const std::string& place, Problems& problems);

/// data.synthetic (schema_synthetic.cpp). `task` stays as it is when there are mistakes.
void read_synthetic(std::optional<SyntheticTask>& task, const Value& value, Problems& problems);
nlohmann::ordered_json write_synthetic(const std::optional<SyntheticTask>& task);

/// Where each key that was set explicitly was set last.
using Places = std::map<std::string, std::string>;
/// Sets what follows from other keys and checks what no single key can (config_check.cpp).
void resolve(Config& config, const Places& places, Problems& problems);

}  // namespace tessera
