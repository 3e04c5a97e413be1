#pragma once
// Which dataset a sequence comes from, when a run trains on several: a pure function of (seed, step), as the sampler is. Every step deals its
// sequences_per_step places out by weight, so that what a dataset has had after any step is its share of all sequences, to within 1 with up to three
// datasets and within 2 with any number. Which places of the step it gets is a keyed permutation: each rank sees the mixture.

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace tessera {

class Mixture {
 public:
  /// Weights count by their ratios. Throws std::invalid_argument when there are none, or one is not a positive number.
  Mixture(std::span<const double> weights, std::uint64_t sequences_per_step, std::uint64_t seed);

  struct Turn {
    std::size_t part = 0;      // the dataset
    std::uint64_t number = 0;  // which of its sequences, counted from the start of the run: each number is dealt once
  };
  /// Sequence `index` (0 .. sequences_per_step-1) of `step`.
  Turn turn(std::uint64_t step, std::uint64_t index) const;

  std::size_t parts() const { return shares_.size(); }
  double share(std::size_t part) const { return shares_[part]; }  // of all sequences
  /// How many of the first `steps` steps' sequences each dataset has had.
  std::vector<std::uint64_t> dealt(std::uint64_t steps) const;

 private:
  /// The sequences of a node are divided between two others: `left_share` / 2^63 of them to the left.
  struct Node {
    std::uint64_t left_share = 0;
    std::size_t left = 0, right = 0;  // below parts(): datasets; from there on: nodes_[i - parts()]
  };

  std::uint64_t per_step_, seed_;
  std::vector<double> shares_;
  std::vector<Node> nodes_;  // the root last; none with one dataset
};

}  // namespace tessera
