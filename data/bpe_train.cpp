#include "data/bpe_train.h"

#include <algorithm>
#include <queue>
#include <stdexcept>
#include <tuple>

#include "data/bpe_split.h"

namespace tessera {
namespace {

constexpr std::uint32_t kNone = UINT32_MAX;

/// All different pieces behind each other as one linked list of tokens, and for each adjacent pair of tokens inside a piece how often it occurs in
/// the text (the sum of its pieces' counts) and where it stands.
class PairIndex {
 public:
  struct Candidate {
    std::int64_t count;
    std::uint32_t left, right;
    /// For a heap with the most frequent on top, and the lowest ids among equals.
    bool operator<(const Candidate& other) const { return std::tie(count, other.left, other.right) < std::tie(other.count, left, right); }
  };

  /// `first_token[i]`: the token of byte i.
  PairIndex(const auto& counts, const std::array<std::uint32_t, 256>& first_token) {
    std::size_t size = 0;
    for (const auto& [piece, count] : counts) size += piece.size();
    if (size >= kNone) throw std::invalid_argument("too many different words to learn a vocabulary from (4 GiB of them): use a sample of the text");
    token_.reserve(size);
    for (const auto& [piece, count] : counts) {
      const auto begin = static_cast<std::uint32_t>(token_.size()), end = static_cast<std::uint32_t>(begin + piece.size());
      for (std::uint32_t at = begin; at < end; ++at) {
        token_.push_back(first_token[static_cast<unsigned char>(piece[at - begin])]);
        previous_.push_back(at == begin ? kNone : at - 1);
        next_.push_back(at + 1 == end ? kNone : at + 1);
        weight_.push_back(static_cast<std::int64_t>(count));
        if (at > begin) add(at - 1);
      }
    }
    publish();
  }

  /// The pair to join next; false when none occurs at least `least` times.
  bool best(std::int64_t least, Candidate& out) {
    while (!heap_.empty()) {
      out = heap_.top();
      const auto found = pairs_.find(key(out.left, out.right));
      const std::int64_t now = found == pairs_.end() ? 0 : found->second.count;
      if (now == out.count) return now >= least;
      heap_.pop();  // it has lost occurrences since it was put there (or was put again when it won some)
      if (now > 0 && now < out.count) heap_.push({now, out.left, out.right});
    }
    return false;
  }

  /// Joins every occurrence of the pair, from left to right, into `result`.
  void join(std::uint32_t left, std::uint32_t right, std::uint32_t result) {
    const auto found = pairs_.find(key(left, right));
    std::vector<std::uint32_t> places = std::move(found->second.places);
    pairs_.erase(found);
    std::sort(places.begin(), places.end());
    for (const std::uint32_t at : places) {
      const std::uint32_t second = next_[at];
      if (token_[at] != left || second == kNone || token_[second] != right) continue;  // a neighbour has taken one of the two
      const std::uint32_t before = previous_[at], after = next_[second];
      if (before != kNone) remove(before);
      if (after != kNone) remove(second);
      token_[at] = result;
      token_[second] = kNone;
      next_[at] = after;
      if (after != kNone) previous_[after] = at;
      if (before != kNone) add(before);
      if (after != kNone) add(at);
    }
    publish();
  }

 private:
  struct Pair {
    std::int64_t count = 0;
    std::vector<std::uint32_t> places;  // of the left token; some may hold no longer
  };
  static std::uint64_t key(std::uint32_t left, std::uint32_t right) { return std::uint64_t{left} << 32 | right; }

  void add(std::uint32_t at) {
    const std::uint64_t pair_key = key(token_[at], token_[next_[at]]);
    Pair& pair = pairs_[pair_key];
    pair.count += weight_[at];
    pair.places.push_back(at);
    grown_.push_back(pair_key);
  }
  void remove(std::uint32_t at) {
    const auto found = pairs_.find(key(token_[at], token_[next_[at]]));
    if (found != pairs_.end()) found->second.count -= weight_[at];  // the pair being joined is gone already
  }
  /// Pairs that have grown go to the heap with their new counts.
  void publish() {
    std::sort(grown_.begin(), grown_.end());
    grown_.erase(std::unique(grown_.begin(), grown_.end()), grown_.end());
    for (const std::uint64_t k : grown_) {
      heap_.push({pairs_.at(k).count, static_cast<std::uint32_t>(k >> 32), static_cast<std::uint32_t>(k)});
    }
    grown_.clear();
  }

  std::vector<std::uint32_t> token_, previous_, next_;
  std::vector<std::int64_t> weight_;
  std::unordered_map<std::uint64_t, Pair> pairs_;
  std::priority_queue<Candidate> heap_;
  std::vector<std::uint64_t> grown_;
};

}  // namespace

void BpeTrainer::add(std::string_view text) {
  bytes_ += text.size();
  PieceSplitter pieces(text);
  for (std::string_view piece; pieces.next(piece);) {
    const auto found = counts_.find(piece);
    if (found != counts_.end()) {
      ++found->second;
    } else {
      counts_.emplace(piece, 1);
    }
  }
}

BpeDefinition BpeTrainer::train(std::int64_t vocabulary, const std::function<void(std::int64_t)>& progress) const {
  constexpr std::int64_t kLeastCount = 2;  // a pair seen once teaches nothing
  if (vocabulary < 257)
    throw std::invalid_argument("a vocabulary of " + std::to_string(vocabulary) + ": at least 257, the 256 bytes and the end of text");
  BpeDefinition out;
  std::array<std::uint32_t, 256> first_token;
  for (const unsigned char byte : byte_order()) {
    first_token[byte] = static_cast<std::uint32_t>(out.tokens.size());
    out.tokens.emplace_back(1, static_cast<char>(byte));
  }
  PairIndex pairs(counts_, first_token);
  for (PairIndex::Candidate best; static_cast<std::int64_t>(out.tokens.size()) + 1 < vocabulary && pairs.best(kLeastCount, best);) {
    // Never a token that is there already: by the rules above every place that spells some bytes, and is never crossed by a merge, has been joined
    // in the same way.
    const auto result = static_cast<std::uint32_t>(out.tokens.size());
    out.tokens.push_back(out.tokens[best.left] + out.tokens[best.right]);
    out.merges.push_back({best.left, best.right, result});
    pairs.join(best.left, best.right, result);
    if (progress && out.tokens.size() % 256 == 0) progress(static_cast<std::int64_t>(out.tokens.size()));
  }
  out.end_of_text = static_cast<std::uint32_t>(out.tokens.size());
  out.special = {out.end_of_text};
  out.tokens.emplace_back(kEndOfText);
  return out;
}

std::uint64_t BpeTrainer::count_tokens(const Tokenizer& tokenizer) const {
  std::uint64_t total = 0;
  std::vector<std::uint32_t> tokens;
  for (const auto& [piece, count] : counts_) {
    tokens.clear();
    tokenizer.encode(piece, tokens);  // a piece alone is one piece again
    total += count * tokens.size();
  }
  return total;
}

}  // namespace tessera
