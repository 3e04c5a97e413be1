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
  std::string tokenizer, format = "auto";
  bool json = false;
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
      if (share > 0) line += fmt::format(", {} left", duration(now.seconds / share - now.seconds));
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
  const auto tokenizer = load_tokenizer(arguments.tokenizer);
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
  command->add_option("--input", options.inputs, "Text (.txt, .jsonl, also .gz or .zst; .parquet) or tokens (.bin); files, folders, patterns, - for standard input")
      ->type_name("FILE...")
      ->required();
  command->add_option("--tokenizer", arguments->tokenizer, "bytes, gpt2:DIR or bpe:FILE (see tessera tokenizer train)")
      ->type_name("SPEC")
      ->required();
  command->add_option("--output", options.output, "Folder for the dataset")->type_name("DIR")->required();
  command->add_option("--validation-fraction", options.validation_fraction, "Share of the documents held out, drawn by a hash of their text")
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
  command->add_flag("--overwrite", options.overwrite, "Replace a dataset in the output folder, once the new one is complete");
  command->add_flag("--json", arguments->json, "Print the summary as JSON");
  command->footer(
      "A .txt file is one document, or several with lines <|endoftext|> between them; a .jsonl line is one document.\n"
      "Example:\n"
      "  tessera prepare --input corpus/*.jsonl.zst --tokenizer gpt2:gpt2/ --output data/corpus --validation-fraction 0.01");
  command->callback([arguments] { prepare(*arguments); });
}

}  // namespace tessera
