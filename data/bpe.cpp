#include "data/bpe.h"

#include <fmt/core.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string_view>
#include <unordered_map>

#include "data/bpe_merge.h"
#include "data/bpe_split.h"
#include "data/files.h"
#include "data/sha256.h"

namespace tessera {
namespace {

// The tokens of pieces seen lately. One table a thread, so there is nothing to lock; every BPE tokenizer uses it and its entries name their owner, so
// it stays 2 MiB a thread whatever the number of tokenizers. A new piece simply takes the place of the one that had its slot.
class PieceCache {
 public:
  static constexpr std::size_t kBytes = 26, kTokens = 8;  // covers all but about one piece in 10,000 of English text
  struct alignas(64) Entry {                              // a cache line
    std::uint32_t owner;                                  // 0: empty
    std::uint8_t size, count;
    char piece[kBytes];
    std::uint32_t tokens[kTokens];
  };
  static_assert(sizeof(Entry) == 64);

  /// The only slot that may hold this piece.
  Entry& slot(std::string_view piece) { return entries_[hash(piece) >> (64 - kLogEntries)]; }
  static bool holds(const Entry& entry, std::uint32_t owner, std::string_view piece) {
    return entry.owner == owner && entry.size == piece.size() && std::memcmp(entry.piece, piece.data(), piece.size()) == 0;
  }

 private:
  static constexpr int kLogEntries = 15;

  static std::uint64_t load(const char* from, std::size_t bytes) {
    std::uint64_t value = 0;
    std::memcpy(&value, from, bytes);
    return value;
  }
  static std::uint64_t hash(std::string_view piece) {
    constexpr std::uint64_t kOdd = 0x9E3779B97F4A7C15u;
    const char* p = piece.data();
    const std::size_t n = piece.size();
    std::uint64_t h = n;
    if (n >= 8) {
      for (std::size_t i = 0; i + 8 < n; i += 8) h = (h ^ load(p + i, 8)) * kOdd, h ^= h >> 29;
      h ^= load(p + n - 8, 8);  // the last eight bytes, overlapping those before
    } else if (n >= 4) {
      h ^= load(p, 4) | load(p + n - 4, 4) << 32;
    } else {
      h ^= load(p, 1) | load(p + n / 2, 1) << 8 | load(p + n - 1, 1) << 16 | n << 24;
    }
    h *= kOdd;
    return (h ^ h >> 32) * kOdd;
  }

  std::unique_ptr<Entry[]> entries_ = std::make_unique<Entry[]>(std::size_t{1} << kLogEntries);
};

std::string definition_hash(const BpeDefinition& d) {
  std::string bytes = "byte-level BPE, Unicode 16\n" + piece_pattern() + "\n";
  const auto put = [&](std::uint64_t n) {  // little-endian, so that the hash is the same on every machine
    for (int i = 0; i < 8; ++i) bytes += static_cast<char>(n >> 8 * i);
  };
  put(d.tokens.size());
  for (const std::string& token : d.tokens) put(token.size()), bytes += token;
  put(d.merges.size());
  for (const BpeMerge& merge : d.merges) put(merge.left), put(merge.right);
  put(d.special.size());
  for (const std::uint32_t id : d.special) put(id);
  put(d.end_of_text);
  return sha256_hex(bytes);
}

class BpeTokenizer final : public Tokenizer {
 public:
  BpeTokenizer(BpeDefinition definition, const std::string& name)
      : definition_(std::move(definition)), name_(name), hash_(definition_hash(definition_)), merges_(definition_.merges) {
    static std::atomic<std::uint32_t> made{0};
    owner_ = ++made;
    for (std::uint32_t id = 0; id < definition_.tokens.size(); ++id) {
      const std::string& token = definition_.tokens[id];
      if (token.size() == 1 && !is_special(id)) byte_token_[static_cast<unsigned char>(token[0])] = id;
    }
  }

  using Tokenizer::decode;
  using Tokenizer::encode;

  void encode(std::string_view text, std::vector<std::uint32_t>& out) const override {
    thread_local PieceCache cache;
    std::uint32_t buffer[kBuffer + PieceCache::kTokens];  // tokens on their way to `out`, which would check its capacity for each
    std::size_t held = 0;
    const auto flush = [&] {
      out.insert(out.end(), buffer, buffer + held);
      held = 0;
    };
    PieceSplitter pieces(text);
    for (std::string_view piece; pieces.next(piece);) {
      if (piece.size() > PieceCache::kBytes) {
        flush();
        append_piece(piece, out);
        continue;
      }
      PieceCache::Entry& entry = cache.slot(piece);
      if (!PieceCache::holds(entry, owner_, piece)) {
        std::uint32_t tokens[PieceCache::kBytes];
        const std::size_t count = merge_piece(piece, tokens);
        if (count > PieceCache::kTokens) {
          flush();
          out.insert(out.end(), tokens, tokens + count);
          continue;
        }
        entry.owner = owner_;
        entry.size = static_cast<std::uint8_t>(piece.size());
        entry.count = static_cast<std::uint8_t>(count);
        std::memcpy(entry.piece, piece.data(), piece.size());
        std::memcpy(entry.tokens, tokens, count * sizeof *tokens);
      }
      std::memcpy(buffer + held, entry.tokens, sizeof entry.tokens);  // a fixed size is faster than `count`; the rest is overwritten next
      held += entry.count;
      if (held > kBuffer) flush();
    }
    flush();
  }

