#pragma once
// The first step of GPT-2's byte-level BPE: text cut into pieces ("words" with their leading space, numbers, punctuation, white space) that no
// token crosses, by the pattern published with GPT-2:
//
//   's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
//
// Which characters are letters, numbers and spaces follows Unicode 16, as in tiktoken and Hugging Face's tokenizers (see bpe_split.cpp).

#include <cstddef>
#include <string>
#include <string_view>

namespace tessera {

/// Length of the longest valid UTF-8 prefix of `text` (no surrogates, no overlong forms, nothing above U+10FFFF).
std::size_t valid_utf8_prefix(std::string_view text);

/// Whether the last character of `text` is whitespace as the pattern has it (\s).
bool ends_in_whitespace(std::string_view text);

/// Walks over the pieces of a text. They follow each other without gaps and together are the whole text. A byte that is not part of a valid
/// UTF-8 character is a piece of its own; the valid stretches on its two sides are cut as if each were a text of its own.
class PieceSplitter {
 public:
  explicit PieceSplitter(std::string_view text) : text_(text) {}  // `text` must outlive this object

  /// False at the end of the text. Throws std::runtime_error when the regular expression library gives up (out of memory).
  bool next(std::string_view& piece);

 private:
  std::string_view text_;
  std::size_t position_ = 0;
  std::size_t valid_end_ = 0;  // text_[position_, valid_end_) is valid UTF-8
};

/// What the pieces depend on, for the hash of a tokenizer.
const std::string& piece_pattern();

}  // namespace tessera
