#include "trainer/buckets.h"

#include <algorithm>
#include <cstdio>

namespace tessera {
namespace {

/// The block of a matrix "h.3.attn.c_attn.weight"; -1 for what is outside the blocks or no matrix.
int block_of(const ParameterInfo& p) {
  int block = -1;
  return p.decayed && std::sscanf(p.name.c_str(), "h.%d.", &block) == 1 ? block : -1;
}

}  // namespace

Buckets::Buckets(const ParameterLayout& layout, std::int64_t unit, std::int64_t elements) {
  for (const ParameterInfo& p : layout.parameters) {
    const int block = block_of(p);
    if (block < 0) continue;
    if (block == static_cast<int>(blocks.size())) blocks.push_back({p.offset, p.offset});
    blocks.at(static_cast<std::size_t>(block)).end = p.offset + p.shape.numel();
  }

  const auto down = [&](std::int64_t n) { return n / unit * unit; };
  const auto up = [&](std::int64_t n) { return down(n + unit - 1); };
  std::int64_t end = up(layout.count);
  const auto cut = [&](std::int64_t first) {  // from the back: a bucket from here to the one cut before
    if (first >= end) return;
    Bucket b{first, end - first, -1};
    if (!blocks.empty() && first >= blocks.front().first && end <= layout.decayed_count)
      while (b.block + 1 < static_cast<int>(blocks.size()) && blocks[static_cast<std::size_t>(b.block + 1)].first <= first) ++b.block;
    list.push_back(b);
    end = first;
  };
  cut(down(layout.decayed_count));
  for (auto block = blocks.rbegin(); block != blocks.rend(); ++block)
    if (end - up(block->first) >= std::max(elements, unit)) cut(up(block->first));
  cut(0);
  std::reverse(list.begin(), list.end());
}

bool Buckets::touches(std::size_t i, int block) const {
  const Bucket& b = list.at(i);
  if (block < 0) return b.block < 0;
  const Range& range = blocks.at(static_cast<std::size_t>(block));
  return b.first < range.end && b.first + b.count > range.first;
}

}  // namespace tessera
