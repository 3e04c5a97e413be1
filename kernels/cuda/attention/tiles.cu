#include "kernels/cuda/attention/tiles.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>

#include "kernels/cuda/attention/attention.h"

namespace tessera::cuda_attention {
namespace {

void check(cudaError_t e, const char* what) {
  if (e != cudaSuccess) throw std::runtime_error(std::string("uploading attention tiles: ") + what + ": " + cudaGetErrorString(e));
}

template <class T>
DeviceBuffer upload(const std::vector<T>& v) {
  return DeviceBuffer(v.data(), v.size() * sizeof(T));
}

/// Bit q of word k is bit k of word q.
std::vector<std::uint64_t> transposed(const std::vector<std::uint64_t>& masks) {
  std::vector<std::uint64_t> out(masks.size(), 0);
  for (std::size_t base = 0; base < masks.size(); base += 64)
    for (int q = 0; q < 64; ++q)
      for (int k = 0; k < 64; ++k) out[base + k] |= (masks[base + q] >> k & 1) << q;
  return out;
}

std::shared_ptr<const TileMap> checked(std::shared_ptr<const TileMap> map) {
  if (!map) throw std::logic_error("upload_tiles_cuda: no tile map");
  if (map->tile_query != 64 || map->tile_key != 64) {
    throw std::invalid_argument("the CUDA attention kernels work on tiles of 64 x 64; the tile map has " + std::to_string(map->tile_query) + " x " +
                                std::to_string(map->tile_key) + ": build it with 64 x 64");
  }
  return map;
}

}  // namespace

DeviceBuffer::DeviceBuffer(const void* host, std::size_t bytes) {
  check(cudaMalloc(&data_, std::max<std::size_t>(bytes, 16)), "cudaMalloc");
  check(cudaMemcpy(data_, host, bytes, cudaMemcpyHostToDevice), "cudaMemcpy");
}

Bands::Bands(const TileMap& map, bool by_key, int groups) {
  const std::int64_t tiles = by_key ? map.key_tiles : map.query_tiles;
  bands_ = static_cast<int>((tiles + groups - 1) / groups);
  before_ = by_key ? 0 : static_cast<int>(bands_ * groups - tiles);
  std::vector<std::int64_t> offsets;
  std::vector<Entry> entries;
  std::vector<int> order;
  for (const TileGroup& group : map.groups) {
    const auto& from = by_key ? group.key_offsets : group.query_offsets;
    const auto& list = by_key ? group.key_entries : group.query_entries;
    std::vector<std::int64_t> length(bands_);
    for (int band = 0; band < bands_; ++band) {
      offsets.push_back(static_cast<std::int64_t>(entries.size()));
      std::int64_t at[kMaxGroups], end[kMaxGroups];
      for (int g = 0; g < groups; ++g) {
        const std::int64_t tile = static_cast<std::int64_t>(band) * groups + g - before_;
        const bool exists = tile >= 0 && tile < tiles;
        at[g] = exists ? from[tile] : 0, end[g] = exists ? from[tile + 1] : 0;
      }
      for (;;) {  // the lists ascend: take the lowest tile of all, from every list that has it
        std::int32_t next = INT32_MAX;
        for (int g = 0; g < groups; ++g)
          if (at[g] < end[g]) next = std::min(next, list[at[g]].tile);
        if (next == INT32_MAX) break;
        Entry e{next, {kAbsent, kAbsent, kAbsent}};
        for (int g = 0; g < groups; ++g)
          if (at[g] < end[g] && list[at[g]].tile == next) e.mask[g] = list[at[g]++].mask;
        entries.push_back(e);
      }
      length[band] = static_cast<std::int64_t>(entries.size()) - offsets.back();
      longest_ = std::max(longest_, length[band]);
    }
    offsets.push_back(static_cast<std::int64_t>(entries.size()));
    std::vector<int> longest_first(bands_);
    std::iota(longest_first.begin(), longest_first.end(), 0);
    std::stable_sort(longest_first.begin(), longest_first.end(), [&](int x, int y) { return length[x] > length[y]; });
    order.insert(order.end(), longest_first.begin(), longest_first.end());
  }
  mean_length_ = static_cast<double>(entries.size()) / std::max<double>(1, static_cast<double>(order.size()));
  offsets_ = upload(offsets), entries_ = upload(entries), order_ = upload(order);
}

CudaTiles::CudaTiles(std::shared_ptr<const TileMap> map)
    : DeviceTiles(checked(std::move(map))), query2_(host(), false, 2), query3_(host(), false, 3), key2_(host(), true, 2) {
  group_of_head_ = upload(host().group_of_head);
  masks_ = upload(host().masks);
  masks_by_key_ = upload(transposed(host().masks));
}

}  // namespace tessera::cuda_attention

namespace tessera {

std::unique_ptr<DeviceTiles> upload_tiles_cuda(std::shared_ptr<const TileMap> tiles) {
  return std::make_unique<cuda_attention::CudaTiles>(std::move(tiles));
}

}  // namespace tessera
