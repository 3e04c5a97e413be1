#include "data/shard_writer.h"

#include <fmt/core.h>

#include <algorithm>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <set>
#include <stdexcept>

#include "data/files.h"
#include "data/hdf5_file.h"
#include "data/sha256.h"

namespace tessera {
namespace {
using Json = nlohmann::ordered_json;

// A sequence reads one or two chunks of 32 KiB (uint16) wherever it lies; blocks hold whole chunks, so that none is written twice.
constexpr std::uint64_t kChunkTokens = 16 << 10, kBlockTokens = 64 * kChunkTokens;
constexpr std::uint64_t kChunkStarts = 4 << 10, kBlockStarts = 32 * kChunkStarts;
constexpr std::size_t kListedSources = 1000;  // in a shard's attributes; the manifest has all

template <typename T>
void copy(const Spool& from, Hdf5File& to, const std::string& name, std::uint64_t block) {
  from.read(block * sizeof(T), [&](std::span<const std::byte> bytes) {
    to.append<T>(name, std::span(reinterpret_cast<const T*>(bytes.data()), bytes.size() / sizeof(T)));
  });
}

Json to_json(const Spool::Mark& mark) { return {{"bytes", mark.bytes}, {"crc", mark.crc}}; }
Spool::Mark mark_from(const Json& json) { return {json.at("bytes"), json.at("crc")}; }

Json to_json(const ShardInfo& shard) {
  Json inputs = Json::array();
  for (const ShardInput& input : shard.inputs) inputs.push_back({input.source, input.first_document, input.last_document});
  return {shard.file, shard.tokens, shard.documents, shard.text_bytes, shard.file_bytes, shard.sha256, inputs};
}
ShardInfo shard_from(const Json& json) {
  ShardInfo out{json.at(0), json.at(1), json.at(2), json.at(3), json.at(4), json.at(5), {}};
  for (const Json& input : json.at(6)) out.inputs.push_back({input.at(0), input.at(1), input.at(2)});
  return out;
}

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
      wide_(vocabulary_ > 65536),
      token_counts_(static_cast<std::size_t>(vocabulary_)),
      source_totals_(sources.size()) {
  for (std::size_t i = 0; i < sources.size(); ++i) source_totals_[i].file = sources[i];
}

void SplitWriter::add(std::span<const std::uint32_t> tokens, bool starts_document, std::uint64_t text_bytes, std::uint32_t source,
                      std::uint64_t document) {
  if (!tokens_) open_shard();
  InShard* here = &in_shard(source, document);
  here->counts.text_bytes += text_bytes;
  source_totals_[source].text_bytes += text_bytes;
  shard_.text_bytes += text_bytes;
  if (starts_document) {
    ++here->counts.documents;
    ++source_totals_[source].documents;
    ++shard_.documents;
    starts_->append(std::as_bytes(std::span(&shard_.tokens, 1)));
    append(std::span(&end_of_text_, 1), *here);
  }
  while (!tokens.empty()) {
    if (!tokens_) {
      open_shard();
      here = &in_shard(source, document);  // the document goes on in it
    }
    const std::size_t count = std::min<std::uint64_t>(tokens.size(), shard_tokens_ - shard_.tokens);
    append(tokens.first(count), *here);
    tokens = tokens.subspan(count);
  }
}

/// No more tokens than the shard has room for.
void SplitWriter::append(std::span<const std::uint32_t> tokens, InShard& source) {
  for (const std::uint32_t token : tokens) ++token_counts_.at(token);
  if (wide_) {
    tokens_->append(std::as_bytes(tokens));
  } else {
    narrow_.assign(tokens.begin(), tokens.end());
    tokens_->append(std::as_bytes(std::span(narrow_)));
  }
  shard_.tokens += tokens.size();
  source.counts.tokens += tokens.size();
  source_totals_[source.stretch.source].tokens += tokens.size();
  if (shard_.tokens == shard_tokens_) close_shard();
}

SplitWriter::InShard& SplitWriter::in_shard(std::uint32_t source, std::uint64_t document) {
  const auto [found, is_new] = shard_sources_.try_emplace(source);
  if (is_new) found->second.stretch = {source, document, document};
  found->second.stretch.last_document = document;  // a file's documents come in their order
  return found->second;
}

std::string SplitWriter::spool_path(const char* what) const { return fmt::format("{}/{}.{:05}.{}", folder_, split_, info_.shards.size(), what); }

void SplitWriter::open_shard() {
  shard_ = {};
  shard_.file = fmt::format("{}/shard_{:05}.h5", split_, info_.shards.size());
  shard_sources_.clear();
  tokens_ = std::make_unique<Spool>(spool_path("tokens"));
  starts_ = std::make_unique<Spool>(spool_path("documents"));
}

std::string SplitWriter::sources_attribute() const {
  Json sources = Json::array();
  for (const auto& [number, here] : shard_sources_) {
    if (sources.size() == kListedSources) break;
    sources.push_back({{"file", source_names_[number]},
                       {"documents", here.counts.documents},
                       {"text_bytes", here.counts.text_bytes},
                       {"tokens", here.counts.tokens},
                       {"first_document", here.stretch.first_document},
                       {"last_document", here.stretch.last_document}});
  }
  return sources.dump(-1, ' ', false, Json::error_handler_t::replace);
}

void SplitWriter::close_shard() {
  starts_->append(std::as_bytes(std::span(&shard_.tokens, 1)));
  starts_->flush();
  tokens_->flush();

  make_folder(folder_ + "/" + split_);
  AtomicFile target(folder_ + "/" + shard_.file);
  Hdf5File file = Hdf5File::create(target.temporary());
  file.create_dataset("tokens", wide_ ? Hdf5Type::u32 : Hdf5Type::u16, {0}, {kChunkTokens}, true);
  file.create_dataset("documents", Hdf5Type::u64, {0}, {kChunkStarts}, true);
  if (wide_) {
    copy<std::uint32_t>(*tokens_, file, "tokens", kBlockTokens);
  } else {
    copy<std::uint16_t>(*tokens_, file, "tokens", kBlockTokens);
  }
  copy<std::uint64_t>(*starts_, file, "documents", kBlockStarts);
  file.set_attribute("format_version", kDatasetVersion);
  file.set_attribute("tokenizer", tokenizer_name_);
  file.set_attribute("tokenizer_hash", tokenizer_hash_);
  file.set_attribute("vocabulary", vocabulary_);
  file.set_attribute("end_of_text", end_of_text_);
  file.set_attribute("split", split_);
  file.set_attribute("text_bytes", shard_.text_bytes);
  file.set_attribute("source_files", shard_sources_.size());
  file.set_attribute("sources", sources_attribute());
  file.close();
  target.commit();

  shard_.file_bytes = std::filesystem::file_size(target.path());
  shard_.sha256 = sha256_file(target.path());
  for (const auto& [number, here] : shard_sources_) shard_.inputs.push_back(here.stretch);
  info_.tokens += shard_.tokens;
  info_.documents += shard_.documents;
  info_.text_bytes += shard_.text_bytes;
  info_.shards.push_back(shard_);
  for (auto* spool : {&tokens_, &starts_}) {
    finished_spools_.push_back((*spool)->path());
    spool->reset();
  }
}

const SplitInfo& SplitWriter::finish() {
  if (tokens_) close_shard();
  return info_;
}

void SplitWriter::remove_finished_spools() {
  for (const std::string& path : finished_spools_) std::filesystem::remove(path);
  finished_spools_.clear();
}

// -- Going on after a crash ---------------------------------------------------------------------------------------------

Json SplitWriter::state() {
  Json shards = Json::array(), totals = Json::array(), counts = Json::array();
  for (const ShardInfo& shard : info_.shards) shards.push_back(to_json(shard));
  for (const SourceInfo& source : source_totals_) totals.push_back({source.documents, source.text_bytes, source.tokens});
  Json out = {{"shards", shards}, {"sources", totals}, {"token_counts", token_counts_}};
  if (!tokens_) return out;
  for (const auto& [number, here] : shard_sources_)
    counts.push_back(
        {number, here.counts.documents, here.counts.text_bytes, here.counts.tokens, here.stretch.first_document, here.stretch.last_document});
  out["open"] = {{"shard", to_json(shard_)}, {"sources", counts}, {"tokens", to_json(tokens_->mark())}, {"documents", to_json(starts_->mark())}};
  return out;
}

/// What the interrupted run was writing when it ended, or had written after its last record: it is written again.
void SplitWriter::remove_unrecorded() const {
  namespace fs = std::filesystem;
  std::set<std::string> recorded = {spool_path("tokens"), spool_path("documents")};
  for (const ShardInfo& shard : info_.shards) recorded.insert(folder_ + "/" + shard.file);
  std::vector<fs::path> found;
  for (const auto& item : fs::directory_iterator(folder_))
    if (item.path().filename().string().starts_with(split_ + ".")) found.push_back(item.path());
  if (fs::exists(folder_ + "/" + split_))
    for (const auto& item : fs::directory_iterator(folder_ + "/" + split_)) found.push_back(item.path());
  for (const fs::path& path : found)
    if (!recorded.contains(path.string())) fs::remove(path);
}

void SplitWriter::restore(const Json& state) {
  for (const Json& json : state.at("shards")) {
    const ShardInfo& shard = info_.shards.emplace_back(shard_from(json));
    const std::string path = folder_ + "/" + shard.file;
    std::error_code error;
    if (std::filesystem::file_size(path, error) != shard.file_bytes || error)
      throw std::runtime_error(
          fmt::format("{}: is not as the interrupted run left it ({} bytes expected); start anew, without --resume", path, shard.file_bytes));
    info_.tokens += shard.tokens;
    info_.documents += shard.documents;
    info_.text_bytes += shard.text_bytes;
  }
  remove_unrecorded();
  for (std::size_t i = 0; i < source_totals_.size(); ++i) {
    const Json& total = state.at("sources").at(i);
    source_totals_[i].documents = total.at(0);
    source_totals_[i].text_bytes = total.at(1);
    source_totals_[i].tokens = total.at(2);
  }
  token_counts_ = state.at("token_counts").get<std::vector<std::uint64_t>>();
  if (!state.contains("open")) return;
  const Json& open = state.at("open");
  shard_ = shard_from(open.at("shard"));
  for (const Json& c : open.at("sources")) {
    const std::uint32_t number = c.at(0);
    shard_sources_[number] = {{"", c.at(1), c.at(2), c.at(3)}, {number, c.at(4), c.at(5)}};
  }
  tokens_ = std::make_unique<Spool>(spool_path("tokens"), mark_from(open.at("tokens")));
  starts_ = std::make_unique<Spool>(spool_path("documents"), mark_from(open.at("documents")));
}

}  // namespace tessera
