#pragma once
// Files that are whole or absent: written aside as NAME.tmp-<pid>, fsynced, renamed, and the folder fsynced.

#include <cstdint>
#include <string>
#include <string_view>

namespace tessera {

/// The contents of a file. Throws std::invalid_argument when it cannot be opened, std::runtime_error when reading it fails.
std::string read_file(const std::string& path);

/// Makes a folder and its parents. Throws std::invalid_argument naming the path and the reason (no permission, a file in the way).
void make_folder(const std::string& path);

/// Makes renames and new names in this folder last through a power cut. Throws std::runtime_error.
void sync_folder(const std::string& path);
/// Makes the contents of a file last. Throws std::runtime_error.
void sync_file(const std::string& path);

/// The folder that holds `path`: "." for a bare name.
std::string folder_of(const std::string& path);

/// Throws the std::runtime_error of a write that failed with `error` (an errno): path, bytes wanted, offset, and on a full disk the bytes free.
[[noreturn]] void throw_write_error(const std::string& path, std::uint64_t bytes, std::uint64_t offset, int error);

/// Writes all of `bytes` to a file descriptor at its current offset; throw_write_error() when that fails.
void write_all(int descriptor, std::string_view bytes, const std::string& path);

/// A file that grows. Each append() is one write, so that a process that is killed leaves whole ones but perhaps the last.
class AppendedFile {
 public:
  /// Opens for appending; makes the file where there is none. Throws std::runtime_error.
  explicit AppendedFile(std::string path);
  ~AppendedFile();
  AppendedFile(const AppendedFile&) = delete;
  AppendedFile& operator=(const AppendedFile&) = delete;

  const std::string& path() const { return path_; }
  void append(std::string_view bytes) { write_all(descriptor_, bytes, path_); }
  /// Makes it last. Throws std::runtime_error.
  void sync();

 private:
  std::string path_;
  int descriptor_;
};

/// A file under construction. Write temporary() by any means, close it, then commit(): until then nothing exists under the final name, and
/// whatever stood there before stays. Without commit() the destructor removes the temporary file.
class AtomicFile {
 public:
  explicit AtomicFile(std::string path);
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;
  ~AtomicFile();

  const std::string& path() const { return path_; }
  const std::string& temporary() const { return temporary_; }
  /// fsync, rename, fsync of the folder. Throws std::runtime_error.
  void commit();

 private:
  std::string path_, temporary_;
  bool committed_ = false;
};

/// Replaces `path` by a file holding `bytes`, atomically. Throws std::runtime_error (disk full, folder not writable).
void write_file(const std::string& path, std::string_view bytes);

}  // namespace tessera
