#pragma once
// Text files to a dataset: a reader thread, tokenizer threads, and an ordered writer, joined by bounded queues. The result depends on the input
// and the options alone, never on the number of threads.
//
// An end-of-text token stands before each document. The validation split is drawn by a keyed hash of the text, so that neither order nor
// position decides, and equal documents fall on the same side. What is drawn is a whole document (by its first piece, kPieceBytes), or, where
// the corpus has too few documents for that, a piece of one: each stretch that a split keeps is then a document there. In a small corpus the
// hashes are ranked, so that the share comes out right and neither split is empty.

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "data/dataset.h"
#include "data/document_reader.h"
#include "data/tokenizer.h"

namespace tessera {

struct PrepareOptions {
  std::vector<std::string> inputs;  // files, folders, patterns, "-"
  std::string output;
  ReaderOptions reader;
  double validation_fraction = 0.01;  // [0, 1); 0: no validation split
  std::uint64_t shard_tokens = 100'000'000;
  int threads = 0;  // tokenizer threads; 0: one a core
  bool overwrite = false;
};

struct PrepareProgress {
  std::uint64_t input_bytes = 0, total_input_bytes = 0;  // on disk (compressed); total 0: unknown
  std::uint64_t text_bytes = 0, tokens = 0;
  double seconds = 0;
};

struct PrepareSummary {
  DatasetInfo dataset;
  std::uint64_t skipped_lines = 0;
  double seconds = 0;
  std::vector<std::string> notices;  // what the user should know, as that lines were left out or bytes are not UTF-8
};

/// Builds the dataset beside its final place, in OUTPUT/.prepare, and moves it there when complete; a killed run leaves nothing else, and the
/// next one clears that away. Throws std::invalid_argument: bad options, missing or empty input, an output folder that cannot be made or is in
/// use; std::runtime_error: damaged input, disk full. `progress` is called a few times a second from the calling thread.
PrepareSummary prepare_dataset(const Tokenizer& tokenizer, const PrepareOptions& options,
                               const std::function<void(const PrepareProgress&)>& progress = {});

/// For people, or as JSON.
std::string describe(const PrepareSummary& summary, bool json);

}  // namespace tessera
