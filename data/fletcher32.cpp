#include "data/fletcher32.h"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <stdexcept>

namespace tessera {
namespace {

constexpr std::uint64_t kModulus = 65535;
constexpr std::size_t kLanes = 32, kRows = 256;  // 32-bit lanes hold 65535 * (1 + 2 + ... + 256)

/// A sum of words as HDF5 leaves it: it adds carries back in, so that what is no sum of zeros never becomes 0.
std::uint32_t folded(std::uint64_t sum, bool any) { return any ? static_cast<std::uint32_t>((sum + kModulus - 1) % kModulus + 1) : 0; }

}  // namespace

// The first sum is that of all words, the second that of the first one's values on the way: word i of n counts n - i times. The words are taken as
// the machine has them, little-endian: exchanging their bytes multiplies by 256 modulo 65535, and can be done to the sums.
// kLanes sums run beside each other: of the k-th row of kLanes words, lane l has word k * kLanes + l.
std::uint32_t fletcher32(std::span<const std::byte> bytes) {
  if (bytes.size() % 2 != 0) throw std::logic_error("fletcher32: an odd number of bytes");
  std::uint64_t left = bytes.size() / 2, first = 0, second = 0;
  bool any = false;
  const std::byte* at = bytes.data();
  while (left >= kLanes) {
    const std::size_t rows = std::min<std::uint64_t>(left / kLanes, kRows);
    std::uint32_t sum[kLanes] = {}, sums[kLanes] = {};
    for (std::size_t row = 0; row < rows; ++row, at += 2 * kLanes) {
      std::uint16_t word[kLanes];
      std::memcpy(word, at, sizeof word);
      for (std::size_t l = 0; l < kLanes; ++l) {
        sum[l] += word[l];
        sums[l] += sum[l];
      }
    }
    // Word (k, l) counts left - k * kLanes - l times; `sums` has it rows - k times.
    const std::uint64_t after = left - rows * kLanes;
    std::uint64_t all = 0;
    for (std::size_t l = 0; l < kLanes; ++l) {
      all += sum[l];
      second += std::uint64_t{kLanes} * sums[l] - std::uint64_t{l} * sum[l];
    }
    second += all * (after % kModulus);
    first += all;
    any = any || all > 0;
    left = after;
    first %= kModulus;
    second %= kModulus;
  }
  for (; left > 0; --left, at += 2) {
    std::uint16_t word;
    std::memcpy(&word, at, sizeof word);
    first += word;
    second += left * word;
    any = any || word > 0;
  }
  return folded(second % kModulus * 256, any) << 16 | folded(first % kModulus * 256, any);
}

}  // namespace tessera
