// The tile products and transposition of the CPU attention, on whole numbers, where every order of summation is exact.

#include "kernels/cpu/attention_tile.h"

#include <gtest/gtest.h>

#include <random>
#include <vector>

namespace tessera::cpu {
namespace {

std::vector<float> whole_numbers(std::int64_t count, std::uint64_t seed) {
  std::mt19937_64 rng(seed);
  std::vector<float> x(count);
  for (float& e : x) e = static_cast<float>(static_cast<int>(rng() % 17) - 8);
  return x;
}

TEST(AttentionTile, ProductsOfEveryShape) {
  for (std::int64_t m : {1, 2, 3, 7, 8, 9, 15, 16, 23})
    for (std::int64_t n : {8, 16, 24, 32, 40, 48, 64, 72})
      for (std::int64_t k : {0, 1, 5, 64})
        for (bool transposed : {false, true})
          for (bool add : {false, true}) {
            // A is [m][k] or [k][m], with rows longer than needed; B and C likewise.
            const Broadcast shape{nullptr, transposed ? m + 3 : 1, transposed ? 1 : k + 2};
            const auto a = whole_numbers((m + 3) * (k + 2) + m * k + 64, 1), b = whole_numbers((k + 1) * (n + 5), 2);
            auto c = whole_numbers(m * (n + 4), 3);
            const auto before = c;
            product(m, n, k, {a.data(), shape.step, shape.row}, b.data(), n + 5, c.data(), n + 4, add);
            for (std::int64_t i = 0; i < m; ++i)
              for (std::int64_t j = 0; j < n + 4; ++j) {
                float expected = before[i * (n + 4) + j];
                if (j < n) {
                  if (!add) expected = 0;
                  for (std::int64_t l = 0; l < k; ++l) expected += a[l * shape.step + i * shape.row] * b[l * (n + 5) + j];
                }
                ASSERT_EQ(c[i * (n + 4) + j], expected) << m << 'x' << n << 'x' << k << (transposed ? " transposed" : "") << (add ? " added" : "");
              }
          }
}

TEST(AttentionTile, TransposePadsWithZeros) {
  for (std::int64_t rows : {1, 7, 8, 13, 16, 24})
    for (std::int64_t size : {8, 24, 64})
      for (std::int64_t lanes : {padded(rows), padded(rows) + 16}) {
        const std::int64_t stride = size + 3;
        const auto from = whole_numbers(rows * stride, 4);
        std::vector<float> to(size * lanes, 99.0f);
        transpose(from.data(), stride, rows, size, to.data(), lanes);
        for (std::int64_t d = 0; d < size; ++d)
          for (std::int64_t r = 0; r < lanes; ++r) ASSERT_EQ(to[d * lanes + r], r < rows ? from[r * stride + d] : 0.0f);
      }
}

}  // namespace
}  // namespace tessera::cpu
