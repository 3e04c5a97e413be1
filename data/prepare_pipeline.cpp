#include "data/prepare_pipeline.h"

#include <fmt/core.h>

#include <cstring>
#include <filesystem>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <system_error>

#include "data/bpe_split.h"
#include "data/sha256.h"

namespace tessera {
namespace {

constexpr std::size_t kBatchBytes = 256 << 10;
constexpr std::size_t kBytesUnderWay = 64 << 20;  // of text; its tokens take up to four times as much

std::uint64_t big_endian(const unsigned char* bytes) {
  std::uint64_t out = 0;
  for (int i = 0; i < 8; ++i) out = out << 8 | bytes[i];
  return out;
}

std::uint64_t size_on_disk(const std::string& file) {
  std::error_code error;
  const auto size = std::filesystem::file_size(file, error);
  return error ? 0 : size;
}

/// A reason without the advice how to leave a line out, for where it was left out.
std::string without_advice(std::string reason) {
  if (const auto advice = reason.find(" (--skip-bad"); advice != std::string::npos) reason.erase(advice);
  return reason;
}

}  // namespace

/// The entries of all files, numbered in each; a file at a time, so that a damaged one is known by name and can be left.
class PreparePipeline::FileReader {
 public:
  FileReader(const std::vector<std::string>& files, const PipelineOptions& options)
      : files_(files), options_(options), file_(options.start.file), skip_(options.start.entry) {
    options_.reader.skip_bad |= options.skip_errors;
    for (std::uint32_t i = 0; i < file_; ++i) bytes_before_ += size_on_disk(files[i]);
  }

  /// Adds about kBatchBytes to the job; false when nothing is left. Of an error that is not to be left out, the entries before it are added.
  bool next(Job& job) {
    while (job.bytes < kBatchBytes && file_ < files_.size() && !job.out.error) {
      bool more = false;
      std::string damage;
      try {
        if (!reader_) reader_.emplace(std::vector{files_[file_]}, options_.reader);
        more = reader_->next(entries_, kBatchBytes - job.bytes);
      } catch (const std::bad_alloc&) {
        job.out.error = std::current_exception();
      } catch (const std::exception& e) {
        if (options_.skip_errors) {
          damage = fmt::format("{}; the rest of the file was left out", without_advice(e.what()));
        } else {
          job.out.error = std::current_exception();
        }
      }
      take_entries(job);
      if (more) continue;
      const InputPosition here{file_, number_, 0};
      if (const std::uint64_t lines = reader_ ? reader_->skipped_lines() : 0)
        job.out.problems.push_back({here, fmt::format("{}: {} bad lines of more than 1 MiB", files_[file_], lines), lines, 0});
      if (!damage.empty()) job.out.problems.push_back({here, damage, 0, 1});
      if (job.out.error) break;
      bytes_before_ += size_on_disk(files_[file_]);
      reader_.reset();
      ++file_;
      number_ = skip_ = 0;
    }
    job.out.end = {file_, number_, 0};
    job.out.input_bytes = bytes_before_ + (reader_ ? reader_->consumed_bytes() : 0);
    return file_ < files_.size() || !job.entries.empty() || !job.out.problems.empty() || job.out.error;
  }

 private:
  void take_entries(Job& job) {
    for (Entry& entry : entries_) {
      const std::uint64_t number = number_++;
      if (number < skip_) continue;
      entry.file = file_;
      job.bytes += entry.bytes.size() + entry.tokens.size() * sizeof(std::uint32_t) + sizeof(Entry);
      job.entries.push_back(std::move(entry));
      job.numbers.push_back(number);
    }
    entries_.clear();
  }

