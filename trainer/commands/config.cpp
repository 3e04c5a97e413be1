// tessera config: the resolved configuration, or the table of keys.

#include <fmt/core.h>

#include <iostream>
#include <memory>

#include "trainer/commands/commands.h"
#include "trainer/config.h"

namespace tessera {

void add_config_command(CLI::App& app) {
  struct Options {
    std::string file;
    std::vector<std::string> sets;
    bool schema = false, json = false;
  };
  auto options = std::make_shared<Options>();
  CLI::App* command = app.add_subcommand("config", "Print the resolved configuration, or every key with --schema");
  CLI::Option* file = command->add_option("CONFIG.yaml", options->file, "YAML configuration; without one: the defaults")->type_name("");
  CLI::Option* sets =
      command->add_option("--set", options->sets, "Set a key, after the file; the last one counts")->type_name("KEY=VALUE")->expected(1)->take_all();
  command->add_flag("--schema", options->schema, "List every key: type, default, range, meaning")->excludes(file)->excludes(sets);
  command->add_flag("--json", options->json, "Print JSON");
  command->footer(
      "Examples:\n"
      "  tessera config configs/quickstart.yaml --set train.steps=100\n"
      "  tessera config --schema\n"
      "  tessera config configs/quickstart.yaml --set 'attention.pattern={window: {size: 256}}' > resolved.yaml");
  command->callback([options] {
    if (options->schema) {
      std::cout << (options->json ? schema_json() + "\n" : schema_text());
      return;
    }
    const Config config = load_config(options->file, options->sets);
    for (const auto& notice : config.notices) fmt::print(stderr, "tessera: note: {}\n", notice);
    std::cout << (options->json ? to_json(config) + "\n" : to_yaml(config));
  });
}

}  // namespace tessera
