#pragma once
// What is in a dataset, for `tessera inspect`: how long its documents are, and some of them as text.

#include <cstdint>
#include <string>
#include <vector>

#include "data/dataset.h"
#include "data/tokenizer.h"

namespace tessera {

/// Documents by their length in tokens, the end-of-text token before each counted: bucket i holds those of 2^i to 2^(i+1) - 1.
struct LengthHistogram {
  struct Bucket {
    std::uint64_t documents = 0, tokens = 0;
  };
  std::vector<Bucket> buckets;  // up to the longest
  std::uint64_t documents = 0, tokens = 0, shortest = 0, median = 0, longest = 0;
};
/// Reads where documents begin, and no token. Memory: 4 bytes a document. Throws std::runtime_error naming the shard that cannot be read.
LengthHistogram document_lengths(const DatasetInfo& info, const SplitInfo& split);

struct DocumentSample {
  std::uint64_t number = 0;       // in the split
  std::string shard;              // in which it begins
  std::uint64_t first_token = 0;  // in that shard: its end-of-text token
  std::uint64_t tokens = 0;
  std::string text;  // of its first tokens
  bool whole = true;
};
/// `count` documents drawn by `seed`, none twice, all when there are fewer; of each the text of at most `most_tokens` tokens.
std::vector<DocumentSample> sample_documents(const DatasetInfo& info, const SplitInfo& split, const Tokenizer& tokenizer, std::uint64_t count,
                                             std::uint64_t seed, std::uint64_t most_tokens);

}  // namespace tessera
