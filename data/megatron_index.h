#pragma once
// The .idx of a Megatron pair (token_files.h has its layout), read from front to back in bounded memory however many sequences it lists.

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

namespace tessera {

enum class TokenType { u8, i8, u16, i16, u32, i32, i64 };
std::size_t size_of(TokenType type);  // bytes

class MegatronIndex {
 public:
  /// Throws std::invalid_argument when the file cannot be opened or is no such index, std::runtime_error when it is damaged.
  explicit MegatronIndex(const std::string& path);
  ~MegatronIndex();

  const std::string& path() const;
  TokenType type() const;
  /// Throws std::runtime_error when the file of tokens, of `bytes` bytes, does not end where the last sequence ends.
  void check_tokens(const std::string& file, std::uint64_t bytes) const;

  struct Sequence {
    std::uint64_t tokens;
    bool first;  // begins a document
  };
  /// The sequences in order, which lie one behind the other in the .bin; none at the end. Throws std::runtime_error naming a sequence or document.
  std::optional<Sequence> next();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace tessera
