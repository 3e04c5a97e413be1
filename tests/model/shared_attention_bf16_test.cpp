// Attention over sequences that several ranks share, in a GPU's element types: bf16, with sums over ranks in fp32.

#include "tests/model/bf16_ops.h"
#include "tests/model/shared_attention_cases.h"

namespace tessera::test {
namespace {

class SharedBf16 : public ::testing::TestWithParam<SequenceExchange> {};

TEST_P(SharedBf16, OneRanksResultsUpToRounding) {
  unsigned n = 0;
  for (const AttentionMath& math : kinds_of_math())
    for (const int ranks : {2, 4, 8}) {
      Case c;
      c.kind = DeviceKind::cuda;
      c.device = make_bf16_ops;
      c.math = math;
      c.patterns = families()[n % 9].patterns;
      c.heads = GetParam() == SequenceExchange::heads ? ranks : 2;
      c.layout = n % 2 == 0 ? SequenceLayout::zigzag : SequenceLayout::balanced;
      c.ranks = ranks;
      c.exchange = GetParam();
      c.documents = n++ % 3 == 1;
      SCOPED_TRACE(fmt::format("{} ranks, kind of math {}", ranks, (n - 1) / 3));
      check_with_self_edges(c, n, kBf16);
    }
}

INSTANTIATE_TEST_SUITE_P(Exchanges, SharedBf16, ::testing::Values(SequenceExchange::needed, SequenceExchange::heads, SequenceExchange::ring),
                         [](const auto& info) { return name_of(info); });

// Each rank's contribution is rounded as it leaves the kernel, by less than the whole; the sums are not, until the end.
TEST(SharedBf16Sums, AreRoundedOnce) {
  for (const auto exchange : {SequenceExchange::needed, SequenceExchange::ring}) {
    Case c;
    c.kind = DeviceKind::cuda;
    c.device = make_bf16_ops;
    c.patterns = {any({global(16), window(12)})};
    c.tokens = 512;
    c.ranks = 8;
    c.exchange = exchange;
    EXPECT_LT(roundings_of_dv(c, 16, 3), 1.2);
  }
}

}  // namespace
}  // namespace tessera::test
