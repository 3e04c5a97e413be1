#pragma once
// Documents out of input files (input_format.h lists the kinds), as a stream in bounded memory: texts, JSON lines still to be parsed, or tokens.
//
// Long documents come in pieces, cut where the GPT-2 pattern starts a new word whatever surrounds it, so that the pieces' tokens, joined, are the
// document's: before the last whitespace character of a run (after a paragraph where there is one, else a line, else a word), or, in text without
// whitespace, where a word of the pattern ends. Pieces hold at most kPieceBytes, unless a single word is longer: that stays whole up to
// kLongestWord, and only beyond is cut between characters. Documents of tokens come in pieces of at most kPieceTokens.

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "data/entry_source.h"
#include "data/input_format.h"

namespace tessera {

constexpr std::size_t kPieceBytes = 64 << 10;
constexpr std::size_t kLongestWord = 2 << 20;
constexpr std::size_t kPieceTokens = 16 << 10;
constexpr std::size_t kLongestLine = 128 << 20;  // of a .jsonl file; such a line is held in memory
constexpr std::string_view kDocumentMarker = "<|endoftext|>";

struct ReaderOptions {
  InputFormat format = InputFormat::automatic;
  std::string text_key = "text";        // of each .jsonl object; the column of a Parquet file
  std::vector<std::string> where = {};  // of Parquet rows, all must hold; see row_filter.h
  /// Of files of tokens: ids beyond the vocabulary are an error, and end_of_text separates documents. 0: no such files are read.
  std::int64_t vocabulary = 0;
  std::uint32_t end_of_text = 0;
  bool check_first = true;  // every file's header, before the first is read: damage is said before hours of work
  bool skip_bad = false;    // .jsonl lines that are broken or lack the text are counted and left out; false: they are an error
};

class DocumentReader {
 public:
  DocumentReader(std::vector<std::string> files, const ReaderOptions& options);
  ~DocumentReader();

  /// The next few entries, about `bytes` of them together; false at the end. Throws std::runtime_error naming file and line or offset.
  bool next(std::vector<Entry>& out, std::size_t bytes);
  /// Of an entry without tokens: calls take(piece, first) for its document and returns true; false for a bad line when skip_bad. const and
  /// thread-safe.
  bool pieces(const Entry& entry, const std::function<void(std::string_view, bool)>& take) const;

  const std::vector<std::string>& files() const;
  std::uint64_t total_bytes() const;     // of the files on disk; 0: unknown (standard input)
  std::uint64_t consumed_bytes() const;  // so far; any thread may ask
  std::uint64_t skipped_lines() const;   // by next() itself: lines longer than kLongestLine, and bad long lines

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

/// Length of the first piece of a document's remaining text: all of it when it is no longer than kPieceBytes. `complete`: `rest` goes to the end of
/// the document; else 0 when that length depends on what follows.
std::size_t piece_length(std::string_view rest, bool complete = true);

}  // namespace tessera
