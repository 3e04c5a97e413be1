#pragma once
// The merging loop of byte-pair encoding. Work is linear in the length of a piece: O(n^2) only up to 128 bytes, where that is fastest, O(n log n)
// only up to as many bytes as there are merges, and beyond O(n), so that a word of a million letters costs what a million letters cost.

#include <cstdint>
#include <span>
#include <vector>

#include "data/bpe.h"

namespace tessera {

/// Adjacent pair of tokens -> its merge: open addressing with linear probing, at most half full. Read-only after construction.
class MergeTable {
 public:
  static constexpr std::uint32_t kNone = UINT32_MAX;
  struct Found {
    std::uint32_t rank = kNone;  // position in the list of merges; kNone: not in the list
    std::uint32_t result = kNone;
  };

  /// Throws std::invalid_argument when a pair stands in the list twice.
  explicit MergeTable(const std::vector<BpeMerge>& merges);

  Found find(std::uint32_t left, std::uint32_t right) const {
    const std::uint64_t key = pair_key(left, right);
    for (std::size_t i = home(key);; i = (i + 1) & mask_) {
      if (slots_[i].key == key) return slots_[i].found;
      if (slots_[i].key == kEmpty) return {};
    }
  }

  /// Joins pairs in `tokens` (bytes as token ids on entry) until none is in the list. Returns how many tokens remain, in front. Allocates nothing for
  /// pieces of up to 128 bytes, nor, once a thread has met some, for those of up to 64 KiB. `looked_at`: increased by the pairs looked up (of pieces
  /// of more than 128 bytes).
  std::size_t merge(std::span<std::uint32_t> tokens, std::uint64_t* looked_at = nullptr) const;

 private:
  static constexpr std::uint64_t kEmpty = UINT64_MAX;  // no pair: ids stay below 2^32 - 1
  struct Slot {
    std::uint64_t key = kEmpty;
    Found found;
  };
  static std::uint64_t pair_key(std::uint32_t left, std::uint32_t right) { return std::uint64_t{left} << 32 | right; }
  std::size_t home(std::uint64_t key) const { return key * 0x9E3779B97F4A7C15u >> shift_; }
  std::size_t merge_short(std::span<std::uint32_t> tokens) const;
  struct Chain;
  void merge_by_heap(Chain& chain) const;
  void merge_by_sweep(Chain& chain) const;

  std::vector<Slot> slots_;
  std::size_t mask_ = 0;
  int shift_ = 0;
  std::uint32_t ranks_ = 0;  // merges in the list
  bool in_order_ = true;     // none joins a token that it or a later one makes, as training has it
};

}  // namespace tessera
