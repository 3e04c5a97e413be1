#include "trainer/prompts.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <stdexcept>

#include "data/bpe_split.h"
#include "data/byte_source.h"
#include "data/json_file.h"

namespace tessera {
namespace {

std::string read_all(const std::string& file) {
  const auto source = open_source(file);
  std::string all;
  std::array<char, 1 << 16> buffer;
  for (std::size_t n; (n = source->read(buffer)) > 0;) all.append(buffer.data(), n);
  return all;
}

std::string prompt_of(const std::string& line, const std::string& key, const std::string& where) {
  const auto json = parse_json(line, where);
  if (!json.is_object()) throw std::invalid_argument(where + ": expected a JSON object on each line");
  const auto found = json.find(key);
  if (found == json.end()) {
    std::string keys;
    for (const auto& [name, value] : json.items()) keys += fmt::format("{}\"{}\"", keys.empty() ? "" : ", ", name);
    throw std::invalid_argument(
        fmt::format("{}: no key \"{}\" in this object; it has {} (choose one with --prompt-key)", where, key, keys.empty() ? "none" : keys));
  }
  if (!found->is_string()) throw std::invalid_argument(fmt::format("{}: \"{}\" is a {}, expected text", where, key, found->type_name()));
  return found->get<std::string>();
}

/// Bytes that a character beginning with `lead` has; 1 for what begins none.
std::size_t character_length(unsigned char lead) {
  if (lead >= 0xc2 && lead <= 0xdf) return 2;
  if (lead >= 0xe0 && lead <= 0xef) return 3;
  if (lead >= 0xf0 && lead <= 0xf4) return 4;
  return 1;
}

}  // namespace

void check_utf8(const std::string& where, std::string_view text) {
  const std::size_t valid = valid_utf8_prefix(text);
  if (valid < text.size())
    throw std::invalid_argument(
        fmt::format("{}: expected UTF-8 text, found byte 0x{:02x} at offset {}", where, static_cast<unsigned char>(text[valid]), valid));
}

std::vector<std::string> read_prompts(const std::string& file, const std::string& key) {
  const std::string name = file == "-" ? "standard input" : file, all = read_all(file);
  const bool json = !key.empty() || file.ends_with(".jsonl") || file.ends_with(".ndjson");
  std::vector<std::string> prompts;
  std::size_t number = 0;
  for (std::size_t at = 0; at < all.size();) {
    const std::size_t end = std::min(all.find('\n', at), all.size());
    std::string line = all.substr(at, end - at);
    at = end + 1;
    ++number;
    if (line.ends_with('\r')) line.pop_back();
    if (line.find_first_not_of(" \t") == std::string::npos) continue;
    const std::string where = fmt::format("{}:{}", name, number);
    check_utf8(where, line);
    prompts.push_back(json ? prompt_of(line, key.empty() ? "prompt" : key, where) : line);
  }
  if (prompts.empty()) throw std::invalid_argument(name + ": expected a prompt a line, found none");
  return prompts;
}

std::string CharacterStream::add(std::string_view bytes) {
  held_ += bytes;
  // The last character is incomplete when its first byte, among the last three, announces more bytes than there are, and the rest continue it.
  std::size_t whole = held_.size();
  for (std::size_t back = 1; back <= std::min<std::size_t>(3, held_.size()); ++back) {
    const auto byte = static_cast<unsigned char>(held_[held_.size() - back]);
    if ((byte & 0xc0) == 0x80) continue;
    if (character_length(byte) > back) whole -= back;
    break;
  }
  std::string out = held_.substr(0, whole);
  held_.erase(0, whole);
  return out;
}

std::string CharacterStream::finish() { return std::exchange(held_, {}); }

}  // namespace tessera