  void decode(std::uint32_t token, std::string& out) const override {
    if (token >= definition_.tokens.size()) {
      throw std::out_of_range(fmt::format("token {} is not in the vocabulary of {} tokens", token, definition_.tokens.size()));
    }
    if (token != definition_.end_of_text) out += definition_.tokens[token];
  }

  std::int64_t vocabulary() const override { return static_cast<std::int64_t>(definition_.tokens.size()); }
  std::uint32_t end_of_text() const override { return definition_.end_of_text; }
  std::string name() const override { return name_; }
  std::string hash() const override { return hash_; }
  void save(const std::string& file) const override { write_file(file, format_tokenizer_json(definition_)); }

 private:
  static constexpr std::size_t kBuffer = 2048;

  bool is_special(std::uint32_t id) const { return std::binary_search(definition_.special.begin(), definition_.special.end(), id); }

  std::size_t merge_piece(std::string_view piece, std::uint32_t* tokens) const {
    for (std::size_t i = 0; i < piece.size(); ++i) tokens[i] = byte_token_[static_cast<unsigned char>(piece[i])];
    return merges_.merge({tokens, piece.size()});
  }
  void append_piece(std::string_view piece, std::vector<std::uint32_t>& out) const {
    const std::size_t before = out.size();
    out.resize(before + piece.size());
    out.resize(before + merge_piece(piece, out.data() + before));
  }

  BpeDefinition definition_;
  std::string name_, hash_;
  MergeTable merges_;
  std::uint32_t owner_ = 0;
  std::array<std::uint32_t, 256> byte_token_{};
};

void check_definition(const BpeDefinition& d, const std::string& source) {
  const auto fail = [&](const std::string& what) { throw std::invalid_argument(source + ": " + what); };
  const auto is_special = [&](std::uint32_t id) { return std::binary_search(d.special.begin(), d.special.end(), id); };
  if (!is_special(d.end_of_text)) fail(fmt::format("no end-of-text token: expected {} in the vocabulary", kEndOfText));
  std::unordered_map<std::string_view, std::uint32_t> id_of;
  for (std::uint32_t id = 0; id < d.tokens.size(); ++id) {
    if (d.tokens[id].empty()) fail(fmt::format("token {} is empty", id));
    if (is_special(id)) continue;
    const auto [other, is_new] = id_of.emplace(d.tokens[id], id);
    if (!is_new) fail(fmt::format("tokens {} and {} stand for the same bytes", other->second, id));
  }
  for (int byte = 0; byte < 256; ++byte) {
    const char c = static_cast<char>(byte);
    if (!id_of.contains({&c, 1})) {
      fail(fmt::format("not a byte-level vocabulary: byte {} (written {}) has no token", byte, byte_characters()[byte]));
    }
  }
  for (const BpeMerge& m : d.merges) {
    if (std::max({m.left, m.right, m.result}) >= d.tokens.size() || is_special(m.left) || is_special(m.right) || is_special(m.result) ||
        d.tokens[m.result] != d.tokens[m.left] + d.tokens[m.right]) {
      fail(fmt::format("merge of tokens {} and {} into {}: no such ordinary tokens, or not their bytes", m.left, m.right, m.result));
    }
  }
}

}  // namespace

const std::array<unsigned char, 256>& byte_order() {
  static const auto order = [] {
    std::array<unsigned char, 256> bytes;
    for (int i = 0; i < 256; ++i) bytes[i] = static_cast<unsigned char>(i);
    // Printable Latin-1 first; the others follow, because their stand-ins lie above U+00FF.
    const auto printable = [](unsigned char b) { return (b >= 0x21 && b <= 0x7E) || (b >= 0xA1 && b != 0xAD); };
    std::stable_partition(bytes.begin(), bytes.end(), printable);
    return bytes;
  }();
  return order;
}

const std::array<std::string, 256>& byte_characters() {
  static const auto characters = [] {
    constexpr int kPrintable = 188;
    std::array<std::string, 256> out;
    for (int i = 0; i < 256; ++i) {
      const int byte = byte_order()[i], code = i < kPrintable ? byte : 256 + i - kPrintable;
      if (code < 0x80) {
        out[byte] = static_cast<char>(code);
      } else {
        out[byte] = {static_cast<char>(0xC0 | code >> 6), static_cast<char>(0x80 | (code & 0x3F))};
      }
    }
    return out;
  }();
  return characters;
}

std::unique_ptr<Tokenizer> make_bpe_tokenizer(BpeDefinition definition, const std::string& name, const std::string& source) {
  check_definition(definition, source);
  try {
    return std::make_unique<BpeTokenizer>(std::move(definition), name);
  } catch (const std::invalid_argument& error) {
    throw std::invalid_argument(source + ": " + error.what());
  }
}

}  // namespace tessera
