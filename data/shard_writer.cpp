#include "data/shard_writer.h"

#include <fmt/core.h>

#include <filesystem>
#include <nlohmann/json.hpp>
#include <stdexcept>

#include "data/sha256.h"

namespace tessera {
namespace {

// A sequence reads one or two chunks of 32 KiB (uint16) wherever it lies; buffers hold whole chunks, so that none is written twice.
constexpr std::uint64_t kChunkTokens = 16 << 10, kBufferedTokens = 64 * kChunkTokens;
constexpr std::uint64_t kChunkStarts = 4 << 10, kBufferedStarts = 32 * kChunkStarts;
constexpr std::size_t kListedSources = 1000;  // in a shard's attributes; the manifest has all

}  // namespace

SplitWriter::SplitWriter(const Tokenizer& tokenizer, std::string folder, std::string split, std::uint64_t shard_tokens,
                         const std::vector<std::string>& sources)
    : end_of_text_(tokenizer.end_of_text()),
      vocabulary_(tokenizer.vocabulary()),
      tokenizer_name_(tokenizer.name()),
      tokenizer_hash_(tokenizer.hash()),
      folder_(std::move(folder)),
      split_(std::move(split)),
      shard_tokens_(shard_tokens),
      source_names_(sources),
      token_counts_(static_cast<std::size_t>(vocabulary_)),
      source_totals_(sources.size()) {
  for (std::size_t i = 0; i < sources.size(); ++i) source_totals_[i].file = sources[i];
}

void SplitWriter::add(std::span<const std::uint32_t> tokens, bool starts_document, std::uint64_t text_bytes, std::uint32_t source) {
  if (!file_) open_shard();
  SourceInfo& in_shard = shard_sources_[source];
  in_shard.text_bytes += text_bytes;
  in_shard.documents += starts_document;
  source_totals_[source].text_bytes += text_bytes;
  source_totals_[source].documents += starts_document;
  shard_.text_bytes += text_bytes;
  if (starts_document) {
    starts_.push_back(shard_.tokens);
    ++shard_.documents;
    add_token(end_of_text_);
  }
  for (const std::uint32_t token : tokens) {
    if (!file_) {
      open_shard();
      shard_sources_[source];  // the document goes on in it
    }
    add_token(token);
  }
}

void SplitWriter::add_token(std::uint32_t token) {
  ++token_counts_.at(token);
  tokens_.push_back(token);
  ++shard_.tokens;
  if (shard_.tokens == shard_tokens_) {
    close_shard();
  } else if (tokens_.size() == kBufferedTokens) {
    flush();
  }
}

void SplitWriter::open_shard() {
  make_folder(folder_ + "/" + split_);
  shard_ = {};
  shard_.file = fmt::format("{}/shard_{:05}.h5", split_, info_.shards.size());
  shard_sources_.clear();
  target_ = std::make_unique<AtomicFile>(folder_ + "/" + shard_.file);
  file_ = Hdf5File::create(target_->temporary());
  file_->create_dataset("tokens", vocabulary_ <= 65536 ? Hdf5Type::u16 : Hdf5Type::u32, {0}, {kChunkTokens}, true);
  file_->create_dataset("documents", Hdf5Type::u64, {0}, {kChunkStarts}, true);
}

void SplitWriter::flush() {
  file_->append<std::uint32_t>("tokens", tokens_);  // the library narrows them to the dataset's type
  tokens_.clear();
  const std::size_t whole = starts_.size() / kChunkStarts * kChunkStarts;
  if (whole < kBufferedStarts) return;
  file_->append<std::uint64_t>("documents", std::span(starts_).first(whole));
  starts_.erase(starts_.begin(), starts_.begin() + static_cast<std::ptrdiff_t>(whole));
}

void SplitWriter::close_shard() {
  file_->append<std::uint32_t>("tokens", tokens_);
  tokens_.clear();
  starts_.push_back(shard_.tokens);
  file_->append<std::uint64_t>("documents", starts_);
  starts_.clear();

  nlohmann::ordered_json sources = nlohmann::ordered_json::array();
  for (const auto& [number, counts] : shard_sources_) {
    if (sources.size() == kListedSources) break;
    sources.push_back({{"file", source_names_[number]}, {"documents", counts.documents}, {"text_bytes", counts.text_bytes}});
  }
  file_->set_attribute("format_version", kDatasetVersion);
  file_->set_attribute("tokenizer", tokenizer_name_);
  file_->set_attribute("tokenizer_hash", tokenizer_hash_);
  file_->set_attribute("vocabulary", vocabulary_);
  file_->set_attribute("end_of_text", end_of_text_);
  file_->set_attribute("split", split_);
  file_->set_attribute("text_bytes", shard_.text_bytes);
  file_->set_attribute("source_files", shard_sources_.size());
  file_->set_attribute("sources", sources.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace));
  file_->close();
  file_.reset();
  target_->commit();

  shard_.file_bytes = std::filesystem::file_size(target_->path());
  shard_.sha256 = sha256_file(target_->path());
  target_.reset();
  info_.tokens += shard_.tokens;
  info_.documents += shard_.documents;
  info_.text_bytes += shard_.text_bytes;
  info_.shards.push_back(shard_);
}

const SplitInfo& SplitWriter::finish() {
  if (file_) close_shard();
  return info_;
}

}  // namespace tessera
