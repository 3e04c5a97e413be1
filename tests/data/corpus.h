#pragma once
// Small corpora and datasets for the tests of the data room.

#include <algorithm>
#include <random>
#include <string>
#include <vector>

#include "data/dataset.h"
#include "data/prepare.h"
#include "data/tokenizer.h"
#include "tests/data/support.h"

namespace tessera::test {

/// Words of random letters, lines and paragraphs: `bytes` of them, a function of the seed.
inline std::string words(std::size_t bytes, unsigned seed) {
  std::mt19937 random(seed);
  std::string out;
  while (out.size() < bytes) {
    out.append(1 + random() % 9, static_cast<char>('a' + random() % 26));
    out += random() % 12 ? " " : random() % 3 ? "\n" : "\n\n";
  }
  out.resize(bytes);
  return out;
}

/// Documents of 1 to 400 bytes, as text of a .jsonl file (no characters that JSON would escape).
inline std::string jsonl(int documents, unsigned seed) {
  std::string out;
  for (int i = 0; i < documents; ++i) {
    std::string text = words(1 + (seed * 7919 + static_cast<unsigned>(i) * 104729) % 400, seed * 1000 + static_cast<unsigned>(i));
    std::replace(text.begin(), text.end(), '\n', ' ');
    out += "{\"text\": \"" + text + "\"}\n";
  }
  return out;
}

inline PrepareSummary prepare(const std::vector<std::string>& inputs, const std::string& output, double fraction = 0.1,
                              std::uint64_t shard_tokens = 100'000'000, int threads = 2) {
  PrepareOptions options;
  options.inputs = inputs;
  options.output = output;
  options.validation_fraction = fraction;
  options.shard_tokens = shard_tokens;
  options.threads = threads;
  return prepare_dataset(*load_tokenizer("bytes"), options);
}

inline std::vector<std::int32_t> all_tokens(const DatasetInfo& info, const SplitInfo& split) {
  TokenReader reader(info, split);
  std::vector<std::int32_t> out(reader.size());
  reader.read(0, out);
  return out;
}

/// The documents of a split of a dataset of bytes.
inline std::vector<std::string> documents_of(const DatasetInfo& info, const SplitInfo& split) {
  std::vector<std::string> out;
  for (const std::int32_t token : all_tokens(info, split)) {
    if (token == 256) {
      out.emplace_back();
    } else {
      out.back() += static_cast<char>(token);
    }
  }
  return out;
}

}  // namespace tessera::test
