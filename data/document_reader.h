#pragma once
// Documents out of text files, as a stream in bounded memory.
//
//   .txt   (also .text .md .rst, or no extension): one document, or several with a line `<|endoftext|>` between them. Bytes, valid UTF-8 or not.
//   .jsonl (also .ndjson): an object a line; the document is the string under one key ("text").
// Either may be compressed with gzip or Zstandard; the content decides, whatever the name.
//
// Long documents come in pieces of at most kPieceBytes. A piece ends before the last whitespace character of a run (after a paragraph where
// there is one, else a line, else a word), which is where the GPT-2 pattern starts a new word whatever surrounds it: the pieces' tokens, joined,
// are the document's. Text without any whitespace is cut between characters.

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace tessera {

constexpr std::size_t kPieceBytes = 64 << 10;
constexpr std::size_t kLongestLine = 256 << 20;  // of a .jsonl file; such a line is held in memory
constexpr std::string_view kDocumentMarker = "<|endoftext|>";

enum class TextFormat { automatic, text, jsonl };

/// "auto", "txt" or "jsonl"; throws std::invalid_argument for another name.
TextFormat text_format(const std::string& name);

struct ReaderOptions {
  TextFormat format = TextFormat::automatic;  // automatic: by file name
  std::string text_key = "text";
  bool skip_bad = false;  // .jsonl lines that are broken or lack the text are counted and left out; false: they are an error
};

/// Files of the arguments, in order: a file itself, a folder's text files (recursively, sorted, those with a known extension), a pattern's
/// matches (* ? [...], sorted; files and folders). "-" is standard input. Throws std::invalid_argument when one is missing or yields no file.
std::vector<std::string> expand_inputs(const std::vector<std::string>& inputs);

/// What the reader hands to the workers: a piece of a document, or a line of JSON still to be parsed.
struct Entry {
  std::string bytes;
  bool json = false;
  bool first = true;       // begins a document
  std::uint32_t file = 0;  // index into files()
  std::uint64_t line = 0;  // of a .jsonl file, from 1
};

class DocumentReader {
 public:
  DocumentReader(std::vector<std::string> files, const ReaderOptions& options);
  ~DocumentReader();

  /// The next few entries, about `bytes` of them together; false at the end. Throws std::runtime_error naming file and line or offset.
  bool next(std::vector<Entry>& out, std::size_t bytes);
  /// Calls take(piece, first) for the document of an entry and returns true; false for a bad line when skip_bad. const and thread-safe.
  bool pieces(const Entry& entry, const std::function<void(std::string_view, bool)>& take) const;

  const std::vector<std::string>& files() const;
  std::uint64_t total_bytes() const;     // of the files on disk; 0: unknown (standard input)
  std::uint64_t consumed_bytes() const;  // so far; any thread may ask
  std::uint64_t skipped_lines() const;   // by next() itself: lines longer than kLongestLine, and bad long lines

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

/// Length of the first piece of a document's remaining text: all of it when it is no longer than kPieceBytes.
std::size_t piece_length(std::string_view rest);

}  // namespace tessera
