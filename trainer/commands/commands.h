#pragma once
// The subcommands of `tessera`, one file each. A command adds itself to the app: options, a footer with an example, and a callback
// that does the work. Errors are thrown: std::invalid_argument (also ConfigError) is the user's (exit code 2), anything else is a failure
// while running (exit code 1). Results go to stdout, everything else to stderr.

#include <fmt/core.h>

#include <CLI/CLI.hpp>
#include <string>

namespace tessera {

/// For options of type double. CLI::Range takes nan for a number of every range.
inline CLI::Validator number_in(double low, double high) {
  const auto problem = [=](const std::string& text) {
    double value = 0;
    const bool good = CLI::detail::lexical_cast(text, value) && value >= low && value <= high;
    return good ? std::string() : fmt::format("expected a number from {:g} to {:g}, found {}", low, high, text);
  };
  return {problem, fmt::format("{:g} to {:g}", low, high), ""};
}

/// What generate and bench generate say of --fast there.
inline constexpr const char* kFastOnCpu = "--fast has no effect on the CPU, which has one way to decode";

void add_prepare_command(CLI::App& app);    // text -> token shards
void add_tokenizer_command(CLI::App& app);  // train a BPE vocabulary
void add_train_command(CLI::App& app);      // a run, alone or under mpirun
void add_eval_command(CLI::App& app);       // loss of a checkpoint on a data split
void add_generate_command(CLI::App& app);   // text from a checkpoint
void add_compare_command(CLI::App& app);    // runs side by side
void add_report_command(CLI::App& app);     // a page on runs or a sweep
void add_inspect_command(CLI::App& app);    // what a file or folder is; checksums
void add_sweep_command(CLI::App& app);      // many runs from one file
void add_export_command(CLI::App& app);     // a checkpoint's weights for others
void add_import_command(CLI::App& app);     // others' weights as a checkpoint
void add_plan_command(CLI::App& app);       // memory and work of a run, before it
void add_config_command(CLI::App& app);     // the resolved configuration, the schema
void add_attention_command(CLI::App& app);  // the attention operator alone, HDF5 in and out
void add_bench_command(CLI::App& app);      // speed of the parts

}  // namespace tessera
