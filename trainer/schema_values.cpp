#include "trainer/schema_values.h"

#include <algorithm>
#include <cmath>
#include <set>

namespace tessera {

namespace {

constexpr std::size_t kMostMessages = 20;

std::string shortened(const std::string& text) {
  constexpr std::size_t kMost = 60;
  std::string shown;
  for (const char c : text.substr(0, kMost)) shown += static_cast<unsigned char>(c) < 0x20 ? ' ' : c;
  return text.size() > kMost ? shown + "..." : shown;
}

/// Length of the UTF-8 character at text[i] (RFC 3629), 0 when it is none.
std::size_t utf8_length(const std::string& text, std::size_t i) {
  const auto byte = [&](std::size_t k) { return i + k < text.size() ? static_cast<unsigned char>(text[i + k]) : 0u; };
  const auto follows = [&](std::size_t k) { return (byte(k) & 0xC0u) == 0x80u; };
  const unsigned a = byte(0), b = byte(1);
  if (a < 0x80) return 1;
  if (a >= 0xC2 && a < 0xE0) return follows(1) ? 2 : 0;
  if (a >= 0xE0 && a < 0xF0) return follows(1) && follows(2) && !(a == 0xE0 && b < 0xA0) && !(a == 0xED && b >= 0xA0) ? 3 : 0;
  if (a >= 0xF0 && a < 0xF5) return follows(1) && follows(2) && follows(3) && !(a == 0xF0 && b < 0x90) && !(a == 0xF4 && b >= 0x90) ? 4 : 0;
  return 0;
}

}  // namespace

std::size_t find_not_text(const std::string& text) {
  for (std::size_t i = 0; i < text.size();) {
    const auto c = static_cast<unsigned char>(text[i]);
    const std::size_t length = utf8_length(text, i);
    if (length == 0 || (c < 0x20 && c != '\n' && c != '\r' && c != '\t') || c == 0x7F) return i;
    i += length;
  }
  return std::string::npos;
}

void Problems::add(const std::string& place, const std::string& path, const std::string& message) {
  std::string text = place;
  if (!path.empty()) text += (text.empty() ? "" : ": ") + path;
  messages_.push_back((text.empty() ? "" : text + ": ") + message);
}

void Problems::throw_if_any() const {
  if (messages_.empty()) return;
  if (messages_.size() == 1) throw ConfigError(messages_[0]);
  std::string text = fmt::format("{} mistakes in {}:", messages_.size(), subject_);
  for (std::size_t i = 0; i < std::min(messages_.size(), kMostMessages); ++i) text += "\n  " + messages_[i];
  if (messages_.size() > kMostMessages) text += fmt::format("\n  and {} more", messages_.size() - kMostMessages);
  throw ConfigError(text);
}

std::string place_of(const std::string& origin, const YAML::Mark& mark) {
  if (mark.is_null() || origin.starts_with("--")) return origin;
  return fmt::format("{}:{}:{}", origin, mark.line + 1, mark.column + 1);
}

Value Value::child(const YAML::Node& child_node, const std::string& child_path) const {
  return {child_node, child_path, place_of(origin, child_node.Mark()), origin};
}

bool is_plain(const YAML::Node& node) { return node.Tag() == "?" || node.Tag().empty(); }

std::string describe(const YAML::Node& node) {
  if (!node || node.IsNull()) return "nothing (null)";
  if (node.IsMap()) return node.size() == 0 ? "an empty map" : "a map";
  if (node.IsSequence()) return node.size() == 0 ? "an empty list" : "a list";
  if (!is_plain(node) && node.Tag() != "!") return fmt::format("a value tagged {}", shortened(node.Tag()));
  if (node.Scalar().empty()) return "an empty text";
  return is_plain(node) ? shortened(node.Scalar()) : fmt::format("the text \"{}\"", shortened(node.Scalar()));
}

std::optional<std::string> read_scalar(const Value& value, const std::string& expected, Problems& problems) {
  const bool tagged = value.node.IsScalar() && !is_plain(value.node) && value.node.Tag() != "!";
  if (value.node.IsScalar() && !tagged) return value.node.Scalar();
  problems.add(value.place, value.path, fmt::format("expected {}, found {}", expected, describe(value.node)));
  return {};
}

const char* start_of_number(const std::string& text) {
  const auto digit = [&](std::size_t i) { return i < text.size() && text[i] >= '0' && text[i] <= '9'; };
  const bool plus = text.starts_with('+');
  if (plus && !digit(1) && !text.substr(1).starts_with('.')) return nullptr;
  const std::size_t digits = plus || text.starts_with('-') ? 1 : 0;
  if (digit(digits) && text[digits] == '0' && digit(digits + 1)) return nullptr;
  return text.data() + (plus ? 1 : 0);
}

std::optional<bool> read_boolean(const Value& value, Problems& problems) {
  const auto text = read_scalar(value, "true or false", problems);
  if (!text) return {};
  if (is_plain(value.node) && (*text == "true" || *text == "false")) return *text == "true";
  problems.add(value.place, value.path, fmt::format("expected true or false, found {}", describe(value.node)));
  return {};
}

std::optional<double> read_number(const Value& value, const Bounds<double>& bounds, Problems& problems) {
  const std::string expected = fmt::format("a number {}", bounds.str());
  const auto text = read_scalar(value, expected, problems);
  if (!text) return {};
  const char* first = start_of_number(*text);
  const char* last = text->data() + text->size();
  double number = 0;
  const auto [end, error] = std::from_chars(first ? first : last, last, number);  // of nothing: an error
  if (error != std::errc() || end != last || !is_plain(value.node) || !std::isfinite(number) || !bounds.holds(number)) {
    problems.add(value.place, value.path, fmt::format("expected {}, found {}", expected, describe(value.node)));
    return {};
  }
  return number;
}

std::optional<std::string> read_text(const Value& value, bool may_be_empty, Problems& problems) {
  auto text = read_scalar(value, "a text", problems);
  if (text && text->empty() && !may_be_empty) {
    problems.add(value.place, value.path, "expected a text that is not empty");
    return {};
  }
  if (text && find_not_text(*text) != std::string::npos) {
    problems.add(value.place, value.path, "expected text in UTF-8 without control characters");
    return {};
  }
  return text;
}

std::optional<std::string> read_choice(const Value& value, const std::vector<std::string>& choices, Problems& problems) {
  std::string expected;
  for (const auto& c : choices) expected += (expected.empty() ? "" : " | ") + c;
  const auto text = read_scalar(value, expected, problems);
  if (!text) return {};
  if (std::find(choices.begin(), choices.end(), *text) != choices.end()) return text;
  problems.add(value.place, value.path,
               fmt::format("expected {}, found {}; nearest is \"{}\"", expected, describe(value.node), nearest(*text, choices)));
  return {};
}

void refuse_tag(const Value& value, const std::string& standard, Problems& problems) {
  const std::string& tag = value.node.Tag();
  if (is_plain(value.node) || tag == "!" || tag == "tag:yaml.org,2002:" + standard) return;
  problems.add(value.place, value.path, fmt::format("the tag {} has no meaning here; leave it out", shortened(tag)));
}

std::vector<std::pair<std::string, Value>> read_map(const Value& value, Problems& problems) {
  refuse_tag(value, "map", problems);
  std::vector<std::pair<std::string, Value>> entries;
  std::set<std::string> seen;
  for (const auto& entry : value.node) {
    if (!entry.first.IsScalar()) {
      problems.add(place_of(value.origin, entry.first.Mark()), value.path, fmt::format("expected a key, found {}", describe(entry.first)));
      continue;
    }
    const std::string name = entry.first.Scalar();
    const std::string path = value.path.empty() ? name : value.path + "." + name;
    Value child = value.child(entry.second, path);
    child.key_place = place_of(value.origin, entry.first.Mark());
    if (entry.second.IsNull()) child.place = child.key_place;  // a null has no place of its own
    if (!seen.insert(name).second) {
      problems.add(child.key_place, path, "the key stands here a second time; keep one");
      continue;
    }
    entries.emplace_back(name, std::move(child));
  }
  return entries;
}

/// Optimal string alignment distance: insertions, deletions, substitutions and swaps of neighbours.
static int edit_distance(const std::string& a, const std::string& b) {
  std::vector<std::vector<int>> d(a.size() + 1, std::vector<int>(b.size() + 1));
  for (std::size_t i = 0; i <= a.size(); ++i) d[i][0] = static_cast<int>(i);
  for (std::size_t j = 0; j <= b.size(); ++j) d[0][j] = static_cast<int>(j);
  for (std::size_t i = 1; i <= a.size(); ++i)
    for (std::size_t j = 1; j <= b.size(); ++j) {
      d[i][j] = std::min({d[i - 1][j] + 1, d[i][j - 1] + 1, d[i - 1][j - 1] + (a[i - 1] != b[j - 1])});
      if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1]) d[i][j] = std::min(d[i][j], d[i - 2][j - 2] + 1);
    }
  return d[a.size()][b.size()];
}

