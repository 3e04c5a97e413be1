#include "trainer/yaml_text.h"

#include <fmt/core.h>
#include <yaml-cpp/depthguard.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>

#include "trainer/schema_values.h"

namespace tessera {

namespace {
constexpr std::size_t kMostBytes = 1 << 20;  // such a file has a few thousand
}

std::string read_yaml_file(const std::string& file, const YamlKind& kind) {
  std::error_code error;
  const auto status = std::filesystem::status(file, error);
  if (!std::filesystem::exists(status)) throw ConfigError(fmt::format("{}: there is no such file; expected a YAML {}", file, kind.name));
  if (std::filesystem::is_directory(status)) throw ConfigError(fmt::format("{}: this is a folder; expected a YAML {}", file, kind.name));
  std::ifstream in(file, std::ios::binary);
  if (!in) throw ConfigError(fmt::format("{}: cannot be opened: {}", file, std::strerror(errno)));
  std::string text(kMostBytes + 1, '\0');
  in.read(text.data(), static_cast<std::streamsize>(text.size()));
  if (in.bad()) throw ConfigError(fmt::format("{}: cannot be read: {}", file, std::strerror(errno)));
  text.resize(static_cast<std::size_t>(in.gcount()));
  return text;
}

void check_yaml_text(const std::string& text, const std::string& origin, const YamlKind& kind) {
  if (text.size() > kMostBytes)
    throw ConfigError(
        fmt::format("{}: more than {} bytes; a {} has a few thousand: is this the file that was meant?", origin, kMostBytes, kind.name));
  const std::size_t bad = find_not_text(text);
  if (bad == std::string::npos) return;
  const std::size_t start = text.rfind('\n', bad) + 1;  // npos + 1 is 0
  const auto line = std::count(text.begin(), text.begin() + static_cast<std::ptrdiff_t>(bad), '\n') + 1;
  throw ConfigError(fmt::format("{}:{}:{}: byte 0x{:02x} is not text; expected a YAML {} in UTF-8", origin, line, bad - start + 1,
                                static_cast<unsigned char>(text[bad]), kind.name));
}

YAML::Node parse_yaml(const std::string& text, const std::string& origin, const YamlKind& kind) {
  check_yaml_text(text, origin, kind);
  std::vector<YAML::Node> documents;
  try {
    documents = YAML::LoadAll(text);
  } catch (const YAML::Exception& e) {
    throw ConfigError(fmt::format("{}: this is not YAML: {}", place_of(origin, e.mark), yaml_problem(e)));
  }
  if (documents.empty() || (documents.size() == 1 && documents[0].IsNull()))
    throw ConfigError(fmt::format("{}: there is no {} in it; expected keys like {}", origin, kind.name, kind.example));
  if (documents.size() > 1)
    throw ConfigError(
        fmt::format("{}: expected one YAML document, found {} (separated by ---)", place_of(origin, documents[1].Mark()), documents.size()));
  return documents[0];
}

std::string yaml_problem(const YAML::Exception& e) {
  return dynamic_cast<const YAML::DeepRecursion*>(&e) ? "lists and maps are nested too deeply" : e.msg;
}

}  // namespace tessera