  const std::vector<std::string>& files_;
  PipelineOptions options_;
  std::optional<DocumentReader> reader_;
  std::vector<Entry> entries_;
  std::uint32_t file_;
  std::uint64_t number_ = 0, skip_, bytes_before_ = 0;
};

PreparePipeline::PreparePipeline(std::vector<std::string> files, const Tokenizer& tokenizer, const PipelineOptions& options)
    : files_(std::move(files)),
      options_(options),
      parser_(files_,
              [&] {
                ReaderOptions strict = options.reader;
                strict.skip_bad = false;  // for the reason, as an exception
                strict.check_first = !options.skip_errors;
                return strict;
              }()),
      tokenizer_(tokenizer),
      most_under_way_(4 + 4 * static_cast<std::size_t>(options.threads)),
      position_(options.start) {
  try {
    threads_.emplace_back([this] { read(); });
    for (int i = 0; i < options.threads; ++i) threads_.emplace_back([this] { work(); });
  } catch (...) {  // the system allows no more threads
    stop_threads();
    throw;
  }
}

PreparePipeline::~PreparePipeline() { stop_threads(); }

void PreparePipeline::stop_threads() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  changed_reader_.notify_all();
  changed_workers_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void PreparePipeline::read() {
  FileReader reader(files_, options_);
  for (bool more = true; more;) {
    {
      std::unique_lock lock(mutex_);
      changed_reader_.wait(lock, [&] { return stop_ || (under_way_ < most_under_way_ && bytes_under_way_ < kBytesUnderWay); });
      if (stop_) return;
    }
    Job job;
    more = reader.next(job);
    const bool failed = job.out.error != nullptr;
    const std::lock_guard lock(mutex_);
    if (more) {
      job.number = read_++;
      ++under_way_;
      bytes_under_way_ += job.bytes;
      jobs_.push_back(std::move(job));
      changed_workers_.notify_one();
    }
    more = more && !failed;
    if (!more) {
      read_all_ = true;
      changed_results_.notify_all();
    }
  }
}

void PreparePipeline::work() {
  while (true) {
    std::unique_lock lock(mutex_);
    changed_workers_.wait(lock, [&] { return stop_ || !jobs_.empty(); });
    if (stop_) return;
    Job job = std::move(jobs_.front());
    jobs_.pop_front();
    lock.unlock();
    try {
      // An error in an entry comes before the one that ended the reading, so that the first in the input is the one that is reported.
      tokenize(job.entries, job.numbers, job.out);
    } catch (...) {
      job.out.error = std::current_exception();
    }
    job.entries.clear();
    lock.lock();
    results_.emplace(job.number, std::move(job));
    changed_results_.notify_one();
  }
}

void PreparePipeline::tokenize(const std::vector<Entry>& entries, const std::vector<std::uint64_t>& numbers, TokenizedBatch& out) const {
  for (std::size_t i = 0; i < entries.size(); ++i) {
    const Entry& entry = entries[i];
    const auto add_piece = [&](std::string_view text, bool first, std::size_t tokens, bool utf8) {
      TokenizedPiece piece{{entry.file, numbers[i], 0}, first, utf8, 0, {}, tokens, text.size()};
      if (options_.hashes) {
        // The prefix only has to be fixed: it says that this hash is used for nothing else.
        const auto digest = sha256({"tessera validation split 1\n", text});
        piece.hash = big_endian(digest.data());
        piece.key = {big_endian(digest.data() + 8), big_endian(digest.data() + 16)};
      }
      out.pieces.push_back(piece);
    };
    if (!entry.tokens.empty()) {  // nothing to tokenize; its text is what it would be prepared from
      std::string text;
      for (const std::uint32_t token : entry.tokens) tokenizer_.decode(token, text);
      out.tokens.insert(out.tokens.end(), entry.tokens.begin(), entry.tokens.end());
      add_piece(text, entry.first, entry.tokens.size(), true);
      continue;
    }
    const auto take = [&](std::string_view text, bool first) {
      const std::size_t before = out.tokens.size();
      tokenizer_.encode(text, out.tokens);
      add_piece(text, first, out.tokens.size() - before, valid_utf8_prefix(text) == text.size());
    };
    try {
      parser_.pieces(entry, take);
    } catch (const std::runtime_error& e) {
      if (!options_.skip_errors && !options_.reader.skip_bad) throw;
      out.problems.push_back({{entry.file, numbers[i], 0}, without_advice(e.what()), 1, 0});
    }
  }
}

std::optional<TokenizedBatch> PreparePipeline::next() {
  std::unique_lock lock(mutex_);
  changed_results_.wait(lock, [&] { return results_.contains(taken_) || (read_all_ && taken_ == read_); });
  const auto found = results_.find(taken_);
  if (found == results_.end()) return std::nullopt;
  TokenizedBatch out = std::move(found->second.out);
  bytes_under_way_ -= found->second.bytes;
  results_.erase(found);
  ++taken_;
  --under_way_;
  changed_reader_.notify_one();
  lock.unlock();
  if (out.error) std::rethrow_exception(out.error);
  for (TokenizedPiece& piece : out.pieces) {
    if (piece.at.file != position_.file) position_ = {piece.at.file, 0, 0};
    position_.documents += piece.first;
    piece.at.documents = position_.documents - (position_.documents > 0);
  }
  if (out.end.file != position_.file) position_ = {out.end.file, 0, 0};
  out.end.documents = position_.documents;
  return out;
}

}  // namespace tessera
