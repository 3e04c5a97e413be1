#include "trainer/sweep/sweep_folder.h"

#include <fmt/core.h>
#include <sys/stat.h>

#include <filesystem>
#include <fstream>
#include <sstream>

#include "data/files.h"
#include "trainer/run_folder.h"

namespace tessera {
namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

std::string SweepFolder::own_path() const { return fs::weakly_canonical(file_).lexically_relative(fs::weakly_canonical(directory_)).string(); }

Json SweepFolder::owner() const {
  if (!fs::exists(record())) return nullptr;
  Json found = Json::parse(read_file(record()), nullptr, false);
  if (!found.is_object() || !found.contains("sweep") || !found["sweep"].is_string())
    throw ConfigError(fmt::format("{}: not what `tessera sweep` writes; set dir: to another folder in {}, or move this file away", record(), file_));
  return found;
}

double SweepFolder::minutes() const {
  const Json found = owner();
  return found.is_object() && found.contains("minutes") && found["minutes"].is_number() ? found["minutes"].get<double>() : 0;
}

void SweepFolder::check_owner() const {
  const Json found = owner();
  if (found.is_null()) {
    const RunFolder alone{directory_};
    if (fs::is_regular_file(alone.metrics()) || !list_checkpoints(alone.checkpoints()).empty())
      throw ConfigError(
          fmt::format("{}: the folder holds a run of its own, with {}; set dir: to another folder in {}", directory_, alone.metrics(), file_));
    return;
  }
  const std::string other = found["sweep"].get<std::string>();
  if (other == own_path()) return;
  throw ConfigError(
      fmt::format("{}: the folder belongs to another sweep, {}. Set dir: to another folder in {}; or, if it is the same sweep whose file was moved, "
                  "remove {}",
                  directory_, (fs::path(directory_) / other).lexically_normal().string(), file_, record()));
}

void SweepFolder::claim() const {
  check_owner();
  make_folder(directory_ + "/" + kSweepLogs);
  if (fs::exists(record()) && minutes() == minutes_) return;
  Json own = {{"sweep", own_path()}};
  if (minutes_ > 0) own["minutes"] = minutes_;
  write_file(record(), own.dump() + "\n");
}

bool key_counts(const std::string& path) {
  for (const char* section : {"checkpoint.", "sample.", "log.", "tensorboard.", "parallel."})
    if (path.starts_with(section)) return false;
  return path != "run.dir" && path != "run.threads" && path != "run.peak_tflops" && path != "data.prefetch" && path != "train.max_nonfinite";
}

std::vector<std::string> sweep_changes(const Config& there, const Config& here) {
  std::vector<std::string> changes;
  for (const Key& key : schema()) {
    const Json before = key.write(there), now = key.write(here);
    if (key_counts(key.path) && before != now) changes.push_back(fmt::format("{}: {} there, {} in the sweep", key.path, before.dump(), now.dump()));
  }
  return changes;
}

const char* name_of(RunState::Kind kind) {
  switch (kind) {
    case RunState::Kind::waiting: return "waiting";
    case RunState::Kind::running: return "running";
    case RunState::Kind::interrupted: return "interrupted";
    case RunState::Kind::failed: return "failed";
    case RunState::Kind::finished: return "finished";
  }
  return "";
}

RunState state_of_run(const std::string& directory) {
  using Kind = RunState::Kind;
  RunState state;
  // Without results: one run's evaluation, on whatever text and context, would not compare with what the others have.
  state.summary = summarize_run(directory, false);
  state.step = state.summary->step;
  state.steps = state.summary->config.train.steps;
  if (state.summary->finished) {
    state.kind = Kind::finished;
    return state;
  }
  if (state.step > 0) state.seconds_left = state.summary->seconds / static_cast<double>(state.step) * static_cast<double>(state.steps - state.step);
  state.kind = folder_in_use(directory) ? Kind::running : state.step > 0 ? Kind::interrupted : Kind::waiting;
  return state;
}

RunState state_of(const SweepFolder& folder, const SweepRun& run) {
  using Kind = RunState::Kind;
  RunState state;
  const std::string directory = folder.run(run.name);
  state.steps = run.config.train.steps;
  if (fs::exists(RunFolder{directory}.config())) state = state_of_run(directory);
  if (state.kind == Kind::finished && state.step < state.steps)
    throw std::invalid_argument(fmt::format("{}: ends at step {} of a run that finished {}: it is damaged; move the run's folder away",
                                            RunFolder{directory}.metrics(), state.step, state.steps));
  if (state.kind == Kind::finished || state.kind == Kind::running) return state;
  if (folder_in_use(directory) || folder_in_use(folder.timing(run.name))) {
    state.kind = Kind::running;
  } else if (fs::exists(folder.failure(run.name))) {
    state.kind = Kind::failed;
    const Json failure = Json::parse(read_file(folder.failure(run.name)), nullptr, false);
    if (failure.is_object() && failure.contains("error") && failure["error"].is_string()) state.error = failure["error"].get<std::string>();
  }
  return state;
}

bool folder_in_use(const std::string& directory) {
  struct stat folder;
  if (stat(directory.c_str(), &folder) != 0) return false;
  const auto holds = [&](const std::string& process) {
    std::error_code error;
    const fs::directory_iterator files("/proc/" + process + "/fd", error);
    if (error) return error != std::errc::no_such_file_or_directory;  // another user's: the inode must do
    for (const auto& file : files) {
      struct stat open;
      if (stat(file.path().c_str(), &open) == 0 && open.st_dev == folder.st_dev && open.st_ino == folder.st_ino) return true;
    }
    return false;
  };
  std::ifstream locks("/proc/locks");
  std::string line;
  while (std::getline(locks, line)) {  // "1: FLOCK  ADVISORY  WRITE 4242 08:01:1234 0 EOF"
    std::istringstream words(line);
    std::string number, type, kind, access, process, inode;
    words >> number >> type >> kind >> access >> process >> inode;
    if (type == "FLOCK" && inode.ends_with(fmt::format(":{}", folder.st_ino)) && holds(process)) return true;
  }
  return false;
}

}  // namespace tessera
