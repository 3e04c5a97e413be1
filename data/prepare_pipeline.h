#pragma once
// The threads of `tessera prepare`: one reads, several tokenize, and the caller takes the results in the order of the input. Memory is bounded:
// the reader waits while too many batches are under way.

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <map>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

#include "data/document_reader.h"
#include "data/tokenizer.h"

namespace tessera {

struct TokenizedPiece {
  std::uint32_t source = 0;
  bool first = true;       // begins a document
  bool utf8 = true;        // its bytes are valid UTF-8
  std::uint64_t hash = 0;  // of its text, keyed; see prepare.h
  std::size_t tokens = 0, text_bytes = 0;
};

struct TokenizedBatch {
  std::vector<std::uint32_t> tokens;  // of all pieces, one after the other
  std::vector<TokenizedPiece> pieces;
  std::uint64_t skipped_lines = 0;
  std::exception_ptr error;
};

class PreparePipeline {
 public:
  /// Both must outlive the pipeline.
  PreparePipeline(DocumentReader& reader, const Tokenizer& tokenizer, int threads, bool hashes);
  ~PreparePipeline();
  /// The next batch in the order of the input; none at the end. Throws what reading or tokenizing it threw.
  std::optional<TokenizedBatch> next();

 private:
  struct Job {
    std::uint64_t number;
    std::vector<Entry> entries;
  };
  void stop_threads();
  void read();
  void work();
  TokenizedBatch tokenize(const std::vector<Entry>& entries) const;

  DocumentReader& reader_;
  const Tokenizer& tokenizer_;
  const bool hashes_;
  const std::size_t most_under_way_;

  std::mutex mutex_;
  std::condition_variable changed_reader_, changed_workers_, changed_results_;
  std::deque<Job> jobs_;
  std::map<std::uint64_t, TokenizedBatch> results_;
  std::size_t under_way_ = 0;
  std::uint64_t read_ = 0, taken_ = 0;
  bool read_all_ = false, stop_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace tessera
