#pragma once
// Files of tokens as other projects write them, byte by byte.

#include <cstdint>
#include <string>
#include <vector>

namespace tessera::test {

template <typename T>
std::string little_endian(const std::vector<T>& values) {
  std::string bytes;
  for (const T value : values)
    for (std::size_t i = 0; i < sizeof(T); ++i) bytes += static_cast<char>(static_cast<std::uint64_t>(value) >> (8 * i));
  return bytes;
}

/// llm.c: T is uint16 (magic 20240520, version 1) or uint32 (20240801, version 7).
template <typename T>
std::string llmc_file(const std::vector<T>& tokens) {
  std::vector<std::int32_t> header(256);
  header[0] = sizeof(T) == 2 ? 20240520 : 20240801;
  header[1] = sizeof(T) == 2 ? 1 : 7;
  header[2] = static_cast<std::int32_t>(tokens.size());
  return little_endian(header) + little_endian(tokens);
}

/// Megatron's .idx over sequences of these lengths; documents: the sequence each begins with, and the number of sequences.
inline std::string megatron_index(int type, std::size_t token_bytes, const std::vector<std::int32_t>& lengths,
                                  const std::vector<std::int64_t>& documents) {
  std::vector<std::int64_t> offsets;
  std::int64_t offset = 0;
  for (const std::int32_t length : lengths) {
    offsets.push_back(offset);
    offset += length * static_cast<std::int64_t>(token_bytes);
  }
  return std::string("MMIDIDX\0\0", 9) + little_endian<std::uint64_t>({1}) + static_cast<char>(type) +
         little_endian<std::uint64_t>({lengths.size(), documents.size()}) + little_endian(lengths) + little_endian(offsets) +
         little_endian(documents);
}

}  // namespace tessera::test
