#pragma once
// The runs of a sweep file: which there are, what each is called, its resolved configuration.
//
// A run's name says in which keys it differs from the base (with `set`): "gate=relu,score=dot", "base" where in none; a variant of `list` has its
// own. Behind it stands ",seed=2" unless the seed is the base's. So a name does not depend on what else is in the file, and values, axes, variants
// and seeds that are added later leave the names of earlier runs as they are. What is no plain word is shortened and, where that loses something,
// told apart by a hash.

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "trainer/sweep/sweep_file.h"

namespace tessera {

struct SweepRun {
  std::string name;                                                     // of the run and of its folder in the sweep's
  std::string variant;                                                  // the name without the seed
  std::vector<std::pair<std::string, nlohmann::ordered_json>> differs;  // keys and values, as set, in which its variant differs from the base
  Config config;                                                        // resolved; run.dir is its folder
  std::vector<Value> values;                                            // what was set, in order; load_variant() of the base and these gives `config`
};

struct Sweep {
  SweepFile file;
  Config base;                        // resolved, with `set`
  std::vector<SweepRun> runs;         // the first seed of every variant first
  std::vector<std::string> variants;  // names, in the file's order
  std::vector<std::string> skipped;   // variants that skip_if left out
  std::vector<std::string> notices;   // variants that are the same run as another, conditions that nothing meets
};

/// The runs of a sweep file. Throws ConfigError listing every mistake: of the file, of each variant that does not resolve, two of one name, no
/// variant at all, more than 10,000 of them.
Sweep expand_sweep(SweepFile file);

/// `run` with train.steps set to `steps`, resolved anew. Throws ConfigError.
SweepRun with_steps(const Sweep& sweep, const SweepRun& run, std::int64_t steps);

/// "attention.gate: relu2".
std::string setting_text(const std::string& key, const nlohmann::ordered_json& value);

/// What the variant called "base" has in the keys of grid and zip, as "base is attention.gate: relu2"; "" where there is none.
std::string base_note(const Sweep& sweep);

// Its parts, for tests.

/// What a key is called in names: its last part, with the one before it where other keys end alike ("gate", "eval.every").
std::string short_key(const std::string& path);
/// A value in names: a folder's name of at most 40 characters, the same for equal values and for no others.
std::string short_value(const nlohmann::ordered_json& value);

}  // namespace tessera
