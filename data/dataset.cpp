#include "data/dataset.h"

#include <fmt/core.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <limits>
#include <list>
#include <nlohmann/json.hpp>
#include <numbers>
#include <optional>
#include <stdexcept>

#include "data/files.h"
#include "data/hdf5_file.h"

namespace tessera {
namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;
namespace {

constexpr const char* kFormat = "tessera-dataset";
constexpr std::size_t kOpenShards = 64;

Json to_json(const SplitInfo& split) {
  Json shards = Json::array();
  for (const ShardInfo& shard : split.shards)
    shards.push_back({{"file", shard.file},
                      {"tokens", shard.tokens},
                      {"documents", shard.documents},
                      {"text_bytes", shard.text_bytes},
                      {"file_bytes", shard.file_bytes},
                      {"sha256", shard.sha256}});
  return {{"tokens", split.tokens}, {"documents", split.documents}, {"text_bytes", split.text_bytes}, {"shards", shards}};
}

SplitInfo split_from(const Json& json) {
  SplitInfo out;
  for (const Json& shard : json.at("shards"))
    out.shards.push_back(
        {shard.at("file"), shard.at("tokens"), shard.at("documents"), shard.at("text_bytes"), shard.at("file_bytes"), shard.at("sha256")});
  out.tokens = json.at("tokens");
  out.documents = json.at("documents");
  out.text_bytes = json.at("text_bytes");
  return out;
}

void check_shards(const DatasetInfo& info, const SplitInfo& split, const std::string& manifest) {
  std::uint64_t tokens = 0;
  for (const ShardInfo& shard : split.shards) {
    const std::string path = info.directory + "/" + shard.file;
    std::error_code error;
    const auto bytes = fs::file_size(path, error);
    if (error) throw std::runtime_error(fmt::format("{}: a shard that {} lists is missing: {}", path, manifest, error.message()));
    if (bytes != shard.file_bytes)
      throw std::runtime_error(fmt::format("{}: the shard has {} bytes, {} says {}; it was cut short or changed. Prepare the data again", path, bytes,
                                           manifest, shard.file_bytes));
    tokens += shard.tokens;
  }
  if (tokens != split.tokens)
    throw std::runtime_error(fmt::format("{}: is damaged: a split's shards hold {} tokens together, it says {}", manifest, tokens, split.tokens));
}

}  // namespace

double bits_per_byte(double nats, const SplitInfo& split) {
  if (split.text_bytes == 0) return 0;
  return nats * static_cast<double>(split.tokens) / static_cast<double>(split.text_bytes) / std::numbers::ln2;
}

bool is_dataset(const std::string& directory) {
  std::error_code error;
  return fs::is_regular_file(directory + "/dataset.json", error);
}

std::string dataset_manifest(const DatasetInfo& info) {
  Json sources = Json::array();
  for (const SourceInfo& source : info.sources)
    sources.push_back({{"file", source.file}, {"documents", source.documents}, {"text_bytes", source.text_bytes}});
  const Json json = {
      {"format", kFormat},
      {"version", kDatasetVersion},
      {"tokenizer",
       {{"name", info.tokenizer_name}, {"hash", info.tokenizer_hash}, {"vocabulary", info.vocabulary}, {"end_of_text", info.end_of_text}}},
      {"unigram_entropy", info.unigram_entropy},
      {"validation_unigram_loss", info.validation_unigram_loss},
      {"splits", {{"train", to_json(info.train)}, {"validation", to_json(info.validation)}}},
      {"sources", sources}};
  // File names are bytes on this system; what is no UTF-8 in them is replaced.
  return json.dump(2, ' ', false, Json::error_handler_t::replace) + "\n";
}

DatasetInfo read_dataset(const std::string& directory) {
  const std::string manifest = directory + "/dataset.json";
  std::error_code error;
  if (!fs::is_directory(directory, error))
    throw std::invalid_argument(fmt::format("{}: no such folder; expected a dataset (tessera prepare)", directory));
  if (!is_dataset(directory))
    throw std::invalid_argument(fmt::format("{}: is not a dataset: it has no dataset.json (make one with tessera prepare)", directory));
  DatasetInfo out;
  try {
    const Json json = Json::parse(read_file(manifest));
    if (json.at("format") != kFormat) throw std::runtime_error(fmt::format("\"format\" is {}, expected \"{}\"", json.at("format").dump(), kFormat));
    if (json.at("version") != kDatasetVersion)
      throw std::runtime_error(fmt::format("format version {}, this program reads {}", json.at("version").dump(), kDatasetVersion));
    const Json& tokenizer = json.at("tokenizer");
    out.directory = directory;
    out.tokenizer_name = tokenizer.at("name");
    out.tokenizer_hash = tokenizer.at("hash");
    out.vocabulary = tokenizer.at("vocabulary");
    out.end_of_text = tokenizer.at("end_of_text");
    out.unigram_entropy = json.at("unigram_entropy");
    out.validation_unigram_loss = json.at("validation_unigram_loss");
    out.train = split_from(json.at("splits").at("train"));
    out.validation = split_from(json.at("splits").at("validation"));
    for (const Json& source : json.at("sources")) out.sources.push_back({source.at("file"), source.at("documents"), source.at("text_bytes")});
  } catch (const std::exception& e) {
    throw std::runtime_error(fmt::format("{}: is damaged or not a dataset's manifest: {}", manifest, e.what()));
  }
  check_shards(out, out.train, manifest);
  check_shards(out, out.validation, manifest);
  return out;
}

// -- Shards -------------------------------------------------------------------------------------------------------------

namespace {

ShardHeader header_of(const Hdf5File& file) {
  if (!file.contains("tokens") || !file.contains("documents") || !file.has_attribute("format_version"))
    throw std::invalid_argument(fmt::format("{}: is not a shard of tokens: no `tokens`, `documents` or format version", file.path()));
  ShardHeader out;
  out.version = file.integer_attribute("format_version");
  if (out.version != kDatasetVersion)
    throw std::runtime_error(fmt::format("{}: format version {}, this program reads {}", file.path(), out.version, kDatasetVersion));
  out.vocabulary = file.integer_attribute("vocabulary");
  out.end_of_text = file.integer_attribute("end_of_text");
  out.tokenizer_name = file.string_attribute("tokenizer");
  out.tokenizer_hash = file.string_attribute("tokenizer_hash");
  out.split = file.string_attribute("split");
  out.sources = file.string_attribute("sources");
  out.text_bytes = static_cast<std::uint64_t>(file.integer_attribute("text_bytes"));
  const Hdf5Info tokens = file.info("tokens"), documents = file.info("documents");
  if (tokens.shape.size() != 1 || documents.shape.size() != 1 || documents.shape[0] == 0)
    throw std::runtime_error(fmt::format("{}: `tokens` and `documents` should be rows of numbers, `documents` not empty", file.path()));
  out.tokens = tokens.shape[0];
  out.documents = documents.shape[0] - 1;
  return out;
}

template <typename T>
void expect(const std::string& path, const char* what, const T& found, const T& expected) {
  if (found != expected)
    throw std::runtime_error(fmt::format("{}: {} is {}, the dataset's manifest says {}; the shard belongs to another dataset. Prepare the data again",
                                         path, what, found, expected));
}

}  // namespace

bool is_shard(const std::string& file) {
  try {
    const Hdf5File open = Hdf5File::open(file);
    return open.contains("tokens") && open.contains("documents");
  } catch (const std::invalid_argument&) {
    return false;
  }
}

ShardHeader read_shard_header(const std::string& file) { return header_of(Hdf5File::open(file)); }

struct TokenReader::Impl {
  struct Shard {
    std::string path;
    std::uint64_t first = 0, tokens = 0, documents = 0;  // first: index in the split
    std::optional<Hdf5File> file;
    std::list<std::size_t>::iterator use;  // in `recent`, when open
    // First tokens of documents, within the shard, read when first asked for. 32 bits: a large corpus has tens of millions of documents.
    std::optional<std::vector<std::uint32_t>> starts;
  };

