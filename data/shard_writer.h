#pragma once
// Writes a split as a sequence of shards (see dataset.h), each written aside, fsynced and renamed.

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "data/dataset.h"
#include "data/files.h"
#include "data/hdf5_file.h"
#include "data/tokenizer.h"

namespace tessera {

class SplitWriter {
 public:
  /// Shards go to `folder`/`split`/shard_NNNNN.h5, of `shard_tokens` tokens each but the last. `sources`: names by source number.
  SplitWriter(const Tokenizer& tokenizer, std::string folder, std::string split, std::uint64_t shard_tokens, const std::vector<std::string>& sources);

  /// Adds a piece of text. starts_document: an end-of-text token goes before it. Throws std::runtime_error (disk full).
  void add(std::span<const std::uint32_t> tokens, bool starts_document, std::uint64_t text_bytes, std::uint32_t source);
  /// Completes the last shard.
  const SplitInfo& finish();

  const SplitInfo& info() const { return info_; }
  const std::vector<std::uint64_t>& token_counts() const { return token_counts_; }  // by token id
  const std::vector<SourceInfo>& sources() const { return source_totals_; }         // by source number

 private:
  void add_token(std::uint32_t token);
  void open_shard();
  void close_shard();
  void flush();

  const std::uint32_t end_of_text_;
  const std::int64_t vocabulary_;
  const std::string tokenizer_name_, tokenizer_hash_;
  const std::string folder_, split_;
  const std::uint64_t shard_tokens_;
  const std::vector<std::string>& source_names_;

  SplitInfo info_;
  std::vector<std::uint64_t> token_counts_;
  std::vector<SourceInfo> source_totals_;

  // The shard being written.
  std::unique_ptr<AtomicFile> target_;
  std::optional<Hdf5File> file_;
  ShardInfo shard_;
  std::map<std::uint32_t, SourceInfo> shard_sources_;
  std::vector<std::uint32_t> tokens_;  // not yet written
  std::vector<std::uint64_t> starts_;  // not yet written
};

}  // namespace tessera
