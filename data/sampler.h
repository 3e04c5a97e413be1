#pragma once
// Which tokens a step trains on: a pure function of (seed, step), with no state to save and nothing to replay. Sequence number n of the run
// (n = step * sequences_per_step + index in the step) lies in epoch n / sequences; within an epoch a keyed permutation of 0 .. sequences-1
// (a Feistel network with cycle walking) visits each sequence once.

#include <cstdint>

namespace tessera {

/// A bijection of 64-bit words whose every output bit depends on every input bit.
std::uint64_t scramble(std::uint64_t x);

/// Keyed bijection of [0, n): balanced Feistel network on ceil(log2 n) bits, walked until the result is < n. O(1) memory.
class Permutation {
 public:
  Permutation(std::uint64_t n, std::uint64_t key);
  std::uint64_t operator()(std::uint64_t i) const;  // i < n
  std::uint64_t inverse(std::uint64_t j) const;
  std::uint64_t size() const { return n_; }

 private:
  std::uint64_t n_, key_;
  int half_bits_;
};

class Sampler {
 public:
  /// tokens: length of the split; a sequence is context + 1 tokens (the last only a label), so there are (tokens - 1) / context of them.
  /// Throws std::invalid_argument when that is none.
  Sampler(std::uint64_t tokens, std::uint64_t context, std::uint64_t sequences_per_step, std::uint64_t seed);

  std::uint64_t sequences() const { return sequences_; }  // an epoch
  /// First token of sequence `index` (0 .. sequences_per_step-1) of `step`.
  std::uint64_t first_token(std::uint64_t step, std::uint64_t index) const { return first_token(step * sequences_per_step_ + index); }
  /// First token of sequence `number` of the run.
  std::uint64_t first_token(std::uint64_t number) const;
  std::uint64_t epoch(std::uint64_t step) const;

 private:
  std::uint64_t context_, sequences_per_step_, sequences_, seed_;
};

}  // namespace tessera
