#include "data/token_files.h"

#include <fmt/core.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <filesystem>
#include <span>
#include <stdexcept>
#include <string_view>
#include <utility>
#include <vector>

#include "data/byte_source.h"
#include "data/document_reader.h"
#include "data/megatron_index.h"

namespace tessera {
namespace fs = std::filesystem;
namespace {

static_assert(std::endian::native == std::endian::little, "the formats are little-endian and read as they lie");

constexpr std::size_t kBufferTokens = 64 << 10;
constexpr std::size_t kLlmcHeader = 256;  // numbers of 4 bytes
constexpr std::uint32_t kLlmcEvaluation = 20240522;

/// Tokens of one stream, cut into documents at each end of text and into pieces.
class TokenSource : public EntrySource {
 public:
  TokenSource(std::string path, std::unique_ptr<ByteSource> source, TokenType type, const TokenLimits& limits)
      : path_(std::move(path)), source_(std::move(source)), type_(type), limits_(limits) {}

  std::uint64_t consumed() const override { return source_->consumed(); }

  bool next(std::vector<Entry>& out) override {
    Entry entry;
    while (true) {
      const auto begin = buffer_.begin() + static_cast<std::ptrdiff_t>(at_);
      const auto wanted = std::min(buffer_.size() - at_, kPieceTokens - entry.tokens.size());
      const auto end = std::find(begin, begin + static_cast<std::ptrdiff_t>(wanted), limits_.end_of_text);
      entry.tokens.insert(entry.tokens.end(), begin, end);
      at_ += static_cast<std::size_t>(end - begin);
      if (entry.tokens.size() == kPieceTokens) return give(std::move(entry), false, out);
      if (at_ < buffer_.size()) {
        ++at_;
        if (!entry.tokens.empty()) return give(std::move(entry), true, out);
        first_ = true;
        continue;
      }
      at_ = 0;
      buffer_.clear();
      if (!fill(buffer_)) return !entry.tokens.empty() && give(std::move(entry), true, out);
    }
  }

 protected:
  /// Adds at least one token; false at the end of the file.
  virtual bool fill(std::vector<std::uint32_t>& out) = 0;

  /// Reads up to `count` tokens; fewer only at the end of the file, which may leave a part of one: its bytes are returned.
  std::size_t read_tokens(std::size_t count, std::vector<std::uint32_t>& out) {
    const std::size_t size = size_of(type_);
    bytes_.resize(count * size);
    std::size_t have = 0;
    while (have < bytes_.size()) {
      const std::size_t got = source_->read(std::span(bytes_).subspan(have));
      if (got == 0) break;
      have += got;
    }
    const std::size_t whole = have / size;
    switch (type_) {
      case TokenType::u8: convert<std::uint8_t>(whole, out); break;
      case TokenType::i8: convert<std::int8_t>(whole, out); break;
      case TokenType::u16: convert<std::uint16_t>(whole, out); break;
      case TokenType::i16: convert<std::int16_t>(whole, out); break;
      case TokenType::u32: convert<std::uint32_t>(whole, out); break;
      case TokenType::i32: convert<std::int32_t>(whole, out); break;
      case TokenType::i64: convert<std::int64_t>(whole, out); break;
    }
    offset_ += have;
    return have % size;
  }

  [[noreturn]] void fail(const std::string& what) const { throw std::runtime_error(path_ + ": " + what); }

  const std::string path_;
  const std::unique_ptr<ByteSource> source_;
  const TokenType type_;
  const TokenLimits limits_;
  std::uint64_t offset_ = 0;  // in the file (uncompressed) of the next token

 private:
  bool give(Entry entry, bool ends, std::vector<Entry>& out) {
    entry.first = std::exchange(first_, ends);
    out.push_back(std::move(entry));
    return true;
  }

