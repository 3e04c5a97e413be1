#include "trainer/hf_tokenizer.h"

#include <fmt/core.h>

#include <filesystem>
#include <nlohmann/json.hpp>
#include <stdexcept>

#include "data/bpe.h"
#include "data/files.h"

namespace tessera {
namespace {

/// The tokenizer `bytes` as a BPE without merges: token = byte.
BpeDefinition bytes_as_bpe() {
  BpeDefinition d;
  for (int byte = 0; byte < 256; ++byte) d.tokens.emplace_back(1, static_cast<char>(byte));
  d.tokens.emplace_back(kEndOfText);
  d.end_of_text = 256;
  d.special = {256};
  return d;
}

bool is_bytes(const BpeDefinition& d) {
  const BpeDefinition bytes = bytes_as_bpe();
  return d.merges.empty() && d.tokens == bytes.tokens && d.special == bytes.special;
}

}  // namespace

std::vector<std::pair<std::string, std::string>> hf_tokenizer_files(const std::string& file, std::int64_t context) {
  const bool bytes = load_tokenizer("bpe:" + file)->hash() == load_tokenizer("bytes")->hash();
  const BpeDefinition d = bytes ? bytes_as_bpe() : parse_tokenizer_json(read_file(file), file);
  const std::string end = d.tokens[d.end_of_text];
  const nlohmann::ordered_json config{{"tokenizer_class", "PreTrainedTokenizerFast"},
                                      {"bos_token", end},
                                      {"eos_token", end},
                                      {"unk_token", end},
                                      {"pad_token", end},
                                      {"add_prefix_space", false},
                                      {"clean_up_tokenization_spaces", false},
                                      {"model_max_length", context}};
  std::vector<std::pair<std::string, std::string>> files{{"tokenizer.json", format_tokenizer_json(d)},
                                                         {"tokenizer_config.json", config.dump(2) + "\n"}};
  if (!d.merges.empty()) {
    files.emplace_back("vocab.json", format_vocabulary_json(d));
    files.emplace_back("merges.txt", format_merges(d));
  }
  return files;
}

std::unique_ptr<Tokenizer> read_hf_tokenizer(const std::string& directory) {
  const std::string json = directory + "/tokenizer.json";
  if (!std::filesystem::exists(json)) {
    for (const char* name : {"/vocab.json", "/encoder.json"})
      if (std::filesystem::exists(directory + name)) return load_tokenizer("gpt2:" + directory);
    throw std::invalid_argument(
        fmt::format("{}: no tokenizer: expected tokenizer.json, or vocab.json and merges.txt; or name one with --tokenizer", directory));
  }
  const std::string contents = read_file(json);
  if (contents.starts_with("{\"tessera_tokenizer\"")) return load_tokenizer("bpe:" + json);
  BpeDefinition definition = parse_tokenizer_json(contents, json);
  if (is_bytes(definition)) return load_tokenizer("bytes");
  return make_bpe_tokenizer(std::move(definition), "bpe", json);
}

}  // namespace tessera