  DatasetInfo info;
  std::vector<Shard> shards;
  std::list<std::size_t> recent;  // open shards, the latest used first
  std::uint64_t size = 0;

  std::size_t shard_of(std::uint64_t token) const {
    const auto after = std::upper_bound(shards.begin(), shards.end(), token, [](std::uint64_t t, const Shard& shard) { return t < shard.first; });
    return static_cast<std::size_t>(after - shards.begin()) - 1;
  }

  Hdf5File& open(std::size_t index) {
    Shard& shard = shards[index];
    if (shard.file) {
      recent.splice(recent.begin(), recent, shard.use);
      return *shard.file;
    }
    if (recent.size() == kOpenShards) {
      shards[recent.back()].file.reset();
      recent.pop_back();
    }
    try {
      Hdf5File file = Hdf5File::open(shard.path);
      const ShardHeader header = header_of(file);
      expect(shard.path, "the tokenizer's hash", header.tokenizer_hash, info.tokenizer_hash);
      expect(shard.path, "the vocabulary", header.vocabulary, info.vocabulary);
      expect(shard.path, "the number of tokens", header.tokens, shard.tokens);
      expect(shard.path, "the number of documents", header.documents, shard.documents);
      shard.file = std::move(file);
    } catch (const std::invalid_argument& e) {  // the manifest vouches for the shard: not the user's mistake
      throw std::runtime_error(e.what());
    }
    shard.use = recent.insert(recent.begin(), index);
    return *shard.file;
  }

