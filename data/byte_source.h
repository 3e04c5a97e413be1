#pragma once
// A stream of bytes out of a file, plain or compressed. What a file is, its first bytes say, not its name.

#include <cstdint>
#include <memory>
#include <span>
#include <string>

namespace tessera {

class ByteSource {
 public:
  virtual ~ByteSource() = default;
  /// Fills `out` as far as it goes and returns the number of bytes; 0 only at the end. Throws std::runtime_error naming the file and the
  /// offset when reading or decompressing fails; a compressed file that stops early is an error.
  virtual std::size_t read(std::span<char> out) = 0;
  /// Bytes of the file itself (compressed) read so far.
  virtual std::uint64_t consumed() const = 0;
};

/// gzip (several members), Zstandard (several frames) or plain; "-" is standard input. Throws std::invalid_argument when it cannot be opened.
std::unique_ptr<ByteSource> open_source(const std::string& path);
/// The bytes as they lie on disk, whatever they look like.
std::unique_ptr<ByteSource> open_plain_source(const std::string& path);

}  // namespace tessera
