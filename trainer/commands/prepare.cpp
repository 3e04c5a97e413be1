// tessera prepare: text files to token shards.

#include "data/prepare.h"

#include <fmt/core.h>
#include <unistd.h>

#include <cstdio>
#include <iostream>
#include <memory>

#include "trainer/commands/commands.h"

namespace tessera {
namespace {

struct Arguments {
  PrepareOptions options;
  std::string tokenizer, format = "auto", on_error = "stop";
  std::uint64_t sample_mb = 64;
  bool json = false, dry_run = false;
};

/// A bar on a terminal, redrawn in place; elsewhere a line every ten seconds.
class ProgressBar {
 public:
  ~ProgressBar() { clear(); }

  void show(const PrepareProgress& now) {
    const double text = static_cast<double>(now.text_bytes), rate = text / now.seconds;
    std::string line =
        fmt::format("{:.1f} MB of text, {:.1f} MB/s, {:.2f} M tokens/s", text / 1e6, rate / 1e6, static_cast<double>(now.tokens) / now.seconds / 1e6);
    if (now.total_input_bytes > 0) {
      const double share = std::min(1.0, static_cast<double>(now.input_bytes) / static_cast<double>(now.total_input_bytes));
      if (terminal_) line = fmt::format("[{:<30}] ", std::string(static_cast<std::size_t>(30 * share), '#')) + line;
      line = fmt::format("{:3.0f} % {}", 100 * share, line);
      const auto done = static_cast<double>(now.input_bytes - now.resumed_bytes), left = static_cast<double>(now.total_input_bytes - now.input_bytes);
      if (done > 0) line += fmt::format(", {} left", duration(now.seconds * left / done));
    }
    if (terminal_) {
      fmt::print(stderr, "\r\033[K{}", line);
      shown_ = true;
    } else if (now.seconds >= next_line_) {
      fmt::print(stderr, "prepare: {}\n", line);
      next_line_ = now.seconds + 10;
    }
    std::fflush(stderr);
  }
  void clear() {
    if (shown_) fmt::print(stderr, "\r\033[K");
    shown_ = false;
  }

 private:
  static std::string duration(double seconds) {
    const auto s = static_cast<long>(seconds + 0.5);
    return s < 3600 ? fmt::format("{}:{:02}", s / 60, s % 60) : fmt::format("{}:{:02}:{:02}", s / 3600, s / 60 % 60, s % 60);
  }
  const bool terminal_ = ::isatty(STDERR_FILENO) == 1;
  bool shown_ = false;
  double next_line_ = 10;
};

void prepare(Arguments& arguments) {
  auto& reader = arguments.options.reader;
  reader.format = input_format(arguments.format);
  arguments.options.skip_errors = arguments.on_error == "skip";
  const auto tokenizer = load_tokenizer(arguments.tokenizer);
  if (arguments.dry_run) {
    std::cout << describe(estimate_dataset(*tokenizer, arguments.options, arguments.sample_mb * 1'000'000), arguments.json);
    return;
  }
  PrepareSummary summary;
  {
    ProgressBar bar;
    summary = prepare_dataset(*tokenizer, arguments.options, [&](const PrepareProgress& now) { bar.show(now); });
  }
  std::cout << describe(summary, arguments.json);
}

}  // namespace

void add_prepare_command(CLI::App& app) {
  auto arguments = std::make_shared<Arguments>();
  PrepareOptions& options = arguments->options;
  CLI::App* command = app.add_subcommand("prepare", "Turn text into token shards to train on");
  command
      ->add_option("--input", options.inputs,
                   "Text (.txt, .jsonl, also .gz or .zst; .parquet) or tokens (.bin); files, folders, patterns, - for standard input")
      ->type_name("FILE...")
      ->required();
  command->add_option("--tokenizer", arguments->tokenizer, "bytes, gpt2:DIR or bpe:FILE (see tessera tokenizer train)")
      ->type_name("SPEC")
      ->required();
  command->add_option("--output", options.output, "Folder for the dataset")->type_name("DIR")->required();
  command
      ->add_option("--validation-fraction,--validation", options.validation_fraction,
                   "Share of the documents held out, drawn by a hash of their text")
      ->type_name("F")
      ->capture_default_str();
  command->add_option("--shard-tokens", options.shard_tokens, "Tokens in each shard file but the last")
      ->type_name("N")
      ->capture_default_str()
      ->check(CLI::Range(std::int64_t{2}, std::int64_t{4'000'000'000}));
  command->add_option("--threads", options.threads, "Tokenizer threads; 0: one a core. The result does not depend on it")
      ->type_name("N")
      ->capture_default_str();
  command->add_option("--format", arguments->format, "What the files are; auto: by their content and names")
      ->check(CLI::IsMember({"auto", "txt", "jsonl", "parquet", "llmc", "nanogpt", "megatron"}))
      ->capture_default_str();
  command->add_option("--text-key,--column", options.reader.text_key, "Name of the text: key in each .jsonl object, column of a Parquet file")
      ->type_name("NAME")
      ->capture_default_str();
  command->add_option("--where", options.reader.where, "Parquet rows to take, as score>=3 or language==en; given several times, all must hold")
      ->type_name("COND")
      ->take_all()
      ->expected(1);
  command->add_flag("--skip-bad", options.reader.skip_bad, "Leave broken .jsonl lines out and count them");
  command->add_option("--on-error", arguments->on_error, "stop, or skip: leave out bad documents and the rest of damaged files, and say which")
      ->check(CLI::IsMember({"stop", "skip"}))
      ->capture_default_str();
  command->add_flag("--dedup", options.dedup, "Leave out documents whose text has come before (20 to 40 bytes of memory a document)");
  command->add_flag("--resume", options.resume, "Go on where a run with the same options was killed or stopped; the result is the same to the byte");
  command->add_flag("--dry-run", arguments->dry_run, "Estimate tokens, shards, disk and time from a sample, and write nothing");
  command->add_option("--sample-mb", arguments->sample_mb, "Text that --dry-run reads, from up to 8 files")
      ->type_name("MB")
      ->check(CLI::Range(1, 1'000'000))
      ->capture_default_str();
  command->add_flag("--overwrite", options.overwrite, "Replace a dataset in the output folder, once the new one is complete");
  command->add_flag("--json", arguments->json, "Print the summary as JSON");
  command->footer(
      "A .txt file is one document, or several with lines <|endoftext|> between them; a .jsonl line is one document, and so is a row of a .parquet\n"
      "file (needs Arrow: see README). Files of tokens are taken as they are, and --tokenizer must name what made them: llm.c's and "
      "modded-nanogpt's\n"
      ".bin, Megatron's .bin with .idx, nanoGPT's .bin with --format nanogpt (it has no header that would tell).\n"
      "Examples:\n"
      "  tessera prepare --input fineweb-edu/*.parquet --where 'score>=3' --tokenizer gpt2:gpt2/ --output data/edu\n"
      "  tessera prepare --input fineweb_train_*.bin --tokenizer gpt2:gpt2/ --output data/fineweb\n"
      "  tessera prepare --input corpus/*.jsonl.zst --tokenizer gpt2:gpt2/ --output data/corpus --validation-fraction 0.01");
  command->callback([arguments] { prepare(*arguments); });
}

}  // namespace tessera
