#include <fmt/core.h>

#include <algorithm>
#include <limits>
#include <list>
#include <optional>
#include <stdexcept>

#include "data/dataset.h"
#include "data/hdf5_file.h"
#include "data/shard_tokens.h"

namespace tessera {
namespace {

template <typename T>
void expect(const std::string& path, const char* what, const T& found, const T& expected) {
  if (found != expected)
    throw std::runtime_error(fmt::format("{}: {} is {}, the dataset's manifest says {}; the shard belongs to another dataset. Prepare the data again",
                                         path, what, found, expected));
}

}  // namespace

struct TokenReader::Impl {
  struct Shard {
    std::string path;
    std::uint64_t first = 0, tokens = 0, documents = 0;  // first: index in the split
    std::optional<ShardTokens> contents;                 // since it was first needed
    std::list<std::size_t>::iterator use;                // in `recent`, when open
    // First tokens of documents, within the shard, read when first asked for. 32 bits: a large corpus has tens of millions of documents.
    std::optional<std::vector<std::uint32_t>> starts;
  };

  DatasetInfo info;
  std::vector<Shard> shards;
  std::size_t open_files = 0;
  std::list<std::size_t> recent;  // open shards, the latest used first
  std::uint64_t size = 0;

  std::size_t shard_of(std::uint64_t token) const {
    const auto after = std::upper_bound(shards.begin(), shards.end(), token, [](std::uint64_t t, const Shard& shard) { return t < shard.first; });
    return static_cast<std::size_t>(after - shards.begin()) - 1;
  }

  /// Compares an open shard with the manifest.
  void check(const Shard& shard, const Hdf5File& file) const {
    const ShardHeader header = read_shard_header(file);
    expect(shard.path, "the tokenizer's hash", header.tokenizer_hash, info.tokenizer_hash);
    expect(shard.path, "the vocabulary", header.vocabulary, info.vocabulary);
    expect(shard.path, "the number of tokens", header.tokens, shard.tokens);
    expect(shard.path, "the number of documents", header.documents, shard.documents);
  }

  void read(std::size_t index, std::uint64_t offset, std::span<std::int32_t> out) {
    Shard& shard = shards[index];
    if (!shard.contents)
      shard.contents.emplace(shard.path, shard.tokens, info.vocabulary, [this, index](const Hdf5File& file) { check(shards[index], file); });
    if (shard.contents->is_open()) {
      recent.splice(recent.begin(), recent, shard.use);
    } else {
      if (recent.size() == open_files) {
        shards[recent.back()].contents->close();
        recent.pop_back();
      }
      shard.use = recent.insert(recent.begin(), index);
    }
    try {
      shard.contents->read(offset, out);
    } catch (...) {
      if (!shard.contents->is_open()) recent.erase(shard.use);
      throw;
    }
  }

  const std::vector<std::uint32_t>& starts(std::size_t index) {
    Shard& shard = shards[index];
    if (shard.starts) return *shard.starts;
    std::vector<std::uint64_t> wide;
    try {
      const Hdf5File file = Hdf5File::open(shard.path);
      check(shard, file);
      wide = file.read<std::uint64_t>("documents");
    } catch (const std::invalid_argument& e) {  // the manifest vouches for the shard: not the user's mistake
      throw std::runtime_error(e.what());
    }
    if (!std::is_sorted(wide.begin(), wide.end()) || wide.back() != shard.tokens)
      throw std::runtime_error(fmt::format("{}: `documents` should rise and end with the number of tokens, {}", shard.path, shard.tokens));
    shard.starts.emplace(wide.begin(), wide.end() - 1);
    return *shard.starts;
  }

  /// Index in the split of the first token of the document that holds the token before shard `index`.
  std::uint64_t start_before(std::size_t index) {
    while (index-- > 0)
      if (const auto& own = starts(index); !own.empty()) return shards[index].first + own.back();
    return 0;
  }

  void check_range(std::uint64_t first, std::size_t count) const {
    if (first > size || count > size - first)
      throw std::out_of_range(fmt::format("{}: tokens {} to {} were asked for, the split has {}", info.directory, first, first + count, size));
  }
};

TokenReader::TokenReader(const DatasetInfo& info, const SplitInfo& split, std::size_t open_files) : impl_(std::make_unique<Impl>()) {
  if (open_files == 0) throw std::invalid_argument("TokenReader: open_files must be at least 1");
  impl_->open_files = open_files;
  // Of the manifest, what shards are compared with: it may list hundreds of them and thousands of sources.
  impl_->info.directory = info.directory;
  impl_->info.tokenizer_hash = info.tokenizer_hash;
  impl_->info.vocabulary = info.vocabulary;
  for (const ShardInfo& shard : split.shards) {
    if (shard.tokens == 0) continue;
    if (shard.tokens > std::numeric_limits<std::uint32_t>::max())
      throw std::runtime_error(fmt::format("{}: the shard has {} tokens, this program reads at most 2^32-1 in one", shard.file, shard.tokens));
    auto& added = impl_->shards.emplace_back();
    added.path = info.directory + "/" + shard.file;
    added.first = impl_->size;
    added.tokens = shard.tokens;
    added.documents = shard.documents;
    impl_->size += shard.tokens;
  }
}
TokenReader::TokenReader(TokenReader&&) noexcept = default;
TokenReader& TokenReader::operator=(TokenReader&&) noexcept = default;
TokenReader::~TokenReader() = default;
std::uint64_t TokenReader::size() const { return impl_->size; }

void TokenReader::read(std::uint64_t first, std::span<std::int32_t> out) {
  impl_->check_range(first, out.size());
  while (!out.empty()) {
    const std::size_t index = impl_->shard_of(first);
    const Impl::Shard& shard = impl_->shards[index];
    const std::uint64_t offset = first - shard.first;
    const std::size_t count = std::min<std::uint64_t>(out.size(), shard.tokens - offset);
    impl_->read(index, offset, out.first(count));
    out = out.subspan(count);
    first += count;
  }
}

void TokenReader::read_document_starts(std::uint64_t first, std::span<std::int32_t> out) {
  impl_->check_range(first, out.size());
  const std::uint64_t origin = first;
  // Sequences are far shorter than 2^31 tokens; a start further back than that is as good as any before the sequence.
  const auto relative = [&](std::uint64_t start) {
    return start >= origin ? static_cast<std::int32_t>(start - origin)
                           : static_cast<std::int32_t>(
                                 -std::min<std::int64_t>(static_cast<std::int64_t>(origin - start), std::numeric_limits<std::int32_t>::max()));
  };
  while (!out.empty()) {
    const std::size_t index = impl_->shard_of(first);
    const Impl::Shard& shard = impl_->shards[index];
    const std::uint64_t offset = first - shard.first;
    const std::size_t count = std::min<std::uint64_t>(out.size(), shard.tokens - offset);
    const auto& starts = impl_->starts(index);
    auto next = std::upper_bound(starts.begin(), starts.end(), offset);  // the first document after `offset`
    std::int32_t current = relative(next == starts.begin() ? impl_->start_before(index) : shard.first + *(next - 1));
    for (std::size_t done = 0; done < count;) {
      const std::size_t end = next == starts.end() ? count : std::min<std::uint64_t>(count, *next - offset);
      std::fill(out.begin() + static_cast<std::ptrdiff_t>(done), out.begin() + static_cast<std::ptrdiff_t>(end), current);
      done = end;
      if (done < count) current = relative(shard.first + *next++);
    }
    out = out.subspan(count);
    first += count;
  }
}

}  // namespace tessera
