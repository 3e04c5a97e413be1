#pragma once
// The tokens of one shard, read from where they lie in its file: HDF5 finds the chunks and their checksums once, and what a sequence takes is then
// one pread() of its own bytes.

#include <sys/stat.h>

#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "data/hdf5_file.h"

namespace tessera {

class ShardTokens {
 public:
  /// `check` looks at the open file and throws when it is not the shard that was meant.
  ShardTokens(std::string path, std::uint64_t tokens, std::int64_t vocabulary, std::function<void(const Hdf5File&)> check);

  /// Tokens [first, first + out.size()). A chunk's checksum is compared when the chunk is first read, and again after the file's size or time of
  /// change has become another. Throws std::runtime_error naming file, tokens and chunk.
  void read(std::uint64_t first, std::span<std::int32_t> out);
  bool is_open() const { return descriptor_.number >= 0 || file_.has_value(); }
  /// Gives the file back; the next read() opens it again. Where its chunks lie and which were checked stays known while the file stays as it was.
  void close();

 private:
  struct Descriptor {
    Descriptor() = default;
    Descriptor(Descriptor&& other) noexcept;
    Descriptor& operator=(Descriptor&& other) noexcept;
    ~Descriptor();
    int number = -1;
  };
  /// What changes when somebody writes to a file or puts another in its place.
  struct Identity {
    std::uint64_t device = 0, inode = 0, bytes = 0;
    std::int64_t seconds = -1, nanoseconds = 0;
    bool operator==(const Identity&) const = default;
  };

  Identity identity() const;
  void open();
  void read_pieces(std::uint64_t first, std::span<std::int32_t> out);
  void check_piece(std::size_t piece);
  void read_bytes(std::uint64_t offset, std::span<std::byte> out) const;

  std::string path_;
  std::uint64_t tokens_;
  std::int64_t vocabulary_;
  std::function<void(const Hdf5File&)> check_;

  Descriptor descriptor_;
  std::optional<Hdf5File> file_;  // instead, of a shard whose bytes only the library can read
  Identity known_;                // of the file that the rest is about
  Hdf5Placement placement_;
  std::vector<bool> checked_;  // by piece
  std::vector<std::byte> buffer_;
};

}  // namespace tessera
