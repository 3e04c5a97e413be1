#pragma once
// bf16 on the host: the upper half of a float. No CUDA needed.

#include <bit>
#include <cstdint>

namespace tessera {

/// To nearest, ties to even; beyond the largest finite value an infinity; NaN stays NaN.
inline std::uint16_t to_bf16(float f) {
  const auto bits = std::bit_cast<std::uint32_t>(f);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  const std::uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  return static_cast<std::uint16_t>((nan ? bits | 0x400000u : rounded) >> 16);
}

inline float from_bf16(std::uint16_t b) { return std::bit_cast<float>(static_cast<std::uint32_t>(b) << 16); }

}  // namespace tessera
