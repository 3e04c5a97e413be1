#pragma once
// Files of YAML that people write: read whole, checked to be text, one document.

#include <yaml-cpp/yaml.h>

#include <string>

namespace tessera {

/// What a file should hold, for the messages: "configuration", and keys that it might have.
struct YamlKind {
  const char* name;
  const char* example;
};

/// The bytes of a file, at most a little more than parse_yaml() takes. Throws ConfigError naming the file when it is not there or cannot be read.
std::string read_yaml_file(const std::string& file, const YamlKind& kind);
/// Throws ConfigError with "origin:line:column" when `text` is no UTF-8 text, or larger than such a file ever is.
void check_yaml_text(const std::string& text, const std::string& origin, const YamlKind& kind);
/// The one document in `text`, which came out of `origin`. Throws ConfigError when it is no YAML, empty, or several documents.
YAML::Node parse_yaml(const std::string& text, const std::string& origin, const YamlKind& kind);
/// yaml-cpp's words, which for its limit on nesting are "bad file".
std::string yaml_problem(const YAML::Exception& e);

}  // namespace tessera
