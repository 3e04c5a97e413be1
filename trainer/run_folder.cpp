#include "trainer/run_folder.h"

#include <fcntl.h>
#include <fmt/core.h>
#include <fmt/ranges.h>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>

#include "data/files.h"
#include "trainer/schema.h"

namespace tessera {
namespace fs = std::filesystem;
namespace {

/// Whether warm-up is what it would be without being set.
bool follows_steps(const Config& c) { return c.optimizer.warmup == usual_warmup(c.train.steps); }

/// Keys that change neither the model nor which batches it sees.
bool may_change(const std::string& path) {
  for (const char* section : {"eval.", "checkpoint.", "sample.", "log.", "tensorboard.", "parallel."})
    if (path.starts_with(section)) return true;
  // model.size only names layers, heads and width. train.micro_batch must be free to follow the number of ranks, and train.precision the device.
  for (const char* key :
       {"run.dir", "run.threads", "run.peak_tflops", "device", "model.size", "attention.visit", "data.path", "data.mix", "data.tokenizer",
        "data.prefetch", "train.steps", "train.micro_batch", "train.precision", "train.recompute", "train.max_nonfinite"})
    if (path == key) return true;
  return false;
}

/// "data/a 0.7, data/b 0.3".
std::string parts_of(const Provenance& data) {
  if (data.mix.empty()) return fmt::format("{} ({} tokens)", data.path, data.train_tokens);
  std::string text;
  for (const Provenance::Part& part : data.mix)
    text += fmt::format("{}{} ({} tokens, share {:.4g})", text.empty() ? "" : ", ", part.path, part.train_tokens, part.share);
  return text;
}

/// In what `now` is not the data that a checkpoint was trained on; "": it is.
std::string data_problem(const Provenance& then, const Provenance& now, const std::string& checkpoint) {
  const char* const key = now.mix.empty() ? "data.path" : "data.mix";
  if (then.tokenizer_hash != now.tokenizer_hash)
    return fmt::format("{} {}: made with another tokenizer ({}, {}) than {} was trained with ({}, {})", key, now.path, now.tokenizer_name,
                       now.tokenizer_hash.substr(0, 12), checkpoint, then.tokenizer_name, then.tokenizer_hash.substr(0, 12));
  if (then.fingerprint == now.fingerprint) return "";
  if (then.mix.empty() && now.mix.empty())
    return fmt::format("data.path {}: other training text ({} tokens) than {} was trained on ({} tokens, from {})", now.path, now.train_tokens,
                       checkpoint, then.train_tokens, then.path);
  return fmt::format("{}: other datasets, shares or order than {} was trained on. There: {}. Here: {}", key, checkpoint, parts_of(then),
                     parts_of(now));
}

}  // namespace

std::string other_data_problem(const RunFolder& folder, const Provenance& data) {
  const auto entries = list_checkpoints(folder.checkpoints());
  for (auto entry = entries.rbegin(); entry != entries.rend(); ++entry) {
    if (!entry->complete) continue;
    try {
      return data_problem(read_checkpoint_info(entry->directory).dataset, data, entry->directory);
    } catch (const std::runtime_error&) {  // damaged: find_start() passes it over too
    }
  }
  return "";
}

bool RunFolder::holds_run() const { return fs::exists(config()) || fs::exists(metrics()) || !list_checkpoints(checkpoints()).empty(); }

std::vector<std::string> changes_that_matter(const Config& checkpoint, const Config& now) {
  std::vector<std::string> changes;
  for (const Key& key : schema()) {
    if (may_change(key.path)) continue;
    // Warm-up that was not set follows the number of steps, which may change.
    if (key.path == "optimizer.warmup" && follows_steps(checkpoint) && follows_steps(now)) continue;
    const auto before = key.write(checkpoint), after = key.write(now);
    if (before != after) changes.push_back(fmt::format("{}: {} in the checkpoint, {} now", key.path, before.dump(), after.dump()));
  }
  return changes;
}

Start find_start(const RunFolder& folder, bool resume, const Config& config, const Provenance& data) {
  Start start;
  if (!resume) {
    if (folder.holds_run())
      throw ConfigError(
          fmt::format("run.dir {} already holds a run. Continue it with --resume, or start a new one with --set run.dir=ANOTHER", folder.directory));
    return start;
  }
  auto entries = list_checkpoints(folder.checkpoints());
  std::erase_if(entries, [](const CheckpointEntry& e) { return !e.complete; });
  if (entries.empty()) {
    start.notices.push_back(fmt::format("--resume: no complete checkpoint in {}: starting from scratch", folder.checkpoints()));
    return start;
  }
  for (auto entry = entries.rbegin(); entry != entries.rend() && start.checkpoint.empty(); ++entry) {
    const auto problems = verify_checkpoint(entry->directory);
    if (problems.empty()) {
      start.checkpoint = entry->directory;
    } else {
      start.notices.push_back(fmt::format("damaged checkpoint passed over: {}", fmt::join(problems, "; ")));
    }
  }
  if (start.checkpoint.empty())
    throw std::runtime_error(fmt::format("every checkpoint in {} is damaged ({}). To start from scratch, move that folder away", folder.checkpoints(),
                                         fmt::join(start.notices, "; ")));
  const CheckpointInfo info = read_checkpoint_info(start.checkpoint);
  if (info.ranks == 0)
    throw ConfigError(
        fmt::format("--resume: {} holds weights alone, without optimizer state. Start a new run from them: --set run.init={} and another run.dir",
                    start.checkpoint, start.checkpoint));
  const auto changes = changes_that_matter(parse_stored_config(info.config, start.checkpoint + "/model.h5"), config);
  if (!changes.empty())
    throw ConfigError(
        fmt::format("--resume: the configuration differs from that of {} in keys that change the model or its training:\n  {}\n"
                    "Put them back, or start a new run in another run.dir",
                    start.checkpoint, fmt::join(changes, "\n  ")));
  if (const std::string problem = data_problem(info.dataset, data, start.checkpoint); !problem.empty())
    throw ConfigError(problem + ". Put that data back, or start a new run in another run.dir");
  return start;
}

void open_run_folder(const RunFolder& folder, const Config& config, std::int64_t step) {
  make_folder(folder.directory);
  make_folder(folder.checkpoints());
  if (config.sample.every > 0) make_folder(folder.directory + "/samples");
  if (access(folder.directory.c_str(), W_OK) != 0)
    throw ConfigError(fmt::format("run.dir {}: cannot be written: {}", folder.directory, std::strerror(errno)));
  write_file(folder.config(), to_yaml(config));
  MetricsFile::cut(folder.metrics(), step);
  std::vector<fs::path> stale;
  for (const auto& entry : fs::directory_iterator(folder.checkpoints()))
    if (entry.path().filename().string().starts_with("step_") && entry.path().extension() == ".tmp") stale.push_back(entry.path());
  for (const CheckpointEntry& entry : list_checkpoints(folder.checkpoints()))
    if (!entry.complete) {
      stale.push_back(entry.directory);
    } else if (entry.step > step) {
      fs::remove_all(entry.directory + ".damaged");
      fs::rename(entry.directory, entry.directory + ".damaged");
    }
  for (const fs::path& path : stale) fs::remove_all(path);
}

FolderLock::FolderLock(const std::string& directory) : descriptor_(open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC)) {
  if (descriptor_ >= 0 && flock(descriptor_, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK) {
    close(descriptor_);
    throw std::runtime_error(fmt::format("run.dir {}: another run is writing to it now. Wait for it or stop it, or use another run.dir", directory));
  }
}

FolderLock::~FolderLock() {
  if (descriptor_ >= 0) close(descriptor_);
}

}  // namespace tessera
