// tessera export: a checkpoint's weights as a folder for Hugging Face's transformers.

#include <fmt/core.h>

#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>

#include "trainer/commands/commands.h"
#include "trainer/hf_export.h"
#include "trainer/progress.h"

namespace tessera {

void add_export_command(CLI::App& app) {
  struct Options {
    std::string checkpoint, format = "hf", output, dtype = "fp32";
    bool overwrite = false, json = false;
  };
  auto o = std::make_shared<Options>();
  CLI::App* command = app.add_subcommand("export", "A checkpoint's weights for Hugging Face's transformers");
  command->add_option("CHECKPOINT", o->checkpoint, "A step folder, or a run folder (its newest checkpoint)")->type_name("")->required();
  command->add_option("--format", o->format, "hf: safetensors, config.json and tokenizer files")->check(CLI::IsMember({"hf"}))->capture_default_str();
  command->add_option("--output", o->output, "Folder to write")->type_name("DIR")->required();
  command->add_option("--dtype", o->dtype, "What matrices are stored in; the rest is fp32")
      ->check(CLI::IsMember({"fp32", "bf16"}))
      ->capture_default_str();
  command->add_flag("--overwrite", o->overwrite, "Replace an earlier export in that folder");
  command->add_flag("--json", o->json, "Print JSON");
  command->footer(
      "A softmax model with dot scores, learned positions, layernorm, biases and the causal pattern is a stock GPT-2. Any other carries its PyTorch "
      "code:\n"
      "  AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)\n"
      "Example:\n"
      "  tessera export runs/mine --output mine-hf --dtype bf16");
  command->callback([o] {
    const HfExport e = export_hf(o->checkpoint, o->output, o->dtype == "bf16" ? HfDtype::bf16 : HfDtype::fp32, o->overwrite);
    if (o->json) {
      const nlohmann::ordered_json result{{"checkpoint", e.checkpoint}, {"output", o->output},        {"model_type", e.model_type},
                                          {"dtype", o->dtype},          {"parameters", e.parameters}, {"bytes", e.bytes}};
      std::cout << result.dump(2) << "\n";
      return;
    }
    fmt::print("{}: {} parameters of {} in {} ({}), {}\n", o->output, e.parameters, e.checkpoint, o->dtype,
               format_bytes(static_cast<double>(e.bytes)),
               e.model_type == "gpt2" ? "a stock GPT-2" : "with its PyTorch code: load it with trust_remote_code=True");
  });
}

}  // namespace tessera
