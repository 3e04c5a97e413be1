#include "data/prepare_pipeline.h"

#include <string>

#include "data/bpe_split.h"
#include "data/sha256.h"

namespace tessera {
namespace {

constexpr std::size_t kBatchBytes = 256 << 10;

/// The key only has to be fixed: it says that this hash is used for nothing else.
std::uint64_t split_hash(std::string_view text) {
  std::string keyed = "tessera validation split 1\n";
  keyed += text;
  return std::stoull(sha256_hex(keyed).substr(0, 16), nullptr, 16);
}

}  // namespace

PreparePipeline::PreparePipeline(DocumentReader& reader, const Tokenizer& tokenizer, int threads, bool hashes)
    : reader_(reader), tokenizer_(tokenizer), hashes_(hashes), most_under_way_(4 + 4 * static_cast<std::size_t>(threads)) {
  try {
    threads_.emplace_back([this] { read(); });
    for (int i = 0; i < threads; ++i) threads_.emplace_back([this] { work(); });
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
  for (bool more = true; more;) {
    {
      std::unique_lock lock(mutex_);
      changed_reader_.wait(lock, [&] { return stop_ || under_way_ < most_under_way_; });
      if (stop_) return;
    }
    Job job{read_, {}};
    TokenizedBatch failed;
    try {
      more = reader_.next(job.entries, kBatchBytes);
    } catch (...) {
      failed.error = std::current_exception();
      more = false;
    }
    const std::lock_guard lock(mutex_);
    if (failed.error) {
      // Its turn comes after everything read before it, so that the first error in the input is the one that is reported.
      results_.emplace(read_++, std::move(failed));
    } else if (more) {
      jobs_.push_back(std::move(job));
      ++read_;
      ++under_way_;
      changed_workers_.notify_one();
    }
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
    TokenizedBatch batch;
    try {
      batch = tokenize(job.entries);
    } catch (...) {
      batch = {};
      batch.error = std::current_exception();
    }
    lock.lock();
    results_.emplace(job.number, std::move(batch));
    changed_results_.notify_one();
  }
}

TokenizedBatch PreparePipeline::tokenize(const std::vector<Entry>& entries) const {
  TokenizedBatch out;
  for (const Entry& entry : entries) {
    if (!entry.tokens.empty()) {  // nothing to tokenize; its text is what it would be prepared from
      std::string text;
      for (const std::uint32_t token : entry.tokens) tokenizer_.decode(token, text);
      out.tokens.insert(out.tokens.end(), entry.tokens.begin(), entry.tokens.end());
      out.pieces.push_back({entry.file, entry.first, true, hashes_ ? split_hash(text) : 0, entry.tokens.size(), text.size()});
      continue;
    }
    const auto take = [&](std::string_view text, bool first) {
      const std::size_t before = out.tokens.size();
      tokenizer_.encode(text, out.tokens);
      const bool utf8 = valid_utf8_prefix(text) == text.size();
      out.pieces.push_back({entry.file, first, utf8, hashes_ ? split_hash(text) : 0, out.tokens.size() - before, text.size()});
    };
    if (!reader_.pieces(entry, take)) ++out.skipped_lines;
  }
  return out;
}

std::optional<TokenizedBatch> PreparePipeline::next() {
  std::unique_lock lock(mutex_);
  changed_results_.wait(lock, [&] { return results_.contains(taken_) || (read_all_ && taken_ == read_); });
  const auto found = results_.find(taken_);
  if (found == results_.end()) return std::nullopt;
  TokenizedBatch out = std::move(found->second);
  results_.erase(found);
  ++taken_;
  if (out.error) std::rethrow_exception(out.error);
  --under_way_;
  changed_reader_.notify_one();
  return out;
}

}  // namespace tessera
