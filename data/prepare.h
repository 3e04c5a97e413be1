#pragma once
// Text files to a dataset: a reader thread, tokenizer threads, and an ordered writer, joined by bounded queues. The result depends on the contents
// and names of the input files and on the options, never on the order in which the files are given, the number of threads, or interruptions.
//
// Files are taken in the order of their names. An end-of-text token stands before each document. The validation split is drawn by a keyed hash of
// the text, so that neither order nor position decides, and equal documents fall on the same side. What is drawn is a whole document, by its first
// piece (document_reader.h); of a document of more than 16 MiB what lies beyond is drawn piece by piece. Where the whole input has fewer than 20
// documents all is drawn by pieces (more than 16 MiB from a pipe excepted: it cannot be counted first). Each stretch that a split keeps of a
// document is then a document there. In a small corpus (up to 16 MiB of text) the hashes are ranked, so that the share comes out right and neither
// split is empty.
//
// Memory: about 0.2 GB whatever the input, but for single .jsonl lines of more than 1 MiB (up to six times the line on top: 0.9 GB at the longest,
// kLongestLine), words of more than 64 KiB (up to 0.1 GB) and --dedup (20 to 40 bytes a document).

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
  bool dedup = false;        // leave out documents whose text has come before; see dedup.h
  bool skip_errors = false;  // leave out bad documents and the rest of damaged files; they are counted and reported. false: an error
  bool resume = false;       // go on where a run with the same options was interrupted
  double journal_seconds = 10;
};

struct PrepareProgress {
  std::uint64_t input_bytes = 0, total_input_bytes = 0;  // on disk (compressed); total 0: unknown
  std::uint64_t resumed_bytes = 0;                       // of input_bytes: done by the run that was interrupted
  std::uint64_t text_bytes = 0, tokens = 0;              // by this run
  double seconds = 0;
};

struct PrepareSummary {
  DatasetInfo dataset;
  std::uint64_t skipped_lines = 0;           // bad documents that were left out
  std::uint64_t text_bytes = 0, tokens = 0;  // by this run, which may have resumed another
  double seconds = 0;
  std::vector<std::string> problems;  // the first of what was left out, and why
  std::vector<std::string> notices;   // what the user should know, as that lines were left out or bytes are not UTF-8
};

/// Builds the dataset beside its final place, in OUTPUT/.prepare, and moves it there when complete (output_folder.h). A run that was killed, or
/// stopped by an error, leaves its work there if it had finished more than a few seconds' worth: `resume` goes on with it, a run without it
/// clears that away. Throws std::invalid_argument: bad options, missing or empty input, an output folder that cannot be made or is in use;
/// std::runtime_error: damaged input, disk full. `progress` is called a few times a second from the calling thread.
PrepareSummary prepare_dataset(const Tokenizer& tokenizer, const PrepareOptions& options,
                               const std::function<void(const PrepareProgress&)>& progress = {});

/// For people, or as JSON.
std::string describe(const PrepareSummary& summary, bool json);

/// What prepare_dataset() would make, from a sample.
struct PrepareEstimate {
  std::size_t files = 0, sampled_files = 0;
  std::uint64_t input_bytes = 0;                     // on disk
  std::uint64_t sampled_bytes = 0;                   // of text
  bool exact = false;                                // the sample was all there is
  double text_bytes = 0, tokens = 0, documents = 0;  // of the whole input, duplicates and all
  double tokens_low = 0, tokens_high = 0;            // two standard errors, from how the sampled files differ
  double shards = 0, disk_bytes = 0;                 // of the dataset
  double peak_disk_bytes = 0;                        // while it is made: the spools of unfinished shards on top
  double seconds = 0;                                // on this machine with these threads
  std::uint64_t bad_documents = 0;                   // in the sample
};

/// Reads about `sample_bytes` of text from the beginnings of several files, spread over the input. Standard input cannot be estimated. Writes
/// nothing. Throws as prepare_dataset().
PrepareEstimate estimate_dataset(const Tokenizer& tokenizer, const PrepareOptions& options, std::uint64_t sample_bytes);
std::string describe(const PrepareEstimate& estimate, bool json);

}  // namespace tessera
