// tessera generate: text from a checkpoint.

#include "trainer/generate.h"

#include <fmt/core.h>

#include <algorithm>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>

#include "trainer/commands/commands.h"
#include "trainer/host_threads.h"
#include "trainer/open_checkpoint.h"
#include "trainer/preflight.h"
#include "trainer/prompts.h"

namespace tessera {
namespace {

using Json = nlohmann::ordered_json;

struct Options : GenerateOptions {
  std::string checkpoint, file, key;
  std::vector<std::string> prompts;
  std::int64_t batch = 8;
  OpenCheckpoint::Options open;
  bool ignore_end = false, json = false;
};

void read_all_prompts(Options& o) {
  if (o.prompts.empty() && o.file.empty()) throw std::invalid_argument("nothing to continue: expected --prompt TEXT or --prompts FILE");
  if (!o.key.empty() && o.file.empty()) throw std::invalid_argument("--prompt-key is of --prompts FILE, which was not given");
  for (std::size_t i = 0; i < o.prompts.size(); ++i)
    check_utf8(o.prompts.size() > 1 ? fmt::format("--prompt number {}", i + 1) : "--prompt", o.prompts[i]);
  if (o.file.empty()) return;
  const auto more = read_prompts(o.file, o.key);
  o.prompts.insert(o.prompts.end(), more.begin(), more.end());
}

/// A token has at least a byte, and end of text stands before the prompt: enough for any text of these prompts, before a tokenizer is there.
std::int64_t longest_text(const Options& o) {
  std::size_t bytes = 0;
  for (const std::string& prompt : o.prompts) bytes = std::max(bytes, prompt.size());
  return static_cast<std::int64_t>(bytes) + 1 + o.tokens;
}

Json to_json(const Work& w) { return {{"tokens", w.tokens}, {"seconds", w.seconds}, {"tokens_per_s", w.rate()}}; }

class Printer {
 public:
  Printer(const Options& o, const OpenCheckpoint& open) : o_(o), open_(open), several_(o.prompts.size() * static_cast<std::size_t>(o.samples) > 1) {}

  void begin() const {
    if (!o_.json && !several_) std::cout << o_.prompts[0] << std::flush;
  }
  void token(std::uint32_t token) {
    if (o_.json || several_) return;
    std::string bytes;
    open_.tokenizer->decode(token, bytes);
    std::cout << stream_.add(bytes) << std::flush;
  }
  void text(const Generation& g) {
    const std::string& prompt = o_.prompts[g.prompt];
    if (o_.json) {
      const Json result{{"checkpoint", open_.info.directory},
                        {"step", open_.info.position.step},
                        {"prompt_number", g.prompt + 1},
                        {"sample", g.sample + 1},
                        {"prompt", prompt},
                        {"text", open_.tokenizer->decode(g.tokens)},
                        {"tokens", g.tokens},
                        {"seed", o_.seed},
                        {"ended", g.ended},
                        {"prefill", to_json(g.prefill)},
                        {"decode", to_json(g.decode)}};
      // A token may end inside a UTF-8 character: such bytes are replaced, `tokens` has all.
      std::cout << result.dump(-1, ' ', false, Json::error_handler_t::replace) << std::endl;
    } else if (several_) {
      std::cout << (o_.samples > 1 ? fmt::format("== prompt {}, sample {}\n", g.prompt + 1, g.sample + 1)
                                   : fmt::format("== prompt {}\n", g.prompt + 1))
                << prompt << open_.tokenizer->decode(g.tokens) << std::endl;
    } else {
      std::cout << stream_.finish() << std::endl;
    }
  }

