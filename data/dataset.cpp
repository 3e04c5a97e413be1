#include "data/dataset.h"

#include <fmt/core.h>

#include <stdexcept>

#include "data/hdf5_file.h"

namespace tessera {

ShardHeader read_shard_header(const Hdf5File& file) {
  if (!file.contains("tokens") || !file.contains("documents") || !file.has_attribute("format_version"))
    throw std::invalid_argument(fmt::format("{}: is not a shard of tokens: no `tokens`, `documents` or format version", file.path()));
  ShardHeader out;
  out.version = file.integer_attribute("format_version");
  if (out.version != kDatasetVersion)
    throw std::runtime_error(fmt::format("{}: format version {}, this program reads {}", file.path(), out.version, kDatasetVersion));
  out.vocabulary = file.integer_attribute("vocabulary");
  out.end_of_text = file.integer_attribute("end_of_text");
  out.tokenizer_name = file.string_attribute("tokenizer");
  out.tokenizer_hash = file.string_attribute("tokenizer_hash");
  out.split = file.string_attribute("split");
  out.sources = file.string_attribute("sources");
  out.text_bytes = static_cast<std::uint64_t>(file.integer_attribute("text_bytes"));
  const Hdf5Info tokens = file.info("tokens"), documents = file.info("documents");
  if (tokens.shape.size() != 1 || documents.shape.size() != 1 || documents.shape[0] == 0)
    throw std::runtime_error(fmt::format("{}: `tokens` and `documents` should be rows of numbers, `documents` not empty", file.path()));
  out.tokens = tokens.shape[0];
  out.documents = documents.shape[0] - 1;
  return out;
}

bool is_shard(const std::string& file) {
  try {
    const Hdf5File open = Hdf5File::open(file);
    return open.contains("tokens") && open.contains("documents");
  } catch (const std::invalid_argument&) {
    return false;
  }
}

ShardHeader read_shard_header(const std::string& file) { return read_shard_header(Hdf5File::open(file)); }

}  // namespace tessera
