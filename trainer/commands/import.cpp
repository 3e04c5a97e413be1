// tessera import: a model in Hugging Face's format as a checkpoint.

#include <fmt/core.h>

#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>

#include "trainer/commands/commands.h"
#include "trainer/hf_import.h"

namespace tessera {

void add_import_command(CLI::App& app) {
  struct Options {
    std::string directory, output, tokenizer;
    bool json = false;
  };
  auto o = std::make_shared<Options>();
  CLI::App* command = app.add_subcommand("import", "A GPT-2 in Hugging Face's format, or an export of ours, as a checkpoint");
  command->add_option("DIR", o->directory, "Folder with config.json, model.safetensors (or its index and files) and a tokenizer")
      ->type_name("")
      ->required();
  command->add_option("--output", o->output, "Checkpoint folder to write: weights alone, without optimizer state")->type_name("DIR")->required();
  command->add_option("--tokenizer", o->tokenizer, "bytes, gpt2:DIR or bpe:FILE, instead of the one in the folder")->type_name("SPEC");
  command->add_flag("--json", o->json, "Print JSON");
  command->footer(
      "eval, generate, inspect and export take the checkpoint as any other; train starts from it with run.init.\n"
      "Examples:\n"
      "  tessera import gpt2-hf --output gpt2\n"
      "  tessera train sparse.yaml --set run.init=gpt2");
  command->callback([o] {
    const HfImport i = import_hf(o->directory, o->output, o->tokenizer);
    if (o->json) {
      const nlohmann::ordered_json result{
          {"checkpoint", i.checkpoint}, {"model_type", i.model_type}, {"tokenizer", i.tokenizer}, {"parameters", i.parameters}};
      std::cout << result.dump(2) << "\n";
      return;
    }
    fmt::print("{}: {} parameters of {} ({}), tokenizer {}\n", i.checkpoint, i.parameters, o->directory, i.model_type, i.tokenizer);
  });
}

}  // namespace tessera
