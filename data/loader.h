#pragma once
// Batches ahead of time: a thread reads and lays out the micro-batches of this rank for the coming steps while the model computes.

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "data/dataset.h"
#include "data/sampler.h"

namespace tessera {

/// Host micro-batch, each [B, T].
struct HostBatch {
  std::int64_t batch = 0, tokens = 0;
  std::vector<std::int32_t> token, target, position, document_start;
  std::uint64_t target_tokens = 0;  // targets that count
};

struct LoaderOptions {
  std::int64_t context = 1024;
  std::int64_t micro_batch = 1;         // sequences a HostBatch
  std::int64_t sequences_per_step = 1;  // over all ranks; a multiple of micro_batch * ranks
  int rank = 0, ranks = 1;              // rank r takes sequences [r*S/ranks, (r+1)*S/ranks) of a step
  std::uint64_t seed = 0;
  std::uint64_t first_step = 0;
  int prefetch = 4;  // HostBatches held ready
};

class Loader {
 public:
  Loader(const DatasetInfo& info, const SplitInfo& split, const LoaderOptions& options);
  ~Loader();
  /// The next micro-batch: sequences_per_step / ranks / micro_batch calls make a step. An error of the reading thread is thrown here.
  const HostBatch& next();
  /// Seconds that next() has waited for data since the last call of this function.
  double take_wait_seconds();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

/// Validation batches, in order, the same ones on any number of ranks: sequence i of the split starts at token i * context.
HostBatch read_sequences(TokenReader& reader, std::uint64_t first_sequence, std::int64_t count, std::int64_t context);

}  // namespace tessera
