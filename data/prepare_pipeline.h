#pragma once
// The threads of `tessera prepare`: one reads, several tokenize, and the caller takes the results in the order of the input. Memory is bounded:
// the reader waits while too many batches, or too many bytes, are under way.

#include <array>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "data/document_reader.h"
#include "data/tokenizer.h"

namespace tessera {

/// A place in the input: before this entry of this file (see DocumentReader), which comes after this many documents of the file.
struct InputPosition {
  std::uint32_t file = 0;
  std::uint64_t entry = 0, documents = 0;
};

inline bool operator<(const InputPosition& a, const InputPosition& b) { return a.file != b.file ? a.file < b.file : a.entry < b.entry; }

/// Something that was left out, where and why.
struct InputProblem {
  InputPosition at;
  std::string what;
  std::uint64_t documents = 0, files = 0;  // how many, of each
};

/// 128 bits of a keyed SHA-256 of a text.
using TextKey = std::array<std::uint64_t, 2>;

struct TokenizedPiece {
  InputPosition at;        // of the entry it came from; `documents` is the number of its document in the file, from 0
  bool first = true;       // begins a document
  bool utf8 = true;        // its bytes are valid UTF-8
  std::uint64_t hash = 0;  // of its text, keyed; see prepare.h
  TextKey key{};           // of its text
  std::size_t tokens = 0, text_bytes = 0;
};

struct TokenizedBatch {
  std::vector<std::uint32_t> tokens;  // of all pieces, one after the other
  std::vector<TokenizedPiece> pieces;
  std::vector<InputProblem> problems;
  InputPosition end;              // where the next batch begins
  std::uint64_t input_bytes = 0;  // of the files on disk, read when it ended
  std::exception_ptr error;
};

struct PipelineOptions {
  ReaderOptions reader;
  bool skip_errors = false;  // bad documents, and the rest of a damaged file, are left out; else an error
  int threads = 1;
  bool hashes = true;  // hash and key of each piece
  InputPosition start;
};

class PreparePipeline {
 public:
  /// The tokenizer must outlive the pipeline.
  PreparePipeline(std::vector<std::string> files, const Tokenizer& tokenizer, const PipelineOptions& options);
  ~PreparePipeline();
  /// The next batch in the order of the input; none at the end. Throws what reading or tokenizing it threw.
  std::optional<TokenizedBatch> next();

  std::uint64_t total_bytes() const { return parser_.total_bytes(); }  // of the files on disk; 0: unknown (standard input)

 private:
  struct Job {
    std::uint64_t number = 0;
    std::vector<Entry> entries;
    std::vector<std::uint64_t> numbers;  // of the entries in their files
    std::size_t bytes = 0;
    TokenizedBatch out;  // what the reader knows of it
  };
  class FileReader;
  void stop_threads();
  void read();
  void work();
  void tokenize(const std::vector<Entry>& entries, const std::vector<std::uint64_t>& numbers, TokenizedBatch& out) const;

  const std::vector<std::string> files_;
  const PipelineOptions options_;
  const DocumentReader parser_;  // turns entries into documents, strictly; reads nothing
  const Tokenizer& tokenizer_;
  const std::size_t most_under_way_;

  std::mutex mutex_;
  std::condition_variable changed_reader_, changed_workers_, changed_results_;
  std::deque<Job> jobs_;
  std::map<std::uint64_t, Job> results_;
  std::size_t under_way_ = 0, bytes_under_way_ = 0;
  std::uint64_t read_ = 0, taken_ = 0;
  bool read_all_ = false, stop_ = false;
  InputPosition position_;  // of the batch taken last, its end
  std::vector<std::thread> threads_;
};

}  // namespace tessera
