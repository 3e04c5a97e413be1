#pragma once
// What a run will take, before it: from the same plan of memory that a run allocates.

#include <nlohmann/json.hpp>

#include "trainer/config.h"

namespace tessera {

/// Of a run of `config` on so many ranks, as `tessera plan --json` prints it: "parameters", "bytes_per_rank" {"total", ...}, "steps", "tokens",
/// "flops_per_token", "flops", "checkpoint_bytes", of prepared data "epochs". Allocates nothing and needs no device. The vocabulary comes from the
/// data where there is some, and is then set in `config`. Throws ConfigError when it is not known, and when the ranks cannot share a step evenly.
/// With parallel.sequence above 1 also "sequence" (plan_sequence in sequence_costs.h).
nlohmann::ordered_json plan_run(Config& config, int ranks);

/// Sets the vocabulary as plan_run does. Throws ConfigError when it is not known.
void find_vocabulary(Config& config);

}  // namespace tessera
