#pragma once
// The configuration of a run. The struct is plain data; schema.cpp is the one place that knows each key's type, default, range and meaning.

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "data/synthetic.h"
#include "model/config.h"
#include "model/gpt.h"
#include "model/sequence_plan.h"

namespace tessera {

/// Bad usage or configuration: exit code 2. The message names file:line:column or the flag, the key, what was expected and what to do.
class ConfigError : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

enum class Schedule { constant, cosine, wsd };
enum class ModelSize { custom, gpt2, gpt2_medium, gpt2_large, gpt2_xl };
enum class Precision { automatic, fp32, bf16 };  // automatic: the device's, fp32 on the cpu, bf16 on a GPU

struct RunConfig {
  std::string dir = "runs/default";
  std::uint64_t seed = 1;
  std::string init;        // checkpoint or run whose parameters the run starts from; "": initial values
  int threads = 0;         // CPU threads a rank; 0: cores of the host / ranks on it
  double peak_tflops = 0;  // for MFU; 0: what the device states, if it does
};
/// One dataset of several.
struct MixEntry {
  std::string path;
  double weight = 0;  // share of the sequences, beside the others' weights
  bool operator==(const MixEntry&) const = default;
};
struct DataConfig {
  std::string path;
  std::vector<MixEntry> mix;               // instead of path
  std::optional<SyntheticTask> synthetic;  // instead of both
  std::string tokenizer;                   // optional: checked against the dataset's
  int prefetch = 4;
};
struct TrainConfig {
  std::int64_t steps = 1000;
  std::int64_t tokens_per_step = 65536;
  std::int64_t micro_batch = 4;  // sequences a forward pass and rank
  Precision precision = Precision::automatic;
  Recompute recompute = Recompute::none;
  int max_nonfinite = 10;  // skipped steps in a row after which the run stops
};
struct OptimizerConfig {
  double lr = 1e-3;
  double beta1 = 0.9, beta2 = 0.95;
  double eps = 1e-8;
  double weight_decay = 0.1;
  double clip = 1.0;          // 0: none
  std::int64_t warmup = 100;  // steps
  Schedule schedule = Schedule::cosine;
  double final_lr = 0.1;  // share of lr at the end
  double decay = 0.2;     // wsd: share of the run in which lr falls
};
struct EvalConfig {
  std::int64_t every = 100;   // steps; 0: only at the end
  std::int64_t batches = 20;  // of micro_batch sequences over all ranks together; 0: the whole split
};
struct CheckpointConfig {
  std::int64_t every = 500;  // steps; 0: only at the end
  int keep = 3;              // newest ones kept; 0: all
};
struct SampleConfig {
  std::int64_t every = 0;  // steps; 0: none
  std::string prompt = "The";
  int tokens = 100;
  double temperature = 0.8;
  int top_k = 50;
};
struct LogConfig {
  std::int64_t every = 1;         // steps between console lines (metrics.jsonl has every step)
  std::int64_t heads_every = 50;  // steps between rows with active share by layer and head
};
struct TensorBoardConfig {
  bool enabled = true;
  std::int64_t histogram_every = 0;  // steps between histograms and images, beside those of evaluations; 0: only those
};
struct ParallelConfig {
  int sequence = 1;  // ranks of a sequence
  SequenceExchange exchange = SequenceExchange::automatic;
  SequenceLayout layout = SequenceLayout::balanced;
  int bucket_mib = 100;    // gradients that are reduced as one, beside the backward pass
  double deadline = 300;   // seconds that a collective between GPUs may take
  bool share_gpu = false;  // whether ranks may share a GPU
};

struct Config {
  RunConfig run;
  std::string device = "cpu";
  ModelSize model_size = ModelSize::custom;  // a named size has set model.layers, heads and width
  std::int64_t vocabulary_multiple = 64;     // model.vocabulary_padded is rounded up to a multiple of this
  ModelConfig model;                         // with model.attention
  DataConfig data;
  TrainConfig train;
  OptimizerConfig optimizer;
  EvalConfig eval;
  CheckpointConfig checkpoint;
  SampleConfig sample;
  LogConfig log;
  TensorBoardConfig tensorboard;
  ParallelConfig parallel;
  std::vector<std::string> notices;  // what resolution changed and why, for the console ("gate softmax: attention.threshold has no effect")
};

/// Reads `file` ("" for defaults only), applies `sets` ("key=value": value parsed as YAML, of text keys taken as it stands unless quoted), resolves
/// what depends on other keys and checks everything. Throws ConfigError that lists every mistake found.
Config load_config(const std::string& file, const std::vector<std::string>& sets);
/// As load_config, from YAML text that came out of `origin`, for the error messages.
Config parse_config(const std::string& yaml, const std::string& origin, const std::vector<std::string>& sets);
/// What a checkpoint or a run folder's config.yaml (`origin`) has kept: every key, resolved. One that is not there is younger than the run, which
/// went without it: attention.threshold.balance is 0 then, whatever its default.
Config parse_stored_config(const std::string& yaml, const std::string& origin);
Config load_stored_config(const std::string& file);
/// The resolved configuration as YAML that load_config reads back to an equal Config.
std::string to_yaml(const Config& config);
/// The same as JSON.
std::string to_json(const Config& config);
/// Every key: path, type, default, range, meaning. Text table, or JSON.
std::string schema_text();
std::string schema_json();

/// optimizer.warmup of a run of so many steps where the key is not set.
std::int64_t usual_warmup(std::int64_t steps);
/// Sets model.vocabulary and model.vocabulary_padded to a tokenizer's `vocabulary`, which came from `origin` (a dataset's path, for the message).
/// Throws ConfigError when the configuration asks for another one.
void resolve_vocabulary(Config& config, std::int64_t vocabulary, const std::string& origin);
/// Throws ConfigError when a step of train.tokens_per_step cannot be dealt evenly to `ranks`; the message lists ranks and micro-batches that can.
void check_ranks(const Config& config, int ranks);
}  // namespace tessera
