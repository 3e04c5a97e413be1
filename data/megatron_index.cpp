#include "data/megatron_index.h"

#include <fcntl.h>
#include <fmt/core.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <string_view>
#include <vector>

namespace tessera {
namespace {

constexpr std::string_view kMagic("MMIDIDX\0\0", 9);
constexpr std::size_t kHeaderBytes = 9 + 8 + 1 + 8 + 8;

std::optional<TokenType> type_of_code(int code) {
  switch (code) {
    case 1: return TokenType::u8;
    case 2: return TokenType::i8;
    case 3: return TokenType::i16;
    case 4: return TokenType::i32;
    case 5: return TokenType::i64;
    case 8: return TokenType::u16;
    default: return std::nullopt;  // 6, 7: floating-point numbers
  }
}

template <typename T>
T number_at(std::string_view bytes, std::size_t offset) {
  T value;
  std::memcpy(&value, bytes.data() + offset, sizeof value);
  return value;
}

/// An open file, read at any place.
class RandomFile {
 public:
  explicit RandomFile(const std::string& path) : path_(path), fd_(::open(path.c_str(), O_RDONLY | O_CLOEXEC)) {
    struct stat found {};
    const bool ok = fd_ >= 0 && ::fstat(fd_, &found) == 0;
    const int error = errno;
    if (!ok || !S_ISREG(found.st_mode)) {
      if (fd_ >= 0) ::close(fd_);
      throw std::invalid_argument(fmt::format("{}: {}", path, ok ? "not a regular file" : fmt::format("cannot be opened: {}", std::strerror(error))));
    }
    size_ = static_cast<std::uint64_t>(found.st_size);
  }
  RandomFile(const RandomFile&) = delete;
  RandomFile& operator=(const RandomFile&) = delete;
  ~RandomFile() { ::close(fd_); }

  const std::string& path() const { return path_; }
  std::uint64_t size() const { return size_; }
  void read(std::uint64_t offset, void* out, std::size_t bytes) const {
    for (std::size_t done = 0; done < bytes;) {
      const ssize_t got = ::pread(fd_, static_cast<char*>(out) + done, bytes - done, static_cast<off_t>(offset + done));
      if (got < 0 && errno == EINTR) continue;
      if (got < 0) throw std::runtime_error(fmt::format("{}: reading failed at offset {}: {}", path_, offset + done, std::strerror(errno)));
      if (got == 0) throw std::runtime_error(fmt::format("{}: cut short while being read: it ends at offset {}", path_, offset + done));
      done += static_cast<std::size_t>(got);
    }
  }

 private:
  std::string path_;
  int fd_;
  std::uint64_t size_ = 0;
};

/// One of the index's arrays, read forward through a window.
template <typename T>
class Column {
 public:
  Column(const RandomFile& file, std::uint64_t offset, std::uint64_t count) : file_(file), offset_(offset), count_(count) {}
  std::uint64_t count() const { return count_; }
  T operator[](std::uint64_t i) {
    if (i < begin_ || i - begin_ >= window_.size()) {
      begin_ = i;
      window_.resize(std::min<std::uint64_t>(count_ - i, kWindow));
      file_.read(offset_ + i * sizeof(T), window_.data(), window_.size() * sizeof(T));
    }
    return window_[i - begin_];
  }

