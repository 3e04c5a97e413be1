#include "trainer/core/python_random.h"

#include <fmt/core.h>

#include <bit>
#include <cmath>
#include <numeric>
#include <set>
#include <stdexcept>

namespace tessera {
namespace {

/// Fills the twister's 624 words as init_by_array() of the reference implementation (mt19937ar.c) does, for std::mt19937's constructor.
class InitByArray {
 public:
  using result_type = std::uint_least32_t;
  explicit InitByArray(std::vector<std::uint32_t> key) : key_(std::move(key)) {}

  template <class Iterator>
  void generate(Iterator first, Iterator last) const {
    const auto n = static_cast<std::size_t>(last - first);
    std::vector<std::uint32_t> s(n);
    s[0] = 19650218u;
    for (std::size_t i = 1; i < n; ++i) s[i] = 1812433253u * (s[i - 1] ^ (s[i - 1] >> 30)) + static_cast<std::uint32_t>(i);
    std::size_t i = 1;
    const auto mix = [&](std::uint32_t factor) { return s[i] ^ ((s[i - 1] ^ (s[i - 1] >> 30)) * factor); };
    const auto advance = [&] {
      if (++i < n) return;
      s[0] = s[n - 1];
      i = 1;
    };
    for (std::size_t k = 0; k < std::max(n, key_.size()); ++k) {
      const std::size_t j = k % key_.size();
      s[i] = mix(1664525u) + key_[j] + static_cast<std::uint32_t>(j);
      advance();
    }
    for (std::size_t k = 1; k < n; ++k) {
      s[i] = mix(1566083941u) - static_cast<std::uint32_t>(i);
      advance();
    }
    s[0] = 0x80000000u;
    std::copy(s.begin(), s.end(), first);
  }

 private:
  std::vector<std::uint32_t> key_;
};

std::mt19937 seeded(std::uint64_t seed) {
  std::vector<std::uint32_t> key{static_cast<std::uint32_t>(seed)};
  if (seed >> 32) key.push_back(static_cast<std::uint32_t>(seed >> 32));
  InitByArray words(std::move(key));
  return std::mt19937(words);
}

}  // namespace

PythonRandom::PythonRandom(std::uint64_t seed) : engine_(seeded(seed)) {}

std::uint32_t PythonRandom::random_bits(int bits) { return static_cast<std::uint32_t>(engine_()) >> (32 - bits); }

std::uint32_t PythonRandom::below(std::size_t n) {
  if (n == 0 || n >> 32) throw std::logic_error(fmt::format("PythonRandom: a number below {}", n));
  const auto bits = static_cast<int>(std::bit_width(n));
  std::uint32_t r = random_bits(bits);
  while (r >= n) r = random_bits(bits);
  return r;
}

std::vector<std::size_t> PythonRandom::sample(std::size_t n, std::size_t k) {
  if (k > n) throw std::invalid_argument(fmt::format("a sample of {} out of {}", k, n));
  // CPython keeps a list of what is left where that takes less memory than a set of what was drawn; the two draw different numbers.
  double most_for_list = 21;
  if (k > 5) most_for_list += std::pow(4.0, std::ceil(std::log(3.0 * static_cast<double>(k)) / std::log(4.0)));
  std::vector<std::size_t> drawn;
  if (static_cast<double>(n) <= most_for_list) {
    std::vector<std::size_t> left(n);
    std::iota(left.begin(), left.end(), std::size_t{0});
    for (std::size_t i = 0; i < k; ++i) {
      const std::size_t j = below(n - i);
      drawn.push_back(left[j]);
      left[j] = left[n - i - 1];
    }
    return drawn;
  }
  std::set<std::size_t> taken;
  while (drawn.size() < k) {
    const std::size_t j = below(n);
    if (taken.insert(j).second) drawn.push_back(j);
  }
  return drawn;
}

}  // namespace tessera
