// The command line: subcommands in trainer/commands, errors to exit codes here and nowhere else.

#include <fmt/core.h>

#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <iostream>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "trainer/commands/commands.h"
#include "trainer/schema_nearest.h"

namespace {

enum ExitCode { kDone = 0, kFailed = 1, kUsage = 2 };

/// This process's rank as its launcher states it (Open MPI, MPICH and Intel MPI, PMIx, Slurm); 0 without one.
int launched_rank() {
  for (const char* name : {"OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID"})
    if (const char* text = std::getenv(name)) return std::atoi(text);
  return 0;
}

int report(ExitCode code, const std::string& message) {
  const int rank = launched_rank();
  // Every rank finds the same mistake in the same command line and configuration: rank 0 says it and the launcher ends the others. A rank that is
  // still here after a while found a mistake of its own (a file that only its host lacks), which nobody else reports.
  if (code == kUsage && rank != 0) std::this_thread::sleep_for(std::chrono::seconds(3));
  const std::string who = rank == 0 ? "tessera" : fmt::format("tessera: rank {}", rank);
  fmt::print(stderr, "{}: error: {}\n", who, message);
  return code;
}

/// Results that did not reach stdout (a full disk, a closed pipe) are a failure.
int finish_output() {
  std::cout.flush();
  return std::cout && std::fflush(stdout) == 0 && std::ferror(stdout) == 0 ? kDone : report(kFailed, "the output could not be written to stdout");
}

/// What is wrong with the command line: a command that is not there, or else what the parser says.
std::string usage_error(const CLI::App& app, int argc, char** argv, const CLI::ParseError& error) {
  const CLI::App* command = &app;
  std::string path = "tessera";
  for (int i = 1; i < argc && argv[i][0] != '-'; ++i) {
    const CLI::App* found = nullptr;
    std::vector<std::string> names;
    for (const CLI::App* sub : command->get_subcommands([](const CLI::App*) { return true; })) {
      names.push_back(sub->get_name());
      if (names.back() == argv[i]) found = sub;
    }
    if (names.empty()) break;
    if (!found) return fmt::format("there is no command \"{}\"; nearest is \"{}\" (see {} --help)", argv[i], tessera::nearest(argv[i], names), path);
    command = found;
    path += fmt::format(" {}", argv[i]);
  }
  return fmt::format("{} (see {} --help)", error.what(), path);
}

int print(const std::string& text) {
  std::cout << text << '\n';
  return finish_output();
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Tessera trains language models with softmax-free sparse attention.", "tessera");
  app.set_version_flag("--version", "tessera " TESSERA_VERSION);
  app.require_subcommand(1);
  app.footer(
      "Example: tessera train configs/quickstart.yaml --set train.steps=100\nExit codes: 0 done, 1 failed while running, 2 bad usage or "
      "configuration.");
  tessera::add_prepare_command(app);
  tessera::add_tokenizer_command(app);
  tessera::add_train_command(app);
  tessera::add_eval_command(app);
  tessera::add_generate_command(app);
  tessera::add_compare_command(app);
  tessera::add_report_command(app);
  tessera::add_inspect_command(app);
  tessera::add_sweep_command(app);
  tessera::add_export_command(app);
  tessera::add_import_command(app);
  tessera::add_plan_command(app);
  tessera::add_config_command(app);
  tessera::add_attention_command(app);
  tessera::add_bench_command(app);

  std::signal(SIGXFSZ, SIG_IGN);  // a file over the limit of ulimit -f is then an error like a full disk, not the end of the process
  try {
    app.parse(argc, argv);
    return finish_output();
  } catch (const CLI::CallForHelp&) {
    std::string help = app.help();  // of the subcommand, where one was named
    while (help.ends_with('\n')) help.pop_back();
    return print(help);
  } catch (const CLI::CallForVersion& e) {
    return print(e.what());
  } catch (const CLI::ParseError& e) {
    return report(kUsage, usage_error(app, argc, argv, e));
  } catch (const std::invalid_argument& e) {
    return report(kUsage, e.what());
  } catch (const std::bad_alloc&) {
    return report(kFailed, "out of memory");
  } catch (const std::exception& e) {
    return report(kFailed, e.what());
  } catch (...) {
    return report(kFailed, "an exception of unknown type");
  }
}
