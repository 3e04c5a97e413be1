// tessera tokenizer: learn a BPE vocabulary from text; turn text into tokens and back.

#include <fmt/core.h>
#include <unistd.h>

#include <charconv>
#include <chrono>
#include <filesystem>
#include <iostream>
#include <iterator>
#include <memory>
#include <nlohmann/json.hpp>
#include <stdexcept>

#include "data/bpe_train.h"
#include "data/document_reader.h"
#include "data/files.h"
#include "data/tokenizer.h"
#include "trainer/commands/commands.h"

namespace tessera {
namespace {

using Json = nlohmann::ordered_json;

/// One line on a terminal's standard error, rewritten at most five times a second; nothing elsewhere.
class ProgressLine {
 public:
  ~ProgressLine() {
    if (shown_) fmt::print(stderr, "\r\033[K");
  }
  void show(const std::string& text) {
    const auto now = std::chrono::steady_clock::now();
    if (!terminal_ || now < next_) return;
    fmt::print(stderr, "\r\033[K{}", text);
    std::fflush(stderr);
    shown_ = true;
    next_ = now + std::chrono::milliseconds(200);
  }

 private:
  bool terminal_ = ::isatty(STDERR_FILENO) == 1, shown_ = false;
  std::chrono::steady_clock::time_point next_{};
};

struct TrainOptions {
  std::vector<std::string> inputs;
  std::int64_t vocabulary = 0;
  std::string output, format = "auto";
  ReaderOptions reader;
  bool json = false;
};

/// The vocabulary would take the place of the text that it is learned from, or of something that is no file.
void check_output(const std::string& output, const std::vector<std::string>& inputs) {
  namespace fs = std::filesystem;
  std::error_code ignored;
  const auto status = fs::status(output, ignored);
  if (!fs::exists(status)) return;
  if (!fs::is_regular_file(status))
    throw std::invalid_argument(fmt::format("--output {}: expected a file to write, found {}", output,
                                            fs::is_directory(status) ? "a folder" : "something that is not a regular file"));
  for (const std::string& input : inputs)
    if (fs::equivalent(input, output, ignored))
      throw std::invalid_argument(fmt::format("--output {}: this is one of the input files ({}); choose another name", output, input));
}

void train(TrainOptions& options) {
  options.reader.format = input_format(options.format);
  DocumentReader reader(expand_inputs(options.inputs, options.reader.format), options.reader);
  check_output(options.output, reader.files());
  const std::string folder = folder_of(options.output);
  make_folder(folder);
  if (::access(folder.c_str(), W_OK) != 0) throw std::invalid_argument(folder + ": cannot write into this folder");  // now, not after the work

  BpeTrainer trainer;
  std::uint64_t documents = 0, skipped = 0;
  std::vector<Entry> entries;
  {
    constexpr std::size_t kBatchBytes = 1 << 20;
    ProgressLine progress;
    while (reader.next(entries, kBatchBytes)) {
      for (const Entry& entry : entries) {
        const bool good = reader.pieces(entry, [&](std::string_view piece, bool first) {
          documents += first;
          trainer.add(piece);
        });
        skipped += !good;
      }
      progress.show(fmt::format("reading: {:.1f} of {:.1f} MB, {} different words", static_cast<double>(reader.consumed_bytes()) / 1e6,
                                static_cast<double>(reader.total_bytes()) / 1e6, trainer.different_pieces()));
    }
    skipped += reader.skipped_lines();
  }
  if (trainer.bytes() == 0) throw std::invalid_argument("the input holds no text to learn a vocabulary from");

  BpeDefinition definition;
  {
    ProgressLine progress;
    definition = trainer.train(options.vocabulary,
                               [&](std::int64_t tokens) { progress.show(fmt::format("learning: {} of {} tokens", tokens, options.vocabulary)); });
  }
  const auto tokenizer = make_bpe_tokenizer(std::move(definition), "bpe", options.output);
  tokenizer->save(options.output);

  const std::uint64_t tokens = trainer.count_tokens(*tokenizer);
  const double bytes_per_token = static_cast<double>(trainer.bytes()) / static_cast<double>(tokens);
  if (options.json) {
    const Json result = {{"file", options.output},
                         {"vocabulary", tokenizer->vocabulary()},
                         {"documents", documents},
                         {"skipped_lines", skipped},
                         {"bytes", trainer.bytes()},
                         {"tokens", tokens},
                         {"bytes_per_token", bytes_per_token},
                         {"hash", tokenizer->hash()}};
    std::cout << result.dump(2, ' ', false, Json::error_handler_t::replace) << "\n";
    return;
  }
  fmt::print("{}: {} tokens, learned from {} documents, {:.1f} MB of text, which they encode at {:.2f} bytes a token\n", options.output,
             tokenizer->vocabulary(), documents, static_cast<double>(trainer.bytes()) / 1e6, bytes_per_token);
  if (tokenizer->vocabulary() < options.vocabulary) {
    fmt::print("(fewer than the {} asked for: no pair of tokens is left that occurs twice)\n", options.vocabulary);
  }
  if (skipped > 0) fmt::print("({} bad line{} skipped)\n", skipped, skipped == 1 ? "" : "s");
  fmt::print("Use it: tessera prepare --tokenizer bpe:{} ...\n", options.output);
}

struct ConvertOptions {
  std::string tokenizer, file;
  bool json = false;
};

std::string read_input(const std::string& file) {
  if (!file.empty() && file != "-") return read_file(file);
  return {std::istreambuf_iterator<char>(std::cin), {}};
}

void encode(const ConvertOptions& options) {
  const auto tokenizer = load_tokenizer(options.tokenizer);
  const std::string text = read_input(options.file);
  const auto start = std::chrono::steady_clock::now();
  const auto tokens = tokenizer->encode(text);
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  if (options.json) {
    std::cout << Json{{"tokenizer", tokenizer->name()}, {"hash", tokenizer->hash()}, {"bytes", text.size()}, {"seconds", seconds}, {"tokens", tokens}}
                     .dump()
              << "\n";
    return;
  }
  std::string line;
  for (const std::uint32_t token : tokens) line += fmt::format("{}{}", line.empty() ? "" : " ", token);
  std::cout << line << "\n";
}

void decode(const ConvertOptions& options) {
  const auto tokenizer = load_tokenizer(options.tokenizer);
  const std::string input = read_input(options.file);
  constexpr const char* kSpace = " \t\r\n";
  std::string text;
  for (std::size_t begin = input.find_first_not_of(kSpace); begin != std::string::npos;) {
    const std::size_t end = std::min(input.find_first_of(kSpace, begin), input.size());
    const std::string_view word = std::string_view(input).substr(begin, end - begin);
    std::uint32_t token = 0;
    const auto [rest, error] = std::from_chars(word.data(), word.data() + word.size(), token);
    if (error != std::errc() || rest != word.data() + word.size() || token >= tokenizer->vocabulary()) {
      throw std::invalid_argument(fmt::format("token \"{}\" at byte {} of the input: expected a number from 0 to {}", word.substr(0, 40), begin,
                                              tokenizer->vocabulary() - 1));
    }
    tokenizer->decode(token, text);
    begin = input.find_first_not_of(kSpace, end);
  }
  std::cout << text;
}

CLI::App* add_convert(CLI::App& parent, const char* name, const char* description, const char* input,
                      const std::shared_ptr<ConvertOptions>& options) {
  CLI::App* command = parent.add_subcommand(name, description);
  command->add_option("file", options->file, input)->type_name("FILE");
  command->add_option("--tokenizer", options->tokenizer, "bytes, gpt2:DIR or bpe:FILE")->type_name("SPEC")->required();
  return command;
}

}  // namespace

void add_tokenizer_command(CLI::App& app) {
  CLI::App* command = app.add_subcommand("tokenizer", "Learn a BPE vocabulary from text; turn text into tokens and back");
  command->require_subcommand(1);
  command->footer(
      "Examples:\n"
      "  tessera tokenizer train --input corpus/*.jsonl.zst --vocabulary 32768 --output my.json\n"
      "  echo 'Hello world' | tessera tokenizer encode --tokenizer bpe:my.json");

  auto train_options = std::make_shared<TrainOptions>();
  CLI::App* train_command = command->add_subcommand("train", "Learn a byte-level BPE vocabulary, saved as a Hugging Face tokenizer.json");
  train_command->add_option("--input", train_options->inputs, "Text: .txt or .jsonl, also .gz or .zst; files, folders, patterns, - for stdin")
      ->type_name("FILE...")
      ->required();
  train_command
      ->add_option("--vocabulary", train_options->vocabulary,
                   "Tokens in all: 256 bytes, the learned ones, the end of text; 65536 or fewer take two bytes each in shards")
      ->type_name("N")
      ->required()
      ->check(CLI::Range(std::int64_t{257}, std::int64_t{1} << 24));
  train_command->add_option("--output", train_options->output, "The tokenizer.json to write")->type_name("FILE")->required();
  train_command->add_option("--format", train_options->format, "What the files are; auto: by their content and names")
      ->check(CLI::IsMember({"auto", "txt", "jsonl", "parquet"}))
      ->capture_default_str();
  train_command
      ->add_option("--text-key,--column", train_options->reader.text_key, "Name of the text: key in each .jsonl object, column of a Parquet file")
      ->type_name("NAME")
      ->capture_default_str();
  train_command->add_flag("--skip-bad", train_options->reader.skip_bad, "Leave broken .jsonl lines out and count them");
  train_command->add_flag("--json", train_options->json, "Print JSON");
  train_command->footer(
      "The same text and vocabulary size always give the same file. A few hundred MB of text are plenty.\n"
      "Example:\n"
      "  tessera tokenizer train --input corpus/*.jsonl.zst --vocabulary 32768 --output my.json");
  train_command->callback([train_options] { train(*train_options); });

  auto encode_options = std::make_shared<ConvertOptions>();
  CLI::App* encode_command = add_convert(*command, "encode", "Print the tokens of a text", "Text; without a file: standard input", encode_options);
  encode_command->add_flag("--json", encode_options->json, "Print JSON");
  encode_command->footer("Example:\n  echo 'Hello world' | tessera tokenizer encode --tokenizer gpt2:gpt2/");
  encode_command->callback([encode_options] { encode(*encode_options); });

  auto decode_options = std::make_shared<ConvertOptions>();
  CLI::App* decode_command =
      add_convert(*command, "decode", "Print the text of tokens", "Numbers separated by white space; without a file: standard input", decode_options);
  decode_command->footer("Example:\n  echo 15496 995 | tessera tokenizer decode --tokenizer gpt2:gpt2/");
  decode_command->callback([decode_options] { decode(*decode_options); });
}

}  // namespace tessera
