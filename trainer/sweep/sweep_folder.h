#pragma once
// The folder of a sweep:
//
//   sweep.json            which sweep file it belongs to, as a path relative to the folder; budget.minutes, where runs were timed for it
//   NAME/                 a run folder like any other; its config.yaml is written before the run starts
//   logs/NAME.log         what the run printed, all starts one after the other
//   logs/NAME.failed.json of a run that failed: its last error; removed when it is started again
//   .timing/NAME/         while the steps of a run with budget.minutes are timed
//
// Nothing else is remembered: what is to be done follows from the sweep file and these.

#include <optional>
#include <string>
#include <vector>

#include "trainer/run_summary.h"
#include "trainer/sweep/sweep_variants.h"

namespace tessera {

class SweepFolder {
 public:
  explicit SweepFolder(const SweepFile& sweep) : directory_(sweep.dir), file_(sweep.file), minutes_(sweep.budget.minutes) {}

  const std::string& directory() const { return directory_; }
  std::string run(const std::string& name) const { return directory_ + "/" + name; }
  std::string log(const std::string& name) const { return directory_ + "/" + kSweepLogs + "/" + name + ".log"; }
  std::string failure(const std::string& name) const { return directory_ + "/" + kSweepLogs + "/" + name + ".failed.json"; }
  std::string timing(const std::string& name) const { return directory_ + "/.timing/" + name; }

  /// Throws ConfigError when the folder belongs to another sweep file, or is a run's.
  void check_owner() const;
  /// budget.minutes of the sweep when the folder was last claimed; 0: it had none, or no run has begun. Throws as check_owner().
  double minutes() const;
  /// Makes it this sweep's. Throws as check_owner(), make_folder() and write_file().
  void claim() const;

 private:
  std::string directory_, file_;
  double minutes_;
  nlohmann::ordered_json owner() const;  // sweep.json, null where there is none
  std::string record() const { return directory_ + "/" + kSweepRecord; }
  std::string own_path() const;  // of the sweep file, relative to the folder
};

/// Whether a key has a part in what a run computes and reports. Left out are where it is, threads, checkpoints, samples, logs.
bool key_counts(const std::string& path);

/// The keys in which the configuration in a run folder differs from a variant's, as "key: VALUE there, VALUE in the sweep", of those that
/// count.
std::vector<std::string> sweep_changes(const Config& there, const Config& here);

struct RunState {
  enum class Kind { waiting, running, interrupted, failed, finished } kind = Kind::waiting;
  std::int64_t step = 0, steps = 0;
  double seconds_left = 0;            // of running and interrupted ones, at the speed they had; 0: not known
  std::string error;                  // of a failed one
  std::optional<RunSummary> summary;  // where it has begun
};
const char* name_of(RunState::Kind kind);

/// Of a run folder by itself. Throws as summarize_run().
RunState state_of_run(const std::string& directory);
/// From the run's folder and what the sweep wrote of it. Throws as summarize_run(), and when a finished run's metrics lack its last steps.
RunState state_of(const SweepFolder& folder, const SweepRun& run);

/// Whether a process on this host holds the lock of a run folder (FolderLock): a run is at work in it. Takes no lock.
bool folder_in_use(const std::string& directory);

}  // namespace tessera