  template <typename T>
  void convert(std::size_t count, std::vector<std::uint32_t>& out) const {
    out.reserve(out.size() + count);
    for (std::size_t i = 0; i < count; ++i) {
      T value;
      std::memcpy(&value, bytes_.data() + i * sizeof(T), sizeof(T));
      const auto token = static_cast<std::int64_t>(value);
      if (token < 0 || token >= limits_.vocabulary)
        fail(
            fmt::format("token {} at offset {} lies outside the tokenizer's vocabulary of {} tokens; expected a file made with the tokenizer that "
                        "--tokenizer names",
                        token, offset_ + i * sizeof(T), limits_.vocabulary));
      out.push_back(static_cast<std::uint32_t>(token));
    }
  }

  std::vector<char> bytes_;
  std::vector<std::uint32_t> buffer_;  // tokens not yet given out, from at_
  std::size_t at_ = 0;
  bool first_ = true;  // the next token begins a document
};

std::uint64_t size_on_disk(const std::string& path) {
  std::error_code error;
  const std::uint64_t size = fs::file_size(path, error);
  if (error) throw std::invalid_argument(fmt::format("{}: cannot be opened: {}", path, error.message()));
  return size;
}

bool is_compressed(const std::string& path) { return path.ends_with(".gz") || path.ends_with(".zst"); }
bool is_regular(const std::string& path) {
  std::error_code ignored;
  return path != "-" && fs::is_regular_file(path, ignored);
}

class LlmcSource : public TokenSource {
 public:
  static std::unique_ptr<EntrySource> open(const std::string& path, const TokenLimits& limits) {
    auto source = open_source(path);  // no magic number begins as compressed data does
    std::array<std::uint32_t, kLlmcHeader> header{};
    const auto bytes = std::as_writable_bytes(std::span(header));
    std::size_t have = 0;
    while (have < bytes.size()) {
      const std::size_t got = source->read({reinterpret_cast<char*>(bytes.data()) + have, bytes.size() - have});
      if (got == 0) break;
      have += got;
    }
    const std::uint32_t magic = header[0], version = header[1], count = header[2];
    if (have >= sizeof magic && magic == kLlmcEvaluation)
      throw std::invalid_argument(fmt::format("{}: llm.c's questions for evaluation (magic {}), expected tokens to train on", path, magic));
    if (have < sizeof magic || !is_llmc_magic(magic))
      throw std::invalid_argument(fmt::format("{}: not a file of llm.c's tokens: expected {} or {} at its start, found {}", path, kLlmcMagic16,
                                              kLlmcMagic32, have < sizeof magic ? fmt::format("{} bytes", have) : std::to_string(magic)));
    if (have < bytes.size())
      throw std::runtime_error(fmt::format("{}: cut short: {} bytes, expected llm.c's header of {} bytes and then tokens", path, have, bytes.size()));
    const std::uint32_t expected = magic == kLlmcMagic16 ? 1 : 7;
    if (version != expected)
      throw std::runtime_error(fmt::format("{}: version {} in llm.c's header, expected {} with magic {}", path, version, expected, magic));
    if (count > INT32_MAX)
      throw std::runtime_error(fmt::format("{}: {} tokens in llm.c's header, expected 0 to {}", path, static_cast<std::int32_t>(count), INT32_MAX));
    const TokenType type = magic == kLlmcMagic16 ? TokenType::u16 : TokenType::u32;
    std::unique_ptr<LlmcSource> out(new LlmcSource(path, std::move(source), type, limits, count));
    if (is_regular(path) && !is_compressed(path)) out->check_size(size_on_disk(path));
    return out;
  }

 private:
  LlmcSource(const std::string& path, std::unique_ptr<ByteSource> source, TokenType type, const TokenLimits& limits, std::uint64_t count)
      : TokenSource(path, std::move(source), type, limits), count_(count), left_(count) {
    offset_ = kHeaderBytes;
  }

  bool fill(std::vector<std::uint32_t>& out) override {
    if (left_ == 0) {
      char more;
      if (source_->read({&more, 1}) > 0)
        fail(fmt::format("too long: llm.c's header promises {} tokens, which end at offset {}, and the file goes on", count_, offset_));
      return false;
    }
    read_tokens(std::min<std::uint64_t>(left_, kBufferTokens), out);
    if (out.empty()) check_size(offset_);
    left_ -= out.size();
    return true;
  }

