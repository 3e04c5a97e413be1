#pragma once
// YAML scalars to C++ values, checked: the readers behind the key table.

#include <fmt/core.h>

#include <charconv>
#include <optional>
#include <string>
#include <type_traits>

#include "trainer/schema.h"

namespace tessera {

/// Inclusive unless `open`.
template <class T>
struct Bounds {
  T low, high;
  bool low_open = false, high_open = false;
  T step = 1;  // integers: multiples of this

  bool holds(T v) const {
    if (!((low_open ? v > low : v >= low) && (high_open ? v < high : v <= high))) return false;
    if constexpr (std::is_integral_v<T>) return v % step == 0;
    return true;
  }
  std::string str() const {
    std::string text = fmt::format("{}{} and {}{}", low_open ? "> " : ">= ", low, high_open ? "< " : "<= ", high);
    if constexpr (std::is_integral_v<T>)
      if (step > 1) text = fmt::format("a multiple of {}, {}", step, text);
    return text;
  }
};

/// Where the first byte stands that is not UTF-8 (RFC 3629) or is a control character other than tab and line ends; npos for none.
std::size_t find_not_text(const std::string& text);

/// The text of a scalar that is not null; otherwise adds "expected `expected`, found ..." and returns nothing.
std::optional<std::string> read_scalar(const Value& value, const std::string& expected, Problems& problems);
std::optional<bool> read_boolean(const Value& value, Problems& problems);
std::optional<double> read_number(const Value& value, const Bounds<double>& bounds, Problems& problems);
std::optional<std::string> read_text(const Value& value, bool may_be_empty, Problems& problems);
std::optional<std::string> read_choice(const Value& value, const std::vector<std::string>& choices, Problems& problems);

/// Adds a problem when a map or list has a tag other than the `standard` one ("map", "seq").
void refuse_tag(const Value& value, const std::string& standard, Problems& problems);

/// A plain (unquoted) scalar: what numbers and true/false are written as.
bool is_plain(const YAML::Node& node);

/// Where the number starts that std::from_chars shall read: behind one '+', which it does not take. Null when there is another sign after it, or a
/// zero before other digits: 010 is eight in YAML 1.1 and ten in 1.2.
const char* start_of_number(const std::string& text);

template <class T>
std::optional<T> read_integer(const Value& value, const Bounds<T>& bounds, Problems& problems) {
  const std::string expected = fmt::format("an integer {}", bounds.str());
  const auto text = read_scalar(value, expected, problems);
  if (!text) return {};
  const char* first = start_of_number(*text);
  const char* last = text->data() + text->size();
  T number{};
  const auto [end, error] = std::from_chars(first ? first : last, last, number);  // of nothing: an error
  if (error != std::errc() || end != last || !is_plain(value.node) || !bounds.holds(number)) {
    problems.add(value.place, value.path, fmt::format("expected {}, found {}", expected, describe(value.node)));
    return {};
  }
  return number;
}

}  // namespace tessera
