#include "data/sampler.h"

#include <fmt/core.h>

#include <bit>
#include <stdexcept>

namespace tessera {
namespace {

constexpr int kRounds = 8;

std::uint64_t round_key(std::uint64_t key, int round) { return scramble(key + static_cast<std::uint64_t>(round + 1) * 0x9e3779b97f4a7c15u); }

}  // namespace

// The finaliser of SplitMix64 (Steele, Lea and Flood, 2014).
std::uint64_t scramble(std::uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

Permutation::Permutation(std::uint64_t n, std::uint64_t key) : n_(n), key_(key), half_bits_((std::bit_width(n > 1 ? n - 1 : 1) + 1) / 2) {
  if (n == 0) throw std::invalid_argument("Permutation: of 0 things");
}

// One pass is (L, R) -> (R, L ^ f(R)), kRounds times, on 2 * half_bits_ bits: at most 4 n values, so that under 4 passes are walked on average.
std::uint64_t Permutation::operator()(std::uint64_t i) const {
  const std::uint64_t mask = (std::uint64_t{1} << half_bits_) - 1;
  do {
    std::uint64_t left = i >> half_bits_, right = i & mask;
    for (int round = 0; round < kRounds; ++round) {
      const std::uint64_t next = left ^ (scramble(right ^ round_key(key_, round)) & mask);
      left = right;
      right = next;
    }
    i = left << half_bits_ | right;
  } while (i >= n_);
  return i;
}

std::uint64_t Permutation::inverse(std::uint64_t j) const {
  const std::uint64_t mask = (std::uint64_t{1} << half_bits_) - 1;
  do {
    std::uint64_t left = j >> half_bits_, right = j & mask;
    for (int round = kRounds; round-- > 0;) {
      const std::uint64_t before = right ^ (scramble(left ^ round_key(key_, round)) & mask);
      right = left;
      left = before;
    }
    j = left << half_bits_ | right;
  } while (j >= n_);
  return j;
}

Sampler::Sampler(std::uint64_t tokens, std::uint64_t context, std::uint64_t sequences_per_step, std::uint64_t seed)
    : context_(context), sequences_per_step_(sequences_per_step), sequences_(0), seed_(seed) {
  if (context == 0 || sequences_per_step == 0) throw std::invalid_argument("Sampler: context and sequences a step must be at least 1");
  if (tokens > 0) sequences_ = (tokens - 1) / context;
  if (sequences_ == 0)
    throw std::invalid_argument(fmt::format(
        "the split has {} tokens, and one sequence takes {} (model.context + 1); prepare more text or lower model.context", tokens, context + 1));
}

std::uint64_t Sampler::first_token(std::uint64_t number) const {
  const Permutation order(sequences_, scramble(seed_) + number / sequences_);  // each epoch in an order of its own
  return order(number % sequences_) * context_;
}

std::uint64_t Sampler::epoch(std::uint64_t step) const { return step * sequences_per_step_ / sequences_; }

}  // namespace tessera
