#pragma once
// Prepared data: a folder of HDF5 shards a split.
//
//   DIR/dataset.json                manifest: format version, tokenizer (name, hash, vocabulary), how it was prepared, splits, shards with
//                                   tokens, documents, bytes of text, bytes of the file, SHA-256, inputs; sources; its own SHA-256; written last
//   DIR/tokenizer.json              the tokenizer, self-contained (load_tokenizer("bpe:DIR/tokenizer.json"))
//   DIR/train/shard_00000.h5 ...    datasets `tokens` (uint16, or uint32 when the vocabulary wants it), `documents` (uint64: index of each
//   DIR/validation/shard_00000.h5   document's first token, plus the end); chunked, Fletcher-32; attributes say where they came from
//
// The shards of a split are one long row of tokens: all but the last hold the same number, and a document may begin in one and end in the
// next (then the first index in `documents` is not 0, or the shard has no document of its own).

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace tessera {

class Hdf5File;

constexpr std::int64_t kDatasetVersion = 1;   // of shards
constexpr std::int64_t kManifestVersion = 2;  // 1 had no SHA-256 of its own, no inputs of shards and no tokens of sources; it is still read

/// A stretch of an input file's documents that a shard holds documents of. Documents are numbered from 0 in their file.
struct ShardInput {
  std::uint32_t source = 0;                             // index into DatasetInfo::sources
  std::uint64_t first_document = 0, last_document = 0;  // in the shard; those between may be in the other split, or were left out
};

struct ShardInfo {
  std::string file;  // relative to the dataset folder
  std::uint64_t tokens = 0;
  std::uint64_t documents = 0;  // that begin in it
  std::uint64_t text_bytes = 0;
  std::uint64_t file_bytes = 0;
  std::string sha256;
  std::vector<ShardInput> inputs = {};
};

struct SplitInfo {
  std::vector<ShardInfo> shards;
  std::uint64_t tokens = 0, documents = 0, text_bytes = 0;
};

struct SourceInfo {
  std::string file;
  std::uint64_t documents = 0, text_bytes = 0, tokens = 0;
};

/// How a dataset was made; of manifests of version 1 nothing is known.
struct Preparation {
  double validation_fraction = 0;
  std::string held_out;  // "documents" or "pieces": what was drawn for validation
  bool deduplicated = false;
  std::uint64_t duplicates = 0, duplicate_bytes = 0;  // left out: documents whose text had come before
  std::uint64_t bad_documents = 0, bad_files = 0;     // left out, the rest of a file in the second case
};

struct DatasetInfo {
  std::string directory;
  std::string tokenizer_name, tokenizer_hash;
  std::int64_t vocabulary = 0;
  std::uint32_t end_of_text = 0;
  SplitInfo train, validation;
  std::vector<SourceInfo> sources;
  Preparation preparation;
  /// Nats a token. The entropy of the training split's token frequencies: the loss of the best guess that ignores the context.
  double unigram_entropy = 0;
  /// Nats a token. The loss of that guess (frequencies plus one, so that none is zero) on the validation split; 0 when there is none.
  double validation_unigram_loss = 0;
};

/// Loss in bits per byte of the split's text, from nats a token.
double bits_per_byte(double nats, const SplitInfo& split);

/// Reads the manifest and checks that each shard is there with the stated size. Throws std::invalid_argument when `directory` is not a dataset,
/// std::runtime_error naming the file when a part is damaged.
DatasetInfo read_dataset(const std::string& directory);
/// The manifest's text. read_dataset(DIR) reads it back from DIR/dataset.json.
std::string dataset_manifest(const DatasetInfo& info);

/// Whether `directory` holds a dataset's manifest.
bool is_dataset(const std::string& directory);

/// All shards of a split as one long row of tokens, shard after shard. Not thread-safe: one a thread. Each shard is opened when first needed, and
/// then checked against the manifest (tokenizer, vocabulary, length); each of its chunks when first read, against its checksum (Fletcher-32), and
/// again when the file has changed since.
class TokenReader {
 public:
  /// open_files: shards that stay open at once, at least 1; the one unused for longest goes first.
  TokenReader(const DatasetInfo& info, const SplitInfo& split, std::size_t open_files = 64);
  TokenReader(TokenReader&&) noexcept;
  TokenReader& operator=(TokenReader&&) noexcept;
  ~TokenReader();
  std::uint64_t size() const;
  /// Copies tokens [first, first + out.size()).  Throws std::runtime_error naming the shard and the offset when it cannot be read as written,
  /// or when a token lies outside the vocabulary; std::out_of_range beyond the end.
  void read(std::uint64_t first, std::span<std::int32_t> out);
  /// For each of [first, first + out.size()): index of the first token of its document, minus `first`; negative when it lies before `first`.
  void read_document_starts(std::uint64_t first, std::span<std::int32_t> out);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

/// What a shard says about itself in its attributes and shapes.
struct ShardHeader {
  std::int64_t version = 0, vocabulary = 0, end_of_text = 0;
  std::string tokenizer_name, tokenizer_hash, split, sources;  // sources: JSON, [{"file", "documents", "text_bytes"}]
  std::uint64_t tokens = 0, documents = 0, text_bytes = 0;
};

/// Whether the file is HDF5 with `tokens` and `documents`. Throws std::runtime_error when it is HDF5 but damaged.
bool is_shard(const std::string& file);
/// Throws std::invalid_argument when the file is no shard, std::runtime_error when it is damaged.
ShardHeader read_shard_header(const std::string& file);
ShardHeader read_shard_header(const Hdf5File& file);

/// Documents to show as text.
struct SampleOptions {
  std::uint64_t count = 0;  // of each split
  std::uint64_t seed = 0;
};
/// For people, or as JSON: what it is, sizes, how long its documents are, tokens by source, and `samples`. Parts that damage keeps from being read
/// are left out, and the reason stands in their place.
std::string describe_dataset(const std::string& directory, bool json, const SampleOptions& samples = {});
std::string describe_shard(const std::string& file, bool json);

/// Reads everything: checksums of every chunk, SHA-256 of every shard, each token within the vocabulary, documents in order and beginning with
/// the end-of-text token, shards that agree with the manifest, the tokenizer's copy. One line a problem; empty: all is well.
std::vector<std::string> verify_dataset(const std::string& directory);
/// The part of that which one shard can answer for itself.
std::vector<std::string> verify_shard(const std::string& file);

}  // namespace tessera
