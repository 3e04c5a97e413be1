// move_rows and look_up on a GPU against their definitions: moves to the bit, sums rounded once.

#include "ops_cuda.h"

namespace tessera::cuda_test {
namespace {

struct Piece {
  std::int64_t head, token, rows;
};

TEST(CudaRows, PiecesMoveBetweenStridesAndBack) {
  TESSERA_NEEDS_GPU();
  for (const std::int64_t size : {8, 24, 64, 128}) {
    constexpr std::int64_t kSequences = 3, kHeads = 2, kTokens = 200;
    // From [B, T, 3, H, D], part 1, to rows packed one after another, [row, B, D].
    const std::int64_t row = 3 * kHeads * size;
    std::mt19937 rng(3);
    std::vector<Bf16> strided(kSequences * kTokens * row);
    for (auto& x : strided) x = __float2bfloat16_rn(static_cast<float>(rng() % 1000) / 64.f);
    const std::vector<Piece> pieces{{1, 0, 64}, {0, 64, 64}, {1, 128, 64}, {0, 199, 1}, {0, 30, 0}, {0, 130, 33}};
    std::vector<std::uint64_t> table;
    std::int64_t at = 0;
    for (const Piece& p : pieces) {
      for (const std::int64_t x : {at, p.token * 3 * kHeads + p.head, p.rows}) table.push_back(static_cast<std::uint64_t>(x));
      at += p.rows;
    }
    Device<Bf16> from(strided), to(kSequences * (at + 1) * size);
    Device<std::uint64_t> device_table(table);
    MoveRows m;
    m.to = {to.get(), DType::bf16, kSequences * size, size, kSequences * size};
    m.from = {from.get() + kHeads * size, DType::bf16, size, kTokens * row, row};
    m.pieces = {device_table.get(), DType::u64, {static_cast<std::int64_t>(pieces.size()), 3}};
    m.sequences = kSequences;
    m.size = size;
    gpu().move_rows(m);
    gpu().synchronize();
    const auto packed = to.host();
    const auto bits = [](Bf16 x) { return __bfloat16_as_ushort(x); };
    at = 0;
    for (const Piece& p : pieces)
      for (std::int64_t r = 0; r < p.rows; ++r, ++at)
        for (std::int64_t b = 0; b < kSequences; ++b)
          for (std::int64_t d = 0; d < size; ++d)
            ASSERT_EQ(bits(packed[(at * kSequences + b) * size + d]),
                      bits(strided[(b * kTokens + p.token + r) * row + (kHeads + p.head) * size + d]));
    ASSERT_EQ(bits(packed[at * kSequences * size]), 0xffff);  // what no piece names

    // Back, added: the named rows are there twice.
    auto wanted = strided;
    for (const Piece& p : pieces)
      for (std::int64_t r = 0; r < p.rows; ++r)
        for (std::int64_t b = 0; b < kSequences; ++b)
          for (std::int64_t d = 0; d < size; ++d) {
            Bf16& x = wanted[(b * kTokens + p.token + r) * row + (kHeads + p.head) * size + d];
            x = __float2bfloat16_rn(2 * __bfloat162float(x));
          }
    std::swap(m.to, m.from);
    m.reversed = m.add = true;
    gpu().move_rows(m);
    gpu().synchronize();
    const auto sums = from.host();
    for (std::size_t n = 0; n < sums.size(); ++n) ASSERT_EQ(bits(sums[n]), bits(wanted[n])) << n;

    m.pieces.shape = {static_cast<std::int64_t>(table.size())};
    EXPECT_THROW(gpu().move_rows(m), std::logic_error);
    m.pieces.shape = {static_cast<std::int64_t>(pieces.size()), 3};
    m.size = 4;
    EXPECT_THROW(gpu().move_rows(m), std::logic_error);
  }
}

TEST(CudaRows, SumsInF32AreRoundedOnce) {
  TESSERA_NEEDS_GPU();
  // 1 + 1/256 + 1/256 + 1/256: each sum in bf16 would be 1 again.
  constexpr std::int64_t kRows = 70, kSize = 64;
  const std::vector<Bf16> one(kRows * kSize, __float2bfloat16_rn(1.f)), little(kRows * kSize, __float2bfloat16_rn(1.f / 256));
  Device<Bf16> ones(one), littles(little), rounded(kRows * kSize);
  Device<float> sums(kRows * kSize), copied(kRows * kSize);
  Device<std::uint64_t> piece(std::vector<std::uint64_t>{0, 0, kRows});
  const auto narrow = [&](const Device<Bf16>& d) { return RowsView{d.get(), DType::bf16, kSize, 0, kSize}; };
  const auto wide = [&](const Device<float>& d) { return RowsView{d.get(), DType::f32, kSize, 0, kSize}; };
  const auto move = [&](const RowsView& to, const RowsView& from, bool add) {
    gpu().move_rows({to, from, {piece.get(), DType::u64, {1, 3}}, false, add, 1, kSize});
  };
  move(wide(sums), narrow(ones), false);
  for (int n = 0; n < 3; ++n) move(wide(sums), narrow(littles), true);
  move(wide(copied), wide(sums), false);
  move(narrow(rounded), wide(sums), false);
  move(wide(copied), wide(sums), true);
  gpu().synchronize();
  for (const float x : sums.host()) ASSERT_EQ(x, 1 + 3.f / 256);
  for (const float x : copied.host()) ASSERT_EQ(x, 2 + 6.f / 256);
  for (const Bf16 x : rounded.host()) ASSERT_EQ(__bfloat162float(x), 1 + 1.f / 64);  // halfway between two, to the even one
  move(narrow(ones), wide(sums), true);
  gpu().synchronize();
  for (const Bf16 x : ones.host()) ASSERT_EQ(__bfloat162float(x), 2 + 1.f / 64);
}

TEST(CudaRows, LookUpReadsATable) {
  TESSERA_NEEDS_GPU();
  Device<std::int32_t> table(std::vector<std::int32_t>{5, 7, 11, 13}), index(std::vector<std::int32_t>{3, 0, -1, 4}), out(4);
  gpu().look_up({out.get(), DType::i32, {4}}, {table.get(), DType::i32, {4}}, {index.get(), DType::i32, {4}});
  gpu().synchronize();
  EXPECT_EQ(out.host(), (std::vector<std::int32_t>{13, 5, INT32_MAX, INT32_MAX}));  // outside: nothing visible, as a document's start
}

}  // namespace
}  // namespace tessera::cuda_test
