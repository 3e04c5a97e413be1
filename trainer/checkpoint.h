#pragma once
// Checkpoints: all that a run needs to go on with the same bits, and that others need to read the model.
//
//   checkpoints/step_00000500/
//     model.h5                        parameters/NAME   f32, each parameter under its GPT-2 name and in its shape
//                                     thresholds        f32 [layers, heads]
//                                     balances          f32 [layers, heads], where the run has them (attention.threshold.balance)
//                                     attributes        format, step, updates, tokens, skipped, nonfinite_in_a_row, parameters,
//                                                       config (YAML), dataset (JSON: path, tokenizer, fingerprint), created (UTC),
//                                                       init (JSON: checkpoint, step, sha256), where run.init was set
//     optimizer_0001_of_0002.h5       m, v              f32 [count]: the moments of the elements of the flat parameters that the rank owned
//                                     segments          i64 [n, 2]: which they were, as first element and number, one segment after the other
//                                     attributes        format, step, parameters (of the whole model), layout (hash of names and shapes)
//                                                       (format 1 has one segment: attributes first, count)
//     tokenizer.json                  the dataset's tokenizer; not there of a synthetic task, which has none
//     COMPLETE.json                   step, and the bytes and SHA-256 of each file above: written last. Without it the folder does not count.
//
// `tessera import` writes one of no ranks: weights alone, without optimizer files. It is read, evaluated and started from (run.init) like any other,
// but no run can be resumed from it.
//
// Everything is written in step_NNNNNNNN.tmp, fsynced, the folder renamed, then COMPLETE.json is written. The moments are stored by flat
// offset, so any number of ranks, with any size of buckets, can read what any other wrote; parameters and moments are f32 whatever device computed
// them. Which data comes next needs no state: it is a function of run.seed and step.

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "data/dataset.h"
#include "data/hdf5_file.h"
#include "kernels/comm/communicator.h"
#include "model/gpt.h"
#include "trainer/config.h"
#include "trainer/open_data.h"
#include "trainer/optimizer.h"

namespace tessera {

/// Where a run stands.
struct RunPosition {
  std::int64_t step = 0;                // steps done
  std::int64_t updates = 0;             // of them, those that changed the parameters
  std::int64_t tokens = 0;              // seen
  std::int64_t skipped = 0;             // steps skipped because the loss or the gradient was not finite
  std::int64_t nonfinite_in_a_row = 0;  // of them, the last ones without a good one between
};

/// Which data a model was trained on. `fingerprint` is a hash of the training shards' checksums in their order, of a synthetic task that of its
/// parameters: equal, equal tokens. A task has its name as the path, and no tokenizer: empty name and hash.
struct Provenance {
  std::string path, tokenizer_name, tokenizer_hash, fingerprint;
  std::int64_t vocabulary = 0;
  std::uint64_t train_tokens = 0;
  /// Of several datasets, each; the above is then of all: paths joined, a fingerprint that follows from theirs, their shares and their order.
  struct Part {
    std::string path, fingerprint;
    double share = 1;
    std::uint64_t train_tokens = 0;
  };
  std::vector<Part> mix{};
  std::string working_directory{};  // which relative paths are relative to; "": not known
};
Provenance provenance_of(const TrainingData& data);

/// Which checkpoint a run's parameters started from (run.init); no path: from initial values.
struct InitialCheckpoint {
  std::string path;
  std::int64_t step = 0;
  std::string sha256;  // of its model.h5
};

struct CheckpointInfo {
  std::string directory;
  RunPosition position;
  std::int64_t parameters = 0;  // elements
  int ranks = 0;                // optimizer files; 0: weights alone
  std::string config;           // YAML
  Provenance dataset;
  InitialCheckpoint init;
  std::string created;
};

struct CheckpointEntry {
  std::int64_t step = 0;
  std::string directory;
  bool complete = false;  // COMPLETE.json is there
};

std::string checkpoint_name(std::int64_t step);  // "step_00000500"

/// The step folders in a checkpoints folder, oldest first, without those still being written. A missing folder holds none.
std::vector<CheckpointEntry> list_checkpoints(const std::string& checkpoints);

/// What a user names (a step folder, a run folder, its checkpoints folder) as the folder of a complete checkpoint, the newest where there are
/// several. Throws std::invalid_argument that says what was looked for.
std::string resolve_checkpoint(const std::string& path);

/// Compares every file with COMPLETE.json; returns a line for each that is missing, has another size or another checksum, naming it. Empty: sound.
std::vector<std::string> verify_checkpoint(const std::string& directory);

/// Throws std::runtime_error naming the file when it is damaged or of another format version.
CheckpointInfo read_checkpoint_info(const std::string& directory);

/// The parameters in a checkpoint, one at a time. Throws std::runtime_error naming file and parameter when they are missing, damaged or of another
/// shape.
class StoredParameters {
 public:
  explicit StoredParameters(const std::string& directory);
  std::vector<float> read(const std::string& name, const Shape& shape) const;
  std::vector<float> read_rows(const std::string& name, std::int64_t rows, std::int64_t columns) const;  // the first of a matrix
  std::vector<float> thresholds(int layers, int heads) const;                                            // [layers, heads]
  std::vector<float> balances(int layers, int heads) const;                                              // likewise; empty: the checkpoint has none

 private:
  Hdf5File file_;
};

/// Fills the model's thresholds and, where it and the checkpoint have them, its balances; returns the thresholds, [layers, heads].
std::vector<float> load_thresholds(const StoredParameters& stored, const Gpt& model, Ops& ops);

/// Fills parameters, thresholds and, where the model and the checkpoint have them, balances, and the optimizer's master where one is given. Throws
/// std::runtime_error naming file and parameter when the model has another shape.
void load_model(const std::string& directory, Gpt& model, Ops& ops, ShardedAdamW* optimizer = nullptr);
/// Fills this rank's moments from the files of however many ranks wrote them. Throws std::runtime_error when they are weights alone.
void load_optimizer(const std::string& directory, const ParameterLayout& layout, ShardedAdamW& optimizer, Ops& ops);

struct CheckpointRequest {
  std::string checkpoints;  // folder
  RunPosition position;
  std::string config;  // YAML
  Provenance dataset;
  InitialCheckpoint init{};
  std::string tokenizer;                        // contents of the dataset's tokenizer.json; "": it has none
  int keep = 0;                                 // newest complete ones that stay; 0: all
  std::function<void()> between_files = [] {};  // for tests: called when the first files are written
};

/// Writes a checkpoint, then removes those beyond `keep`. When any rank fails (disk full), all throw one error, nothing is left of the new one,
/// and the earlier ones are as they were. The model's gradients are lost. Returns its folder. Collective.
std::string save_checkpoint(const CheckpointRequest& request, const Gpt& model, ShardedAdamW& optimizer, Ops& ops, Communicator& host);

/// The values of a parameter, in its shape.
using ParameterValues = std::function<std::vector<float>(const ParameterInfo&)>;

/// Writes a checkpoint of no ranks, weights alone, as the folder `directory`, which must not exist: in a folder beside it that is renamed when all is
/// on disk. One parameter is in memory at a time. thresholds: [layers, heads]. attachments: further files, name and contents, that the configuration
/// speaks of. `request.checkpoints` and `keep` are not used.
void save_weights(const std::string& directory, const CheckpointRequest& request, const ModelConfig& model, const ParameterValues& values,
                  const std::vector<float>& thresholds, const std::vector<std::pair<std::string, std::string>>& attachments = {});

}  // namespace tessera
