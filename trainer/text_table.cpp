#include "trainer/text_table.h"

#include <fmt/core.h>

#include <algorithm>

namespace tessera {

std::string text_table(const std::vector<std::vector<std::string>>& rows) {
  const std::size_t columns = rows.empty() ? 0 : rows[0].size();
  std::vector<std::size_t> width(columns, 0);
  std::vector<bool> right(columns, rows.size() > 1);
  for (std::size_t r = 0; r < rows.size(); ++r)
    for (std::size_t c = 0; c < columns; ++c) {
      const std::string& cell = rows[r][c];
      width[c] = std::max(width[c], cell.size());
      if (r > 0 && !cell.empty() && std::string("0123456789+-~").find(cell[0]) == std::string::npos) right[c] = false;
    }
  std::string text;
  for (const auto& row : rows) {
    std::string line;
    for (std::size_t c = 0; c < columns; ++c)
      line += fmt::format(fmt::runtime(right[c] ? "{}{:>{}}" : "{}{:<{}}"), c > 0 ? "  " : "", row[c], width[c]);
    while (line.ends_with(' ')) line.pop_back();
    text += line + "\n";
  }
  return text;
}

}  // namespace tessera
