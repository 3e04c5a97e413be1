#pragma once
// What one input file yields.

#include <cstdint>
#include <string>
#include <vector>

namespace tessera {

/// A piece of a document, as text or as tokens, or a line of JSON still to be parsed.
struct Entry {
  std::string bytes;
  bool json = false;
  bool first = true;                  // begins a document
  std::uint32_t file = 0;             // index into the reader's files()
  std::uint64_t line = 0;             // of a .jsonl file, from 1
  std::vector<std::uint32_t> tokens;  // of a file of tokens, without end of text; then `bytes` is empty. Text leaves it empty
};

/// The documents of one file, in bounded memory.
class EntrySource {
 public:
  virtual ~EntrySource() = default;
  /// Adds an entry, all but Entry::file filled in; false at the end. Throws std::runtime_error naming the file and the place in it.
  virtual bool next(std::vector<Entry>& out) = 0;
  /// Bytes of the file read so far.
  virtual std::uint64_t consumed() const = 0;
};

}  // namespace tessera
