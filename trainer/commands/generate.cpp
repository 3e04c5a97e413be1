// tessera generate: text from a checkpoint.

#include "trainer/generate.h"

#include <fmt/core.h>

#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>

#include "trainer/commands/commands.h"
#include "trainer/host_threads.h"
#include "trainer/open_checkpoint.h"

namespace tessera {

void add_generate_command(CLI::App& app) {
  // CLI11 would take -1 for 2^64 - 1.
  const auto not_negative = [](const std::string& text) { return text.starts_with('-') ? "expected 0 or more, found " + text : std::string(); };
  struct Options : GenerateOptions {
    std::string checkpoint, prompt;
    OpenCheckpoint::Options open;
    bool ignore_end = false, json = false;
  };
  auto o = std::make_shared<Options>();
  o->temperature = 0.8;
  CLI::App* command = app.add_subcommand("generate", "Text from a checkpoint, as it is made");
  command->add_option("CHECKPOINT", o->checkpoint, "A step folder, or a run folder (its newest checkpoint)")->type_name("")->required();
  command->add_option("--prompt", o->prompt, "Text to continue")->type_name("TEXT")->required();
  command->add_option("--tokens", o->tokens, "Tokens to make, at most")->type_name("N")->check(CLI::Range(1, 1 << 30))->required();
  command->add_option("--temperature", o->temperature, "Below 1 likelier tokens, above 1 more surprising ones; 0: always the likeliest")
      ->type_name("T")
      ->check(number_in(0, 100))
      ->capture_default_str();
  command->add_option("--top-k", o->top_k, "Only the K likeliest tokens; 0: all")
      ->type_name("K")
      ->check(CLI::Range(0, 1 << 30))
      ->capture_default_str();
  command->add_option("--seed", o->seed, "Same seed, same text")->type_name("S")->check(not_negative)->capture_default_str();
  command->add_option("--device", o->open.device, "Where to compute (default: as in training where that is there, else cpu)")
      ->check(CLI::IsMember({"cpu", "cuda"}));
  command->add_option("--threads", o->open.threads, "CPU threads; 0: all cores")->type_name("N")->check(CLI::Range(0, 4096))->capture_default_str();
  command->add_flag("--ignore-end", o->ignore_end, "Go on after end of text");
  command->add_flag("--json", o->json, "Print JSON at the end, instead of text as it is made");
  command->footer(
      "Example:\n"
      "  tessera generate runs/mine --prompt \"The function returns\" --tokens 100 --temperature 0.7 --top-k 40 --seed 1");
  command->callback([o] {
    const auto alone = make_single_communicator();
    o->open.threads = threads_for_rank(*alone, o->open.threads);
    OpenCheckpoint open(o->checkpoint, OpenCheckpoint::Use::generate, o->open, *alone);
    if (!open.notice.empty()) fmt::print(stderr, "tessera: note: {}\n", open.notice);
    GenerateOptions options = *o;
    options.stop_at_end = !o->ignore_end;
    if (!o->json) std::cout << o->prompt << std::flush;
    std::string text;
    const auto tokens = generate(*open.model, *open.tokenizer, o->prompt, options, [&](std::uint32_t token) {
      std::string piece;
      open.tokenizer->decode(token, piece);
      text += piece;
      if (!o->json) std::cout << piece << std::flush;
    });
    if (!o->json) {
      std::cout << "\n";
      return;
    }
    const nlohmann::ordered_json result{{"checkpoint", open.info.directory},
                                        {"step", open.info.position.step},
                                        {"prompt", o->prompt},
                                        {"text", text},
                                        {"tokens", tokens},
                                        {"seed", options.seed},
                                        {"ended", static_cast<std::int64_t>(tokens.size()) < options.tokens}};
    // A token may end inside a UTF-8 character: such bytes are replaced, `tokens` has all.
    std::cout << result.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) << "\n";
  });
}

}  // namespace tessera
