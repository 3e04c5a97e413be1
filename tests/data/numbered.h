#pragma once
// Token data of any size that says of itself where it lies: from the tokens of a sequence alone follows where in the corpus it was taken, and whether
// every one of them is right. What a loader delivers can so be counted against the corpus without asking the sampler.
//
// Documents of kDocument tokens: end of text, the document's number in four bytes, then bytes that a hash makes of the token's place.

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

namespace tessera::test {

constexpr std::uint64_t kDocument = 1000;

inline std::uint32_t numbered_token(std::uint64_t place, std::uint32_t end_of_text) {
  const std::uint64_t document = place / kDocument, within = place % kDocument;
  if (within == 0) return end_of_text;
  if (within <= 4) return static_cast<std::uint32_t>(document >> 8 * (within - 1) & 0xff);
  return static_cast<std::uint32_t>((place * 0x9e3779b97f4a7c15u) >> 56);
}

/// Where in the corpus a sequence of at least kDocument + 4 tokens lies.
inline std::uint64_t place_of(std::span<const std::int32_t> tokens, std::uint32_t end_of_text) {
  for (std::size_t at = 0; at + 4 < tokens.size(); ++at) {
    if (tokens[at] != static_cast<std::int32_t>(end_of_text)) continue;
    std::uint64_t document = 0;
    for (std::size_t i = 0; i < 4; ++i) document |= static_cast<std::uint64_t>(tokens[at + 1 + i]) << 8 * i;
    return document * kDocument - at;
  }
  throw std::runtime_error("no end of text in a sequence: it is not of the numbered corpus");
}

/// Throws unless tokens, targets and document starts are those of the corpus at `place`.
inline void check_sequence(std::uint64_t place, std::uint32_t end_of_text, std::span<const std::int32_t> tokens,
                           std::span<const std::int32_t> targets, std::span<const std::int32_t> starts) {
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    const std::uint64_t within = (place + i) % kDocument;
    const std::int32_t start = within > i ? 0 : static_cast<std::int32_t>(i - within);
    if (tokens[i] != static_cast<std::int32_t>(numbered_token(place + i, end_of_text)) ||
        targets[i] != static_cast<std::int32_t>(numbered_token(place + i + 1, end_of_text)) || starts[i] != start)
      throw std::runtime_error("token " + std::to_string(place + i) + " is not what the corpus has there");
  }
}

/// The first `tokens` tokens as files of llm.c.
inline void write_numbered(const std::string& folder, std::uint64_t tokens, std::uint64_t files, std::uint32_t end_of_text) {
  std::filesystem::create_directories(folder);
  // Files end where documents do: each is complete in itself.
  const std::uint64_t documents = (tokens + kDocument - 1) / kDocument, per_file = (documents + files - 1) / files;
  for (std::uint64_t file = 0; file * per_file < documents; ++file) {
    const std::uint64_t first = file * per_file * kDocument, last = std::min((file + 1) * per_file * kDocument, tokens);
    std::ofstream out(folder + "/tokens_" + std::to_string(100000 + file) + ".bin", std::ios::binary);
    std::vector<std::int32_t> header(256);
    header[0] = 20240520;
    header[1] = 1;
    header[2] = static_cast<std::int32_t>(last - first);
    out.write(reinterpret_cast<const char*>(header.data()), 1024);
    std::vector<std::uint16_t> buffer;
    for (std::uint64_t place = first; place < last;) {
      buffer.clear();
      for (; place < last && buffer.size() < 1 << 20; ++place) buffer.push_back(static_cast<std::uint16_t>(numbered_token(place, end_of_text)));
      out.write(reinterpret_cast<const char*>(buffer.data()), static_cast<std::streamsize>(2 * buffer.size()));
    }
    if (!out.flush()) throw std::runtime_error(folder + ": cannot be written");
  }
}

/// Which sequences of an epoch have come.
class Coverage {
 public:
  explicit Coverage(std::uint64_t sequences) : seen_(sequences) {}
  /// Throws when it came before, or is no sequence.
  void add(std::uint64_t sequence) {
    if (sequence >= seen_.size()) throw std::runtime_error("sequence " + std::to_string(sequence) + " lies beyond the last");
    if (seen_[sequence]) throw std::runtime_error("sequence " + std::to_string(sequence) + " came twice in one epoch");
    seen_[sequence] = true;
    ++count_;
  }
  std::uint64_t count() const { return count_; }
  bool complete() const { return count_ == seen_.size(); }
  void clear() {
    seen_.assign(seen_.size(), false);
    count_ = 0;
  }

 private:
  std::vector<bool> seen_;
  std::uint64_t count_ = 0;
};

}  // namespace tessera::test
