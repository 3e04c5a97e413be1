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

ShardHeader read_shard_header(const Hdf5File& file) {
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

bool is_shard(const std::string& file) {
  try {
    const Hdf5File open = Hdf5File::open(file);
    return open.contains("tokens") && open.contains("documents");
  } catch (const std::invalid_argument&) {
    return false;
  }
}

ShardHeader read_shard_header(const std::string& file) { return read_shard_header(Hdf5File::open(file)); }

}  // namespace tessera
