// tessera prepare --dry-run.

#include <fmt/core.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <stdexcept>

#include "data/prepare.h"
#include "data/prepare_inputs.h"

namespace tessera {
namespace {

constexpr std::size_t kSampledFiles = 8;
constexpr double kReadAhead = 256 << 10;  // of text that the reader has read behind a batch's end, at most; half of it on average

/// What a stretch of the input held.
struct Sampled {
  double input = 0, text = 0, tokens = 0, documents = 0;
  Sampled& operator+=(const Sampled& other) {
    input += other.input, text += other.text, tokens += other.tokens, documents += other.documents;
    return *this;
  }
};

/// Up to kSampledFiles of them, at equal distances in bytes.
std::vector<std::size_t> spread(const std::vector<std::uint64_t>& sizes, std::uint64_t total) {
  std::vector<std::size_t> out;
  std::uint64_t before = 0;
  for (std::size_t i = 0; i < sizes.size(); before += sizes[i++]) {
    // The middle of the next of equal parts lies in this file.
    const auto middle = [&] { return (2 * static_cast<double>(out.size()) + 1) / (2 * kSampledFiles) * static_cast<double>(total); };
    if (sizes.size() > kSampledFiles && middle() > static_cast<double>(before + sizes[i])) continue;
    out.push_back(i);
    if (out.size() == kSampledFiles) break;
  }
  return out;
}

/// Standard error of total * (sum tokens / sum input), as a share of it, from how the units differ.
double doubt(const std::vector<Sampled>& units, const Sampled& sum) {
  if (units.size() < 2 || sum.tokens == 0) return 0.1;
  const double ratio = sum.tokens / sum.input, n = static_cast<double>(units.size());
  double squares = 0;
  for (const Sampled& unit : units) squares += std::pow(unit.tokens - ratio * unit.input, 2);
  return std::sqrt(squares * n / (n - 1)) / sum.tokens;
}

}  // namespace

PrepareEstimate estimate_dataset(const Tokenizer& tokenizer, const PrepareOptions& options, std::uint64_t sample_bytes) {
  check(options);
  if (sample_bytes == 0) throw std::invalid_argument("--sample-mb: expected at least 1");
  const std::vector<std::string> files = input_files(options);
  std::vector<std::uint64_t> sizes;
  PrepareEstimate out;
  for (const std::string& file : files) {
    if (file == "-") throw std::invalid_argument("--dry-run: standard input has no size to estimate from; give files");
    sizes.push_back(std::filesystem::file_size(file));
    out.input_bytes += sizes.back();
  }
  const std::vector<std::size_t> chosen = spread(sizes, out.input_bytes);
  out.files = files.size();
  out.sampled_files = chosen.size();
  out.exact = chosen.size() == files.size();

  Sampled sum;
  std::vector<Sampled> of_files, of_batches;
  const auto begin = std::chrono::steady_clock::now();
  for (std::size_t i = 0; i < chosen.size(); ++i) {
    PreparePipeline pipeline({files[chosen[i]]}, tokenizer, pipeline_options(tokenizer, options, {}));
    const double wanted = static_cast<double>(sample_bytes - out.sampled_bytes) / static_cast<double>(chosen.size() - i);
    Sampled file;
    bool ended = false;
    while (file.text < wanted) {
      const auto batch = pipeline.next();
      if ((ended = !batch)) break;
      Sampled here;
      for (const TokenizedPiece& piece : batch->pieces) here.text += static_cast<double>(piece.text_bytes), here.documents += piece.first;
      here.tokens = static_cast<double>(batch->tokens.size()) + here.documents;  // each has its end-of-text token
      here.input = static_cast<double>(batch->input_bytes) - file.input;
      for (const InputProblem& problem : batch->problems) out.bad_documents += problem.documents;
      file += here;
      of_batches.push_back(here);
    }
    out.exact &= ended;
    out.sampled_bytes += static_cast<std::uint64_t>(file.text);
    if (ended) {
      file.input = static_cast<double>(sizes[chosen[i]]);
    } else {
      file.input *= file.text / (file.text + kReadAhead / 2);
    }
    sum += file;
    of_files.push_back(file);
  }
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  if (sum.tokens == 0) throw std::invalid_argument(fmt::format("{}: no text in the sample", options.inputs.front()));

  const double scale = out.exact ? 1 : static_cast<double>(out.input_bytes) / sum.input;
  const double share =
      out.exact ? 0
                : 2 * doubt(of_files.size() > 1 ? of_files : of_batches, sum) + 2 * kReadAhead / std::sqrt(12) * std::sqrt(chosen.size()) / sum.text;
  out.text_bytes = sum.text * scale;
  out.tokens = sum.tokens * scale;
  out.documents = sum.documents * scale;
  out.tokens_low = out.tokens * std::max(0.0, 1 - share);
  out.tokens_high = out.tokens * (1 + share);
  const auto shard = static_cast<double>(options.shard_tokens), bytes = tokenizer.vocabulary() <= 65536 ? 2.0 : 4.0;
  for (const double fraction : {1 - options.validation_fraction, options.validation_fraction}) out.shards += std::ceil(out.tokens * fraction / shard);
  // Per chunk of 16 Ki tokens a checksum and its place, per document where it begins, per shard what it says about itself.
  out.disk_bytes = out.tokens * (bytes + 20.0 / 16384) + 8 * out.documents + 6000 * out.shards;
  out.peak_disk_bytes = out.disk_bytes + 2 * std::min(shard, out.tokens) * bytes;
  out.seconds = seconds * scale;
  return out;
}

std::string describe(const PrepareEstimate& e, bool json) {
  const auto whole = [](double value) { return static_cast<std::uint64_t>(std::llround(value)); };
  if (json) {
    const nlohmann::ordered_json out = {{"dry_run", true},
                                        {"files", e.files},
                                        {"input_bytes", e.input_bytes},
                                        {"sample", {{"files", e.sampled_files}, {"text_bytes", e.sampled_bytes}, {"bad_documents", e.bad_documents}}},
                                        {"exact", e.exact},
                                        {"text_bytes", whole(e.text_bytes)},
                                        {"documents", whole(e.documents)},
                                        {"tokens", whole(e.tokens)},
                                        {"tokens_low", whole(e.tokens_low)},
                                        {"tokens_high", whole(e.tokens_high)},
                                        {"shards", whole(e.shards)},
                                        {"disk_bytes", whole(e.disk_bytes)},
                                        {"peak_disk_bytes", whole(e.peak_disk_bytes)},
                                        {"seconds", e.seconds}};
    return out.dump(2) + "\n";
  }
  return fmt::format(
      "{} bytes in {} file{}; {} {:.1f} MB of text of {} of them\n"
      "  tokens       {:.4g} million ({:.4g} to {:.4g}), {:.4g} documents, {:.4g} MB of text\n"
      "  shards       {}\n"
      "  disk         {:.4g} MB, up to {:.4g} MB while it is made\n"
      "  time         {:.0f} s on this machine\n{}",
      e.input_bytes, e.files, e.files == 1 ? "" : "s", e.exact ? "counted from all" : "estimated from", static_cast<double>(e.sampled_bytes) / 1e6,
      e.sampled_files, e.tokens / 1e6, e.tokens_low / 1e6, e.tokens_high / 1e6, e.documents, e.text_bytes / 1e6, whole(e.shards), e.disk_bytes / 1e6,
      e.peak_disk_bytes / 1e6, e.seconds,
      e.bad_documents ? fmt::format("  bad          {} documents of the sample cannot be read (--on-error skip leaves such out)\n", e.bad_documents)
                      : "");
}

}  // namespace tessera
