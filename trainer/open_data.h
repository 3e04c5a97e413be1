#pragma once
// Opening prepared data for a command, with errors that say what to do.

#include <memory>
#include <optional>
#include <string>

#include "data/dataset.h"
#include "data/loader.h"
#include "data/tokenizer.h"
#include "trainer/config.h"

namespace tessera {

/// What a run trains on: the dataset of data.path, those of data.mix, or a synthetic task.
struct TrainingData {
  std::vector<MixPart> parts;              // at least one, all of one tokenizer; of a task none
  std::optional<SyntheticTask> synthetic;  // has no tokenizer

  const DatasetInfo& first() const { return parts.front().data; }
  std::string names() const;  // their folders; the task
  std::uint64_t train_tokens() const;
  double share(std::size_t part) const;  // of the sequences, 0 .. 1
};

/// Throws ConfigError naming the key when there is no such data, when tokenizers differ or a dataset stands in data.mix twice.
TrainingData open_training_data(const DataConfig& config);
/// Whether all that `config` names is there: prepared data, or a task; false also when it names none.
bool has_training_data(const DataConfig& config);

/// Of the relative paths of `config`, those without prepared data here become paths from `directory`, where there is some ("": they stay).
void find_training_data(DataConfig& config, const std::string& directory);

/// The dataset in `path`, which `key` says (or --data). Throws ConfigError that names the command to prepare one when there is none.
DatasetInfo open_data(const std::string& path, const std::string& key = "data.path");

/// The dataset's own tokenizer. `expected` (data.tokenizer; "": any) is a name ("bytes", "gpt2", "bpe") or a SPEC of load_tokenizer();
/// ConfigError when the data was made with another one.
std::unique_ptr<Tokenizer> open_tokenizer(const DatasetInfo& data, const std::string& expected = "");

}  // namespace tessera