 private:
  static constexpr std::uint64_t kWindow = 8 << 10;
  const RandomFile& file_;
  const std::uint64_t offset_, count_;
  std::uint64_t begin_ = 0;
  std::vector<T> window_;
};

}  // namespace

std::size_t size_of(TokenType type) {
  switch (type) {
    case TokenType::u8:
    case TokenType::i8: return 1;
    case TokenType::u16:
    case TokenType::i16: return 2;
    case TokenType::u32:
    case TokenType::i32: return 4;
    case TokenType::i64: return 8;
  }
  throw std::logic_error("size of an unknown type of token");
}

struct MegatronIndex::Impl {
  explicit Impl(const std::string& path) : file(path) {
    std::array<char, kHeaderBytes> bytes;
    const std::string_view header(bytes.data(), std::min<std::uint64_t>(file.size(), bytes.size()));
    file.read(0, bytes.data(), header.size());
    if (!header.starts_with(kMagic) && !kMagic.starts_with(header))
      throw std::invalid_argument(fmt::format("{}: not an index of Megatron's: expected it to begin with MMIDIDX and two zero bytes", path));
    if (header.size() < kHeaderBytes)
      fail(fmt::format("cut short: {} bytes, expected a header of {} and then the index", header.size(), kHeaderBytes));
    if (const auto version = number_at<std::uint64_t>(header, 9); version != 1) fail(fmt::format("version {}, expected 1", version));
    const int code = static_cast<unsigned char>(header[17]);
    const auto known = type_of_code(code);
    if (!known) fail(fmt::format("type {} of a token, expected 1, 2, 3, 4, 5 or 8 (whole numbers)", code));
    type = *known;

    const auto sequences = number_at<std::uint64_t>(header, 18), indices = number_at<std::uint64_t>(header, 26);
    const std::uint64_t most = file.size();  // either number is less: nothing below overflows
    const std::uint64_t expected = sequences < most && indices < most && most < (1ull << 58) ? kHeaderBytes + 12 * sequences + 8 * indices : 0;
    if (expected && sequences && file.size() == expected + sequences)
      fail("the index of a multimodal dataset (it ends with a mode for each sequence), expected one of text");
    if (file.size() != expected)
      fail(fmt::format("{} bytes, where its header promises {} sequences and {} indices{}", file.size(), sequences, indices,
                       expected ? fmt::format(", {} bytes in all", expected) : ""));
    lengths.emplace(file, kHeaderBytes, sequences);
    offsets.emplace(file, kHeaderBytes + 4 * sequences, sequences);
    documents.emplace(file, kHeaderBytes + 12 * sequences, indices);
    if (indices == 0 || (*documents)[indices - 1] != static_cast<std::int64_t>(sequences) || (*documents)[0] != 0)
      fail(fmt::format("the documents' indices run from {} to {}, expected 0 to the number of sequences, {}", indices ? (*documents)[0] : 0,
                       indices ? (*documents)[indices - 1] : 0, sequences));
  }
  [[noreturn]] void fail(const std::string& what) const { throw std::runtime_error(file.path() + ": " + what); }

  std::uint64_t length(std::uint64_t i) {
    const std::int32_t tokens = (*lengths)[i];
    if (tokens < 0) fail(fmt::format("sequence {}: a length of {} tokens", i, tokens));
    return static_cast<std::uint64_t>(tokens);
  }

  RandomFile file;
  TokenType type = TokenType::u16;
  std::optional<Column<std::int32_t>> lengths;
  std::optional<Column<std::int64_t>> offsets, documents;
  std::uint64_t sequence = 0, document = 0, offset = 0;  // what comes next
};

MegatronIndex::MegatronIndex(const std::string& path) : impl_(std::make_unique<Impl>(path)) {}
MegatronIndex::~MegatronIndex() = default;

const std::string& MegatronIndex::path() const { return impl_->file.path(); }
TokenType MegatronIndex::type() const { return impl_->type; }

void MegatronIndex::check_tokens(const std::string& file, std::uint64_t bytes) const {
  const std::uint64_t count = impl_->lengths->count();
  const std::int64_t begin = count ? (*impl_->offsets)[count - 1] : 0;
  const std::uint64_t last = count ? impl_->length(count - 1) * size_of(impl_->type) : 0;
  if (begin < 0 || bytes < last || bytes - last != static_cast<std::uint64_t>(begin))
    throw std::runtime_error(fmt::format("{}: {} bytes, where {} has the last of {} sequences begin at offset {} and take {} bytes", file, bytes,
                                         path(), count, begin, last));
}

std::optional<MegatronIndex::Sequence> MegatronIndex::next() {
  Impl& index = *impl_;
  if (index.sequence == index.lengths->count()) {
    for (; index.document < index.documents->count(); ++index.document)
      if ((*index.documents)[index.document] != static_cast<std::int64_t>(index.sequence))
        index.fail(fmt::format("document {}: begins at sequence {}, before the document in front of it", index.document,
                               (*index.documents)[index.document]));
    return std::nullopt;
  }
  const std::uint64_t tokens = index.length(index.sequence);
  const std::int64_t offset = (*index.offsets)[index.sequence];
  if (offset != static_cast<std::int64_t>(index.offset))
    index.fail(fmt::format("sequence {}: begins at offset {}, expected {}, where the one before ends", index.sequence, offset, index.offset));
  index.offset += tokens * size_of(index.type);

  bool first = false;
  while (true) {  // empty documents begin at the same sequence
    const std::int64_t begin = (*index.documents)[index.document];
    if (begin < static_cast<std::int64_t>(index.sequence))
      index.fail(fmt::format("document {}: begins at sequence {}, before the document in front of it", index.document, begin));
    if (begin > static_cast<std::int64_t>(index.sequence)) break;
    first = true;
    ++index.document;
  }
  ++index.sequence;
  return Sequence{tokens, first};
}

}  // namespace tessera
