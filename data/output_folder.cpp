#include "data/output_folder.h"

#include <fcntl.h>
#include <fmt/core.h>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <stdexcept>
#include <system_error>
#include <utility>

#include "data/dataset.h"
#include "data/files.h"

namespace tessera {
namespace fs = std::filesystem;
namespace {

constexpr std::array kParts = {"train", "validation", "tokenizer.json", "dataset.json"};  // the manifest moves last
constexpr const char* kComplete = "complete";  // in the staging folder: the names of the parts, a line each

}  // namespace

OutputFolder::OutputFolder(std::string path, bool overwrite) : path_(std::move(path)) {
  std::error_code error;
  existed_ = fs::exists(path_, error);
  make_folder(path_);
  if (!has(kComplete)) refuse_foreign(overwrite);
  make_folder(staging());
  const std::string lock = staging() + "/lock";
  lock_ = ::open(lock.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666);
  if (lock_ < 0) throw std::invalid_argument(fmt::format("{}: the folder cannot be written: {}", path_, std::strerror(errno)));
  try {
    // Some network file systems have no locks; there nobody is kept out.
    if (::flock(lock_, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK)
      throw std::invalid_argument(fmt::format("{}: another tessera prepare is writing into this folder", path_));
    if (has(kComplete)) {
      move_into_place();
      recovered_ = true;
    }
  } catch (...) {
    ::close(lock_);
    throw;
  }
}

OutputFolder::~OutputFolder() {
  std::error_code ignored;
  if (!keep_) fs::remove_all(staging(), ignored);
  ::close(lock_);
  if (!existed_) ::rmdir(path_.c_str());  // only if nothing came of it: a folder that is not empty stays
}

bool OutputFolder::has(const std::string& name) const {
  std::error_code ignored;
  return fs::exists(staging() + "/" + name, ignored);
}

void OutputFolder::clear() {
  for (const auto& item : fs::directory_iterator(staging()))
    if (item.path().filename() != "lock") fs::remove_all(item.path());
}

void OutputFolder::refuse_foreign(bool overwrite) const {
  if (overwrite) return;
  if (is_dataset(path_))
    throw std::invalid_argument(fmt::format("{}: already holds a dataset; choose another folder, or replace it with --overwrite", path_));
  const bool own = fs::exists(staging());  // a killed run's: its parts may have begun to move into place
  for (const auto& item : fs::directory_iterator(path_)) {
    const std::string name = item.path().filename().string();
    if (name == ".prepare" || (own && std::find(kParts.begin(), kParts.end(), name) != kParts.end())) continue;
    throw std::invalid_argument(
        fmt::format("{}: the folder is not empty (it holds {}) and is not a dataset; choose another, or write into it with "
                    "--overwrite, which replaces train, validation, tokenizer.json and dataset.json and leaves the rest",
                    path_, name));
  }
}

void OutputFolder::commit(const std::string& manifest) {
  write_file(staging() + "/dataset.json", manifest);
  std::string parts;
  for (const char* part : kParts) {
    const std::string from = staging() + "/" + part;
    if (!fs::exists(from)) continue;
    if (fs::is_directory(from)) sync_folder(from);
    parts += fmt::format("{}\n", part);
  }
  write_file(staging() + "/" + kComplete, parts);  // the last thing to need space: a full disk shows before anything has moved
  move_into_place();
}

/// May be interrupted anywhere and called again: a part of the new dataset is either still in the staging folder or in its place.
void OutputFolder::move_into_place() {
  const std::string parts = read_file(staging() + "/" + kComplete), old = staging() + "/old";
  make_folder(old);
  const auto set_aside = [&](const char* part) {
    if (!fs::exists(path_ + "/" + part)) return;
    fs::remove_all(old + "/" + part);
    fs::rename(path_ + "/" + part, old + "/" + part);
  };
  // The old manifest first: from here on the folder is no dataset until the new manifest stands in it.
  if (has("dataset.json")) {
    set_aside("dataset.json");
    sync_folder(path_);
  }
  for (const char* part : kParts) {
    const bool is_new = parts.find(fmt::format("{}\n", part)) != std::string::npos;
    if (is_new && !has(part)) continue;  // in its place already
    set_aside(part);
    if (std::string_view(part) == "dataset.json") sync_folder(path_);  // what the manifest lists is there before it
    if (is_new) fs::rename(staging() + "/" + part, path_ + "/" + part);
  }
  sync_folder(path_);
  // This name goes last, so that whoever comes after an interruption up to here also clears the rest away.
  for (const auto& item : fs::directory_iterator(staging())) {
    const std::string name = item.path().filename().string();
    if (name != kComplete && name != "lock") fs::remove_all(item.path());
  }
  fs::remove(staging() + "/" + kComplete);
  keep_ = false;
}

}  // namespace tessera
