#pragma once
// run.dir: config.yaml (resolved), metrics.jsonl, events.out.tfevents.* (a file a start), checkpoints/step_NNNNNNNN/, samples/step_NNNNNNNN.txt. What
// a start may do with a folder that already holds a run, and which checkpoint it goes on from.

#include <string>
#include <vector>

#include "trainer/checkpoint.h"
#include "trainer/config.h"
#include "trainer/metrics.h"

namespace tessera {

struct RunFolder {
  std::string directory;
  std::string config() const { return directory + "/config.yaml"; }
  std::string metrics() const { return directory + "/metrics.jsonl"; }
  std::string checkpoints() const { return directory + "/checkpoints"; }
  std::string sample(std::int64_t step) const { return directory + "/samples/" + checkpoint_name(step) + ".txt"; }
  bool holds_run() const;
};

/// Where a start goes on from.
struct Start {
  std::string checkpoint;  // "": from scratch
  std::vector<std::string> notices;
};

/// Decides, changing nothing. Without `resume`: ConfigError when the folder holds a run. With it: the newest complete checkpoint whose files match
/// their checksums (a notice for each newer one that does not), or from scratch, with a notice, when there is none. Throws ConfigError listing each
/// key whose change would make it another model or training, when `data` is not what the checkpoint was trained on, and when it is weights alone;
/// std::runtime_error when there are complete checkpoints and all are damaged.
Start find_start(const RunFolder& folder, bool resume, const Config& config, const Provenance& data);

/// In what `data` is not what a run's newest sound checkpoint was trained on; "": it is, or there is no such checkpoint.
std::string other_data_problem(const RunFolder& folder, const Provenance& data);

/// The keys in which a resumed run may not differ and does, as "key: VALUE in the checkpoint, VALUE now".
std::vector<std::string> changes_that_matter(const Config& checkpoint, const Config& now);

/// Makes the folder ready to go on from `step`: folders and config.yaml are written, metrics.jsonl is cut back to `step`, half-written checkpoints
/// go away, and those after `step` (find_start() found them damaged) are renamed to step_NNNNNNNN.damaged, so that they count for nothing. Throws
/// std::invalid_argument when the folder cannot be written.
void open_run_folder(const RunFolder& folder, const Config& config, std::int64_t step);

/// Holds a lock on the folder while it lives, so that two runs do not write into it at once. Throws std::runtime_error when another one does. File
/// systems without locks are let pass.
class FolderLock {
 public:
  explicit FolderLock(const std::string& directory);
  ~FolderLock();
  FolderLock(const FolderLock&) = delete;
  FolderLock& operator=(const FolderLock&) = delete;

 private:
  int descriptor_;
};

}  // namespace tessera
