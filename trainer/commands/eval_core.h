#pragma once
// The half of `tessera eval` that measures CORE.

#include <CLI/CLI.hpp>
#include <string>

#include "trainer/open_checkpoint.h"

namespace tessera {

struct EvalCoreOptions {
  std::string bundle, tasks;  // a bundle's folder ("": no CORE); labels, comma-separated
  std::size_t limit = 0;
};

/// --core, --tasks and --limit.
void add_eval_core_options(CLI::App& command, EvalCoreOptions& options);
/// Prints the tasks and CORE, as a table or as JSON; the JSON goes to the file `output` too, unless that is "". Collective.
void eval_core(const std::string& checkpoint, const EvalCoreOptions& options, const OpenCheckpoint::Options& open, bool json,
               const std::string& output, Communicator& comm);

}  // namespace tessera
