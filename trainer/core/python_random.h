#pragma once
// Python's random.Random, as far as CORE's few-shot examples and order of items depend on it: the same numbers from the same seed as CPython 3.11
// and later (Lib/random.py, Modules/_randommodule.c). Tested against recorded outputs of CPython.

#include <cstdint>
#include <random>
#include <span>
#include <utility>
#include <vector>

namespace tessera {

class PythonRandom {
 public:
  /// random.Random(seed): the Mersenne Twister (Matsumoto & Nishimura, 1998), filled by init_by_array() from the seed's 32-bit words, lowest first.
  explicit PythonRandom(std::uint64_t seed);

  /// getrandbits(bits), of 1 to 32 bits.
  std::uint32_t random_bits(int bits);
  /// _randbelow(n): uniform in [0, n), 1 <= n < 2^32.
  std::uint32_t below(std::size_t n);

  /// shuffle(x)
  template <class T>
  void shuffle(std::vector<T>& x) {
    for (std::size_t i = x.size(); i-- > 1;) std::swap(x[i], x[below(i + 1)]);
  }
  /// sample(range(n), k). Throws std::invalid_argument when k > n.
  std::vector<std::size_t> sample(std::size_t n, std::size_t k);

 private:
  std::mt19937 engine_;
};

}  // namespace tessera
