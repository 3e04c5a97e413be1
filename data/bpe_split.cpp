#include "data/bpe_split.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <stdexcept>

namespace tessera {
namespace {

// The character classes of the published pattern, spelled out where PCRE2 alone would cut differently from tiktoken:
//  - \s: PCRE2 counts U+180E as a space, Unicode since 6.3 and the other implementations do not.
//  - \p{L}, \p{N}: PCRE2 10.42 (Debian 12, Ubuntu 24.04) knows Unicode 14. The ranges after \p{..} are what Unicode 15, 15.1 and 16 added, so that
//    an older and a newer library give the same tokens.
// ASCII stands first because PCRE2 tests it by bitmap, which is faster than the property tables.
constexpr const char* kSpace = R"(\t-\r \x{85}\x{A0}\x{1680}\x{2000}-\x{200A}\x{2028}\x{2029}\x{202F}\x{205F}\x{3000})";
constexpr const char* kLetter =
    R"(A-Za-z\p{L})"
    R"(\x{1C89}-\x{1C8A}\x{A7CB}-\x{A7CD}\x{A7DA}-\x{A7DC}\x{105C0}-\x{105F3}\x{10D4A}-\x{10D65}\x{10D6F}-\x{10D85}\x{10EC2}-\x{10EC4})"
    R"(\x{1123F}-\x{11240}\x{11380}-\x{11389}\x{1138B}\x{1138E}\x{11390}-\x{113B5}\x{113B7}\x{113D1}\x{113D3}\x{11BC0}-\x{11BE0}\x{11F02})"
    R"(\x{11F04}-\x{11F10}\x{11F12}-\x{11F33}\x{1342F}\x{13441}-\x{13446}\x{13460}-\x{143FA}\x{16100}-\x{1611D}\x{16D40}-\x{16D6C}\x{18CFF})"
    R"(\x{1B132}\x{1B155}\x{1DF25}-\x{1DF2A}\x{1E030}-\x{1E06D}\x{1E4D0}-\x{1E4EB}\x{1E5D0}-\x{1E5ED}\x{1E5F0}\x{2B739}\x{2EBF0}-\x{2EE5D})"
    R"(\x{31350}-\x{323AF})";
constexpr const char* kNumber =
    R"(0-9\p{N})"
    R"(\x{10D40}-\x{10D49}\x{116D0}-\x{116E3}\x{11BF0}-\x{11BF9}\x{11F50}-\x{11F59}\x{16130}-\x{16139}\x{16D70}-\x{16D79}\x{1CCF0}-\x{1CCF9})"
    R"(\x{1D2C0}-\x{1D2D3}\x{1E4F0}-\x{1E4F9}\x{1E5F1}-\x{1E5FA})";

std::string make_pattern() {
  const std::string s = kSpace, l = kLetter, n = kNumber;
  return "'s|'t|'re|'ve|'m|'ll|'d| ?[" + l + "]+| ?[" + n + "]+| ?[^" + s + l + n + "]+|[" + s + "]+(?![^" + s + "])|[" + s + "]+";
}

std::string pcre2_message(int code) {
  PCRE2_UCHAR text[256];
  pcre2_get_error_message(code, text, sizeof text);
  return reinterpret_cast<const char*>(text);
}

struct Pattern {
  Pattern() {
    const std::string& text = piece_pattern();
    int code = 0;
    PCRE2_SIZE offset = 0;
    regex = pcre2_compile(reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), PCRE2_UTF | PCRE2_ANCHORED, &code, &offset, nullptr);
    if (!regex) throw std::runtime_error("the tokenizer's pattern does not compile with this PCRE2: " + pcre2_message(code));
    jit = pcre2_jit_compile(regex, PCRE2_JIT_COMPLETE) == 0;  // false on a processor or kernel without it: slower, same result
  }
  pcre2_code* regex;
  bool jit;
};

using MatchData = std::unique_ptr<pcre2_match_data, decltype(&pcre2_match_data_free)>;

/// End of the piece that starts at `position` of the valid text.
std::size_t match_end(std::string_view text, std::size_t position) {
  static const Pattern pattern;  // compiled once, shared by all threads, never freed
  thread_local const MatchData match(pcre2_match_data_create(1, nullptr), pcre2_match_data_free);
  if (!match) throw std::bad_alloc();
  const auto subject = reinterpret_cast<PCRE2_SPTR>(text.data());
  const int found = pattern.jit ? pcre2_jit_match(pattern.regex, subject, text.size(), position, PCRE2_NO_UTF_CHECK, match.get(), nullptr)
                                : pcre2_match(pattern.regex, subject, text.size(), position, PCRE2_NO_UTF_CHECK, match.get(), nullptr);
  if (found < 0) throw std::runtime_error("cutting text into words failed at byte " + std::to_string(position) + ": " + pcre2_message(found));
  return pcre2_get_ovector_pointer(match.get())[1];
}

}  // namespace

