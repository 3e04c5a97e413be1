#pragma once
// Patterns, written short.

#include <cstdint>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "model/pattern.h"

namespace tessera {

inline PatternSpec causal() { return {}; }
inline PatternSpec window(std::int64_t size) { return {.kind = PatternSpec::Kind::window, .size = size}; }
inline PatternSpec strided(std::int64_t stride, std::int64_t width) { return {.kind = PatternSpec::Kind::strided, .size = stride, .width = width}; }
inline PatternSpec dilated(std::int64_t window, std::int64_t dilation) {
  return {.kind = PatternSpec::Kind::dilated, .size = window, .width = dilation};
}
inline PatternSpec global(std::int64_t tokens) { return {.kind = PatternSpec::Kind::global, .size = tokens}; }
inline PatternSpec bigbird(std::int64_t window, std::int64_t global, std::int64_t random, std::int64_t block, std::uint64_t seed = 7) {
  return {.kind = PatternSpec::Kind::bigbird, .size = window, .width = global, .random = random, .block = block, .seed = seed};
}
inline PatternSpec blocks(std::int64_t block, std::int64_t rows, unsigned seed) {
  auto mask = std::make_shared<BlockMask>();
  mask->block = block;
  mask->rows = rows;
  std::mt19937 rng(seed);
  for (std::int64_t i = 0; i < rows * rows; ++i) mask->visible.push_back(rng() % 3 == 0);
  return {.kind = PatternSpec::Kind::blocks, .file = "mask" + std::to_string(seed), .mask = mask};
}
inline PatternSpec any(std::vector<PatternSpec> children) { return {.kind = PatternSpec::Kind::any, .children = std::move(children)}; }
inline PatternSpec all(std::vector<PatternSpec> children) { return {.kind = PatternSpec::Kind::all, .children = std::move(children)}; }

}  // namespace tessera
