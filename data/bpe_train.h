#pragma once
// Learning a byte-level BPE vocabulary: count the pieces of the text, then join the most frequent adjacent pair of tokens again and again (Sennrich,
// Haddow, Birch, 2016). The counts of pairs are kept up to date merge by merge, each pair with the places where it stands, so a merge costs what it
// changes, not a pass over the text.

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <unordered_map>

#include "data/bpe.h"

namespace tessera {

class BpeTrainer {
 public:
  /// Counts the pieces of one text. Memory grows with the number of different pieces, not with the text.
  void add(std::string_view text);

  std::uint64_t bytes() const { return bytes_; }  // of text added
  std::size_t different_pieces() const { return counts_.size(); }

  /// 256 bytes in GPT-2's order, then the merges, then the end of text as the last id: `vocabulary` tokens in all, or fewer when no pair is left that
  /// occurs twice. Of equally frequent pairs the one with the lowest ids (left, then right) is joined, so equal counts give equal vocabularies.
  /// `progress` is called now and then with the number of tokens so far. Throws std::invalid_argument when `vocabulary` is below 257.
  BpeDefinition train(std::int64_t vocabulary, const std::function<void(std::int64_t)>& progress = {}) const;

  /// How many tokens the added texts have under a BPE tokenizer.
  std::uint64_t count_tokens(const Tokenizer& tokenizer) const;

 private:
  struct Hash {
    using is_transparent = void;  // look up a string_view without making a string
    std::size_t operator()(std::string_view text) const { return std::hash<std::string_view>()(text); }
  };
  std::unordered_map<std::string, std::uint64_t, Hash, std::equal_to<>> counts_;
  std::uint64_t bytes_ = 0;
};

}  // namespace tessera
