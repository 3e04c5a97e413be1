// tessera bench data: how fast text becomes shards and shards become batches, beside what the memory and the page cache allow.

#include <fcntl.h>
#include <fmt/core.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <iostream>
#include <nlohmann/json.hpp>
#include <random>
#include <stdexcept>

#include "data/files.h"
#include "data/loader.h"
#include "data/prepare.h"
#include "trainer/commands/bench.h"
#include "trainer/commands/commands.h"

namespace tessera {
namespace {

struct DataBench {
  std::string tokenizer = "bytes";
  std::int64_t megabytes = 64, context = 1024, micro_batch = 8;
  int threads = 0;
  double seconds = 0.5;
  bool json = false;
};

/// A folder for the benchmark's files, removed at the end.
class Workplace {
 public:
  Workplace() {
    std::string pattern = (std::filesystem::temp_directory_path() / "tessera-bench-XXXXXX").string();
    if (!::mkdtemp(pattern.data())) throw std::runtime_error(fmt::format("{}: cannot be made: {}", pattern, std::strerror(errno)));
    path_ = pattern;
  }
  Workplace(const Workplace&) = delete;
  Workplace& operator=(const Workplace&) = delete;
  ~Workplace() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  std::string operator/(const char* name) const { return path_ + "/" + name; }

