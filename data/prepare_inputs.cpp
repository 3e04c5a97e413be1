#include "data/prepare_inputs.h"

#include <fmt/core.h>

#include <algorithm>
#include <filesystem>
#include <stdexcept>
#include <thread>

namespace tessera {

void check(const PrepareOptions& options) {
  if (options.inputs.empty()) throw std::invalid_argument("prepare: no input files");
  if (options.output.empty()) throw std::invalid_argument("prepare: no output folder");
  if (!(options.validation_fraction >= 0 && options.validation_fraction < 1))
    throw std::invalid_argument(fmt::format("--validation-fraction {}: expected a number from 0 to less than 1", options.validation_fraction));
  if (options.shard_tokens < 2 || options.shard_tokens > 4'000'000'000)
    throw std::invalid_argument(fmt::format("--shard-tokens {}: expected 2 to 4000000000", options.shard_tokens));
  if (options.threads < 0 || options.threads > 1024) throw std::invalid_argument(fmt::format("--threads {}: expected 0 to 1024", options.threads));
}

std::vector<std::string> input_files(const PrepareOptions& options) {
  std::vector<std::string> files = expand_inputs(options.inputs, options.reader.format);
  std::sort(files.begin(), files.end());
  return files;
}

bool fewer_documents(const std::vector<std::string>& files, const ReaderOptions& options, std::uint64_t than) {
  if (!std::all_of(files.begin(), files.end(), [](const std::string& file) { return std::filesystem::is_regular_file(file); })) return false;
  ReaderOptions lenient = options;
  lenient.skip_bad = true;
  std::uint64_t count = 0;
  std::vector<Entry> entries;
  for (const std::string& file : files) {
    try {
      for (DocumentReader reader({file}, lenient); reader.next(entries, 256 << 10);)
        for (const Entry& entry : entries)
          if (entry.first && ++count >= than) return false;
    } catch (const std::exception&) {  // the run itself meets it too
    }
  }
  return true;
}

PipelineOptions pipeline_options(const Tokenizer& tokenizer, const PrepareOptions& options, const InputPosition& start) {
  PipelineOptions out;
  out.reader = options.reader;
  out.reader.vocabulary = tokenizer.vocabulary();
  out.reader.end_of_text = tokenizer.end_of_text();
  out.skip_errors = options.skip_errors;
  out.threads = options.threads ? options.threads : std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  out.hashes = options.validation_fraction > 0 || options.dedup;
  out.start = start;
  return out;
}

}  // namespace tessera
