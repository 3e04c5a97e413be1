#include "data/row_filter.h"

#include <fmt/core.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <stdexcept>
#include <utility>

namespace tessera {
namespace {

using Op = RowFilter::Op;
constexpr std::array<std::pair<std::string_view, Op>, 7> kOperators = {{{">=", Op::greater_equal},
                                                                        {"<=", Op::less_equal},
                                                                        {"==", Op::equal},
                                                                        {"!=", Op::not_equal},
                                                                        {">", Op::greater},
                                                                        {"<", Op::less},
                                                                        {"=", Op::equal}}};

std::string_view trimmed(std::string_view text) {
  const std::size_t begin = text.find_first_not_of(" \t");
  return begin == std::string_view::npos ? std::string_view() : text.substr(begin, text.find_last_not_of(" \t") + 1 - begin);
}

std::optional<long double> number_of(const std::string& text) {
  if (text.empty() || text.find_first_not_of("+-.0123456789eE") != std::string::npos) return std::nullopt;  // no hexadecimal numbers, no nan
  char* end = nullptr;
  const long double value = std::strtold(text.c_str(), &end);
  if (*end != '\0' || end == text.c_str() || !std::isfinite(value)) return std::nullopt;
  return value;
}

template <typename T>
bool compare(RowFilter::Op op, const T& left, const T& right) {
  switch (op) {
    case Op::less: return left < right;
    case Op::less_equal: return left <= right;
    case Op::equal: return left == right;
    case Op::not_equal: return left != right;
    case Op::greater_equal: return left >= right;
    case Op::greater: return left > right;
  }
  throw std::logic_error("unknown comparison");
}

}  // namespace

bool RowFilter::holds(long double value) const { return compare(op, value, *number); }
bool RowFilter::holds(std::string_view value) const { return compare(op, value, std::string_view(text)); }

RowFilter parse_row_filter(const std::string& condition) {
  const auto refuse = [&](const std::string& why) {
    throw std::invalid_argument(fmt::format(
        "--where \"{}\": {}; expected NAME OP VALUE with OP one of >= <= > < (numbers) or == != (numbers, text), as in score>=3 or language==en",
        condition, why));
  };
  RowFilter filter;
  filter.source = condition;
  const std::size_t at = condition.find_first_of("<>=!");
  if (at == std::string::npos) refuse("no comparison in it");
  const std::string_view all = condition;
  const auto found = std::find_if(kOperators.begin(), kOperators.end(), [&](const auto& known) { return all.substr(at).starts_with(known.first); });
  if (found == kOperators.end()) refuse("! stands alone");
  filter.op = found->second;
  filter.column = trimmed(all.substr(0, at));
  filter.text = trimmed(all.substr(at + found->first.size()));
  if (filter.column.empty()) refuse("no column's name before the comparison");
  if (filter.text.empty()) refuse("no value behind the comparison");
  const char quote = filter.text.front();
  if (quote == '"' || quote == '\'') {
    if (filter.text.size() < 2 || filter.text.back() != quote) refuse("a quote that is not closed");
    filter.text = filter.text.substr(1, filter.text.size() - 2);
  } else {
    if (filter.text.find_first_of("<>=!&|") != std::string::npos) refuse("more than one comparison (give --where several times; all must hold)");
    filter.number = number_of(filter.text);
  }
  if (filter.orders() && !filter.number) refuse(fmt::format("{} orders numbers, and {} is none", found->first, filter.text));
  return filter;
}

}  // namespace tessera
