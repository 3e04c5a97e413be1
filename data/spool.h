#pragma once
// A file that only grows: numbers on their way into a shard. What a journal has recorded of it can be found again after a crash: the file is cut
// back to the recorded length, and a checksum says whether that much is as it was.

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

namespace tessera {

class Spool {
 public:
  struct Mark {
    std::uint64_t bytes = 0;
    std::uint32_t crc = 0;  // CRC-32 of those bytes
  };

  /// A new, empty file. Throws std::runtime_error.
  explicit Spool(std::string path);
  /// The first mark.bytes of a file that is there. Throws std::runtime_error when it is shorter, or other than it was.
  Spool(std::string path, const Mark& mark);
  Spool(const Spool&) = delete;
  Spool& operator=(const Spool&) = delete;
  ~Spool();

  const std::string& path() const { return path_; }
  /// Throws std::runtime_error (disk full).
  void append(std::span<const std::byte> bytes);
  /// Brings everything to the disk and says how much there is.
  Mark mark();
  /// Hands what append() holds back to the system. Throws std::runtime_error (disk full).
  void flush();
  /// All of it, flushed before, in blocks of `block` bytes (the last may be shorter).
  void read(std::size_t block, const std::function<void(std::span<const std::byte>)>& take) const;

 private:
  std::string path_;
  int descriptor_ = -1;
  Mark mark_;
  std::vector<std::byte> buffer_;  // not yet written
};

}  // namespace tessera
