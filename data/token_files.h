#pragma once
// Files that hold tokens already. All numbers are little-endian.
//
//   llm.c, modded-nanogpt   .bin: 256 int32 (magic, version, number of tokens, the rest unused), then the tokens. Magic 20240520, version 1: uint16;
//                           20240801, version 7: uint32. May be compressed (gzip, Zstandard)
//   nanoGPT                 .bin: uint16 tokens and nothing else. May be compressed
//   Megatron                .bin: tokens; .idx: "MMIDIDX\0\0", version 1 (uint64), type of a token (uint8: 1 uint8, 2 int8, 3 int16, 4 int32,
//                           5 int64, 8 uint16), numbers S of sequences and D of indices (uint64), S lengths (int32), S offsets in bytes (int64),
//                           D indices (int64): document i is the sequences [index i, index i + 1)
//
// Where the tokenizer's end of text stands, a document ends, in all of them, and where Megatron's index says so. A file is complete in itself:
// what stands before its first end of text is a document, also where the writer cut one in two between files. Documents without tokens are
// left out, as they are in text.

#include <cstdint>
#include <memory>
#include <string>

#include "data/entry_source.h"
#include "data/input_format.h"

namespace tessera {

constexpr std::uint32_t kLlmcMagic16 = 20240520, kLlmcMagic32 = 20240801;
constexpr bool is_llmc_magic(std::uint32_t number) { return number == kLlmcMagic16 || number == kLlmcMagic32; }

/// The tokenizer that the tokens are of.
struct TokenLimits {
  std::int64_t vocabulary = 0;  // every token is less
  std::uint32_t end_of_text = 0;
};

/// `format`: llmc, nanogpt or megatron. Throws std::invalid_argument when the file cannot be opened or is no such file, std::runtime_error when it
/// is damaged or cut short (at once where its size says so) or a token lies beyond the vocabulary (while reading).
std::unique_ptr<EntrySource> open_token_file(const std::string& path, InputFormat format, const TokenLimits& limits);

}  // namespace tessera
