#include "data/spool.h"

#include <fcntl.h>
#include <fmt/core.h>
#include <unistd.h>
#include <zlib.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <string_view>
#include <utility>

#include "data/files.h"

namespace tessera {
namespace {

constexpr std::size_t kBufferBytes = 1 << 20;

std::uint32_t crc_of(std::uint32_t before, std::span<const std::byte> bytes) {
  return static_cast<std::uint32_t>(::crc32_z(before, reinterpret_cast<const unsigned char*>(bytes.data()), bytes.size()));
}

}  // namespace

Spool::Spool(std::string path) : path_(std::move(path)), descriptor_(::open(path_.c_str(), O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0666)) {
  if (descriptor_ < 0) throw std::runtime_error(fmt::format("{}: cannot be created: {}", path_, std::strerror(errno)));
}

Spool::Spool(std::string path, const Mark& mark) : path_(std::move(path)), descriptor_(::open(path_.c_str(), O_RDWR | O_CLOEXEC)), mark_(mark) {
  try {
    if (descriptor_ < 0 || ::ftruncate(descriptor_, std::min<off_t>(::lseek(descriptor_, 0, SEEK_END), static_cast<off_t>(mark.bytes))) != 0)
      throw std::runtime_error(fmt::format("{}: cannot be opened: {}", path_, std::strerror(errno)));
    std::uint32_t crc = 0;
    std::uint64_t bytes = 0;
    read(kBufferBytes, [&](std::span<const std::byte> block) {
      crc = crc_of(crc, block);
      bytes += block.size();
    });
    if (bytes != mark.bytes || crc != mark.crc)
      throw std::runtime_error(fmt::format("{}: is not as the interrupted run left it; start anew, without --resume", path_));
    if (::lseek(descriptor_, 0, SEEK_END) < 0) throw std::runtime_error(fmt::format("{}: cannot be written: {}", path_, std::strerror(errno)));
  } catch (...) {
    if (descriptor_ >= 0) ::close(descriptor_);
    throw;
  }
}

Spool::~Spool() { ::close(descriptor_); }

void Spool::append(std::span<const std::byte> bytes) {
  buffer_.insert(buffer_.end(), bytes.begin(), bytes.end());
  if (buffer_.size() >= kBufferBytes) flush();
}

void Spool::flush() {
  if (buffer_.empty()) return;
  write_all(descriptor_, {reinterpret_cast<const char*>(buffer_.data()), buffer_.size()}, path_);
  mark_.crc = crc_of(mark_.crc, buffer_);
  mark_.bytes += buffer_.size();
  buffer_.clear();
}

Spool::Mark Spool::mark() {
  flush();
  if (::fdatasync(descriptor_) != 0 && errno != EINVAL) throw_write_error(path_, 0, mark_.bytes, errno);
  return mark_;
}

void Spool::read(std::size_t block, const std::function<void(std::span<const std::byte>)>& take) const {
  if (!buffer_.empty()) throw std::logic_error("a spool is read before it was flushed");
  std::vector<std::byte> bytes(block);
  std::size_t have = 0;
  for (std::uint64_t offset = 0;;) {
    const ssize_t got = ::pread(descriptor_, bytes.data() + have, block - have, static_cast<off_t>(offset));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) throw std::runtime_error(fmt::format("{}: reading failed at offset {}: {}", path_, offset, std::strerror(errno)));
    offset += static_cast<std::uint64_t>(got);
    have += static_cast<std::size_t>(got);
    if (have < block && got > 0) continue;
    if (have > 0) take(std::span(bytes).first(have));
    have = 0;
    if (got == 0) break;
  }
}

}  // namespace tessera
