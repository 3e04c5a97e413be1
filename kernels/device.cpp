#include "kernels/device.h"

#include <algorithm>

namespace tessera {
namespace {

constexpr std::size_t kMiB = std::size_t{1} << 20;

}  // namespace

const char* name_of(DeviceKind kind) { return kind == DeviceKind::cuda ? "cuda" : "cpu"; }

DType compute_type(DeviceKind kind) { return kind == DeviceKind::cuda ? DType::bf16 : DType::f32; }

std::size_t scratch_bytes(DeviceKind kind, std::int64_t rows, std::int64_t width) {
  if (kind == DeviceKind::cpu) return 0;
  // The most that a launcher of kernels/cuda/layers.h asks for; a test holds the two together. Norms and bias gradients: two partial sums a column
  // of each of 264 blocks. Embedding: (token, row) pairs, twice, and the sorter's own memory.
  const auto sums = static_cast<std::size_t>(width) * 2 * 264 * sizeof(float), pairs = static_cast<std::size_t>(rows) * 18 + 2 * kMiB;
  return std::max(sums, pairs);
}

std::size_t tiles_bytes(DeviceKind kind, const TileMap& map) {
  std::size_t entries = 0, offsets = 0;
  for (const TileGroup& group : map.groups) {
    entries += group.query_entries.size();
    offsets += group.query_offsets.size() + group.key_offsets.size();
  }
  const std::size_t masks = map.masks.size() * sizeof(std::uint64_t);
  if (kind == DeviceKind::cpu) return 2 * entries * sizeof(TileEntry) + offsets * sizeof(std::int64_t) + masks;
  // 16-byte entries of two query tiles, of three, and of two key tiles; masks by query and by key (kernels/cuda/attention/tiles.h).
  return entries * 16 * 4 / 3 + offsets * 2 * sizeof(std::int64_t) + 2 * masks;
}

std::size_t library_bytes(DeviceKind kind) { return kind == DeviceKind::cuda ? 576 * kMiB : 0; }

std::size_t connection_bytes(DeviceKind kind, int ranks, int others) {
  if (kind == DeviceKind::cpu || ranks == 1) return 0;
  return (857 + 406 * static_cast<std::size_t>(others)) * kMiB;
}

std::size_t logits_bytes(DeviceKind kind) { return kind == DeviceKind::cuda ? 1024 * kMiB : 64 * kMiB; }

}  // namespace tessera
