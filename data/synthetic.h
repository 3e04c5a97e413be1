#pragma once
// Made-up sequences that ask a model to find what it has seen before: they tell attention patterns apart in minutes. Sequence number n of a stream is
// a function of (task, context, split, seed, n) alone: nothing is stored, any rank makes any of them, and a resumed run goes on with the same ones.
//
//   mqar     multi-query associative recall (Arora et al., arXiv 2312.04927, "Zoology"): `pairs` keys, each followed by its value, then each key once
//            more, at an even gap behind the pairs; the answer is its value. Keys are distinct tokens of [1, V/2), values of [V/2, V). Gap 2g has a
//            probability proportional to (g + 1)^(power_a - 1): 1 is uniform, less asks sooner. Each key in turn takes one of the gaps left
//   copy     a random string over [2, V), the separator 1, the string again; the answers are the second one's tokens. What is left of the sequence
//            is padding, 0
//   needle   one key of [1, V/2) with its value of [V/2, V) behind it, in random tokens of all but that key; the last token is the key again, and
//            the answer its value
//
// The model is asked at the answers alone. The distance of an answer is that between the token that asks and the earlier token that is the answer:
// how far attention must reach. Of copy it is the length of the string. Accuracy by chance is one over the number of possible answers.

#include <cstdint>
#include <string>
#include <vector>

namespace tessera {

struct SyntheticTask {
  enum class Kind { mqar, copy, needle };
  enum class Filler { random, padding };  // between the queries of mqar: tokens of the whole vocabulary, or 0

  Kind kind = Kind::mqar;
  std::int64_t vocabulary = 8192;  // V, at least 4
  // mqar
  std::int64_t pairs = 8;
  double power_a = 0.01;  // > 0
  Filler filler = Filler::random;
  // copy, needle: each sequence's distance is drawn from the list, or without one such that its logarithm is uniform
  std::vector<std::int64_t> distances{};
  std::int64_t shortest = 1, longest = 0;  // longest 0: as far as the sequence goes

  bool operator==(const SyntheticTask&) const = default;
};

/// "mqar", "copy", "needle".
const char* name_of(SyntheticTask::Kind kind);
/// Tokens that an answer may be.
std::int64_t possible_answers(const SyntheticTask& task);
/// Why sequences of so many tokens cannot hold the task, in words; "" when they can.
std::string synthetic_problem(const SyntheticTask& task, std::int64_t context);

/// Sequences in the validation split: the first ones of a stream that is the same whatever the seed. Training has no end.
inline constexpr std::int64_t kSyntheticValidation = 1024;

/// Token t asks for target[t], which stands distance[t] tokens before it; target -1 and distance 0 where nothing is asked. Each [context].
struct SyntheticSequence {
  std::vector<std::int32_t> token, target, distance;
};

class SyntheticSource {
 public:
  enum class Split { train, validation };
  /// Throws std::invalid_argument when the task does not fit. `seed` is of the training split.
  SyntheticSource(const SyntheticTask& task, std::int64_t context, Split split, std::uint64_t seed);

  std::int64_t context() const { return context_; }
  void make(std::uint64_t number, SyntheticSequence& out) const;

 private:
  class Draws;
  void make_mqar(Draws& draws, SyntheticSequence& out) const;
  void make_copy(Draws& draws, SyntheticSequence& out) const;
  void make_needle(Draws& draws, SyntheticSequence& out) const;
  std::int64_t draw_distance(Draws& draws) const;

  SyntheticTask task_;
  std::int64_t context_;
  std::uint64_t key_;
  std::vector<double> gap_weight_;  // mqar: of gap 2g
};

}  // namespace tessera
