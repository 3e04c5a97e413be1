#pragma once
// Opening prepared data for a command, with errors that say what to do.

#include <memory>
#include <string>

#include "data/dataset.h"
#include "data/tokenizer.h"

namespace tessera {

/// The dataset in `path` (data.path or --data). Throws ConfigError that names the command to prepare one when there is none.
DatasetInfo open_data(const std::string& path);

/// The dataset's own tokenizer. `expected` (data.tokenizer; "": any) is a name ("bytes", "gpt2", "bpe") or a SPEC of load_tokenizer();
/// ConfigError when the data was made with another one.
std::unique_ptr<Tokenizer> open_tokenizer(const DatasetInfo& data, const std::string& expected = "");

}  // namespace tessera
