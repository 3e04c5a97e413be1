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
/// Whether the files hold fewer documents than that, counted as they stand there (bad and repeated ones too, of a damaged file those before the
/// damage). Reads only until there are as many. Of standard input and pipes, which can be read only once: false.
bool fewer_documents(const std::vector<std::string>& files, const ReaderOptions& options, std::uint64_t than);
PipelineOptions pipeline_options(const Tokenizer& tokenizer, const PrepareOptions& options, const InputPosition& start);

}  // namespace tessera
