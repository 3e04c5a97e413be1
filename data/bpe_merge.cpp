#include "data/bpe_merge.h"

#include <algorithm>
#include <bit>
#include <mutex>
#include <stdexcept>
#include <string>
#include <unordered_map>

namespace tessera {
namespace {
constexpr std::size_t kShort = 128;      // where the heap overtakes the scan (measured on GPT-2: between 90 and 160)
constexpr std::size_t kKept = 64 << 10;  // working memory for pieces of up to this length stays with the thread
constexpr std::size_t kHuge = 256 << 10;
}  // namespace

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
  ranks_ = static_cast<std::uint32_t>(merges.size());
  std::unordered_map<std::uint32_t, std::uint32_t> made;  // token -> the last merge that makes it
  for (std::uint32_t rank = 0; rank < ranks_; ++rank) made[merges[rank].result] = rank;
  const auto is_made_before = [&](std::uint32_t token, std::uint32_t rank) {
    const auto found = made.find(token);
    return found == made.end() || found->second < rank;
  };
  for (std::uint32_t rank = 0; rank < ranks_ && in_order_; ++rank)
    in_order_ = is_made_before(merges[rank].left, rank) && is_made_before(merges[rank].right, rank);
}

/// The tokens of a long piece as a doubly linked list, and the pairs of it that the list of merges may know. A candidate that no longer holds (one of
/// its tokens has been joined to something else) is seen when it comes up, because the pair now at its position has another rank, and dropped. Each
/// join makes at most two new ones, so that there are less than three times as many as bytes.
struct MergeTable::Chain {
  struct Candidate {
    std::uint32_t at, other;  // position of the left token; the rank, or the candidate after it
  };
  std::span<std::uint32_t> tokens;
  std::vector<std::uint32_t> previous, next, first;
  std::vector<Candidate> candidates;
  std::uint64_t looked_at = 0;

  void start(std::span<std::uint32_t> piece) {
    tokens = piece;
    const auto size = static_cast<std::uint32_t>(tokens.size());
    previous.resize(size);
    next.resize(size);
    for (std::uint32_t i = 0; i < size; ++i) {
      previous[i] = i == 0 ? kNone : i - 1;
      next[i] = i + 1 == size ? kNone : i + 1;
    }
    candidates.clear();
    candidates.reserve(size);
  }
  Found find(const MergeTable& table, std::uint32_t at) {
    ++looked_at;
    if (tokens[at] == kNone || next[at] == kNone) return {};
    return table.find(tokens[at], tokens[next[at]]);
  }
  /// Joins the tokens at `at` and behind it. push(position): a pair that is new.
  template <typename Push>
  void join(std::uint32_t at, std::uint32_t result, Push push) {
    const std::uint32_t second = next[at];
    tokens[at] = result;
    tokens[second] = kNone;
    next[at] = next[second];
    if (next[at] != kNone) {
      previous[next[at]] = at;
      push(at);
    }
    if (previous[at] != kNone) push(previous[at]);
  }
};

std::size_t MergeTable::merge(std::span<std::uint32_t> tokens, std::uint64_t* looked_at) const {
  if (tokens.size() < 2) return tokens.size();
  if (tokens.size() <= kShort) return merge_short(tokens);
  if (tokens.size() > 1 << 30)
    throw std::invalid_argument("a word of " + std::to_string(tokens.size()) + " bytes without a break: the limit is 1 GiB");
  // One at a time of those that take much memory (up to 50 bytes a byte), so that it is bounded whatever the number of threads.
  static std::mutex one;
  std::unique_lock lock(one, std::defer_lock);
  if (tokens.size() > kHuge) lock.lock();
  thread_local Chain kept;
  Chain large;
  Chain& chain = tokens.size() <= kKept ? kept : large;
  chain.start(tokens);
  chain.looked_at = 0;
  if (in_order_ && tokens.size() >= ranks_) {
    merge_by_sweep(chain);
  } else {
    merge_by_heap(chain);
  }
  if (looked_at) *looked_at += chain.looked_at;
  return std::remove(tokens.begin(), tokens.end(), kNone) - tokens.begin();
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

// A heap of candidates by rank, then position.
void MergeTable::merge_by_heap(Chain& chain) const {
  auto& heap = chain.candidates;
  const auto later = [](const Chain::Candidate& a, const Chain::Candidate& b) { return a.other != b.other ? a.other > b.other : a.at > b.at; };
  for (std::uint32_t i = 0; i + 1 < chain.tokens.size(); ++i)
    if (const Found found = chain.find(*this, i); found.rank != kNone) heap.push_back({i, found.rank});
  std::make_heap(heap.begin(), heap.end(), later);
  while (!heap.empty()) {
    const auto [at, rank] = heap.front();
    std::pop_heap(heap.begin(), heap.end(), later);
    heap.pop_back();
    const Found found = chain.find(*this, at);
    if (found.rank != rank) continue;
    chain.join(at, found.result, [&](std::uint32_t place) {
      const Found pair = chain.find(*this, place);
      if (pair.rank == kNone) return;
      heap.push_back({place, pair.rank});
      std::push_heap(heap.begin(), heap.end(), later);
    });
  }
}

// A list of candidates for each rank, in one sweep over the ranks: with merges in order a join makes only candidates of later ranks. Within a rank
// the order matters in runs of one token alone (aaa is aa a), as other pairs of a rank do not overlap: a run is joined from its start.
void MergeTable::merge_by_sweep(Chain& chain) const {
  chain.first.assign(ranks_, kNone);
  const auto push = [&](std::uint32_t at) {
    const Found found = chain.find(*this, at);
    if (found.rank == kNone) return;
    chain.candidates.push_back({at, chain.first[found.rank]});
    chain.first[found.rank] = static_cast<std::uint32_t>(chain.candidates.size() - 1);
  };
  for (auto i = static_cast<std::uint32_t>(chain.tokens.size() - 1); i-- > 0;) push(i);
  for (std::uint32_t rank = 0; rank < ranks_; ++rank) {
    for (std::uint32_t c = chain.first[rank]; c != kNone; c = chain.candidates[c].other) {
      std::uint32_t at = chain.candidates[c].at;
      const Found found = chain.find(*this, at);
      if (found.rank != rank) continue;
      const std::uint32_t left = chain.tokens[at];
      const auto is_run = [&](std::uint32_t place) {
        return place != kNone && chain.next[place] != kNone && chain.tokens[place] == left && chain.tokens[chain.next[place]] == left;
      };
      if (!is_run(at)) {
        chain.join(at, found.result, push);
        continue;
      }
      while (chain.previous[at] != kNone && chain.tokens[chain.previous[at]] == left) at = chain.previous[at];
      for (; is_run(at); at = chain.next[at]) chain.join(at, found.result, push);
    }
  }
}

}  // namespace tessera
