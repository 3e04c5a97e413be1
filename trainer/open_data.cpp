#include "trainer/open_data.h"

#include <fmt/core.h>

#include <filesystem>

#include "trainer/config.h"

namespace tessera {

DatasetInfo open_data(const std::string& path) {
  constexpr const char* how = "Prepare text with: tessera prepare --input FILE... --tokenizer bytes --output DIR, then --set data.path=DIR";
  if (path.empty()) throw ConfigError(fmt::format("data.path is not set: there is nothing to train on. {}", how));
  if (!std::filesystem::exists(path + "/dataset.json"))
    throw ConfigError(fmt::format("data.path {}: no prepared data (dataset.json) here. {}", path, how));
  return read_dataset(path);
}

std::unique_ptr<Tokenizer> open_tokenizer(const DatasetInfo& data, const std::string& expected) {
  auto tokenizer = load_tokenizer("bpe:" + data.directory + "/tokenizer.json");
  if (tokenizer->hash() != data.tokenizer_hash)
    throw std::runtime_error(fmt::format("{0}/tokenizer.json is not the tokenizer that {0} was made with (SHA-256 {1}, expected {2})", data.directory,
                                         tokenizer->hash(), data.tokenizer_hash));
  const bool specification = expected.find(':') != std::string::npos;
  const bool fits = expected.empty() || (specification ? load_tokenizer(expected)->hash() == data.tokenizer_hash : expected == data.tokenizer_name);
  if (!fits)
    throw ConfigError(
        fmt::format("data.tokenizer is {}, and {} was made with {} (hash {}). Prepare the text again with that tokenizer, or leave the "
                    "key out",
                    expected, data.directory, data.tokenizer_name, data.tokenizer_hash.substr(0, 12)));
  return tokenizer;
}

}  // namespace tessera
