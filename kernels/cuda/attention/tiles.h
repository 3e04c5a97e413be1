#pragma once
// Tile lists on the device, as the attention kernels walk them.

#include <algorithm>

#include "kernels/attention.h"
#include "kernels/cuda/attention/pipeline.cuh"

namespace tessera::cuda_attention {

/// Device memory that lives as long as its owner.
class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  /// Allocates and copies `bytes` bytes; throws std::runtime_error with CUDA's own words.
  DeviceBuffer(const void* host, std::size_t bytes);
  DeviceBuffer(DeviceBuffer&& other) noexcept : data_(other.data_) { other.data_ = nullptr; }
  DeviceBuffer& operator=(DeviceBuffer&& other) noexcept {
    std::swap(data_, other.data_);
    return *this;
  }
  ~DeviceBuffer() { cudaFree(data_); }
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
};

/// The bands of one direction, `groups` neighbouring tiles each. Where the tiles do not fill them, one band walks its list for fewer: the first by
/// query, the last by key, for under a causal pattern those are the shortest lists.
class Bands {
 public:
  Bands(const TileMap& map, bool by_key, int groups);
  BandLists lists() const { return {offsets_.as<int64_t>(), entries_.as<Entry>(), order_.as<int>(), bands_, before_}; }
  /// Entries of a list, on average, where at most `tiles` tiles of the other side exist.
  double mean_length(std::int64_t tiles) const { return std::min(mean_length_, static_cast<double>(tiles)); }
  /// Entries of the longest list.
  std::int64_t longest() const { return longest_; }

 private:
  int bands_, before_;  // before_: BandLists::before
  double mean_length_;
  std::int64_t longest_ = 0;
  DeviceBuffer offsets_, entries_, order_;
};

class CudaTiles final : public DeviceTiles {
 public:
  explicit CudaTiles(std::shared_ptr<const TileMap> host);
  /// groups: 2 or 3 by query; 2 by key.
  const Bands& by_query(int groups) const { return groups == 2 ? query2_ : query3_; }
  const Bands& by_key() const { return key2_; }
  const int* group_of_head() const { return group_of_head_.as<int>(); }
  const uint64_t* masks() const { return masks_.as<uint64_t>(); }
  const uint64_t* masks_by_key() const { return masks_by_key_.as<uint64_t>(); }

 private:
  Bands query2_, query3_, key2_;
  DeviceBuffer group_of_head_, masks_, masks_by_key_;
};

}  // namespace tessera::cuda_attention
