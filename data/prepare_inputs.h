#pragma once
// What prepare_dataset() and estimate_dataset() have in common: options and input files.

#include <string>
#include <vector>

#include "data/prepare.h"
#include "data/prepare_pipeline.h"

namespace tessera {

/// Throws std::invalid_argument for options that are out of range.
void check(const PrepareOptions& options);
/// All input files, sorted by name.
std::vector<std::string> input_files(const PrepareOptions& options);
PipelineOptions pipeline_options(const Tokenizer& tokenizer, const PrepareOptions& options, const InputPosition& start);

}  // namespace tessera
