#pragma once
// Prepared data: a folder of HDF5 shards a split.
//
//   DIR/dataset.json                manifest: format version, tokenizer (name, hash, vocabulary), splits, shards with tokens, documents,
//                                   bytes of text, SHA-256; written last
//   DIR/tokenizer.json              the tokenizer, self-contained (load_tokenizer("bpe:DIR/tokenizer.json"))
//   DIR/train/shard_00000.h5 ...    datasets `tokens` (uint16, or uint32 when the vocabulary wants it), `documents` (uint64: index of each
//   DIR/validation/shard_00000.h5   document's first token, plus the end); chunked, Fletcher-32; attributes say where they came from

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace tessera {

struct ShardInfo {
  std::string file;  // relative to the dataset folder
  std::uint64_t tokens = 0;
  std::uint64_t documents = 0;
  std::uint64_t text_bytes = 0;
  std::string sha256;
};

struct SplitInfo {
  std::vector<ShardInfo> shards;
  std::uint64_t tokens = 0, documents = 0, text_bytes = 0;
};

struct DatasetInfo {
  std::string directory;
  std::string tokenizer_name, tokenizer_hash;
  std::int64_t vocabulary = 0;
  std::uint32_t end_of_text = 0;
  SplitInfo train, validation;
};

/// Reads the manifest and checks that each shard is there with the stated size. Throws std::invalid_argument when `directory` is not a dataset,
/// std::runtime_error naming the file when a part is damaged.
DatasetInfo read_dataset(const std::string& directory);

/// All shards of a split as one long row of tokens, shard after shard. Reads are checked (Fletcher-32). Not thread-safe: one a thread.
class TokenReader {
 public:
  TokenReader(const DatasetInfo& info, const SplitInfo& split);
  ~TokenReader();
  std::uint64_t size() const;
  /// Copies tokens [first, first + out.size()).  Throws std::runtime_error naming the shard and the offset when it cannot be read as written.
  void read(std::uint64_t first, std::span<std::int32_t> out);
  /// For each of [first, first + out.size()): index of the first token of its document, minus `first`; negative when it lies before `first`.
  void read_document_starts(std::uint64_t first, std::span<std::int32_t> out);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace tessera