std::string nearest(const std::string& word, const std::vector<std::string>& words) {
  const std::string shown = word.substr(0, 100);  // a longer one is no typing mistake, and the distance takes quadratic time
  const auto unlikeness = [&](const std::string& w) { return std::pair(shown.empty() || !w.starts_with(shown), edit_distance(shown, w)); };
  return *std::min_element(words.begin(), words.end(), [&](const auto& a, const auto& b) { return unlikeness(a) < unlikeness(b); });
}

std::string nearest_key(const std::string& path) {
  const auto leaf = [](const std::string& p) { return p.substr(p.rfind('.') + 1); };
  const std::string shown = path.substr(0, 100);
  std::string best;
  int least = 1 << 30;
  const auto consider = [&](const std::string& candidate) {
    // The right name in the wrong section is nearer than the letters say.
    const int distance = std::min(2 * edit_distance(shown, candidate), 3 + 2 * edit_distance(leaf(shown), leaf(candidate)));
    if (distance < least) least = distance, best = candidate;
  };
  for (const Key& key : schema()) {
    for (std::size_t dot = key.path.find('.'); dot != std::string::npos; dot = key.path.find('.', dot + 1)) consider(key.path.substr(0, dot));
    consider(key.path);
  }
  return best;
}

}  // namespace tessera
