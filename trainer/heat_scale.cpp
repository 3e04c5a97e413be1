#include "trainer/heat_scale.h"

#include <fmt/core.h>

#include <algorithm>
#include <cmath>

namespace tessera {

namespace {

constexpr std::array<std::uint32_t, kHeatLevels> kViridis = {0x440154, 0x471164, 0x482071, 0x472e7c, 0x433c83, 0x3f4988, 0x3a548c, 0x34608d,
                                                             0x2f6b8e, 0x2b768e, 0x26808e, 0x228b8d, 0x20958c, 0x20a088, 0x24aa83, 0x31b47b,
                                                             0x42bd72, 0x57c666, 0x70ce57, 0x8bd546, 0xa7db35, 0xc4e023, 0xe1e41e, 0xfde725};
constexpr std::uint32_t kNone = 0xafb8c1;

}  // namespace

int heat_level(double share) {
  if (!(share > 0)) return -1;
  const double at = (std::log10(share) + kHeatDecades) / kHeatDecades * kHeatLevels;
  return std::clamp(static_cast<int>(std::floor(at)), 0, kHeatLevels - 1);
}

std::array<std::uint8_t, 3> heat_colour(int level) {
  const std::uint32_t rgb = level < 0 ? kNone : kViridis[static_cast<std::size_t>(level)];
  return {static_cast<std::uint8_t>(rgb >> 16), static_cast<std::uint8_t>(rgb >> 8), static_cast<std::uint8_t>(rgb)};
}

std::string heat_css() {
  std::string rules;
  for (int level = 0; level < kHeatLevels; ++level) rules += fmt::format(".h{} {{ fill: #{:06x}; }}\n", level, kViridis[level]);
  return rules;
}

}  // namespace tessera
