// A dataset's manifest, DIR/dataset.json.

#include <fmt/core.h>

#include <filesystem>
#include <nlohmann/json.hpp>
#include <numbers>
#include <stdexcept>

#include "data/dataset.h"
#include "data/files.h"
#include "data/json_file.h"
#include "data/sha256.h"

namespace tessera {
namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;
namespace {

constexpr const char* kFormat = "tessera-dataset";

Json to_json(const SplitInfo& split) {
  Json shards = Json::array();
  for (const ShardInfo& shard : split.shards) {
    Json inputs = Json::array();
    for (const ShardInput& input : shard.inputs)
      inputs.push_back({{"source", input.source}, {"first_document", input.first_document}, {"last_document", input.last_document}});
    shards.push_back({{"file", shard.file},
                      {"tokens", shard.tokens},
                      {"documents", shard.documents},
                      {"text_bytes", shard.text_bytes},
                      {"file_bytes", shard.file_bytes},
                      {"sha256", shard.sha256},
                      {"inputs", inputs}});
  }
  return {{"tokens", split.tokens}, {"documents", split.documents}, {"text_bytes", split.text_bytes}, {"shards", shards}};
}

SplitInfo split_from(const Json& json, bool inputs) {
  SplitInfo out;
  for (const Json& shard : json.at("shards")) {
    out.shards.push_back(
        {shard.at("file"), shard.at("tokens"), shard.at("documents"), shard.at("text_bytes"), shard.at("file_bytes"), shard.at("sha256"), {}});
    if (!inputs) continue;
    for (const Json& input : shard.at("inputs"))
      out.shards.back().inputs.push_back({input.at("source"), input.at("first_document"), input.at("last_document")});
  }
  out.tokens = json.at("tokens");
  out.documents = json.at("documents");
  out.text_bytes = json.at("text_bytes");
  return out;
}

Json to_json(const Preparation& how) {
  return {{"validation_fraction", how.validation_fraction},
          {"held_out", how.held_out},
          {"deduplicated", how.deduplicated},
          {"duplicates", how.duplicates},
          {"duplicate_bytes", how.duplicate_bytes},
          {"bad_documents", how.bad_documents},
          {"bad_files", how.bad_files}};
}

Preparation preparation_from(const Json& json) {
  return {json.at("validation_fraction"), json.at("held_out"),      json.at("deduplicated"), json.at("duplicates"),
          json.at("duplicate_bytes"),     json.at("bad_documents"), json.at("bad_files")};
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

// The last line but the brace is the SHA-256 of the text that would stand there without that line: the object before `"sha256"` was added.
constexpr const char* kEnd = "\n}\n";

std::string checksum_line(const std::string& text) { return fmt::format(",\n  \"sha256\": \"{}\"", sha256_hex(text)); }

void check_sum(const std::string& text) {
  const std::size_t line = text.rfind(",\n  \"sha256\": \"");
  if (line == std::string::npos) throw std::runtime_error("its own SHA-256 is missing");
  const std::string alone = text.substr(0, line) + kEnd;
  if (text.substr(line) != checksum_line(alone) + kEnd) throw std::runtime_error("its text does not have the SHA-256 it states; it was changed");
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
    sources.push_back({{"file", source.file}, {"documents", source.documents}, {"text_bytes", source.text_bytes}, {"tokens", source.tokens}});
  const Json json = {
      {"format", kFormat},
      {"version", kManifestVersion},
      {"tokenizer",
       {{"name", info.tokenizer_name}, {"hash", info.tokenizer_hash}, {"vocabulary", info.vocabulary}, {"end_of_text", info.end_of_text}}},
      {"preparation", to_json(info.preparation)},
      {"unigram_entropy", info.unigram_entropy},
      {"validation_unigram_loss", info.validation_unigram_loss},
      {"splits", {{"train", to_json(info.train)}, {"validation", to_json(info.validation)}}},
      {"sources", sources}};
  // File names are bytes on this system; what is no UTF-8 in them is replaced.
  const std::string text = json.dump(2, ' ', false, Json::error_handler_t::replace);
  return text.substr(0, text.size() - 2) + checksum_line(text + "\n") + kEnd;  // less the "\n}" that closes it
}

DatasetInfo read_dataset(const std::string& directory) {
  const std::string manifest = directory + "/dataset.json";
  std::error_code error;
  if (!fs::is_directory(directory, error))
    throw std::invalid_argument(fmt::format("{}: no such folder; expected a dataset (tessera prepare)", directory));
  if (!is_dataset(directory))
    throw std::invalid_argument(fmt::format("{}: is not a dataset: it has no dataset.json ({})", directory,
                                            fs::exists(directory + "/.prepare", error)
                                                ? "a tessera prepare is at work in it or was interrupted; --resume goes on with that"
                                                : "make one with tessera prepare"));
  DatasetInfo out;
  try {
    const std::string text = read_file(manifest);
    const Json json = parse_json<Json>(text, manifest);
    if (json.at("format") != kFormat) throw std::runtime_error(fmt::format("\"format\" is {}, expected \"{}\"", json.at("format").dump(), kFormat));
    const Json& version = json.at("version");
    if (version != 1 && version != kManifestVersion)
      throw std::runtime_error(fmt::format("format version {}, this program reads 1 and {}", version.dump(), kManifestVersion));
    const bool second = version == kManifestVersion;
    if (second || json.contains("sha256")) check_sum(text);
    const Json& tokenizer = json.at("tokenizer");
    out.directory = directory;
    out.tokenizer_name = tokenizer.at("name");
    out.tokenizer_hash = tokenizer.at("hash");
    out.vocabulary = tokenizer.at("vocabulary");
    out.end_of_text = tokenizer.at("end_of_text");
    if (second) out.preparation = preparation_from(json.at("preparation"));
    out.unigram_entropy = json.at("unigram_entropy");
    out.validation_unigram_loss = json.at("validation_unigram_loss");
    out.train = split_from(json.at("splits").at("train"), second);
    out.validation = split_from(json.at("splits").at("validation"), second);
    for (const Json& source : json.at("sources"))
      out.sources.push_back(
          {source.at("file"), source.at("documents"), source.at("text_bytes"), second ? source.at("tokens").get<std::uint64_t>() : 0});
  } catch (const std::exception& e) {
    throw std::runtime_error(fmt::format("{}: is damaged or not a dataset's manifest: {}", manifest, e.what()));
  }
  check_shards(out, out.train, manifest);
  check_shards(out, out.validation, manifest);
  return out;
}

}  // namespace tessera
