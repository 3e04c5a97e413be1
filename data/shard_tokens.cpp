#include "data/shard_tokens.h"

#include <fcntl.h>
#include <fmt/core.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "data/fletcher32.h"

namespace tessera {
namespace {

/// `bytes` as numbers of type T, widened.
template <typename T>
void widen(std::span<const std::byte> bytes, std::span<std::int32_t> out) {
  for (std::size_t i = 0; i < out.size(); ++i) {
    T value;
    std::memcpy(&value, bytes.data() + i * sizeof(T), sizeof(T));
    out[i] = static_cast<std::int32_t>(value);
  }
}

}  // namespace

ShardTokens::Descriptor::Descriptor(Descriptor&& other) noexcept : number(std::exchange(other.number, -1)) {}
ShardTokens::Descriptor& ShardTokens::Descriptor::operator=(Descriptor&& other) noexcept {
  std::swap(number, other.number);
  return *this;
}
ShardTokens::Descriptor::~Descriptor() {
  if (number >= 0) ::close(number);
}

ShardTokens::ShardTokens(std::string path, std::uint64_t tokens, std::int64_t vocabulary, std::function<void(const Hdf5File&)> check)
    : path_(std::move(path)), tokens_(tokens), vocabulary_(vocabulary), check_(std::move(check)) {}

void ShardTokens::close() {
  descriptor_ = Descriptor();
  file_.reset();
}

ShardTokens::Identity ShardTokens::identity() const {
  struct stat status;
  if (::fstat(descriptor_.number, &status) != 0) throw std::runtime_error(fmt::format("{}: cannot be read: {}", path_, std::strerror(errno)));
  return {static_cast<std::uint64_t>(status.st_dev), static_cast<std::uint64_t>(status.st_ino), static_cast<std::uint64_t>(status.st_size),
          static_cast<std::int64_t>(status.st_mtim.tv_sec), static_cast<std::int64_t>(status.st_mtim.tv_nsec)};
}

void ShardTokens::open() {
  close();
  Descriptor opened;
  opened.number = ::open(path_.c_str(), O_RDONLY | O_CLOEXEC);
  if (opened.number < 0) throw std::runtime_error(fmt::format("{}: cannot be opened: {}", path_, std::strerror(errno)));
  descriptor_ = std::move(opened);
  const Identity now = identity();
  if (now == known_) return;
  known_ = {};
  try {
    Hdf5File file = Hdf5File::open(path_);
    check_(file);
    if (auto placement = file.placement("tokens"); placement && (placement->type == Hdf5Type::u16 || placement->type == Hdf5Type::u32)) {
      placement_ = std::move(*placement);
      checked_.assign(placement_.offsets.size(), !placement_.fletcher32);
      known_ = now;
    } else {
      descriptor_ = Descriptor();
      file_ = std::move(file);
    }
  } catch (const std::invalid_argument& e) {  // the manifest vouches for the shard: not the user's mistake
    close();
    throw std::runtime_error(e.what());
  } catch (...) {
    close();
    throw;
  }
}

void ShardTokens::read(std::uint64_t first, std::span<std::int32_t> out) {
  if (!is_open() || (!file_ && identity() != known_)) open();
  try {
    if (file_)
      file_->read_part<std::int32_t>("tokens", {first}, {out.size()}, out);
    else
      read_pieces(first, out);
  } catch (const std::runtime_error& e) {
    throw std::runtime_error(fmt::format("{}: tokens {} to {} cannot be read: the shard is damaged. Prepare the data again ({})", path_, first,
                                         first + out.size(), e.what()));
  }
  // Each time: what indexes the embedding's rows is not taken on trust from a disk that was read a second time. As unsigned, negative is large.
  std::uint32_t largest = 0;
  for (const std::int32_t token : out) largest = std::max(largest, static_cast<std::uint32_t>(token));
  if (largest < vocabulary_) return;
  const auto wrong = std::find_if(out.begin(), out.end(), [&](std::int32_t token) { return token < 0 || token >= vocabulary_; });
  throw std::runtime_error(fmt::format("{}: token {} at index {} lies outside the vocabulary of {}; the shard does not match its tokenizer", path_,
                                       static_cast<std::uint32_t>(*wrong), first + static_cast<std::uint64_t>(wrong - out.begin()), vocabulary_));
}

void ShardTokens::read_pieces(std::uint64_t first, std::span<std::int32_t> out) {
  const std::uint64_t size = size_of(placement_.type);
  while (!out.empty()) {
    const std::uint64_t piece = first / placement_.piece, within = first % placement_.piece;
    const std::size_t count = std::min<std::uint64_t>(out.size(), placement_.piece - within);
    std::span<const std::byte> bytes;
    if (!checked_[piece]) {
      check_piece(piece);
      bytes = std::span(buffer_).subspan(within * size, count * size);
    } else {
      if (buffer_.size() < count * size) buffer_.resize(count * size);
      read_bytes(placement_.offsets[piece] + within * size, std::span(buffer_).first(count * size));
      bytes = std::span(buffer_).first(count * size);
    }
    if (placement_.type == Hdf5Type::u16)
      widen<std::uint16_t>(bytes, out.first(count));
    else
      widen<std::uint32_t>(bytes, out.first(count));
    out = out.subspan(count);
    first += count;
  }
}

/// Reads the whole piece into the buffer and compares its checksum.
void ShardTokens::check_piece(std::size_t piece) {
  const std::size_t bytes = placement_.piece * size_of(placement_.type);
  if (buffer_.size() < bytes + 4) buffer_.resize(bytes + 4);
  read_bytes(placement_.offsets[piece], std::span(buffer_).first(bytes + 4));
  std::uint32_t stored;
  std::memcpy(&stored, buffer_.data() + bytes, sizeof stored);
  if (const std::uint32_t found = fletcher32(std::span(buffer_).first(bytes)); found != stored)
    throw std::runtime_error(fmt::format("chunk {}, tokens {} to {}: Fletcher-32 is {:08x}, the file says {:08x}", piece, piece * placement_.piece,
                                         std::min(tokens_, (piece + 1) * placement_.piece), found, stored));
  checked_[piece] = true;
}

void ShardTokens::read_bytes(std::uint64_t offset, std::span<std::byte> out) const {
  for (std::size_t done = 0; done < out.size();) {
    const ssize_t got = ::pread(descriptor_.number, out.data() + done, out.size() - done, static_cast<off_t>(offset + done));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) throw std::runtime_error(fmt::format("reading {} bytes at {} failed: {}", out.size(), offset, std::strerror(errno)));
    if (got == 0) throw std::runtime_error(fmt::format("the file ends at {}, within the {} bytes from {} on", offset + done, out.size(), offset));
    done += static_cast<std::size_t>(got);
  }
}

}  // namespace tessera
