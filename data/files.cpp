#include "data/files.h"

#include <fcntl.h>
#include <fmt/core.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <stdexcept>
#include <system_error>
#include <utility>

namespace tessera {
namespace {

class Descriptor {
 public:
  Descriptor(const std::string& path, int flags) : fd_(::open(path.c_str(), flags | O_CLOEXEC, 0666)) {}
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  ~Descriptor() {
    if (fd_ >= 0) ::close(fd_);
  }
  bool ok() const { return fd_ >= 0; }
  int get() const { return fd_; }
  int close() { return ::close(std::exchange(fd_, -1)); }

 private:
  int fd_;
};

void sync(const std::string& path, int flags) {
  const Descriptor file(path, flags);
  // Some file systems know no fsync of a folder and say EINVAL; there is nothing more to do on those.
  if (!file.ok() || (::fsync(file.get()) != 0 && errno != EINVAL))
    throw std::runtime_error(fmt::format("{}: cannot be brought to disk (fsync): {}", path, std::strerror(errno)));
}

}  // namespace

std::string read_file(const std::string& path) {
  const Descriptor file(path, O_RDONLY);
  if (!file.ok()) throw std::invalid_argument(fmt::format("{}: cannot be opened: {}", path, std::strerror(errno)));
  std::string out;
  std::size_t used = 0;
  while (true) {
    out.resize(used + (1 << 16));
    const ssize_t got = ::read(file.get(), out.data() + used, out.size() - used);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) {
      const std::string reason = std::strerror(errno);
      if (errno == EISDIR) throw std::invalid_argument(fmt::format("{}: is a folder, expected a file", path));
      throw std::runtime_error(fmt::format("{}: reading failed at offset {}: {}", path, used, reason));
    }
    used += static_cast<std::size_t>(got);
    if (got == 0) break;
  }
  out.resize(used);
  return out;
}

void make_folder(const std::string& path) {
  std::error_code error;
  std::filesystem::create_directories(path, error);
  if (!error && !std::filesystem::is_directory(path, error)) error = std::make_error_code(std::errc::not_a_directory);
  const std::string problem = fmt::format("{}: the folder cannot be made: {}", path, error.message());
  if (error == std::errc::no_space_on_device) throw std::runtime_error(problem);
  if (error) throw std::invalid_argument(problem);
}

void sync_folder(const std::string& path) { sync(path, O_RDONLY | O_DIRECTORY); }
void sync_file(const std::string& path) { sync(path, O_RDONLY); }

std::string folder_of(const std::string& path) {
  const std::string parent = std::filesystem::path(path).parent_path().string();
  return parent.empty() ? "." : parent;
}

void throw_write_error(const std::string& path, std::uint64_t bytes, std::uint64_t offset, int error) {
  std::string hint;
  struct statvfs disk;
  if ((error == ENOSPC || error == EDQUOT) && ::statvfs(folder_of(path).c_str(), &disk) == 0)
    hint = fmt::format(" ({} bytes free on its file system; free some space or choose another folder)",
                       static_cast<std::uint64_t>(disk.f_bavail) * disk.f_frsize);
  if (error == EFBIG) hint = " (a limit on the size of files: see ulimit -f)";
  throw std::runtime_error(fmt::format("{}: writing {} bytes at offset {} failed: {}{}", path, bytes, offset, std::strerror(error), hint));
}

void write_all(int descriptor, std::string_view bytes, const std::string& path) {
  std::size_t done = 0;
  while (done < bytes.size()) {
    const ssize_t wrote = ::write(descriptor, bytes.data() + done, bytes.size() - done);
    if (wrote < 0 && errno == EINTR) continue;
    if (wrote < 0) {
      const int error = errno;
      const off_t offset = ::lseek(descriptor, 0, SEEK_CUR);
      throw_write_error(path, bytes.size() - done, offset < 0 ? done : static_cast<std::uint64_t>(offset), error);
    }
    done += static_cast<std::size_t>(wrote);
  }
}

AppendedFile::AppendedFile(std::string path)
    : path_(std::move(path)), descriptor_(::open(path_.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666)) {
  if (descriptor_ < 0) throw std::runtime_error(fmt::format("{}: cannot be opened for writing: {}", path_, std::strerror(errno)));
}

AppendedFile::~AppendedFile() { ::close(descriptor_); }

void AppendedFile::sync() {
  if (::fsync(descriptor_) != 0) throw std::runtime_error(fmt::format("{}: fsync: {}", path_, std::strerror(errno)));
}

AtomicFile::AtomicFile(std::string path) : path_(std::move(path)), temporary_(fmt::format("{}.tmp-{}", path_, ::getpid())) {
  std::error_code none;
  const auto there = std::filesystem::status(path_, none);  // renaming over a device, as root, would replace it for everybody
  if (std::filesystem::exists(there) && !std::filesystem::is_regular_file(there))
    throw std::invalid_argument(path_ + ": not a regular file; expected a new file, or one to replace");
}

AtomicFile::~AtomicFile() {
  if (!committed_) ::unlink(temporary_.c_str());
}

void AtomicFile::commit() {
  sync_file(temporary_);
  if (::rename(temporary_.c_str(), path_.c_str()) != 0)
    throw std::runtime_error(fmt::format("{}: cannot be renamed to {}: {}", temporary_, path_, std::strerror(errno)));
  committed_ = true;
  sync_folder(folder_of(path_));
}

void write_file(const std::string& path, std::string_view bytes) {
  AtomicFile target(path);
  Descriptor file(target.temporary(), O_WRONLY | O_CREAT | O_TRUNC);
  if (!file.ok()) throw std::runtime_error(fmt::format("{}: cannot be created: {}", target.temporary(), std::strerror(errno)));
  write_all(file.get(), bytes, path);
  if (file.close() != 0) throw_write_error(path, bytes.size(), 0, errno);
  target.commit();
}

}  // namespace tessera