  const std::vector<std::uint32_t>& starts(std::size_t index) {
    Shard& shard = shards[index];
    if (shard.starts) return *shard.starts;
    const auto wide = open(index).read<std::uint64_t>("documents");
    if (!std::is_sorted(wide.begin(), wide.end()) || wide.back() != shard.tokens)
      throw std::runtime_error(fmt::format("{}: `documents` should rise and end with the number of tokens, {}", shard.path, shard.tokens));
    shard.starts.emplace(wide.begin(), wide.end() - 1);
    return *shard.starts;
  }

  /// Index in the split of the first token of the document that holds the token before shard `index`.
  std::uint64_t start_before(std::size_t index) {
    while (index-- > 0)
      if (const auto& own = starts(index); !own.empty()) return shards[index].first + own.back();
    return 0;
  }

  void check_range(std::uint64_t first, std::size_t count) const {
    if (first > size || count > size - first)
      throw std::out_of_range(fmt::format("{}: tokens {} to {} were asked for, the split has {}", info.directory, first, first + count, size));
  }
};

TokenReader::TokenReader(const DatasetInfo& info, const SplitInfo& split) : impl_(std::make_unique<Impl>()) {
  impl_->info = info;
  for (const ShardInfo& shard : split.shards) {
    if (shard.tokens == 0) continue;
    if (shard.tokens > std::numeric_limits<std::uint32_t>::max())
      throw std::runtime_error(fmt::format("{}: the shard has {} tokens, this program reads at most 2^32-1 in one", shard.file, shard.tokens));
    auto& added = impl_->shards.emplace_back();
    added.path = info.directory + "/" + shard.file;
    added.first = impl_->size;
    added.tokens = shard.tokens;
    added.documents = shard.documents;
    impl_->size += shard.tokens;
  }
}
TokenReader::TokenReader(TokenReader&&) noexcept = default;
TokenReader& TokenReader::operator=(TokenReader&&) noexcept = default;
TokenReader::~TokenReader() = default;
std::uint64_t TokenReader::size() const { return impl_->size; }

void TokenReader::read(std::uint64_t first, std::span<std::int32_t> out) {
  impl_->check_range(first, out.size());
  while (!out.empty()) {
    const std::size_t index = impl_->shard_of(first);
    const Impl::Shard& shard = impl_->shards[index];
    const std::uint64_t offset = first - shard.first;
    const std::size_t count = std::min<std::uint64_t>(out.size(), shard.tokens - offset);
    const std::span<std::int32_t> part = out.first(count);
    Hdf5File& file = impl_->open(index);
    try {
      file.read_part<std::int32_t>("tokens", {offset}, {count}, part);
    } catch (const std::runtime_error& e) {
      throw std::runtime_error(fmt::format("{}: tokens {} to {} cannot be read: the shard is damaged. Prepare the data again ({})", shard.path,
                                           offset, offset + count, e.what()));
    }
    const auto wrong = std::find_if(part.begin(), part.end(), [&](std::int32_t token) { return token < 0 || token >= impl_->info.vocabulary; });
    if (wrong != part.end())
      throw std::runtime_error(fmt::format("{}: token {} at index {} lies outside the vocabulary of {}; the shard does not match its tokenizer",
                                           shard.path, *wrong, offset + static_cast<std::uint64_t>(wrong - part.begin()), impl_->info.vocabulary));
    out = out.subspan(count);
    first += count;
  }
}

void TokenReader::read_document_starts(std::uint64_t first, std::span<std::int32_t> out) {
  impl_->check_range(first, out.size());
  const std::uint64_t origin = first;
  // Sequences are far shorter than 2^31 tokens; a start further back than that is as good as any before the sequence.
  const auto relative = [&](std::uint64_t start) {
    return start >= origin ? static_cast<std::int32_t>(start - origin)
                           : static_cast<std::int32_t>(
                                 -std::min<std::int64_t>(static_cast<std::int64_t>(origin - start), std::numeric_limits<std::int32_t>::max()));
  };
  while (!out.empty()) {
    const std::size_t index = impl_->shard_of(first);
    const Impl::Shard& shard = impl_->shards[index];
    const std::uint64_t offset = first - shard.first;
    const std::size_t count = std::min<std::uint64_t>(out.size(), shard.tokens - offset);
    const auto& starts = impl_->starts(index);
    auto next = std::upper_bound(starts.begin(), starts.end(), offset);  // the first document after `offset`
    std::int32_t current = relative(next == starts.begin() ? impl_->start_before(index) : shard.first + *(next - 1));
    for (std::size_t i = 0; i < count; ++i) {
      if (next != starts.end() && *next == offset + i) current = relative(shard.first + *next++);
      out[i] = current;
    }
    out = out.subspan(count);
    first += count;
  }
}

}  // namespace tessera
