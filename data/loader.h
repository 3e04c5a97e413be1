#pragma once
// Batches ahead of time: a thread reads and lays out the micro-batches of this rank for the coming steps while the model computes.

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "data/dataset.h"
#include "data/mix.h"
#include "data/sampler.h"
#include "data/synthetic.h"

namespace tessera {

/// Host micro-batch, each [B, T]. Of whole sequences, or of the same places of each, in ascending order; indices are those of the whole sequence.
/// position: 0 .. T-1, or the places. document_start: index in the sequence of the first token of the token's document, 0 when
/// that lies before the sequence. target: the next token; -1 where there is none (read_sequences at the end of a split, and what a synthetic task
/// does not ask).
struct HostBatch {
  std::int64_t batch = 0, tokens = 0;
  std::vector<std::int32_t> token, target, position, document_start;
  std::uint64_t target_tokens = 0;       // targets that count
  std::vector<std::int32_t> distance{};  // of synthetic tasks (SyntheticSequence); of text empty
};

struct LoaderOptions {
  std::int64_t context = 1024;
  std::int64_t micro_batch = 1;         // sequences a HostBatch
  std::int64_t sequences_per_step = 1;  // over all ranks; a multiple of micro_batch * ranks
  int rank = 0, ranks = 1;              // rank r takes sequences [r*S/ranks, (r+1)*S/ranks) of a step
  std::vector<std::int32_t> places;     // read only these tokens of each sequence, ascending, 0 <= place < context; none: all of them
  std::uint64_t seed = 0;
  std::uint64_t first_step = 0;
  int prefetch = 4;      // HostBatches held ready
  int open_files = 256;  // shards held open, of all datasets together; at least one of each
};

/// One of the datasets that a run trains on, and its weight beside the others.
struct MixPart {
  DatasetInfo data;
  double weight = 1;
};

class Loader {
 public:
  /// Throws std::invalid_argument when the split is shorter than a sequence or the sequences cannot be divided among the ranks.
  Loader(const DatasetInfo& info, const SplitInfo& split, const LoaderOptions& options);
  /// The training splits of several datasets, dealt by weight (mix.h); each in epochs of its own. One alone gives what it gives by itself.
  Loader(std::span<const MixPart> mix, const LoaderOptions& options);
  /// A synthetic task: index i of step s is sequence s * sequences_per_step + i of its training split with this seed.
  Loader(const SyntheticTask& task, const LoaderOptions& options);
  ~Loader();
  /// The next micro-batch: sequences_per_step / ranks / micro_batch calls make a step. It stays valid until the next call. An error of the
  /// reading thread is thrown here, at the batch that could not be read, and at every call after it.
  const HostBatch& next();
  /// Seconds that next() has waited for data since the last call of this function.
  double take_wait_seconds();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

/// Validation batches, in order, the same ones on any number of ranks: sequence i of the split starts at token i * context. Sequences
/// 0 .. (reader.size() - 1) / context (rounded up) - 1 hold every target of the split once; in the last, targets beyond the end are -1.
/// `places`: as LoaderOptions has it. Throws std::out_of_range when a sequence starts beyond the end.
HostBatch read_sequences(TokenReader& reader, std::uint64_t first_sequence, std::int64_t count, std::int64_t context,
                         std::span<const std::int32_t> places = {});
/// Sequences first_sequence, first_sequence + 1, ... of a synthetic task.
HostBatch read_sequences(const SyntheticSource& source, std::uint64_t first_sequence, std::int64_t count, std::span<const std::int32_t> places = {});

}  // namespace tessera
