// What `tessera inspect` says about datasets and shards.

#include <fmt/core.h>

#include <algorithm>
#include <functional>
#include <nlohmann/json.hpp>
#include <stdexcept>

#include "data/dataset.h"
#include "data/dataset_contents.h"
#include "data/hdf5_file.h"
#include "data/sha256.h"
#include "data/tokenizer.h"

namespace tessera {
using Json = nlohmann::ordered_json;
namespace {

constexpr std::uint64_t kSampleTokens = 200;  // shown of a document
constexpr std::size_t kListed = 20;           // shards and sources in the text; the JSON has all

std::string dump(const Json& json) { return json.dump(2, ' ', false, Json::error_handler_t::replace) + "\n"; }

/// `tokens`: of all sources together, for shares; 0: not shown. Sources of manifests that do not count tokens have none.
std::string sources_text(const Json& sources, std::size_t total, std::uint64_t tokens) {
  std::string out = fmt::format("  sources      {} file{}\n", total, total == 1 ? "" : "s");
  for (std::size_t i = 0; i < std::min(sources.size(), kListed); ++i) {
    const std::uint64_t own = sources[i].value("tokens", std::uint64_t{0});
    const double share = tokens > 0 ? 100 * static_cast<double>(own) / static_cast<double>(tokens) : 0;
    out += fmt::format("    {}  {}{} documents, {} bytes of text\n", sources[i].at("file").get<std::string>(),
                       own == 0    ? ""
                       : share > 0 ? fmt::format("{} tokens ({:.2f} %), ", own, share)
                                   : fmt::format("{} tokens, ", own),
                       sources[i].at("documents").get<std::uint64_t>(), sources[i].at("text_bytes").get<std::uint64_t>());
  }
  if (total > kListed) out += fmt::format("    and {} more\n", total - std::min(sources.size(), kListed));
  return out;
}

/// What `make` gives, or why it could not.
Json or_reason(const std::function<Json()>& make) {
  try {
    return make();
  } catch (const std::exception& e) {
    return {{"unreadable", e.what()}};
  }
}

Json lengths_json(const LengthHistogram& lengths) {
  Json buckets = Json::array();
  for (std::size_t i = 0; i < lengths.buckets.size(); ++i)
    buckets.push_back({{"from", std::uint64_t{1} << i},
                       {"to", (std::uint64_t{2} << i) - 1},
                       {"documents", lengths.buckets[i].documents},
                       {"tokens", lengths.buckets[i].tokens}});
  const double mean = lengths.documents > 0 ? static_cast<double>(lengths.tokens) / static_cast<double>(lengths.documents) : 0;
  return {{"documents", lengths.documents}, {"shortest", lengths.shortest},
          {"median", lengths.median},       {"mean", mean},
          {"longest", lengths.longest},     {"buckets", buckets}};
}

std::string lengths_text(const std::string& split, const Json& lengths) {
  if (lengths.contains("unreadable")) return fmt::format("  lengths      {}: cannot be read: {}\n", split, lengths["unreadable"].get<std::string>());
  std::string out = fmt::format("  lengths      {}: tokens a document: shortest {}, median {}, mean {:.1f}, longest {}\n", split,
                                lengths["shortest"].get<std::uint64_t>(), lengths["median"].get<std::uint64_t>(), lengths["mean"].get<double>(),
                                lengths["longest"].get<std::uint64_t>());
  constexpr double kBar = 40;
  std::uint64_t most = 1, all = 0;
  for (const Json& bucket : lengths["buckets"]) {
    most = std::max(most, bucket["documents"].get<std::uint64_t>());
    all += bucket["tokens"].get<std::uint64_t>();
  }
  for (const Json& bucket : lengths["buckets"]) {
    const auto documents = bucket["documents"].get<std::uint64_t>();
    if (bucket["to"] < lengths["shortest"]) continue;
    const double share = all > 0 ? 100 * bucket["tokens"].get<double>() / static_cast<double>(all) : 0;
    out += fmt::format("    {:>9} to {:>9}  {:>11} documents, {:>5.1f} % of the tokens  {}\n", bucket["from"].get<std::uint64_t>(),
                       bucket["to"].get<std::uint64_t>(), documents, share,
                       std::string(static_cast<std::size_t>(kBar * static_cast<double>(documents) / static_cast<double>(most) + 0.5), '#'));
  }
  return out;
}

Json samples_json(const DatasetInfo& info, const SplitInfo& split, const SampleOptions& samples) {
  const auto tokenizer = load_tokenizer("bpe:" + info.directory + "/tokenizer.json");
  if (tokenizer->hash() != info.tokenizer_hash) throw std::runtime_error(info.directory + "/tokenizer.json: not the tokenizer of this dataset");
  Json out = Json::array();
  for (const DocumentSample& sample : sample_documents(info, split, *tokenizer, samples.count, samples.seed, kSampleTokens))
    out.push_back({{"document", sample.number},
                   {"shard", sample.shard},
                   {"first_token", sample.first_token},
                   {"tokens", sample.tokens},
                   {"text", sample.text},
                   {"whole", sample.whole}});
  return out;
}

/// Text from anywhere: no control character of it may reach a terminal.
std::string indented(const std::string& text) {
  std::string out = "    | ";
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (c == '\n')
      out += "\n    | ";
    else if ((byte < 0x20 && c != '\t') || byte == 0x7f)
      out += fmt::format("\\x{:02x}", byte);
    else
      out += c;
  }
  return out;
}

std::string samples_text(const std::string& split, const Json& samples) {
  if (samples.is_object()) return fmt::format("  samples      {}: cannot be read: {}\n", split, samples["unreadable"].get<std::string>());
  std::string out;
  for (const Json& sample : samples)
    out += fmt::format("  sample       {}: document {}, {} tokens from token {} of {} on\n{}{}\n", split, sample["document"].get<std::uint64_t>(),
                       sample["tokens"].get<std::uint64_t>(), sample["first_token"].get<std::uint64_t>(), sample["shard"].get<std::string>(),
                       indented(sample["text"].get<std::string>()), sample["whole"].get<bool>() ? "" : " [...]");
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

std::string describe_dataset(const std::string& directory, bool json, const SampleOptions& samples) {
  const DatasetInfo info = read_dataset(directory);
  const double train_bits = bits_per_byte(info.unigram_entropy, info.train);
  const double validation_bits = bits_per_byte(info.validation_unigram_loss, info.validation);
  Json out = Json::parse(dataset_manifest(info));
  out["kind"] = "dataset";
  out["directory"] = directory;
  out["unigram_bits_per_byte"] = train_bits;
  out["validation_unigram_bits_per_byte"] = validation_bits;
  for (const auto& [name, split] : {std::pair("train", &info.train), std::pair("validation", &info.validation)}) {
    if (split->tokens == 0) continue;
    out["lengths"][name] = or_reason([&] { return lengths_json(document_lengths(info, *split)); });
    if (samples.count > 0) out["samples"][name] = or_reason([&] { return samples_json(info, *split, samples); });
  }
  if (json) return dump(out);

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
  if (out.contains("lengths"))
    for (const auto& [name, lengths] : out["lengths"].items()) text += lengths_text(name, lengths);
  text += sources_text(out["sources"], out["sources"].size(), info.train.tokens + info.validation.tokens);
  if (out.contains("samples"))
    for (const auto& [name, list] : out["samples"].items()) text += samples_text(name, list);
  return text;
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
  return text + sources_text(sources, source_files, 0);
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
