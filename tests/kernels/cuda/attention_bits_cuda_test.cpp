// The CUDA attention against itself, bit by bit: skipped tiles, schedules, recorded calls, parts of the queries, repetition, large offsets.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>

#include "attention_run.h"

namespace tessera {
namespace {

using namespace cuda_test;

TEST(CudaAttention, SkippingChangesNoBit) {
  NEEDS_GPU();
  for (const auto path : paths())
    for (const std::int64_t D : {64, 128})
      for (const auto gate : {Gate::relu, Gate::relu2, Gate::relu4})
        for (const auto score : {Score::cosine, Score::fidelity, Score::dot})
          for (const bool documents : {false, true}) {
            AttentionMath math;
            math.gate = gate, math.score = score;
            // Thresholds near the largest score of a tile, so that some tiles are active and most are not.
            const double root = D == 64 ? 1.0 : 0.7;
            const double tau = score == Score::cosine ? 3.6 * root : score == Score::fidelity ? 0.2 * root * root : 3.5;
            const Problem p = make_problem({1, 3, 700, D}, math, {is_causal, strided, sinks}, documents, tau, 31);
            const Result active = run(p, path, Visit::active), all = run(p, path, Visit::all);
            const std::string what = describe(math, p.in.shape, path);
            expect_same_bits(active, all, what);
            std::uint64_t tiles = 0, visible = 0;
            for (int h = 0; h < 3; ++h)
              tiles += active.counters[h * kAttentionCounters + kActiveTiles], visible += active.counters[h * kAttentionCounters + kVisibleTiles];
            EXPECT_GT(tiles, 0u) << what << ": nothing to compare";
            EXPECT_LT(tiles, visible) << what << ": nothing was skipped";
          }
}

TEST(CudaAttention, SchedulesGiveTheSameBits) {
  NEEDS_GPU();
  // More bands than a GPU has multiprocessors, so that blocks take several: 4 x 16 heads x at least 4 bands. Empty bands, empty columns, documents.
  for (const auto path : paths())
    for (const std::int64_t D : {64, 128})
      for (const auto math : {AttentionMath{}, AttentionMath{.gate = Gate::softmax}, AttentionMath{.length_beta = 0.6f}})
        for (const bool documents : {false, true}) {
          const Problem p = make_problem({4, 16, 700, D}, math, {is_causal, holes, windowed, sinks}, documents, 0.8, 51);
          const auto tiles = upload_tiles_cuda(make_tiles(700, 16, p.patterns));
          const Result once = run(p, path, Visit::active, tiles.get(), CudaAttentionSchedule::block_a_band);
          const std::string what = describe(math, p.in.shape, path) + (documents ? " documents" : "");
          for (const auto visit : {Visit::active, Visit::all})
            expect_same_bits(once, run(p, path, visit, tiles.get(), CudaAttentionSchedule::persistent), what + (visit == Visit::all ? " all" : ""));
        }
}

TEST(CudaAttention, SchedulesGiveTheSameBitsOverSectionsOfHeads) {
  NEEDS_GPU();
  // 12 heads' keys and values fit the part of the L2 cache that is counted on: sections of 7 and 6 heads, and bands enough to fill them.
  const Problem p = make_problem({1, 13, 4096, 128}, {}, {windowed, is_causal}, false, 0.8, 53);
  const auto tiles = upload_tiles_cuda(make_tiles(4096, 13, p.patterns));
  for (const auto path : paths())
    expect_same_bits(run(p, path, Visit::active, tiles.get(), CudaAttentionSchedule::block_a_band),
                     run(p, path, Visit::active, tiles.get(), CudaAttentionSchedule::persistent), describe(p.in.math, p.in.shape, path));
}

// The first keys' list is all queries, while a query's is short: dq, which starts before dk, dv ends, is done long before.
TEST(CudaAttention, WhatFollowsWaitsForTheLongestList) {
  NEEDS_GPU();
  const Problem p = make_problem({1, 1, 8192, 64}, {}, {[](std::int64_t i, std::int64_t j) { return j < 64 || i - j < 8; }}, false, 0.1, 54);
  const auto tiles = upload_tiles_cuda(make_tiles(8192, 1, p.patterns));
  for (const auto path : paths())
    for (const bool recorded : {false, true}) run(p, path, Visit::all, tiles.get(), CudaAttentionSchedule::automatic, recorded);
}

TEST(CudaAttention, ARecordedCallGivesTheSameBits) {
  NEEDS_GPU();
  for (const auto path : paths())
    for (const std::int64_t D : {64, 128})
      for (const auto schedule : {CudaAttentionSchedule::block_a_band, CudaAttentionSchedule::persistent}) {
        const Problem p = make_problem({4, 16, 700, D}, {}, {is_causal, holes, windowed, sinks}, true, 0.8, 52);
        const auto tiles = upload_tiles_cuda(make_tiles(700, 16, p.patterns));
        expect_same_bits(run(p, path, Visit::active, tiles.get(), schedule), run(p, path, Visit::active, tiles.get(), schedule, true),
                         describe(p.in.math, p.in.shape, path));
      }
}

TEST(CudaAttention, SomeQueriesOverTheKeysTheySeeGiveTheBitsOfTheWhole) {
  NEEDS_GPU();
  // 11 query tiles dealt to two ranks, each with a compact buffer of the key tiles that its queries touch.
  const std::vector<std::vector<int>> ranks = {{0, 3, 4, 7, 10}, {1, 2, 5, 6, 8, 9}};
  for (const auto path : paths())
    for (const std::int64_t D : {64, 128})
      for (const auto math : {AttentionMath{}, AttentionMath{.normalizer = Normalizer::length}, AttentionMath{.gate = Gate::softmax},
                              AttentionMath{.length_beta = 0.6f}, AttentionMath{.score = Score::fidelity}})
        for (const bool documents : {false, true}) {
          const std::int64_t B = 2, H = 3, T = 690;
          const double tau = math.score == Score::fidelity ? 0.02 : 0.8;
          const Problem p = make_problem({B, H, T, D}, math, {windowed, sinks, holes}, documents, tau, 61);
          const Result whole = run(p, path, Visit::active);
          const auto map = make_tiles(T, H, p.patterns);
          std::vector<double> dk(B * H * T * D), dv(B * H * T * D);
          std::vector<std::uint64_t> counters(H * kAttentionCounters);
          const std::string what = describe(math, p.in.shape, path) + (documents ? " documents" : "");
          for (const auto& queries : ranks) {
            std::vector<int> keys;
            for (int b = 0; b < map->key_tiles; ++b) {
              bool seen = false;
              for (const TileGroup& g : map->groups)
                for (const int a : queries)
                  for (std::int64_t n = g.query_offsets[a]; n < g.query_offsets[a + 1]; ++n) seen |= g.query_entries[n].tile == b;
              if (seen) keys.push_back(b);
            }
            const auto tokens_of = [&](const std::vector<int>& tiles) {
              std::vector<std::int64_t> t;
              for (const int tile : tiles)
                for (std::int64_t n = 64 * tile; n < std::min<std::int64_t>(T, 64 * tile + 64); ++n) t.push_back(n);
              return t;
            };
            const auto mine = tokens_of(queries), theirs = tokens_of(keys);
            const auto rows_of = [&](const std::vector<double>& from, const std::vector<std::int64_t>& tokens) {
              std::vector<double> to;
              for (std::int64_t bh = 0; bh < B * H; ++bh)
                for (const auto t : tokens) to.insert(to.end(), &from[(bh * T + t) * D], &from[(bh * T + t) * D] + D);
              return rounded(to);
            };
            const AttentionShape s{B, H, static_cast<std::int64_t>(mine.size()), D}, ks{B, H, static_cast<std::int64_t>(theirs.size()), D};
            const std::int64_t n = s.tokens, m = ks.tokens, words = bitmap_words((m + 63) / 64), tiles = (n + 63) / 64;
            Device<Bf16> q(rows_of(p.in.q, mine)), k(rows_of(p.in.k, theirs)), v(rows_of(p.in.v, theirs)), d_o(rows_of(p.d_o, mine));
            Device<Bf16> o(B * H * n * D), dq(B * H * n * D), d_k(B * H * m * D), d_v(B * H * m * D);
            Device<float> scale(std::vector<float>(p.in.scale.begin(), p.in.scale.end())),
                threshold(std::vector<float>(p.in.tau.begin(), p.in.tau.end())),
                balance(std::vector<float>(p.in.balance.begin(), p.in.balance.end()));
            Device<float> z(B * H * n), work(attention_backward_workspace(s, 64));
            Device<std::uint32_t> bits(B * H * tiles * words);
            Device<std::uint64_t> count(std::vector<std::uint64_t>(H * kAttentionCounters, 0));
            std::vector<std::int32_t> starts, positions(mine.begin(), mine.end());
            for (std::int64_t b = 0; b < B && documents; ++b)
              for (const auto t : mine)
                starts.push_back(
                    static_cast<std::int32_t>(std::lower_bound(theirs.begin(), theirs.end(), p.document_start[b * T + t]) - theirs.begin()));
            Device<std::int32_t> document_start(starts), position(positions);
            const auto lists = upload_tiles_cuda(part_of(*map, queries, keys));
            AttentionForward f;
            f.shape = s, f.keys = m, f.math = math, f.tiles = lists.get();
            f.q = packed(q.get(), s), f.k = packed(k.get(), ks), f.v = packed(v.get(), ks), f.o = packed(o.get(), s);
            f.scale = {scale.get(), DType::f32, {H}}, f.threshold = {threshold.get(), DType::f32, {H}};
            if (documents) f.document_start = {document_start.get(), DType::i32, {B, n}};
            f.positions = {position.get(), DType::i32, {n}};
            f.z = {z.get(), DType::f32, {B, H, n}}, f.active_tiles = {bits.get(), DType::u32, {B, H, tiles, words}};
            f.counters = {count.get(), DType::u64, {H, kAttentionCounters}};
            AttentionBackward g;
            g.forward = f, g.d_o = packed(d_o.get(), s), g.dq = packed(dq.get(), s), g.dk = packed(d_k.get(), ks), g.dv = packed(d_v.get(), ks);
            if (!p.in.balance.empty()) g.balance = {balance.get(), DType::f32, {H}};
            g.workspace = {work.get(), DType::f32, {static_cast<std::int64_t>(work.size())}};
            cuda_attention_forward(f, nullptr, {path});
            cuda_attention_backward(g, nullptr, {path});
            TESSERA_CUDA_CHECK(cudaDeviceSynchronize());
            const auto o_host = o.host(), dq_host = dq.host(), dk_host = d_k.host(), dv_host = d_v.host();
            const auto z_host = z.host();
            for (std::int64_t bh = 0; bh < B * H; ++bh) {
              for (std::int64_t i = 0; i < n; ++i) {
                const std::int64_t here = (bh * n + i) * D, there = (bh * T + mine[i]) * D;
                ASSERT_EQ(std::memcmp(&o_host[here], &whole.o[there], D * sizeof(Bf16)), 0) << what << " o of token " << mine[i];
                ASSERT_EQ(std::memcmp(&dq_host[here], &whole.dq[there], D * sizeof(Bf16)), 0) << what << " dq of token " << mine[i];
                ASSERT_EQ(z_host[bh * n + i], whole.z[bh * T + mine[i]]) << what << " z of token " << mine[i];
              }
              for (std::int64_t j = 0; j < m; ++j)
                for (std::int64_t d = 0; d < D; ++d) {
                  dk[(bh * T + theirs[j]) * D + d] += __bfloat162float(dk_host[(bh * m + j) * D + d]);
                  dv[(bh * T + theirs[j]) * D + d] += __bfloat162float(dv_host[(bh * m + j) * D + d]);
                }
            }
            const auto c = count.host();
            for (std::size_t x = 0; x < c.size(); ++x) counters[x] += c[x];
          }
          EXPECT_EQ(counters, whole.counters) << what;
          double largest[2] = {0, 0};
          for (std::size_t x = 0; x < dk.size(); ++x)
            largest[0] = std::max(largest[0], std::abs(dk[x])), largest[1] = std::max(largest[1], std::abs(dv[x]));
          for (std::size_t x = 0; x < dk.size(); ++x) {  // two ranks' sums and the whole: each was rounded to bf16 once
            ASSERT_NEAR(dk[x], __bfloat162float(whole.dk[x]), 3.0 / 256 * largest[0]) << what << " dk " << x;
            ASSERT_NEAR(dv[x], __bfloat162float(whole.dv[x]), 3.0 / 256 * largest[1]) << what << " dv " << x;
          }
        }
}

TEST(CudaAttention, TenRunsGiveTheSameBits) {
  NEEDS_GPU();
  for (const auto path : paths())
    for (const std::int64_t D : {64, 128}) {
      const Problem p = make_problem({2, 3, 900, D}, {}, {is_causal, strided}, true, 1.5, 11);
      const auto tiles = upload_tiles_cuda(make_tiles(900, 3, p.patterns));
      const Result first = run(p, path, Visit::active, tiles.get());
      for (int n = 1; n < 10; ++n)
        expect_same_bits(first, run(p, path, Visit::active, tiles.get()), std::string(name_of(path)) + " run " + std::to_string(n));
    }
}

TEST(CudaAttention, OffsetsBeyondTwoToThe31) {
  NEEDS_GPU();
  // The last sequence of a batch of three in packed [B, T, 3, H, D] (2.4e9 elements), against the same sequence alone.
  const std::int64_t B = 3, H = 16, T = 131072, D = 128, token = 3 * H * D;
  std::size_t free = 0, total = 0;
  TESSERA_CUDA_CHECK(cudaMemGetInfo(&free, &total));
  if (free < (std::size_t{24} << 30)) GTEST_SKIP() << "needs 24 GiB of free GPU memory, has " << (free >> 30);
  const AttentionShape all{B, H, T, D}, one{1, H, T, D};
  const auto tiles = upload_tiles_cuda(make_window_tiles(T, H, 128));
  std::vector<Bf16> sequence(T * token);
  std::uint32_t state = 1;
  for (auto& x : sequence) x = __float2bfloat16_rn((static_cast<float>((state = state * 1664525u + 1013904223u) >> 8) / (1 << 23) - 1.f) * 0.15f);
  Device<Bf16> qkv(B * T * token), gradient(B * T * token), o(B * H * T * D), d_o(B * H * T * D);
  TESSERA_CUDA_CHECK(cudaMemset(qkv.get(), 0, qkv.size() * 2));
  TESSERA_CUDA_CHECK(cudaMemset(d_o.get(), 0, d_o.size() * 2));
  TESSERA_CUDA_CHECK(cudaMemcpy(qkv.get() + 2 * T * token, sequence.data(), sequence.size() * 2, cudaMemcpyHostToDevice));
  TESSERA_CUDA_CHECK(cudaMemcpy(d_o.get() + 2 * H * T * D, sequence.data(), H * T * D * 2, cudaMemcpyHostToDevice));
  const std::int64_t n = T / 64;
  Device<float> scale(std::vector<float>(H, 8.f)), tau(std::vector<float>(H, 0.1f)), z(B * H * T), work(attention_backward_workspace(all, 64));
  Device<std::uint32_t> bits(B * H * n * bitmap_words(n));
  const auto results = [&](const AttentionShape& s, Bf16* q, Bf16* out, Bf16* grad_out, Bf16* grad) {
    const auto part = [&](Bf16* p, int which) { return HeadsView{p + which * H * D, DType::bf16, T * token, D, token}; };
    AttentionForward f;
    f.shape = s, f.tiles = tiles.get();
    f.q = part(q, 0), f.k = part(q, 1), f.v = part(q, 2), f.o = packed(out, s);
    f.scale = {scale.get(), DType::f32, {H}}, f.threshold = {tau.get(), DType::f32, {H}}, f.z = {z.get(), DType::f32, {B, H, T}};
    f.active_tiles = {bits.get(), DType::u32, {static_cast<std::int64_t>(bits.size())}};
    AttentionBackward g;
    g.forward = f, g.d_o = packed(grad_out, s), g.dq = part(grad, 0), g.dk = part(grad, 1), g.dv = part(grad, 2);
    g.workspace = {work.get(), DType::f32, {static_cast<std::int64_t>(work.size())}};
    cuda_attention_forward(f, nullptr);
    cuda_attention_backward(g, nullptr);
    TESSERA_CUDA_CHECK(cudaDeviceSynchronize());
  };
  const auto last = [&](const Device<Bf16>& from, std::int64_t at, std::int64_t count) {
    std::vector<Bf16> v(count);
    TESSERA_CUDA_CHECK(cudaMemcpy(v.data(), from.get() + at, count * 2, cudaMemcpyDeviceToHost));
    return v;
  };
  results(all, qkv.get(), o.get(), d_o.get(), gradient.get());
  const auto o_all = last(o, 2 * H * T * D, H * T * D), g_all = last(gradient, 2 * T * token, T * token);
  o.poison(), gradient.poison();
  results(one, qkv.get() + 2 * T * token, o.get(), d_o.get() + 2 * H * T * D, gradient.get());
  EXPECT_TRUE(same_bits(o_all, last(o, 0, H * T * D)));
  EXPECT_TRUE(same_bits(g_all, last(gradient, 0, T * token)));
  double sum = 0;
  for (const Bf16 x : o_all) sum += std::abs(__bfloat162float(x));
  EXPECT_GT(sum, 0);
}

}  // namespace
}  // namespace tessera
