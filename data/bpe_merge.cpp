#include "data/bpe_merge.h"

#include <algorithm>
#include <bit>
#include <functional>
#include <queue>
#include <stdexcept>

namespace tessera {
namespace {
constexpr std::size_t kShort = 128;  // where the heap overtakes the scan (measured on GPT-2: between 90 and 160)
}

MergeTable::MergeTable(const std::vector<BpeMerge>& merges) {
  const std::size_t capacity = std::bit_ceil(2 * merges.size() + 2);
  slots_.resize(capacity);
  mask_ = capacity - 1;
  shift_ = 64 - std::countr_zero(capacity);
  for (std::uint32_t rank = 0; rank < merges.size(); ++rank) {
    const std::uint64_t key = pair_key(merges[rank].left, merges[rank].right);
    std::size_t i = home(key);
    while (slots_[i].key != kEmpty && slots_[i].key != key) i = (i + 1) & mask_;
    if (slots_[i].key == key) {
      throw std::invalid_argument("merges " + std::to_string(slots_[i].found.rank + 1) + " and " + std::to_string(rank + 1) + " join the same pair");
    }
    slots_[i] = {key, {rank, merges[rank].result}};
  }
}

std::size_t MergeTable::merge(std::span<std::uint32_t> tokens) const {
  if (tokens.size() < 2) return tokens.size();
  return tokens.size() <= kShort ? merge_short(tokens) : merge_long(tokens);
}

// Scans for the lowest rank, joins, closes the gap.
std::size_t MergeTable::merge_short(std::span<std::uint32_t> tokens) const {
  Found pairs[kShort];  // pairs[i] is the merge of tokens[i] and tokens[i + 1]
  std::size_t size = tokens.size();
  for (std::size_t i = 0; i + 1 < size; ++i) pairs[i] = find(tokens[i], tokens[i + 1]);
  while (size > 1) {
    std::size_t best = 0;
    for (std::size_t i = 1; i + 1 < size; ++i) {
      if (pairs[i].rank < pairs[best].rank) best = i;
    }
    if (pairs[best].rank == kNone) break;
    tokens[best] = pairs[best].result;
    std::copy(tokens.begin() + best + 2, tokens.begin() + size, tokens.begin() + best + 1);
    if (best + 2 < size) std::copy(pairs + best + 2, pairs + size - 1, pairs + best + 1);
    --size;
    if (best > 0) pairs[best - 1] = find(tokens[best - 1], tokens[best]);
    if (best + 1 < size) pairs[best] = find(tokens[best], tokens[best + 1]);
  }
  return size;
}

// A doubly linked list of tokens and a heap of candidate pairs by (rank, position). A candidate that no longer holds (one of its tokens has been
// joined to something else) is seen when it comes up, because the pair now at its position has another rank, and dropped. Working memory:
// 20 bytes a byte of the piece.
std::size_t MergeTable::merge_long(std::span<std::uint32_t> tokens) const {
  if (tokens.size() >= kNone)
    throw std::invalid_argument("a word of " + std::to_string(tokens.size()) + " bytes without a break: the limit is 4 GiB");
  const auto size = static_cast<std::uint32_t>(tokens.size());
  std::vector<std::uint32_t> previous(size), next(size);
  for (std::uint32_t i = 0; i < size; ++i) {
    previous[i] = i == 0 ? kNone : i - 1;
    next[i] = i + 1 == size ? kNone : i + 1;
  }
  // The rank and the position in one number: its order is theirs.
  std::vector<std::uint64_t> candidates;
  candidates.reserve(size);
  for (std::uint32_t i = 0; i + 1 < size; ++i) {
    const Found found = find(tokens[i], tokens[i + 1]);
    if (found.rank != kNone) candidates.push_back(pair_key(found.rank, i));
  }
  std::priority_queue<std::uint64_t, std::vector<std::uint64_t>, std::greater<>> heap(std::greater<>(), std::move(candidates));
  const auto push = [&](std::uint32_t at) {
    const Found found = find(tokens[at], tokens[next[at]]);
    if (found.rank != kNone) heap.push(pair_key(found.rank, at));
  };
  while (!heap.empty()) {
    const auto rank = static_cast<std::uint32_t>(heap.top() >> 32), at = static_cast<std::uint32_t>(heap.top());
    heap.pop();
    const std::uint32_t second = next[at];
    if (tokens[at] == kNone || second == kNone) continue;
    const Found found = find(tokens[at], tokens[second]);
    if (found.rank != rank) continue;
    tokens[at] = found.result;
    tokens[second] = kNone;
    next[at] = next[second];
    if (next[at] != kNone) {
      previous[next[at]] = at;
      push(at);
    }
    if (previous[at] != kNone) push(previous[at]);
  }
  return std::remove(tokens.begin(), tokens.end(), kNone) - tokens.begin();
}

}  // namespace tessera
