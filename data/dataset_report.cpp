// What `tessera inspect` says about datasets and shards.

#include <fmt/core.h>

#include <algorithm>
#include <functional>
#include <nlohmann/json.hpp>
#include <stdexcept>

#include "data/dataset.h"
#include "data/hdf5_file.h"
#include "data/sha256.h"
#include "data/tokenizer.h"

namespace tessera {
using Json = nlohmann::ordered_json;
namespace {

constexpr std::size_t kListed = 20;  // shards and sources in the text; the JSON has all

std::string dump(const Json& json) { return json.dump(2, ' ', false, Json::error_handler_t::replace) + "\n"; }

std::string sources_text(const Json& sources, std::size_t total) {
  std::string out = fmt::format("  sources      {} file{}\n", total, total == 1 ? "" : "s");
  for (std::size_t i = 0; i < std::min(sources.size(), kListed); ++i)
    out += fmt::format("    {}  {} documents, {} bytes of text\n", sources[i].at("file").get<std::string>(),
                       sources[i].at("documents").get<std::uint64_t>(), sources[i].at("text_bytes").get<std::uint64_t>());
  if (total > kListed) out += fmt::format("    and {} more\n", total - std::min(sources.size(), kListed));
  return out;
}

/// Collects problems: an exception in a check is one line, and the checks after it still run.
class Problems {
 public:
  void check(const std::function<void()>& body) {
    try {
      body();
    } catch (const std::exception& e) {
      lines.push_back(e.what());
    }
  }
  std::vector<std::string> lines;
};

/// Every chunk's checksum, the tokens' range, and the documents.
void check_contents(const std::string& path, Problems& problems) {
  std::vector<std::uint64_t> documents;
  ShardHeader header;
  std::size_t before = problems.lines.size();
  problems.check([&] { header = read_shard_header(path); });
  if (problems.lines.size() > before) return;
  problems.check([&] {
    documents = Hdf5File::open(path).read<std::uint64_t>("documents");
    if (documents.back() != header.tokens)
      throw std::runtime_error(fmt::format("{}: `documents` ends with {}, expected the number of tokens, {}", path, documents.back(), header.tokens));
    if (std::adjacent_find(documents.begin(), documents.end(), std::greater_equal<>()) != documents.end())
      throw std::runtime_error(fmt::format("{}: `documents` should rise from entry to entry", path));
  });

  constexpr std::uint64_t kBlock = 1 << 20;
  std::vector<std::uint32_t> tokens;
  auto document = documents.begin();
  for (std::uint64_t first = 0; first < header.tokens; first += kBlock) {
    before = problems.lines.size();
    problems.check([&] {
      tokens.resize(std::min(kBlock, header.tokens - first));
      Hdf5File::open(path).read_part<std::uint32_t>("tokens", {first}, {tokens.size()}, tokens);
    });
    if (problems.lines.size() > before) continue;
    problems.check([&] {
      for (std::size_t i = 0; i < tokens.size(); ++i)
        if (tokens[i] >= static_cast<std::uint64_t>(header.vocabulary))
          throw std::runtime_error(
              fmt::format("{}: token {} at index {} lies outside the vocabulary of {}", path, tokens[i], first + i, header.vocabulary));
    });
    problems.check([&] {
      while (document != documents.end() && *document < first) ++document;
      for (; document != documents.end() && *document < first + tokens.size(); ++document)
        if (tokens[*document - first] != header.end_of_text)
          throw std::runtime_error(fmt::format("{}: the document at index {} begins with token {}, expected the end-of-text token {}", path,
                                               *document, tokens[*document - first], header.end_of_text));
    });
  }
}

}  // namespace

std::string describe_dataset(const std::string& directory, bool json) {
  const DatasetInfo info = read_dataset(directory);
  const double train_bits = bits_per_byte(info.unigram_entropy, info.train);
  const double validation_bits = bits_per_byte(info.validation_unigram_loss, info.validation);
  Json out = Json::parse(dataset_manifest(info));
  if (json) {
    out["kind"] = "dataset";
    out["directory"] = directory;
    out["unigram_bits_per_byte"] = train_bits;
    out["validation_unigram_bits_per_byte"] = validation_bits;
    return dump(out);
  }
  std::string text = fmt::format("{}: a dataset, format version {}\n", directory, kDatasetVersion);
  text += fmt::format("  tokenizer    {}, {} tokens, end of text {}, SHA-256 {}\n", info.tokenizer_name, info.vocabulary, info.end_of_text,
                      info.tokenizer_hash);
  for (const auto& [name, split] : {std::pair("train", &info.train), std::pair("validation", &info.validation)}) {
    text += fmt::format("  {:<12} {} tokens, {} documents, {} bytes of text, {} shard{}\n", name, split->tokens, split->documents, split->text_bytes,
                        split->shards.size(), split->shards.size() == 1 ? "" : "s");
    for (std::size_t i = 0; i < std::min(split->shards.size(), kListed); ++i)
      text += fmt::format("    {}  {} tokens, {} documents, {} bytes, SHA-256 {}...\n", split->shards[i].file, split->shards[i].tokens,
                          split->shards[i].documents, split->shards[i].file_bytes, split->shards[i].sha256.substr(0, 12));
    if (split->shards.size() > kListed) text += fmt::format("    and {} more\n", split->shards.size() - kListed);
  }
  text += fmt::format("  unigram      {:.4f} nats a token, {:.4f} bits per byte (training tokens); {:.4f}, {:.4f} as a guess on validation\n",
                      info.unigram_entropy, train_bits, info.validation_unigram_loss, validation_bits);
  return text + sources_text(out["sources"], out["sources"].size());
}

std::string describe_shard(const std::string& file, bool json) {
  const ShardHeader header = read_shard_header(file);
  const Hdf5File open = Hdf5File::open(file);
  const Hdf5Info tokens = open.info("tokens");
  const auto source_files = static_cast<std::size_t>(open.integer_attribute("source_files"));
  Json sources;
  try {
    sources = Json::parse(header.sources);
  } catch (const Json::exception& e) {
    throw std::runtime_error(fmt::format("{}: attribute sources is not JSON: {}", file, e.what()));
  }
  if (json)
    return dump(
        {{"kind", "shard"},
         {"file", file},
         {"version", header.version},
         {"tokenizer",
          {{"name", header.tokenizer_name}, {"hash", header.tokenizer_hash}, {"vocabulary", header.vocabulary}, {"end_of_text", header.end_of_text}}},
         {"split", header.split},
         {"tokens", header.tokens},
         {"type", to_string(tokens.type)},
         {"chunk", tokens.chunk},
         {"fletcher32", tokens.fletcher32},
         {"stored_bytes", tokens.stored_bytes},
         {"documents", header.documents},
         {"text_bytes", header.text_bytes},
         {"source_files", source_files},
         {"sources", sources}});
  std::string text = fmt::format("{}: a shard of the {} split, format version {}\n", file, header.split, header.version);
  text += fmt::format("  tokenizer    {}, {} tokens, end of text {}, SHA-256 {}\n", header.tokenizer_name, header.vocabulary, header.end_of_text,
                      header.tokenizer_hash);
  text += fmt::format("  tokens       {} ({}, {} bytes stored{})\n", header.tokens, to_string(tokens.type), tokens.stored_bytes,
                      tokens.fletcher32 ? ", Fletcher-32" : "");
  text += fmt::format("  documents    {} begin in it, {} bytes of text\n", header.documents, header.text_bytes);
  return text + sources_text(sources, source_files);
}

std::vector<std::string> verify_shard(const std::string& file) {
  Problems problems;
  check_contents(file, problems);
  return problems.lines;
}

std::vector<std::string> verify_dataset(const std::string& directory) {
  Problems problems;
  DatasetInfo info;
  problems.check([&] { info = read_dataset(directory); });
  if (!problems.lines.empty()) return problems.lines;
  problems.check([&] {
    const std::string file = directory + "/tokenizer.json";
    const auto tokenizer = load_tokenizer("bpe:" + file);
    if (tokenizer->hash() != info.tokenizer_hash)
      throw std::runtime_error(fmt::format("{}: the tokenizer's hash is {}, the manifest says {}", file, tokenizer->hash(), info.tokenizer_hash));
  });
  for (const auto& [name, split] : {std::pair("train", &info.train), std::pair("validation", &info.validation)}) {
    for (const ShardInfo& shard : split->shards) {
      const std::string path = directory + "/" + shard.file;
      problems.check([&] {
        if (const std::string found = sha256_file(path); found != shard.sha256)
          throw std::runtime_error(fmt::format("{}: SHA-256 is {}, the manifest says {}", path, found, shard.sha256));
      });
      check_contents(path, problems);
      problems.check([&] {
        SplitInfo alone;
        alone.shards = {shard};
        std::int32_t token;
        TokenReader reader(info, alone);  // compares the shard with the manifest when it opens it
        if (reader.size() > 0) reader.read(0, std::span(&token, 1));
      });
    }
  }
  return problems.lines;
}

}  // namespace tessera
