#pragma once
// Tables for people.

#include <string>
#include <vector>

namespace tessera {

/// Rows of cells as lines, columns two spaces apart and as wide as their widest cell; a column whose cells below the first row all begin with a
/// digit, a sign or "-" stands to the right.
std::string text_table(const std::vector<std::vector<std::string>>& rows);

}  // namespace tessera
