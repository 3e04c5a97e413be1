#include "data/prepare.h"

#include <fcntl.h>
#include <fmt/core.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <system_error>
#include <thread>

#include "data/files.h"
#include "data/prepare_pipeline.h"
#include "data/shard_writer.h"

namespace tessera {
namespace fs = std::filesystem;
namespace {

constexpr std::uint64_t kDecideBytes = 16 << 20;  // of text seen before the way of holding out is chosen
constexpr std::uint64_t kFewDocuments = 20;       // fewer in that much text, and pieces are held out
constexpr std::array kParts = {"train", "validation", "tokenizer.json"};

/// The output folder while a dataset is being made in its subfolder .prepare, which a lock marks as in use.
class OutputFolder {
 public:
  OutputFolder(std::string path, bool overwrite) : path_(std::move(path)) {
    std::error_code error;
    existed_ = fs::exists(path_, error);
    make_folder(path_);
    if (!overwrite) refuse_foreign();
    make_folder(staging());
    const std::string lock = staging() + "/lock";
    lock_ = ::open(lock.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    if (lock_ < 0) throw std::invalid_argument(fmt::format("{}: the folder cannot be written: {}", path_, std::strerror(errno)));
    // Some network file systems have no locks; there nobody is kept out.
    if (::flock(lock_, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK) {
      ::close(lock_);
      throw std::invalid_argument(fmt::format("{}: another tessera prepare is writing into this folder", path_));
    }
    for (const char* part : kParts) fs::remove_all(staging() + "/" + part);  // of a run that was killed
  }
  OutputFolder(const OutputFolder&) = delete;
  OutputFolder& operator=(const OutputFolder&) = delete;
  ~OutputFolder() {
    std::error_code ignored;
    fs::remove_all(staging(), ignored);
    ::close(lock_);
    if (!existed_) ::rmdir(path_.c_str());  // only if nothing came of it: a folder that is not empty stays
  }

  std::string staging() const { return path_ + "/.prepare"; }

  /// Moves the parts into place, the manifest last. What a former dataset had goes only now.
  void commit(const std::string& manifest) {
    const std::string staged = staging() + "/dataset.json";
    write_file(staged, manifest);  // the last thing to need space: a full disk shows before anything has moved
    if (fs::remove(path_ + "/dataset.json")) sync_folder(path_);
    for (const char* part : kParts) {
      const std::string from = staging() + "/" + part, to = path_ + "/" + part;
      fs::remove_all(to);
      if (!fs::exists(from)) continue;
      if (fs::is_directory(from)) sync_folder(from);
      fs::rename(from, to);
    }
    sync_folder(path_);
    fs::rename(staged, path_ + "/dataset.json");
    sync_folder(path_);
  }

 private:
  void refuse_foreign() const {
    if (is_dataset(path_))
      throw std::invalid_argument(fmt::format("{}: already holds a dataset; choose another folder, or replace it with --overwrite", path_));
    const bool own = fs::exists(staging());  // a killed run's: its parts may have begun to move into place
    for (const auto& item : fs::directory_iterator(path_)) {
      const std::string name = item.path().filename().string();
      if (name == ".prepare" || (own && std::find(kParts.begin(), kParts.end(), name) != kParts.end())) continue;
      throw std::invalid_argument(
          fmt::format("{}: the folder is not empty (it holds {}) and is not a dataset; choose another, or write into it with "
                      "--overwrite, which replaces train, validation, tokenizer.json and dataset.json and leaves the rest",
                      path_, name));
    }
  }

  std::string path_;
  bool existed_ = false;
  int lock_ = -1;
};

/// Puts each piece on its side. What it sees first it keeps, until it knows whether documents or pieces are to be held out, and in a small
/// corpus which hashes are the smallest.
class Holdout {
 public:
  Holdout(double fraction, SplitWriter& train, SplitWriter& validation) : fraction_(fraction), writers_{&train, &validation} {
    decided_ = fraction == 0;
  }

  void add(TokenizedBatch batch) {
    if (decided_) return place(batch);
    for (const TokenizedPiece& piece : batch.pieces) {
      kept_bytes_ += piece.text_bytes;
      documents_ += piece.first;
    }
    kept_.push_back(std::move(batch));
    if (kept_bytes_ > kDecideBytes) decide(false);
  }
  void finish() {
    if (!decided_) decide(true);
  }
  bool by_pieces() const { return by_pieces_; }

 private:
  void decide(bool complete) {
    decided_ = true;
    by_pieces_ = documents_ < kFewDocuments;
    if (complete) {
      std::vector<std::uint64_t> hashes;
      for (const TokenizedBatch& batch : kept_)
        for (const TokenizedPiece& piece : batch.pieces)
          if (piece.first || by_pieces_) hashes.push_back(piece.hash);
      std::sort(hashes.begin(), hashes.end());
      if (hashes.size() > 1) {
        const auto wanted = static_cast<std::size_t>(std::llround(fraction_ * static_cast<double>(hashes.size())));
        threshold_ = hashes[std::clamp<std::size_t>(wanted, 1, hashes.size() - 1)];
      }
    } else {
      threshold_ = static_cast<std::uint64_t>(std::ldexp(fraction_, 64));
    }
    for (const TokenizedBatch& batch : kept_) place(batch);
    kept_.clear();
  }

  void place(const TokenizedBatch& batch) {
    std::span<const std::uint32_t> tokens = batch.tokens;
    for (const TokenizedPiece& piece : batch.pieces) {
      bool side = side_;
      if (piece.first || by_pieces_) side = piece.hash < threshold_;
      writers_[side]->add(tokens.first(piece.tokens), piece.first || side != side_, piece.text_bytes, piece.source);
      side_ = side;
      tokens = tokens.subspan(piece.tokens);
    }
  }

  const double fraction_;
  const std::array<SplitWriter*, 2> writers_;
  std::vector<TokenizedBatch> kept_;
  std::uint64_t kept_bytes_ = 0, documents_ = 0, threshold_ = 0;
  bool decided_ = false, by_pieces_ = false, side_ = false;  // side_: where the last piece went; true: validation
};

void check(const PrepareOptions& options) {
  if (options.inputs.empty()) throw std::invalid_argument("prepare: no input files");
  if (options.output.empty()) throw std::invalid_argument("prepare: no output folder");
  if (!(options.validation_fraction >= 0 && options.validation_fraction < 1))
    throw std::invalid_argument(fmt::format("--validation-fraction {}: expected a number from 0 to less than 1", options.validation_fraction));
  if (options.shard_tokens < 2 || options.shard_tokens > 4'000'000'000)
    throw std::invalid_argument(fmt::format("--shard-tokens {}: expected 2 to 4000000000", options.shard_tokens));
  if (options.threads < 0 || options.threads > 1024) throw std::invalid_argument(fmt::format("--threads {}: expected 0 to 1024", options.threads));
}

/// What to say of files that stand in the input more than once, under whatever names; empty when none does.
std::string repeated_files(const std::vector<std::string>& files) {
  std::map<std::pair<dev_t, ino_t>, const std::string*> seen;
  std::size_t repeats = 0;
  std::string first;
  for (const std::string& file : files) {
    struct stat found;
    if (::stat(file.c_str(), &found) != 0 || !S_ISREG(found.st_mode)) continue;
    const auto [known, is_new] = seen.emplace(std::pair(found.st_dev, found.st_ino), &file);
    if (!is_new && repeats++ == 0) first = file == *known->second ? file : fmt::format("{} (also {})", file, *known->second);
  }
  if (repeats == 0) return "";
  return fmt::format("{} stands in the input more than once{}; its documents are in the dataset as often", first,
                     repeats > 1 ? fmt::format(", as do others ({} repeats)", repeats) : "");
}

/// Cross-entropy in nats a token: -sum_i o_i ln m_i, with o the frequencies of `observed` and m those of `model` after adding `plus` to each count.
double unigram_loss(const std::vector<std::uint64_t>& observed, const std::vector<std::uint64_t>& model, double plus) {
  double observed_total = 0, model_total = 0, sum = 0;
  for (std::size_t i = 0; i < model.size(); ++i) {
    observed_total += static_cast<double>(observed[i]);
    model_total += static_cast<double>(model[i]) + plus;
  }
  for (std::size_t i = 0; i < model.size(); ++i)
    if (observed[i]) sum -= static_cast<double>(observed[i]) / observed_total * std::log((static_cast<double>(model[i]) + plus) / model_total);
  return sum;
}

}  // namespace

PrepareSummary prepare_dataset(const Tokenizer& tokenizer, const PrepareOptions& options,
                               const std::function<void(const PrepareProgress&)>& progress) {
  using Clock = std::chrono::steady_clock;
  const auto begin = Clock::now();
  const auto seconds = [&] { return std::chrono::duration<double>(Clock::now() - begin).count(); };
  check(options);
  ReaderOptions reading = options.reader;
  reading.vocabulary = tokenizer.vocabulary();
  reading.end_of_text = tokenizer.end_of_text();
  DocumentReader reader(expand_inputs(options.inputs, reading.format), reading);
  const int threads = options.threads ? options.threads : std::max(1, static_cast<int>(std::thread::hardware_concurrency()));

  PrepareSummary summary;
  if (std::string repeated = repeated_files(reader.files()); !repeated.empty()) summary.notices.push_back(std::move(repeated));
  std::uint64_t not_utf8 = 0;
  std::uint32_t first_not_utf8 = 0;
  DatasetInfo& info = summary.dataset;
  try {
    OutputFolder output(options.output, options.overwrite);
    SplitWriter train(tokenizer, output.staging(), "train", options.shard_tokens, reader.files());
    SplitWriter validation(tokenizer, output.staging(), "validation", options.shard_tokens, reader.files());
    Holdout holdout(options.validation_fraction, train, validation);
    {
      PreparePipeline pipeline(reader, tokenizer, threads, options.validation_fraction > 0);
      PrepareProgress now{0, reader.total_bytes(), 0, 0, 0};
      double shown = 0;
      while (auto batch = pipeline.next()) {
        for (const TokenizedPiece& piece : batch->pieces) {
          now.text_bytes += piece.text_bytes;
          if (!piece.utf8 && not_utf8++ == 0) first_not_utf8 = piece.source;
        }
        now.tokens += batch->tokens.size();
        summary.skipped_lines += batch->skipped_lines;
        holdout.add(std::move(*batch));
        now.input_bytes = reader.consumed_bytes();
        now.seconds = seconds();
        if (progress && now.seconds - shown > 0.2) progress(now), shown = now.seconds;
      }
    }
    summary.skipped_lines += reader.skipped_lines();
    holdout.finish();
    info.train = train.finish();
    info.validation = validation.finish();
    if (info.train.tokens + info.validation.tokens == 0)
      throw std::invalid_argument(fmt::format("{}: the input is empty: no text in {} file{}{}", options.inputs.front(), reader.files().size(),
                                              reader.files().size() == 1 ? "" : "s",
                                              summary.skipped_lines ? fmt::format(", {} bad lines left out", summary.skipped_lines) : ""));
    if (info.train.tokens == 0) throw std::invalid_argument("no text was left to train on; lower --validation-fraction");

    info.directory = options.output;
    info.tokenizer_name = tokenizer.name();
    info.tokenizer_hash = tokenizer.hash();
    info.vocabulary = tokenizer.vocabulary();
    info.end_of_text = tokenizer.end_of_text();
    info.sources = train.sources();
    for (std::size_t i = 0; i < info.sources.size(); ++i) {
      info.sources[i].documents += validation.sources()[i].documents;
      info.sources[i].text_bytes += validation.sources()[i].text_bytes;
    }
    info.unigram_entropy = unigram_loss(train.token_counts(), train.token_counts(), 0);
    info.validation_unigram_loss = unigram_loss(validation.token_counts(), train.token_counts(), 1);
    tokenizer.save(output.staging() + "/tokenizer.json");
    output.commit(dataset_manifest(info));
    if (holdout.by_pieces() && info.validation.tokens > 0)
      summary.notices.push_back(fmt::format("fewer than {} documents: pieces of up to {} KiB were held out for validation instead of whole documents",
                                            kFewDocuments, kPieceBytes >> 10));
  } catch (const fs::filesystem_error& e) {
    throw std::runtime_error(fmt::format("{}: {}", e.path1().string(), e.code().message()));
  }
  if (options.validation_fraction > 0 && info.validation.tokens == 0)
    summary.notices.push_back("the validation split is empty: the text is too short, or all alike");
  if (not_utf8)
    summary.notices.push_back(
        fmt::format("bytes that are not UTF-8 were kept as they are, in {} of the pieces of up to {} KiB, first in {}: is it text?", not_utf8,
                    kPieceBytes >> 10, reader.files()[first_not_utf8]));
  if (summary.skipped_lines)
    summary.notices.push_back(fmt::format("{} bad line{} left out", summary.skipped_lines, summary.skipped_lines == 1 ? " was" : "s were"));
  summary.seconds = seconds();
  return summary;
}

std::string describe(const PrepareSummary& summary, bool json) {
  const DatasetInfo& info = summary.dataset;
  const std::uint64_t tokens = info.train.tokens + info.validation.tokens, bytes = info.train.text_bytes + info.validation.text_bytes;
  const double speed = static_cast<double>(bytes) / std::max(summary.seconds, 1e-9);
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
        {"unigram_entropy", info.unigram_entropy},
        {"unigram_bits_per_byte", bits_per_byte(info.unigram_entropy, info.train)},
        {"validation_unigram_loss", info.validation_unigram_loss},
        {"validation_unigram_bits_per_byte", bits_per_byte(info.validation_unigram_loss, info.validation)},
        {"seconds", summary.seconds},
        {"bytes_per_second", speed},
        {"tokens_per_second", static_cast<double>(tokens) / std::max(summary.seconds, 1e-9)},
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
  for (const std::string& notice : summary.notices) out += fmt::format("  note: {}\n", notice);
  return out;
}

}  // namespace tessera
