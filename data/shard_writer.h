#pragma once
// Writes a split as a sequence of shards (see dataset.h). The tokens of a shard gather in spool files beside its final place; when it is full it
// becomes an HDF5 file at once, written aside, fsynced and renamed. So its bytes do not depend on how the tokens came, and a run that was killed
// finds the spools again and goes on in the middle of a shard.

#include <cstdint>
#include <map>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <span>
#include <string>
#include <vector>

#include "data/dataset.h"
#include "data/spool.h"
#include "data/tokenizer.h"

namespace tessera {

class SplitWriter {
 public:
  /// Shards go to `folder`/`split`/shard_NNNNN.h5, of `shard_tokens` tokens each but the last. `sources`: names by source number.
  SplitWriter(const Tokenizer& tokenizer, std::string folder, std::string split, std::uint64_t shard_tokens, const std::vector<std::string>& sources);

  /// Adds a piece of the text of a document, which has this number in this source. starts_document: an end-of-text token goes before it.
  /// Throws std::runtime_error (disk full).
  void add(std::span<const std::uint32_t> tokens, bool starts_document, std::uint64_t text_bytes, std::uint32_t source, std::uint64_t document);
  /// Completes the last shard.
  const SplitInfo& finish();

  const SplitInfo& info() const { return info_; }
  const std::vector<std::uint64_t>& token_counts() const { return token_counts_; }  // by token id
  const std::vector<SourceInfo>& sources() const { return source_totals_; }         // by source number

  /// Everything that is needed to go on from here, with the spools brought to disk. The spools of finished shards stay until
  /// remove_finished_spools(), which may be called when the state is safe.
  nlohmann::ordered_json state();
  void remove_finished_spools();
  /// To the state of another process, in a writer that has added nothing. Throws std::runtime_error when files are not as they were then.
  void restore(const nlohmann::ordered_json& state);

 private:
  struct InShard {
    SourceInfo counts;
    ShardInput stretch;
  };
  std::string spool_path(const char* what) const;
  void open_shard();
  void close_shard();
  void append(std::span<const std::uint32_t> tokens, InShard& source);
  InShard& in_shard(std::uint32_t source, std::uint64_t document);
  std::string sources_attribute() const;
  void remove_unrecorded() const;

  const std::uint32_t end_of_text_;
  const std::int64_t vocabulary_;
  const std::string tokenizer_name_, tokenizer_hash_;
  const std::string folder_, split_;
  const std::uint64_t shard_tokens_;
  const std::vector<std::string>& source_names_;
  const bool wide_;  // tokens take four bytes

  SplitInfo info_;
  std::vector<std::uint64_t> token_counts_;
  std::vector<SourceInfo> source_totals_;
  std::vector<std::string> finished_spools_;

  // The shard being filled.
  std::unique_ptr<Spool> tokens_, starts_;  // none: no shard
  ShardInfo shard_;
  std::map<std::uint32_t, InShard> shard_sources_;
  std::vector<std::uint16_t> narrow_;
};

}  // namespace tessera
