#include "data/dataset_contents.h"

#include <fmt/core.h>

#include <algorithm>
#include <bit>
#include <functional>
#include <limits>
#include <optional>
#include <span>
#include <stdexcept>

#include "data/hdf5_file.h"
#include "data/sampler.h"

namespace tessera {
namespace {

/// Where the documents of a shard begin in it, and its end.
std::vector<std::uint64_t> read_starts(const DatasetInfo& info, const ShardInfo& shard) {
  const std::string path = info.directory + "/" + shard.file;
  std::vector<std::uint64_t> starts;
  try {
    starts = Hdf5File::open(path).read<std::uint64_t>("documents");
  } catch (const std::invalid_argument& e) {  // the manifest vouches for the shard
    throw std::runtime_error(e.what());
  }
  const bool rises = std::ranges::adjacent_find(starts, std::greater_equal<>()) == starts.end();
  if (starts.size() != shard.documents + 1 || starts.back() != shard.tokens || !rises)
    throw std::runtime_error(fmt::format("{}: `documents` should hold {} places that rise and end with the number of tokens, {}", path,
                                         shard.documents + 1, shard.tokens));
  return starts;
}

}  // namespace

LengthHistogram document_lengths(const DatasetInfo& info, const SplitInfo& split) {
  LengthHistogram out;
  std::vector<std::uint32_t> lengths;
  lengths.reserve(split.documents);
  std::optional<std::uint64_t> open;  // where the last document so far begins in the split
  const auto end_at = [&](std::uint64_t token) {
    if (!open) return;
    const std::uint64_t length = token - *open;
    lengths.push_back(static_cast<std::uint32_t>(std::min<std::uint64_t>(length, std::numeric_limits<std::uint32_t>::max())));
    const auto bucket = static_cast<std::size_t>(std::bit_width(length) - 1);
    if (out.buckets.size() <= bucket) out.buckets.resize(bucket + 1);
    ++out.buckets[bucket].documents;
    out.buckets[bucket].tokens += length;
    out.tokens += length;
  };
  std::uint64_t first = 0;  // of the shard, in the split
  for (const ShardInfo& shard : split.shards) {
    const auto starts = read_starts(info, shard);
    for (const std::uint64_t start : std::span(starts).first(shard.documents)) {
      end_at(first + start);
      open = first + start;
    }
    first += shard.tokens;
  }
  end_at(first);
  out.documents = lengths.size();
  if (lengths.empty()) return out;
  const auto [least, most] = std::ranges::minmax(lengths);
  out.shortest = least;
  out.longest = most;
  const auto middle = lengths.begin() + static_cast<std::ptrdiff_t>(lengths.size() / 2);
  std::ranges::nth_element(lengths, middle);
  out.median = *middle;
  return out;
}

std::vector<DocumentSample> sample_documents(const DatasetInfo& info, const SplitInfo& split, const Tokenizer& tokenizer, std::uint64_t count,
                                             std::uint64_t seed, std::uint64_t most_tokens) {
  std::uint64_t documents = 0;
  for (const ShardInfo& shard : split.shards) documents += shard.documents;
  std::vector<DocumentSample> out;
  if (documents == 0) return out;
  const Permutation order(documents, scramble(seed));
  TokenReader reader(info, split);
  for (std::uint64_t i = 0; i < std::min(count, documents); ++i) {
    DocumentSample sample;
    sample.number = order(i);
    std::size_t index = 0;
    std::uint64_t before = 0, first = 0;  // documents and tokens before the shard
    for (; sample.number >= before + split.shards[index].documents; ++index) {
      before += split.shards[index].documents;
      first += split.shards[index].tokens;
    }
    const auto starts = read_starts(info, split.shards[index]);
    const std::uint64_t here = sample.number - before;
    sample.shard = split.shards[index].file;
    sample.first_token = starts[here];
    std::uint64_t end = first + starts[here + 1];
    for (std::size_t next = index + 1; here + 1 == split.shards[index].documents && next < split.shards.size(); ++next) {
      // The shard's last document goes on to where the next one begins.
      const ShardInfo& after = split.shards[next];
      end += after.documents > 0 ? read_starts(info, after).front() : after.tokens;
      if (after.documents > 0) break;
    }
    sample.tokens = end - first - sample.first_token;
    std::vector<std::int32_t> tokens(std::min(sample.tokens, most_tokens));
    sample.whole = tokens.size() == sample.tokens;
    reader.read(first + sample.first_token, tokens);
    for (const std::int32_t token : tokens) tokenizer.decode(static_cast<std::uint32_t>(token), sample.text);
    out.push_back(std::move(sample));
  }
  return out;
}

}  // namespace tessera
