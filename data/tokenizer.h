#pragma once
// Text <-> tokens. All tokenizers work on bytes: any input, valid UTF-8 or not, encodes, and decode(encode(x)) == x. In a BPE a byte that is not
// part of a valid character is the token of that byte; the valid stretches between such bytes are encoded as texts of their own.

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace tessera {

class Tokenizer {
 public:
  virtual ~Tokenizer() = default;

  /// Appends the tokens of `text`. Special tokens in the text are ordinary text: only end_of_text() makes one. Thread-safe on a const object.
  virtual void encode(std::string_view text, std::vector<std::uint32_t>& out) const = 0;
  /// Appends the bytes of a token; end_of_text() appends nothing. Throws std::out_of_range for an id outside the vocabulary.
  virtual void decode(std::uint32_t token, std::string& out) const = 0;

  virtual std::int64_t vocabulary() const = 0;    // ids are 0 .. vocabulary()-1
  virtual std::uint32_t end_of_text() const = 0;  // separates documents; stands before each
  virtual std::string name() const = 0;           // "bytes", "gpt2", "bpe"
  virtual std::string hash() const = 0;           // SHA-256 (hex) of what defines the token ids: equal hash, equal tokens
  /// Writes the tokenizer as one self-contained file that load_tokenizer("bpe:FILE") reads back (bytes writes a one-line file).
  virtual void save(const std::string& file) const = 0;

  std::vector<std::uint32_t> encode(std::string_view text) const;
  std::string decode(const std::vector<std::uint32_t>& tokens) const;
};

/// SPEC: "bytes" | "gpt2:DIR" (vocab.bpe + encoder.json, or merges.txt + vocab.json, or tokenizer.json) | "bpe:FILE".
/// Throws std::invalid_argument naming the file, line or key, what was expected and what to do.
std::unique_ptr<Tokenizer> load_tokenizer(const std::string& spec);

}  // namespace tessera
