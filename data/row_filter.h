#pragma once
// A condition on a column: NAME OP VALUE, as in score>=3, language==en or dump!='CC-MAIN-2013-20'.
//
//   OP     >= <= > <   numbers
//          == = !=     numbers, text, true and false
//   VALUE  a number, or text, in quotes or without

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace tessera {

struct RowFilter {
  enum class Op { less, less_equal, equal, not_equal, greater_equal, greater };
  std::string column, text;  // text: the value as it stands, less its quotes
  Op op = Op::equal;
  std::optional<long double> number;  // the value, where it is one; holds every 64-bit integer
  std::string source;                 // what was parsed, for messages

  bool orders() const { return op != Op::equal && op != Op::not_equal; }
  bool holds(long double value) const;       // number is set
  bool holds(std::string_view value) const;  // !orders()
};

/// Throws std::invalid_argument with the grammar.
RowFilter parse_row_filter(const std::string& condition);

}  // namespace tessera