const std::string& piece_pattern() {
  static const std::string pattern = make_pattern();
  return pattern;
}

bool ends_in_whitespace(std::string_view text) {  // kSpace, in UTF-8
  if (text.empty()) return false;
  const auto at = [&](std::size_t from_end) { return from_end <= text.size() ? static_cast<unsigned char>(text[text.size() - from_end]) : 0u; };
  const unsigned last = at(1);
  if (last < 0x80) return last == ' ' || (last >= '\t' && last <= '\r');
  if (at(2) == 0xC2) return last == 0x85 || last == 0xA0;
  switch (at(3) << 8 | at(2)) {
    case 0xE19A: return last == 0x80;
    case 0xE280: return last <= 0x8A || last == 0xA8 || last == 0xA9 || last == 0xAF;
    case 0xE281: return last == 0x9F;
    case 0xE380: return last == 0x80;
    default: return false;
  }
}

std::size_t valid_utf8_prefix(std::string_view text) {
  const auto* p = reinterpret_cast<const unsigned char*>(text.data());
  const std::size_t size = text.size();
  const auto continues = [&](std::size_t i, unsigned low = 0x80, unsigned high = 0xBF) { return i < size && p[i] >= low && p[i] <= high; };
  std::size_t i = 0;
  while (i < size) {
    std::uint64_t eight;
    if (i + sizeof eight <= size && (std::memcpy(&eight, p + i, sizeof eight), (eight & 0x8080808080808080u) == 0)) {
      i += sizeof eight;
      continue;
    }
    const unsigned c = p[i];  // the table of well-formed sequences: Unicode Standard, table 3-7
    if (c < 0x80) {
      i += 1;
    } else if (c >= 0xC2 && c <= 0xDF && continues(i + 1)) {
      i += 2;
    } else if (c >= 0xE0 && c <= 0xEF && continues(i + 1, c == 0xE0 ? 0xA0 : 0x80, c == 0xED ? 0x9F : 0xBF) && continues(i + 2)) {
      i += 3;
    } else if (c >= 0xF0 && c <= 0xF4 && continues(i + 1, c == 0xF0 ? 0x90 : 0x80, c == 0xF4 ? 0x8F : 0xBF) && continues(i + 2) && continues(i + 3)) {
      i += 4;
    } else {
      break;
    }
  }
  return i;
}

bool PieceSplitter::next(std::string_view& piece) {
  if (position_ == valid_end_) {
    if (position_ == text_.size()) return false;
    valid_end_ += valid_utf8_prefix(text_.substr(position_));
    if (position_ == valid_end_) {  // not the start of a character
      piece = text_.substr(position_, 1);
      valid_end_ = ++position_;
      return true;
    }
  }
  const std::size_t end = match_end(text_.substr(0, valid_end_), position_);
  piece = text_.substr(position_, end - position_);
  position_ = end;
  return true;
}

}  // namespace tessera
