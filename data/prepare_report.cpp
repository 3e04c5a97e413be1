// What `tessera prepare` says at the end.

#include <fmt/core.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "data/prepare.h"

namespace tessera {

std::string describe(const PrepareSummary& summary, bool json) {
  const DatasetInfo& info = summary.dataset;
  const std::uint64_t tokens = info.train.tokens + info.validation.tokens, bytes = info.train.text_bytes + info.validation.text_bytes;
  const double seconds = std::max(summary.seconds, 1e-9);
  const double speed = static_cast<double>(summary.text_bytes) / seconds;  // of this run alone, if it went on with another
  if (json) {
    const auto split = [](const SplitInfo& s) {
      return nlohmann::ordered_json{{"tokens", s.tokens}, {"documents", s.documents}, {"text_bytes", s.text_bytes}, {"shards", s.shards.size()}};
    };
    const nlohmann::ordered_json out = {
        {"output", info.directory},
        {"tokenizer", {{"name", info.tokenizer_name}, {"hash", info.tokenizer_hash}, {"vocabulary", info.vocabulary}}},
        {"train", split(info.train)},
        {"validation", split(info.validation)},
        {"source_files", info.sources.size()},
        {"skipped_lines", summary.skipped_lines},
        {"damaged_files", info.preparation.bad_files},
        {"duplicates", info.preparation.duplicates},
        {"duplicate_bytes", info.preparation.duplicate_bytes},
        {"unigram_entropy", info.unigram_entropy},
        {"unigram_bits_per_byte", bits_per_byte(info.unigram_entropy, info.train)},
        {"validation_unigram_loss", info.validation_unigram_loss},
        {"validation_unigram_bits_per_byte", bits_per_byte(info.validation_unigram_loss, info.validation)},
        {"seconds", summary.seconds},
        {"bytes_per_second", speed},
        {"tokens_per_second", static_cast<double>(summary.tokens) / seconds},
        {"problems", summary.problems},
        {"notices", summary.notices}};
    return out.dump(2, ' ', false, nlohmann::ordered_json::error_handler_t::replace) + "\n";
  }
  const auto split = [](const char* name, const SplitInfo& s) {
    return fmt::format("  {:<11}{:>14} tokens {:>10} documents {:>14} bytes of text {:>5} shard{}\n", name, s.tokens, s.documents, s.text_bytes,
                       s.shards.size(), s.shards.size() == 1 ? "" : "s");
  };
  std::string out =
      fmt::format("{}: {} tokens from {} bytes in {} file{}, tokenizer {} ({} tokens), {:.1f} s, {:.1f} MB/s\n", info.directory, tokens, bytes,
                  info.sources.size(), info.sources.size() == 1 ? "" : "s", info.tokenizer_name, info.vocabulary, summary.seconds, speed / 1e6);
  out += split("train", info.train) + split("validation", info.validation);
  out += fmt::format("  unigram entropy of the training tokens: {:.4f} nats a token, {:.4f} bits per byte\n", info.unigram_entropy,
                     bits_per_byte(info.unigram_entropy, info.train));
  if (info.validation.tokens)
    out += fmt::format("  loss of that guess on validation:       {:.4f} nats a token, {:.4f} bits per byte\n", info.validation_unigram_loss,
                       bits_per_byte(info.validation_unigram_loss, info.validation));
  for (const std::string& problem : summary.problems) out += fmt::format("  left out: {}\n", problem);
  if (const std::uint64_t all = summary.skipped_lines + info.preparation.bad_files; summary.problems.size() < all && !summary.problems.empty())
    out += fmt::format("  and {} more\n", all - summary.problems.size());
  for (const std::string& notice : summary.notices) out += fmt::format("  note: {}\n", notice);
  return out;
}

}  // namespace tessera
