#pragma once

#include <algorithm>
#include <optional>
#include <vector>

namespace tessera {

/// The middle of the values, the mean of the middle two of an even number; nothing of none.
inline std::optional<double> median(std::vector<double> values) {
  if (values.empty()) return {};
  std::ranges::sort(values);
  return (values[(values.size() - 1) / 2] + values[values.size() / 2]) / 2;
}

}  // namespace tessera
