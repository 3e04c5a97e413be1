#include "data/byte_source.h"

#include <fcntl.h>
#include <fmt/core.h>
#include <unistd.h>
#include <zlib.h>
#include <zstd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <string_view>
#include <vector>

namespace tessera {
namespace {

constexpr std::size_t kBufferBytes = 256 << 10;

/// The file as it lies on disk, with its first bytes already looked at.
class PlainSource : public ByteSource {
 public:
  explicit PlainSource(const std::string& path) : path_(path), fd_(path == "-" ? STDIN_FILENO : ::open(path.c_str(), O_RDONLY | O_CLOEXEC)) {
    if (fd_ < 0) throw std::invalid_argument(fmt::format("{}: cannot be opened: {}", path, std::strerror(errno)));
    try {
      head_.resize(4);
      std::size_t have = 0;
      while (const std::size_t got = read_file(std::span(head_).subspan(have))) have += got;
      head_.resize(have);
    } catch (...) {
      close();
      throw;
    }
  }
  ~PlainSource() override { close(); }

  std::string_view head() const { return {head_.data(), head_.size()}; }
  const std::string& path() const { return path_; }
  std::uint64_t consumed() const override { return offset_; }
  std::size_t read(std::span<char> out) override {
    if (head_used_ == head_.size()) return read_file(out);
    const std::size_t count = std::min(out.size(), head_.size() - head_used_);
    std::copy_n(head_.begin() + static_cast<std::ptrdiff_t>(head_used_), count, out.begin());
    head_used_ += count;
    return count;
  }

 private:
  std::size_t read_file(std::span<char> out) {
    while (!out.empty()) {
      const ssize_t got = ::read(fd_, out.data(), out.size());
      if (got < 0 && errno == EINTR) continue;
      if (got < 0 && errno == EISDIR) throw std::invalid_argument(fmt::format("{}: is a folder, expected a file", path_));
      if (got < 0) throw std::runtime_error(fmt::format("{}: reading failed at offset {}: {}", path_, offset_, std::strerror(errno)));
      offset_ += static_cast<std::uint64_t>(got);
      return static_cast<std::size_t>(got);
    }
    return 0;
  }
  void close() {
    if (fd_ > STDIN_FILENO) ::close(fd_);
  }

  std::string path_;
  int fd_;
  std::uint64_t offset_ = 0;
  std::vector<char> head_;
  std::size_t head_used_ = 0;
};

/// What gzip and Zstandard share: a buffer of compressed bytes, and the offset for messages.
class CompressedSource : public ByteSource {
 public:
  explicit CompressedSource(std::unique_ptr<PlainSource> file) : file_(std::move(file)), input_(kBufferBytes) {}
  std::uint64_t consumed() const override { return taken_ + used_; }

 protected:
  /// Compressed bytes not yet used, read from the file when there are none; empty at its end.
  std::span<char> input() {
    if (used_ == have_) {
      taken_ += used_;
      used_ = 0;
      have_ = file_->read(input_);
    }
    return std::span(input_).subspan(used_, have_ - used_);
  }
  void use(std::size_t count) { used_ += count; }
  [[noreturn]] void fail(const char* kind, const std::string& what) const {
    throw std::runtime_error(fmt::format("{}: {} data damaged at offset {} of the file: {}", file_->path(), kind, consumed(), what));
  }

 private:
  std::unique_ptr<PlainSource> file_;
  std::vector<char> input_;
  std::size_t used_ = 0, have_ = 0;
  std::uint64_t taken_ = 0;
};

class GzipSource : public CompressedSource {
 public:
  explicit GzipSource(std::unique_ptr<PlainSource> file) : CompressedSource(std::move(file)) {
    if (inflateInit2(&stream_, 15 + 16) != Z_OK) throw std::runtime_error("zlib cannot start");
  }
  ~GzipSource() override { inflateEnd(&stream_); }

  std::size_t read(std::span<char> out) override {
    while (true) {
      const std::span<char> in = input();
      if (in.empty()) {
        if (inside_) fail("gzip", "the file stops in the middle; was it cut short?");
        return 0;
      }
      if (!inside_) inflateReset(&stream_);
      inside_ = true;
      stream_.next_in = reinterpret_cast<Bytef*>(in.data());
      stream_.avail_in = static_cast<uInt>(in.size());
      stream_.next_out = reinterpret_cast<Bytef*>(out.data());
      stream_.avail_out = static_cast<uInt>(std::min<std::size_t>(out.size(), 1 << 30));
      const auto room = stream_.avail_out;
      const int status = inflate(&stream_, Z_NO_FLUSH);
      use(in.size() - stream_.avail_in);
      if (status == Z_STREAM_END) inside_ = false;  // another member may follow
      if (status != Z_OK && status != Z_STREAM_END && status != Z_BUF_ERROR) fail("gzip", stream_.msg ? stream_.msg : "unknown error");
      if (room != stream_.avail_out) return room - stream_.avail_out;
    }
  }

 private:
  z_stream stream_{};
  bool inside_ = false;
};

class ZstdSource : public CompressedSource {
 public:
  explicit ZstdSource(std::unique_ptr<PlainSource> file) : CompressedSource(std::move(file)), context_(ZSTD_createDCtx(), ZSTD_freeDCtx) {
    if (!context_) throw std::bad_alloc();
  }

  std::size_t read(std::span<char> out) override {
    while (true) {
      ZSTD_outBuffer to{out.data(), out.size(), 0};
      const std::span<char> in = input();
      if (in.empty() && !inside_) return 0;
      // With no input left the decoder may still hold output of the last block.
      ZSTD_inBuffer from{in.data(), in.size(), 0};
      const std::size_t status = ZSTD_decompressStream(context_.get(), &to, &from);
      use(from.pos);
      if (ZSTD_isError(status)) fail("Zstandard", ZSTD_getErrorName(status));
      inside_ = status != 0;
      if (to.pos > 0) return to.pos;
      if (in.empty() && inside_) fail("Zstandard", "the file stops in the middle; was it cut short?");
    }
  }

 private:
  std::unique_ptr<ZSTD_DCtx, decltype(&ZSTD_freeDCtx)> context_;
  bool inside_ = false;
};

bool is_zstd(std::string_view head) {
  using std::string_view_literals::operator""sv;
  if (head == "\x28\xb5\x2f\xfd"sv) return true;
  return head.size() == 4 && (head[0] & 0xf0) == 0x50 && head.substr(1) == "\x2a\x4d\x18"sv;  // a skippable frame first
}

}  // namespace

std::unique_ptr<ByteSource> open_plain_source(const std::string& path) { return std::make_unique<PlainSource>(path); }

std::unique_ptr<ByteSource> open_source(const std::string& path) {
  auto file = std::make_unique<PlainSource>(path);
  if (file->head().starts_with("\x1f\x8b")) return std::make_unique<GzipSource>(std::move(file));
  if (is_zstd(file->head())) return std::make_unique<ZstdSource>(std::move(file));
  return file;
}

}  // namespace tessera