 private:
  std::string path_;
};

/// Text with the word lengths of English and a vocabulary of 20000 words used with Zipf's frequencies: tokenizers find what they find in prose.
std::string make_text(std::size_t bytes) {
  std::mt19937_64 random(1);
  std::vector<std::string> words(20'000);
  for (std::string& word : words)
    for (std::size_t length = 2 + random() % 8; length > 0; --length) word += "etaoinshrdlucmfwypvbgkjqxz"[std::min(random() % 26, random() % 26)];
  std::string out;
  out.reserve(bytes + 64);
  while (out.size() < bytes) {
    const double uniform = static_cast<double>(random() >> 11) * 0x1p-53;
    out += words[std::min<std::size_t>(words.size() - 1, static_cast<std::size_t>(std::exp(uniform * std::log(static_cast<double>(words.size())))))];
    const auto next = random() % 400;
    out += next == 0 ? ".\n<|endoftext|>\n" : next < 4 ? ".\n\n" : next < 30 ? ", " : " ";
  }
  return out;
}

/// MB/s of reading files that the page cache holds, in order, into a buffer that the processor's cache holds. A file that fits into the
/// processor's last cache is read from there and comes out about twice as fast, so that this is measured on the very files that the loader reads.
double page_cache_mbs(const std::vector<std::string>& paths, double seconds) {
  std::vector<char> buffer(256 << 10);
  std::size_t total = 0;
  const double ms = best_ms(seconds, [&] {
    total = 0;
    for (const std::string& path : paths) {
      const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
      if (descriptor < 0) throw std::runtime_error(fmt::format("{}: cannot be opened: {}", path, std::strerror(errno)));
      for (ssize_t got; (got = ::read(descriptor, buffer.data(), buffer.size())) > 0;) total += static_cast<std::size_t>(got);
      ::close(descriptor);
    }
  });
  return static_cast<double>(total) / ms * 1e-3;
}

double memcpy_mbs(const std::string& from, double seconds) {
  std::vector<char> to(from.size());
  const double ms = best_ms(seconds, [&] {
    std::memcpy(to.data(), from.data(), from.size());
    __asm__ volatile("" : : "r"(to.data()) : "memory");  // the copy is wanted
  });
  return static_cast<double>(from.size()) / ms * 1e-3;
}

/// Tokens/s of copying the loader's sequences, in its order, out of the shards' bytes: what delivering them costs when nothing else is done, from
/// memory that holds the files as the page cache does.
double copy_tokens_per_s(const std::vector<std::string>& paths, const LoaderOptions& o, int token_bytes, double seconds) {
  std::string bytes;
  for (const std::string& path : paths) bytes += read_file(path);
  const auto row = static_cast<std::size_t>(o.context) * static_cast<std::size_t>(token_bytes);
  const Sampler sampler(bytes.size() / static_cast<std::size_t>(token_bytes), static_cast<std::uint64_t>(o.context),
                        static_cast<std::uint64_t>(o.micro_batch), o.seed);
  std::vector<char> batch(row * static_cast<std::size_t>(o.micro_batch));
  std::uint64_t step = 0;
  constexpr int kBatches = 256;
  const double ms = best_ms(seconds, [&] {
    for (int i = 0; i < kBatches; ++i, ++step) {
      for (std::int64_t r = 0; r < o.micro_batch; ++r)
        std::memcpy(batch.data() + static_cast<std::size_t>(r) * row,
                    bytes.data() + sampler.first_token(step, static_cast<std::uint64_t>(r)) * static_cast<std::uint64_t>(token_bytes), row);
      __asm__ volatile("" : : "r"(batch.data()) : "memory");  // the copies are wanted
    }
  });
  return static_cast<double>(kBatches * o.micro_batch * o.context) / ms * 1e3;
}

/// Tokens/s of `batches` batches, once.
double load_tokens_per_s(Loader& loader, std::uint64_t batches) {
  const auto begin = std::chrono::steady_clock::now();
  std::uint64_t tokens = 0;
  for (std::uint64_t i = 0; i < batches; ++i) tokens += loader.next().token.size();
  return static_cast<double>(tokens) / std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

nlohmann::ordered_json measure(const DataBench& options) {
  const Workplace folder;
  const auto tokenizer = load_tokenizer(options.tokenizer);
  const std::string text = make_text(static_cast<std::size_t>(options.megabytes) << 20);
  write_file(folder / "text.txt", text);
  nlohmann::ordered_json out = {{"tokenizer", tokenizer->name()}, {"text_bytes", text.size()}};
  PrepareOptions prepare;
  prepare.inputs = {folder / "text.txt"};
  prepare.output = folder / "data";
  prepare.threads = options.threads;
  const PrepareSummary summary = prepare_dataset(*tokenizer, prepare);
  const DatasetInfo& info = summary.dataset;
  const auto tokens = static_cast<double>(info.train.tokens + info.validation.tokens);
  out["prepare"] = {{"mb_per_s", static_cast<double>(text.size()) / summary.seconds * 1e-6},
                    {"tokens_per_s", tokens / summary.seconds},
                    {"tokens", tokens},
                    {"threads", options.threads}};

  std::vector<std::string> shards;
  std::uint64_t shard_bytes = 0;
  for (const ShardInfo& shard : info.train.shards) {
    shards.push_back(info.directory + "/" + shard.file);
    shard_bytes += shard.file_bytes;
  }
  const double page_cache = page_cache_mbs(shards, options.seconds);
  out["baseline"] = {
      {"memcpy_mb_per_s", memcpy_mbs(text, options.seconds)}, {"page_cache_read_mb_per_s", page_cache}, {"page_cache_read_bytes", shard_bytes}};

  // Reading in order is what the shards' format costs; the loader adds random places, documents and the hand-over between threads.
  TokenReader reader(info, info.train);
  std::vector<std::int32_t> row(1 << 16);
  const double reading_ms = best_ms(options.seconds, [&] {
    for (std::uint64_t first = 0; first + row.size() <= reader.size(); first += row.size()) reader.read(first, row);
  });
  const double read = static_cast<double>(reader.size() / row.size() * row.size());
  LoaderOptions loading;
  loading.context = options.context;
  loading.micro_batch = loading.sequences_per_step = options.micro_batch;
  const int token_bytes = info.vocabulary <= 65536 ? 2 : 4;
  const double shard_limit = page_cache * 1e6 / token_bytes;
  const double copied = copy_tokens_per_s(shards, loading, token_bytes, options.seconds);
  // In the first epoch after opening, each chunk's checksum is compared; after it none.
  Loader loader(info, info.train, loading);
  const std::uint64_t epoch = std::max<std::uint64_t>(1, (reader.size() - 1) / static_cast<std::uint64_t>(options.context * options.micro_batch));
  const double first_epoch = load_tokens_per_s(loader, epoch);
  double loaded = 0, spent = 0;
  for (int i = 0; i < 3 || spent < options.seconds; ++i) {
    loaded = std::max(loaded, load_tokens_per_s(loader, epoch));
    spent += static_cast<double>(epoch * static_cast<std::uint64_t>(options.context * options.micro_batch)) / loaded;
  }
  out["read"] = {{"tokens_per_s", read / reading_ms * 1e3}, {"share_of_page_cache_read", read / reading_ms * 1e3 / shard_limit}};
  out["loader"] = {{"context", options.context},
                   {"micro_batch", options.micro_batch},
                   {"first_epoch_tokens_per_s", first_epoch},
                   {"tokens_per_s", loaded},
                   {"memcpy_tokens_per_s", copied},
                   {"share_of_memcpy", loaded / copied},
                   {"share_of_page_cache_read", loaded / shard_limit}};
  return out;
}

}  // namespace

void add_bench_data(CLI::App& bench) {
  auto options = std::make_shared<DataBench>();
  CLI::App* command = bench.add_subcommand("data", "Preparing text and loading batches, beside memcpy and the page cache");
  command->add_option("--tokenizer", options->tokenizer, "bytes, gpt2:DIR or bpe:FILE")->type_name("SPEC")->capture_default_str();
  command->add_option("--megabytes", options->megabytes, "Text to generate and prepare")->check(CLI::Range(1, 1 << 16))->capture_default_str();
  command->add_option("--context", options->context, "Tokens a sequence")->check(CLI::Range(1, 1 << 20))->capture_default_str();
  command->add_option("--micro-batch", options->micro_batch, "Sequences a batch")->check(CLI::Range(1, 4096))->capture_default_str();
  command->add_option("--threads", options->threads, "Tokenizer threads; 0: one a core")->check(CLI::Range(0, 1024))->capture_default_str();
  command->add_option("--seconds", options->seconds, "Time spent on each measurement")->check(number_in(0.001, 3600))->capture_default_str();
  command->add_flag("--json", options->json, "Print JSON");
  command->footer("Example:\n  tessera bench data --tokenizer gpt2:gpt2/ --megabytes 256");
  command->callback([options] {
    const auto r = measure(*options);
    if (options->json) {
      std::cout << r.dump(2) << '\n';
      return;
    }
    const auto number = [&](const char* part, const char* key) { return r[part][key].get<double>(); };
    std::cout << fmt::format("memcpy                    {:>10.0f} MB/s\n", number("baseline", "memcpy_mb_per_s"));
    std::cout << fmt::format("the shards, page cache    {:>10.0f} MB/s  ({:.0f} MB)\n", number("baseline", "page_cache_read_mb_per_s"),
                             number("baseline", "page_cache_read_bytes") / 1e6);
    std::cout << fmt::format("prepare, tokenizer {:<7}{:>10.1f} MB/s  {:>8.1f} M tokens/s\n", r["tokenizer"].get<std::string>(),
                             number("prepare", "mb_per_s"), number("prepare", "tokens_per_s") / 1e6);
    for (const char* part : {"read", "loader"})
      std::cout << fmt::format("{:<26}{:>10.1f} M tokens/s  {:>5.1f} % of what the page cache gives\n",
                               part == std::string("read") ? "shards in order, checked" : "loader, random sequences",
                               number(part, "tokens_per_s") / 1e6, 100 * number(part, "share_of_page_cache_read"));
    std::cout << fmt::format("  in the first epoch      {:>10.1f} M tokens/s, every chunk's checksum compared\n",
                             number("loader", "first_epoch_tokens_per_s") / 1e6);
    std::cout << fmt::format(
        "  memcpy of the same rows {:>10.1f} M tokens/s; the loader, which also widens, shifts targets and marks documents: {:.1f} %\n",
        number("loader", "memcpy_tokens_per_s") / 1e6, 100 * number("loader", "share_of_memcpy"));
  });
}

}  // namespace tessera
