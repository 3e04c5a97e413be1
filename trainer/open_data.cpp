#include "trainer/open_data.h"

#include <fmt/core.h>

#include <algorithm>
#include <filesystem>

namespace tessera {
namespace {

/// What must be true of data.mix as a whole.
void check_mix(const std::vector<MixPart>& parts) {
  const auto place = [&](std::size_t i) { return fmt::format("data.mix[{}], {}", i, parts[i].data.directory); };
  for (std::size_t i = 0; i < parts.size(); ++i) {
    const DatasetInfo& one = parts[i].data;
    if (one.tokenizer_hash != parts[0].data.tokenizer_hash)
      throw ConfigError(
          fmt::format("{}: made with tokenizer {} (hash {}), and {} with {} (hash {}). Expected one tokenizer: prepare the text of one again with "
                      "the other's, --tokenizer bpe:{}/tokenizer.json",
                      place(i), one.tokenizer_name, one.tokenizer_hash.substr(0, 12), place(0), parts[0].data.tokenizer_name,
                      parts[0].data.tokenizer_hash.substr(0, 12), parts[0].data.directory));
    const auto same_text = [&](const DatasetInfo& other) {
      return std::ranges::equal(one.train.shards, other.train.shards, {}, &ShardInfo::sha256, &ShardInfo::sha256);
    };
    for (std::size_t k = 0; k < i; ++k)
      if (std::filesystem::equivalent(one.directory, parts[k].data.directory) || same_text(parts[k].data))
        throw ConfigError(fmt::format("{}: the same training text as {}. Keep one, with both weights together", place(i), place(k)));
  }
}

bool is_prepared(const std::string& path) { return !path.empty() && std::filesystem::exists(path + "/dataset.json"); }

}  // namespace

std::string TrainingData::names() const {
  if (synthetic) return name_of(synthetic->kind);
  std::string out;
  for (const MixPart& part : parts) out += (out.empty() ? "" : ", ") + part.data.directory;
  return out;
}

std::uint64_t TrainingData::train_tokens() const {
  std::uint64_t tokens = 0;
  for (const MixPart& part : parts) tokens += part.data.train.tokens;
  return tokens;
}

double TrainingData::share(std::size_t part) const {
  if (synthetic) return 1;
  double total = 0;
  for (const MixPart& each : parts) total += each.weight;
  return parts[part].weight / total;
}

TrainingData open_training_data(const DataConfig& config) {
  TrainingData out;
  if (config.synthetic) {
    out.synthetic = config.synthetic;
    return out;
  }
  if (config.mix.empty()) {
    out.parts.push_back({open_data(config.path), 1});
    return out;
  }
  for (std::size_t i = 0; i < config.mix.size(); ++i)
    out.parts.push_back({open_data(config.mix[i].path, fmt::format("data.mix[{}].path", i)), config.mix[i].weight});
  check_mix(out.parts);
  return out;
}

bool has_training_data(const DataConfig& config) {
  if (config.synthetic) return true;
  return config.mix.empty() ? is_prepared(config.path)
                            : std::ranges::all_of(config.mix, [](const MixEntry& entry) { return is_prepared(entry.path); });
}

void find_training_data(DataConfig& config, const std::string& directory) {
  const auto find = [&](std::string& path) {
    const std::string there = (std::filesystem::path(directory) / path).string();  // an absolute path stays
    if (!path.empty() && !directory.empty() && !is_prepared(path) && is_prepared(there)) path = there;
  };
  find(config.path);
  for (MixEntry& entry : config.mix) find(entry.path);
}

DatasetInfo open_data(const std::string& path, const std::string& key) {
  constexpr const char* how = "Prepare text with: tessera prepare --input FILE... --tokenizer bytes --output DIR, then --set data.path=DIR";
  if (path.empty()) throw ConfigError(fmt::format("data.path is not set, nor data.mix or data.synthetic: there is nothing to train on. {}", how));
  if (!is_prepared(path)) throw ConfigError(fmt::format("{} {}: no prepared data (dataset.json) here. {}", key, path, how));
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
