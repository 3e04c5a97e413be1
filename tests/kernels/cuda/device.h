#pragma once
// Device memory, bf16 and tile lists for the CUDA tests and measurements.

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <iostream>
#include <map>
#include <memory>
#include <vector>

#include "kernels/attention.h"

namespace tessera::cuda_test {

inline void check(cudaError_t e, const char* what) {
  if (e == cudaSuccess) return;
  std::cerr << what << ": " << cudaGetErrorString(e) << "\n";
  std::abort();
}
#define TESSERA_CUDA_CHECK(call) ::tessera::cuda_test::check((call), #call)

inline bool has_gpu() {
  int n = 0;
  return cudaGetDeviceCount(&n) == cudaSuccess && n > 0;
}

inline float to_bf16(double x) { return __bfloat162float(__float2bfloat16_rn(static_cast<float>(x))); }

/// Device memory filled with 0xff (NaN in every floating type): what a kernel leaves unwritten shows.
template <class T>
class Device {
 public:
  explicit Device(std::size_t n) : n_(n) {
    TESSERA_CUDA_CHECK(cudaMalloc(&data_, std::max<std::size_t>(n, 1) * sizeof(T)));
    TESSERA_CUDA_CHECK(cudaMemset(data_, 0xff, n * sizeof(T)));
  }
  explicit Device(const std::vector<T>& v) : Device(v.size()) {
    TESSERA_CUDA_CHECK(cudaMemcpy(data_, v.data(), n_ * sizeof(T), cudaMemcpyHostToDevice));
  }
  Device(Device&& o) noexcept : data_(o.data_), n_(o.n_) { o.data_ = nullptr; }
  Device& operator=(const Device&) = delete;
  ~Device() { cudaFree(data_); }
  T* get() const { return data_; }
  std::size_t size() const { return n_; }
  std::vector<T> host() const {
    std::vector<T> v(n_);
    TESSERA_CUDA_CHECK(cudaMemcpy(v.data(), data_, n_ * sizeof(T), cudaMemcpyDeviceToHost));
    return v;
  }
  void poison() { TESSERA_CUDA_CHECK(cudaMemset(data_, 0xff, n_ * sizeof(T))); }

 private:
  T* data_ = nullptr;
  std::size_t n_;
};

using Bf16 = __nv_bfloat16;

/// [B, H, T, D] packed.
inline HeadsView packed(Bf16* p, const AttentionShape& s) {
  return {p, DType::bf16, s.heads * s.tokens * s.head_size, s.tokens * s.head_size, s.head_size};
}

/// visible(i, j) for j <= i of each distinct pattern; heads take them in turn. Tiles of 64 x 64.
using Pattern = std::function<bool(std::int64_t i, std::int64_t j)>;

inline std::shared_ptr<TileMap> make_tiles(std::int64_t tokens, std::int64_t heads, const std::vector<Pattern>& patterns) {
  auto map = std::make_shared<TileMap>();
  map->tokens = tokens;
  map->query_tiles = map->key_tiles = (tokens + 63) / 64;
  map->mask0_is_causal = true;
  for (int r = 0; r < 64; ++r) map->masks.push_back(r == 63 ? ~0ull : (1ull << (r + 1)) - 1);
  std::map<std::vector<std::uint64_t>, int> known{{map->masks, 0}};
  for (std::int64_t h = 0; h < heads; ++h) map->group_of_head.push_back(static_cast<std::int32_t>(h % patterns.size()));
  for (const Pattern& visible : patterns) {
    TileGroup group;
    std::vector<std::vector<TileEntry>> by_key(map->key_tiles);
    for (std::int64_t a = 0; a < map->query_tiles; ++a) {
      group.query_offsets.push_back(static_cast<std::int64_t>(group.query_entries.size()));
      for (std::int64_t b = 0; b <= a; ++b) {
        std::vector<std::uint64_t> mask(64, 0);
        std::uint64_t all = ~0ull, any = 0;
        for (int r = 0; r < 64; ++r) {
          const std::int64_t i = a * 64 + r;
          for (int c = 0; c < 64; ++c) {
            const std::int64_t j = b * 64 + c;
            if (j <= i && visible(i, j)) mask[r] |= 1ull << c;
          }
          all &= mask[r], any |= mask[r];
        }
        if (!any) continue;
        int number = TileEntry::kFull;
        if (all != ~0ull) {
          number = known.emplace(mask, static_cast<int>(known.size())).first->second;
          if (number * 64ull == map->masks.size()) map->masks.insert(map->masks.end(), mask.begin(), mask.end());
        }
        group.query_entries.push_back({static_cast<std::int32_t>(b), number});
        by_key[b].push_back({static_cast<std::int32_t>(a), number});
      }
    }
    group.query_offsets.push_back(static_cast<std::int64_t>(group.query_entries.size()));
    for (const auto& list : by_key) {
      group.key_offsets.push_back(static_cast<std::int64_t>(group.key_entries.size()));
      group.key_entries.insert(group.key_entries.end(), list.begin(), list.end());
    }
    group.key_offsets.push_back(static_cast<std::int64_t>(group.key_entries.size()));
    map->groups.push_back(std::move(group));
  }
  return map;
}

/// The same for a causal window of whole tiles (window a multiple of 64; 0: all), without looking at single edges: for long sequences.
inline std::shared_ptr<TileMap> make_window_tiles(std::int64_t tokens, std::int64_t heads, std::int64_t window) {
  auto map = std::make_shared<TileMap>();
  map->tokens = tokens;
  map->query_tiles = map->key_tiles = (tokens + 63) / 64;
  map->mask0_is_causal = true;
  for (int r = 0; r < 64; ++r) map->masks.push_back(r == 63 ? ~0ull : (1ull << (r + 1)) - 1);
  for (int r = 0; r < 64; ++r) map->masks.push_back(r == 63 ? 0 : ~0ull << (r + 1));  // i - j < window in the farthest tile
  map->group_of_head.assign(heads, 0);
  TileGroup g;
  const std::int64_t n = map->query_tiles, far = window / 64;
  for (std::int64_t a = 0; a < n; ++a) {
    g.query_offsets.push_back(static_cast<std::int64_t>(g.query_entries.size()));
    for (std::int64_t b = window ? std::max<std::int64_t>(0, a - far) : 0; b <= a; ++b)
      g.query_entries.push_back({static_cast<std::int32_t>(b), b == a ? 0 : window && b == a - far ? 1 : TileEntry::kFull});
  }
  g.query_offsets.push_back(static_cast<std::int64_t>(g.query_entries.size()));
  for (std::int64_t b = 0; b < n; ++b) {
    g.key_offsets.push_back(static_cast<std::int64_t>(g.key_entries.size()));
    for (std::int64_t a = b; a < (window ? std::min(n, b + far + 1) : n); ++a)
      g.key_entries.push_back({static_cast<std::int32_t>(a), b == a ? 0 : window && b == a - far ? 1 : TileEntry::kFull});
  }
  g.key_offsets.push_back(static_cast<std::int64_t>(g.key_entries.size()));
  map->groups.push_back(std::move(g));
  return map;
}

}  // namespace tessera::cuda_test
