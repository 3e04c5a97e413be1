#pragma once
// Byte-level byte-pair encoding (Sennrich, Haddow, Birch, 2016, on bytes as in GPT-2, Radford et al., 2019): a piece of text starts as its bytes, and
// the adjacent pair of tokens that stands first in the list of merges is joined, leftmost first, until no adjacent pair is in the list.

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "data/tokenizer.h"

namespace tessera {

inline constexpr const char* kEndOfText = "<|endoftext|>";

struct BpeMerge {
  std::uint32_t left, right, result;  // ids; the bytes of `result` are those of `left` and `right`
};

/// What defines a byte-level BPE.
struct BpeDefinition {
  std::vector<std::string> tokens;     // bytes of each id; of a special token, its text
  std::vector<BpeMerge> merges;        // the first is joined first
  std::vector<std::uint32_t> special;  // ascending: ids that no text encodes to, end_of_text among them
  std::uint32_t end_of_text = 0;
};

// -- Files (bpe_files.cpp). Every reader throws std::invalid_argument that names the file and the line, offset or key. ---------------------

/// vocab.bpe + encoder.json, or merges.txt + vocab.json, or tokenizer.json, whichever is there, in this order.
BpeDefinition read_bpe_directory(const std::string& directory);
/// The contents of a tokenizer.json as Hugging Face's tokenizers write it: model BPE, pre-tokenizer ByteLevel. `file` is for messages.
BpeDefinition parse_tokenizer_json(const std::string& contents, const std::string& file);
/// The same, written: Hugging Face's tokenizers read it and give the same tokens.
std::string format_tokenizer_json(const BpeDefinition& definition);

/// The same as GPT-2's two files: vocab.json, special tokens in it, and merges.txt.
std::string format_vocabulary_json(const BpeDefinition& definition);
std::string format_merges(const BpeDefinition& definition);

/// The printable characters, in UTF-8, that stand for the bytes 0..255 in those files (GPT-2's table).
const std::array<std::string, 256>& byte_characters();
/// The bytes in the order of those characters' code points: the ids 0..255 of GPT-2 and of vocabularies trained here.
const std::array<unsigned char, 256>& byte_order();

// -- Encoding (bpe.cpp) -------------------------------------------------------------------------------------------------------------------

/// Makes the tokenizer. Throws std::invalid_argument, starting with `source`, when the definition lacks a byte, has a token or a merge twice, or has
/// no end of text.
std::unique_ptr<Tokenizer> make_bpe_tokenizer(BpeDefinition definition, const std::string& name, const std::string& source);

}  // namespace tessera
