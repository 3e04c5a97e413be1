#pragma once
// The colours of a share of edges, in figures and images: viridis, logarithmic from 10^-4 (dark) to 1 (bright).

#include <array>
#include <cstdint>
#include <string>

namespace tessera {

constexpr int kHeatLevels = 24;
constexpr double kHeatDecades = 4;

/// The level of a share, 0 to kHeatLevels - 1; -1 for none at all.
int heat_level(double share);

/// Red, green and blue of a level; grey for -1.
std::array<std::uint8_t, 3> heat_colour(int level);

/// Rules for the classes h0 to h23 of figures: ".h0 { fill: #440154; }", a line each.
std::string heat_css();

}  // namespace tessera
