// tessera train: a run, alone or under mpirun.

#include <memory>
#include <string>
#include <vector>

#include "trainer/collective.h"
#include "trainer/commands/commands.h"
#include "trainer/config.h"
#include "trainer/run.h"

namespace tessera {

void add_train_command(CLI::App& app) {
  struct Options {
    std::string file;
    std::vector<std::string> sets;
    bool resume = false;
  };
  auto options = std::make_shared<Options>();
  CLI::App* command = app.add_subcommand("train", "Train a model: alone, or on several ranks under mpirun");
  command->add_option("CONFIG.yaml", options->file, "YAML configuration")->type_name("")->required();
  command->add_option("--set", options->sets, "Set a key, after the file; the last one counts")->type_name("KEY=VALUE")->expected(1)->take_all();
  command->add_flag("--resume", options->resume, "Continue the run in run.dir from its newest sound checkpoint, on any number of ranks");
  command->footer(
      "SIGTERM, SIGINT (Ctrl-C) or SIGUSR1: the step is finished, a checkpoint written, and the run ends; a second signal ends it at once.\n"
      "Examples:\n"
      "  tessera train configs/quickstart.yaml --set data.path=data/mine --set run.dir=runs/mine\n"
      "  mpirun -n 2 tessera train runs/mine/config.yaml --resume");
  command->callback([options] {
    // Before MPI starts: a mistake in it is every rank's, and main() knows to say it once.
    const Config config = load_config(options->file, options->sets);
    const auto comm = make_mpi_communicator();
    run_on_ranks(*comm, [&] { train(config, options->resume, *comm); });
  });
}

}  // namespace tessera
