#pragma once
// Sweep files: one YAML that describes many runs. Every key of a configuration is written with its dots, as for --set, and checked where it stands.
//
//   base: ../quickstart.yaml              configuration that all runs start from; relative to this file
//   dir: runs/gates                       folder of the runs; not given: runs/NAME of NAME.yaml; relative to the working directory, as run.dir is
//   set: {model.layers: 2}                for every run, after the base
//   grid:                                 every combination
//     attention.gate: [relu, relu2]
//     attention.score: [dot, cosine]
//   zip:                                  lists of one length, taken together; each row with every combination of the grid
//     model.context: [256, 512]
//     train.micro_batch: [8, 4]
//   list:                                 more variants beside those, each with a name of its own
//     - {name: softmax, set: {attention.gate: softmax}}
//   overrides:                            for the variants that meet a condition, in this order, after the above
//     - {if: {attention.gate: softmax}, set: {attention.score: dot}}
//   skip_if:                              variants that are left out: those that meet any of these conditions
//     - {attention.gate: relu, attention.score: [dot, fidelity]}
//   seeds: [1, 2, 3]                      run.seed; each variant once with each
//   budget: {steps: 500}                  or {tokens: 5.0e+6} or {minutes: 10}: train.steps of every run
//   resources: {ranks: 2, at_once: 4}     MPI ranks a run; most runs at a time (0: as many as there is room for); gpus: of a run (not given:
//                                         one a rank)
//                                         All of a run's ranks are on this host. Sweeps know nothing of each other:
//                                         CUDA_VISIBLE_DEVICES says which GPUs are whose
//
// A condition is a map from keys to a value, or to a list of values of which one must hold; all its keys must meet. overrides look at the keys as
// they are set so far, and do not change a run's name (`tessera sweep plan` lists what they set); skip_if looks at these and at what has become of
// them when the configuration is resolved.
//
// budget.tokens is rounded up to whole steps of the variant. budget.minutes is time of training steps, without start, evaluation and checkpoints: a
// variant's steps are those that fit at the speed of a few steps that are timed before its run begins. They are decided once and stand in the run's
// config.yaml, so schedules run to their end and a resumed run is the same run; other minutes need another folder. Where attention empties as it
// trains, a run takes less than that.

#include <cstdint>
#include <string>
#include <vector>

#include "trainer/schema.h"

namespace tessera {

/// The folder, beside those of the runs, of what they printed.
inline constexpr const char* kSweepLogs = "logs";
/// The file in it that says whose it is.
inline constexpr const char* kSweepRecord = "sweep.json";

/// A key with a value of its type. `written` is the value as a configuration prints it: equal values are equal there however they were written.
struct Setting {
  const Key* key;
  Value value;
  nlohmann::ordered_json written;
};

struct Condition {
  struct Term {
    const Key* key;
    std::vector<nlohmann::ordered_json> values;  // as Setting::written
  };
  std::vector<Term> terms;
  std::string place;

  bool holds(const Config& config) const;
};

struct SweepFile {
  std::string file, base, dir;  // base as a path from the working directory
  std::string base_place;
  std::vector<Setting> set;  // with --set
  struct Axis {
    const Key* key;
    std::vector<Setting> values;
  };
  std::vector<Axis> grid, zip;
  struct Named {
    std::string name, place;
    std::vector<Setting> set;
  };
  std::vector<Named> list;
  struct Override {
    Condition condition;
    std::vector<Setting> set;
  };
  std::vector<Override> overrides;
  std::vector<Condition> skip_if;
  std::vector<std::uint64_t> seeds;  // empty: run.seed of the base
  struct Budget {                    // at most one is set
    std::int64_t steps = 0, tokens = 0;
    double minutes = 0;
    std::string place;
  } budget;
  struct Resources {
    int ranks = 1;
    int gpus = 0;     // of a run with device cuda; 0: one a rank
    int at_once = 0;  // 0: as many as there is room for
    std::string place{};
  } resources;
};

/// Reads a sweep file; `sets` ("key=value") are added to `set`. Throws ConfigError listing every mistake with file:line:column.
SweepFile read_sweep_file(const std::string& file, const std::vector<std::string>& sets);

/// As read_sweep_file, of YAML text that came out of `file`.
SweepFile parse_sweep_file(const std::string& yaml, const std::string& file, const std::vector<std::string>& sets);

}  // namespace tessera