 private:
  const Options& o_;
  const OpenCheckpoint& open_;
  const bool several_;
  CharacterStream stream_;
};

void generate_command(Options o) {
  if (const int ranks = launched_ranks(); ranks > 1)
    throw std::invalid_argument(fmt::format("generate computes on one rank, and the launcher started {}: run it without mpirun", ranks));
  read_all_prompts(o);
  o.stop_at_end = !o.ignore_end;
  const auto texts = static_cast<std::int64_t>(o.prompts.size()) * o.samples;
  o.open.cache_sequences = o.recompute ? 0 : std::min(o.batch, texts);
  o.open.sequence_tokens = longest_text(o);
  const auto alone = make_single_communicator();
  o.open.threads = threads_for_rank(*alone, o.open.threads);
  const OpenCheckpoint open(o.checkpoint, OpenCheckpoint::Use::generate, o.open, *alone);
  const auto note = [](const std::string& text) { fmt::print(stderr, "tessera: note: {}\n", text); };
  if (!open.notice.empty()) note(open.notice);
  if (o.open.fast && open.ops->kind() == DeviceKind::cpu) note(kFastOnCpu);

  Printer printer(o, open);
  printer.begin();
  GenerateEvents events;
  events.on_token = [&](const Generation&, std::uint32_t token) { printer.token(token); };
  events.on_text = [&](const Generation& g) { printer.text(g); };
  events.on_notice = note;
  const GenerateTotals totals = generate(*open.model, *open.tokenizer, o.prompts, o, events);
  if (o.json) return;
  const std::int64_t cached = open.model->options().cache;
  fmt::print(stderr, "tessera: prompt {} tokens, {:.1f} tokens/s; then {} tokens, {:.1f} tokens/s{}\n", totals.prefill.tokens, totals.prefill.rate(),
             totals.decode.tokens, totals.decode.rate(),
             totals.recomputed > 0 && totals.recomputed == totals.decode.tokens ? " (each from the whole text)"
             : totals.recomputed > 0                                            ? fmt::format(" ({} of them from the whole text)", totals.recomputed)
             : cached > 1                                                       ? fmt::format(" (up to {} texts at once)", cached)
                                                                                : "");
}

}  // namespace

void add_generate_command(CLI::App& app) {
  // CLI11 would take -1 for 2^64 - 1.
  const auto not_negative = [](const std::string& text) { return text.starts_with('-') ? "expected 0 or more, found " + text : std::string(); };
  auto o = std::make_shared<Options>();
  o->temperature = 0.8;
  CLI::App* command = app.add_subcommand("generate", "Text from a checkpoint, as it is made");
  command->add_option("CHECKPOINT", o->checkpoint, "A step folder, or a run folder (its newest checkpoint)")->type_name("")->required();
  CLI::Option* prompt = command->add_option("--prompt", "Text to continue; may be given several times")->type_name("TEXT")->expected(1)->take_all();
  command->add_option("--prompts", o->file, "File of prompts, one a line; .jsonl: an object a line; plain, .gz or .zst; -: standard input")
      ->type_name("FILE");
  command->add_option("--prompt-key", o->key, "The lines of --prompts are JSON objects with the prompt under this key (for .jsonl: prompt)")
      ->type_name("KEY");
  command->add_option("--samples", o->samples, "Texts of each prompt")->type_name("N")->check(CLI::Range(1, 1 << 20))->capture_default_str();
  command->add_option("--tokens", o->tokens, "Tokens to make, at most")->type_name("N")->check(CLI::Range(1, 1 << 30))->required();
  command->add_option("--temperature", o->temperature, "Below 1 likelier tokens, above 1 more surprising ones; 0: always the likeliest")
      ->type_name("T")
      ->check(number_in(0, 100))
      ->capture_default_str();
  command->add_option("--top-k", o->top_k, "Only the K likeliest tokens; 0: all")
      ->type_name("K")
      ->check(CLI::Range(0, 1 << 30))
      ->capture_default_str();
  command
      ->add_option("--top-p", o->top_p,
                   "Of what temperature and --top-k leave, only the fewest likeliest tokens that have this probability together; 1: all")
      ->type_name("P")
      ->check(number_in(1e-6, 1))
      ->capture_default_str();
  command->add_option("--seed", o->seed, "Same seed, same text, whatever else is in the batch (with --fast up to rounding)")
      ->type_name("S")
      ->check(not_negative)
      ->capture_default_str();
  command->add_option("--batch", o->batch, "Texts made at once, each with a cache of its own; more are faster together and take more memory")
      ->type_name("N")
      ->check(CLI::Range(std::int64_t{1}, kFewRows))
      ->capture_default_str();
  command->add_flag("--recompute", o->recompute, "Without the cache: each token from the whole text, one text at a time. To check, and slow");
  command->add_flag(
      "--fast", o->open.fast,
      "On a GPU: the fastest kernels for each number of texts and length. What a token is then depends on its company, and on --recompute, by the "
      "rounding of bf16: a near tie may fall the other way");
  command->add_option("--device", o->open.device, "Where to compute (default: as in training where that is there, else cpu)")
      ->check(CLI::IsMember({"cpu", "cuda"}));
  command->add_option("--threads", o->open.threads, "CPU threads; 0: all cores")->type_name("N")->check(CLI::Range(0, 4096))->capture_default_str();
  command->add_flag("--ignore-end", o->ignore_end, "Go on after end of text");
  command->add_flag("--json", o->json, "Print a JSON object a line for each text when it is done, with its tokens and speeds");
  command->footer(
      "One text is printed as it is made, several are each when they are done, in order; speeds go to stderr.\n"
      "The keys and values of earlier tokens are kept, so that a token costs one position. It is the token that computing the whole text gives\n"
      "(--recompute): on a GPU to the bit of its logits but for --fast, on the CPU up to the order of fp32 sums. Beyond the context the model sees\n"
      "the last tokens of its context: then each token is computed from all of them.\n"
      "Examples:\n"
      "  tessera generate runs/mine --prompt \"The function returns\" --tokens 100 --temperature 0.7 --top-k 40 --top-p 0.95 --seed 1\n"
      "  tessera generate runs/mine --prompts questions.jsonl --prompt-key question --samples 4 --tokens 200 --json");
  command->callback([o, prompt] {
    o->prompts = prompt->results();
    generate_command(*o);
  });
}

}  // namespace tessera