  void check_size(std::uint64_t size) const {
    const std::uint64_t expected = kHeaderBytes + count_ * size_of(type_);
    if (size != expected)
      fail(fmt::format("{}: {} bytes, where llm.c's header promises {} tokens, {} bytes in all", size < expected ? "cut short" : "too long", size,
                       count_, expected));
  }

  static constexpr std::uint64_t kHeaderBytes = 4 * kLlmcHeader;
  const std::uint64_t count_;
  std::uint64_t left_;
};

class NanoGptSource : public TokenSource {
 public:
  static std::unique_ptr<EntrySource> open(const std::string& path, const TokenLimits& limits) {
    // Tokens may begin as compressed data does, so here the name decides.
    const bool compressed = is_compressed(path);
    if (is_regular(path) && !compressed) {
      std::uint32_t magic = 0;
      const auto source = open_plain_source(path);
      if (source->read({reinterpret_cast<char*>(&magic), sizeof magic}) == sizeof magic && is_llmc_magic(magic))
        throw std::invalid_argument(fmt::format("{}: has llm.c's header (magic {}), which nanoGPT's files have not; pass no --format", path, magic));
      if (const std::uint64_t size = size_on_disk(path); size % 2 != 0)
        throw std::runtime_error(fmt::format("{}: cut short, or not nanoGPT's: {} bytes, expected an even number (uint16 tokens)", path, size));
    }
    return std::unique_ptr<EntrySource>(new NanoGptSource(path, compressed ? open_source(path) : open_plain_source(path), TokenType::u16, limits));
  }

 private:
  using TokenSource::TokenSource;
  bool fill(std::vector<std::uint32_t>& out) override {
    if (read_tokens(kBufferTokens, out) != 0)
      fail(fmt::format("cut short, or not nanoGPT's: {} bytes, expected an even number (uint16 tokens)", offset_));
    return !out.empty();
  }
};

/// A Megatron pair: the index says how many tokens come before the next document.
class MegatronSource : public TokenSource {
 public:
  static std::unique_ptr<EntrySource> open(const std::string& path, const TokenLimits& limits) {
    const std::string tokens = fs::path(path).replace_extension(".bin").string();
    auto index = std::make_unique<MegatronIndex>(fs::path(path).replace_extension(".idx").string());
    if (!is_regular(tokens)) throw std::invalid_argument(fmt::format("{}: is missing or no file; {} is its index", tokens, index->path()));
    index->check_tokens(tokens, size_on_disk(tokens));
    return std::unique_ptr<EntrySource>(new MegatronSource(tokens, std::move(index), limits));
  }

 private:
  MegatronSource(const std::string& path, std::unique_ptr<MegatronIndex> index, const TokenLimits& limits)
      : TokenSource(path, open_plain_source(path), index->type(), limits), index_(std::move(index)) {}

  bool fill(std::vector<std::uint32_t>& out) override {
    while (out.size() < kBufferTokens) {
      if (left_ == 0) {
        const auto sequence = index_->next();
        if (!sequence) break;
        if (sequence->first) out.push_back(limits_.end_of_text);  // it separates the documents
        left_ = sequence->tokens;
        continue;
      }
      const std::size_t before = out.size(), wanted = std::min<std::uint64_t>(left_, kBufferTokens - before);
      read_tokens(wanted, out);
      if (out.size() - before < wanted)
        fail(fmt::format("cut short while being read: it ends at offset {}, which {} does not", offset_, index_->path()));
      left_ -= wanted;
    }
    return !out.empty();
  }

  const std::unique_ptr<MegatronIndex> index_;
  std::uint64_t left_ = 0;  // tokens of the sequence that are not read yet
};

}  // namespace

std::unique_ptr<EntrySource> open_token_file(const std::string& path, InputFormat format, const TokenLimits& limits) {
  switch (format) {
    case InputFormat::llmc: return LlmcSource::open(path, limits);
    case InputFormat::nanogpt: return NanoGptSource::open(path, limits);
    case InputFormat::megatron: return MegatronSource::open(path, limits);
    default: throw std::logic_error(fmt::format("{}: {} is no format of tokens", path, to_string(format)));
  }
}

}  // namespace tessera
