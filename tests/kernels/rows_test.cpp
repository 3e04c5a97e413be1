// Ops::move_rows and look_up against their definitions, element by element.

#include <gtest/gtest.h>

#include <numeric>
#include <random>

#include "kernels/ops.h"

namespace tessera {
namespace {

template <class T>
Tensor tensor(std::vector<T>& v, Shape shape) {
  return {v.data(), dtype_of<T>::value, shape};
}

TEST(Rows, PiecesMoveBetweenStridesAndBack) {
  const auto ops = make_cpu_ops(2);
  std::mt19937 rng(3);
  constexpr std::int64_t kSize = 5, kSequences = 3, kHeads = 2, kTokens = 40;
  // From [B, T, 3, H, D], part 1, to rows packed one after another, [row, B, D].
  const std::int64_t row = 3 * kHeads * kSize;
  std::vector<float> strided(kSequences * kTokens * row), packed(kSequences * kTokens * kHeads * kSize, -1.0f);
  std::iota(strided.begin(), strided.end(), 0.0f);
  struct Piece {
    std::int64_t head, token, rows;
  };
  const std::vector<Piece> pieces{{1, 0, 8}, {0, 8, 16}, {1, 24, 16}, {0, 39, 1}, {0, 30, 0}};
  std::vector<std::uint64_t> table;
  std::int64_t at = 0;
  for (const Piece& p : pieces) {
    table.insert(table.end(),
                 {static_cast<std::uint64_t>(at), static_cast<std::uint64_t>(p.token * 3 * kHeads + p.head), static_cast<std::uint64_t>(p.rows)});
    at += p.rows;
  }
  MoveRows m;
  m.to = {packed.data(), DType::f32, kSequences * kSize, kSize, kSequences * kSize};
  m.from = {strided.data() + kHeads * kSize, DType::f32, kSize, kTokens * row, row};
  m.pieces = tensor(table, {std::ssize(pieces), 3});
  m.sequences = kSequences;
  m.size = kSize;
  ops->move_rows(m);
  at = 0;
  for (const Piece& p : pieces)
    for (std::int64_t r = 0; r < p.rows; ++r, ++at)
      for (std::int64_t b = 0; b < kSequences; ++b)
        for (std::int64_t d = 0; d < kSize; ++d)
          ASSERT_EQ(packed[(at * kSequences + b) * kSize + d], strided[(b * kTokens + p.token + r) * row + (kHeads + p.head) * kSize + d]);
  EXPECT_EQ(packed[at * kSequences * kSize], -1.0f);  // what no piece names

  // Back, added: the named rows are there twice, the others once.
  auto wanted = strided;
  for (const Piece& p : pieces)
    for (std::int64_t r = 0; r < p.rows; ++r)
      for (std::int64_t b = 0; b < kSequences; ++b)
        for (std::int64_t d = 0; d < kSize; ++d) wanted[(b * kTokens + p.token + r) * row + (kHeads + p.head) * kSize + d] *= 2;
  std::swap(m.to, m.from);
  m.reversed = m.add = true;
  ops->move_rows(m);
  EXPECT_EQ(strided, wanted);

  m.pieces = tensor(table, {std::ssize(table)});
  EXPECT_THROW(ops->move_rows(m), std::logic_error);
}

TEST(Rows, LookUpReadsATable) {
  const auto ops = make_cpu_ops(1);
  std::vector<std::int32_t> table{5, 7, 11, 13}, index{3, 0, 0, 2}, out(4);
  ops->look_up(tensor(out, {4}), tensor(table, {4}), tensor(index, {4}));
  EXPECT_EQ(out, (std::vector<std::int32_t>{13, 5, 5, 11}));
  index[1] = 4;
  EXPECT_THROW(ops->look_up(tensor(out, {4}), tensor(table, {4}), tensor(index, {4})), std::logic_error);
}

}  // namespace
}  // namespace tessera
