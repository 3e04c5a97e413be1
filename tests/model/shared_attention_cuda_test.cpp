// Attention over sequences that several ranks share, on one GPU: each rank a thread with a stream of its own, messages by way of the host.

#include "kernels/cuda/ops.h"
#include "tests/model/shared_attention_cases.h"

namespace tessera::test {
namespace {

Case gpu_case(SequenceExchange exchange, int ranks) {
  Case c;
  c.kind = DeviceKind::cuda;
  c.device = [] { return make_cuda_ops(0); };
  c.exchange = exchange;
  c.ranks = ranks;
  c.tile_query = c.tile_key = 64;
  c.tokens = 690;
  c.heads = exchange == SequenceExchange::heads ? ranks : 3;
  return c;
}

class SharedCuda : public ::testing::TestWithParam<SequenceExchange> {
 protected:
  void SetUp() override {
    if (const std::string problem = cuda_problem(); !problem.empty()) GTEST_SKIP() << "no GPU: " << problem;
  }
};

/// Every pattern under every layout on 2 and 4 ranks; kinds of math, head sizes and documents are dealt over them.
TEST_P(SharedCuda, OneRanksResultsUpToRounding) {
  const std::vector<Named> patterns = {{"causal", {causal()}},
                                       {"window", {window(90)}},
                                       {"strided", {strided(21, 3)}},
                                       {"dilated", {dilated(30, 5)}},
                                       {"global, window in every other head", {any({global(4), window(90)}), causal()}},
                                       {"bigbird", {bigbird(2, 1, 2, 64)}},
                                       {"blocks", {blocks(64, 19, 5)}}};
  const std::vector<AttentionMath> kinds = kinds_of_math();
  unsigned n = 0;
  for (const Named& pattern : patterns)
    for (const auto layout : {SequenceLayout::contiguous, SequenceLayout::zigzag, SequenceLayout::balanced})
      for (const int ranks : {2, 4}) {
        const unsigned turn = n + n / 6;  // 6 cases a pattern: so that the next has others
        Case c = gpu_case(GetParam(), ranks);
        c.math = kinds[turn % kinds.size()];
        c.patterns = pattern.patterns;
        c.size = (turn + n / 3) % 2 == 0 ? 64 : 128;
        c.layout = layout;
        c.documents = (turn / 6 + turn) % 2 == 1;
        SCOPED_TRACE(fmt::format("{}, {} ranks, kind of math {}, head size {}, layout {}{}", pattern.name, ranks, turn % kinds.size(), c.size,
                                 name_of(layout), c.documents ? ", documents" : ""));
        check_with_self_edges(c, n++, kBf16);
      }
}

INSTANTIATE_TEST_SUITE_P(Exchanges, SharedCuda, ::testing::Values(SequenceExchange::needed, SequenceExchange::heads, SequenceExchange::ring),
                         [](const auto& info) { return name_of(info); });

// As with the bf16 of the CPU, but that weights are rounded too, and a ring's z may move some to the other side.
TEST(SharedCudaSums, AreRoundedOnce) {
  if (const std::string problem = cuda_problem(); !problem.empty()) GTEST_SKIP() << "no GPU: " << problem;
  for (const auto exchange : {SequenceExchange::needed, SequenceExchange::ring}) {
    Case c = gpu_case(exchange, 8);
    c.patterns = {any({global(64), window(70)})};
    c.tokens = 1024;
    c.size = 64;
    EXPECT_LT(roundings_of_dv(c, 64, 3), 1.2);
  }
}

}  // namespace
}  // namespace tessera::test
