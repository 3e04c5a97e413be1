// The predicted step, against closed forms.

#include "trainer/simulate.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "model/gpt.h"
#include "model/parameters.h"

namespace tessera {
namespace {

constexpr double kInfinite = std::numeric_limits<double>::infinity();
constexpr SequenceExchange kExchanges[] = {SequenceExchange::needed, SequenceExchange::ring, SequenceExchange::heads};
constexpr SequenceLayout kLayouts[] = {SequenceLayout::contiguous, SequenceLayout::zigzag, SequenceLayout::balanced};

Config config_of(std::vector<std::string> sets = {}) {
  std::vector<std::string> all = {"device=cuda",         "model.layers=3",        "model.heads=8",
                                  "model.width=512",     "model.vocabulary=1000", "model.context=4096",
                                  "train.micro_batch=2", "train.steps=10",        "train.tokens_per_step=65536"};
  all.insert(all.end(), sets.begin(), sets.end());
  return parse_config("{}", "test.yaml", all);
}

SequenceCosts costs_of(const Config& c, int ranks, SequenceLayout layout = SequenceLayout::contiguous) {
  return sequence_costs(c, make_layer_tiles(c.model, c.model.context), ranks, layout);
}

SimulatedStep step_of(const Config& c, int ranks, SequenceExchange exchange, const SimulatedCluster& cluster,
                      SequenceLayout layout = SequenceLayout::contiguous, const SimulatedRates& rates = {}) {
  return simulate_step(c, costs_of(c, ranks, layout), exchange, cluster, rates);
}

const SimulatedCluster kPerfect{.gpus = 16, .node_size = 8, .link_gbps = kInfinite, .node_gbps = kInfinite, .latency_us = 0};

// One GPU: 6 FLOPs a matrix parameter and token, a diagonal and what is below it in tiles, nothing else.
TEST(Simulate, OneGpuIsWorkAtItsRates) {
  const Config c = config_of();
  const SimulatedRates rates;
  const SimulatedStep step = step_of(c, 1, SequenceExchange::needed, {.gpus = 1});
  EXPECT_EQ(step.micro_batches, 8);
  EXPECT_EQ(step.tokens, 65536);
  const double matrices = 3 * 12 * 512.0 * 512 + 1024 * 512.0;  // the embedding's rows are padded to 1024
  EXPECT_EQ(c.model.vocabulary_padded, 1024);
  EXPECT_NEAR(step.dense, 65536 * 6 * matrices / 692e12 * 1e3, 1e-9);
  EXPECT_NEAR(step.other, 65536 * (3 * 512 * 13.7e-12 + 1024 * 1.03e-12) * 1e3, 1e-9);
  const double lists = 16 * 3 * 8 * 64, tiles = lists * 65 / 2;  // sequences, layers, heads, query tiles
  EXPECT_NEAR(step.attention, (tiles * (1.92 + 6.14) + lists * (9.2 + 22.0)) * 1e-6, 1e-9);
  EXPECT_NEAR(step.optimizer, static_cast<double>(make_parameter_layout(c.model).count) * 8.2e-9, 1e-9);
  EXPECT_EQ(step.exchange, 0);
  EXPECT_EQ(step.exchange_whole, 0);
  EXPECT_EQ(step.exchange_bytes, 0);
  EXPECT_EQ(step.gradients_whole, 0);
  EXPECT_EQ(step.gradients_bytes, 0);
}

TEST(Simulate, TheOutputGateIsAMatrixMoreALayer) {
  const auto dense = [](const char* gate) { return step_of(config_of({gate}), 1, SequenceExchange::needed, {.gpus = 1}).dense; };
  EXPECT_NEAR(dense("attention.output_gate=true") - dense("attention.output_gate=false"), 65536 * 6 * (3 * 512.0 * 512) / 692e12 * 1e3, 1e-9);
}

TEST(Simulate, PerfectLinksLeaveTheWork) {
  for (const char* pattern : {"attention.pattern=causal", "attention.pattern={window: {size: 500}}"}) {
    const Config c = config_of({pattern});
    const SimulatedStep alone = step_of(c, 1, SequenceExchange::needed, {.gpus = 1});
    for (auto exchange : kExchanges) {
      for (auto layout : kLayouts) {
        const SimulatedStep step = step_of(c, 8, exchange, kPerfect, layout);
        EXPECT_NEAR(step.exchange, 0, 1e-9);
        EXPECT_NEAR(step.gradients, 0, 1e-12);
        EXPECT_NEAR(step.optimizer, alone.optimizer / 16, 1e-12);
        EXPECT_GE(step.attention * 16, alone.attention * (1 - 1e-9));  // the rank that has most
      }
    }
    const SimulatedStep even = step_of(c, 8, SequenceExchange::heads, kPerfect);  // 64 blocks over 8 ranks, a head each
    EXPECT_NEAR(even.dense * 16, alone.dense, 1e-9);
    EXPECT_NEAR(even.attention * 16, alone.attention, 1e-9);
  }
}

// A causal sequence in neighbouring parts: the last rank has 15 of 64 parts' worth of pairs, twice what zigzag gives it.
TEST(Simulate, ZigzagBalancesCausal) {
  const Config c = config_of();
  const double tiles = 64 * 65 / 2, last = tiles - 56 * 57 / 2;
  SimulatedRates rates;
  rates.list_forward_ns = rates.list_backward_ns = 0;
  const double contiguous = step_of(c, 8, SequenceExchange::ring, kPerfect, SequenceLayout::contiguous, rates).attention;
  const double zigzag = step_of(c, 8, SequenceExchange::ring, kPerfect, SequenceLayout::zigzag, rates).attention;
  EXPECT_NEAR(contiguous / zigzag, last / (tiles / 8), 1e-9);
}

TEST(Simulate, BytesOfAWindowDoNotGrowWithTheContext) {
  const auto sent = [](const std::string& pattern, int context, SequenceExchange exchange) {
    const Config c = config_of({"attention.pattern=" + pattern, "train.micro_batch=1", "model.context=" + std::to_string(context)});
    const SimulatedStep step = step_of(c, 8, exchange, {.gpus = 8});
    return static_cast<double>(step.exchange_bytes) / static_cast<double>(step.micro_batches);
  };
  const std::string window = "{window: {size: 257}}";
  EXPECT_EQ(sent(window, 4096, SequenceExchange::needed), sent(window, 32768, SequenceExchange::needed));
  EXPECT_EQ(8 * sent(window, 4096, SequenceExchange::ring), sent(window, 32768, SequenceExchange::ring));
  EXPECT_EQ(8 * sent(window, 4096, SequenceExchange::heads), sent(window, 32768, SequenceExchange::heads));
  EXPECT_EQ(8 * sent("causal", 4096, SequenceExchange::needed), sent("causal", 32768, SequenceExchange::needed));
  // A rank in the middle: to the next, k and v of 256 keys forward and again backward; to the one before, dk and dv of as many.
  EXPECT_EQ(sent(window, 4096, SequenceExchange::needed), 3.0 * 256 * 2 * 512 * 2 * 3);  // layers, keys, k and v, width, bf16, messages
}

// Where links are slow and the work takes no time, the exchange is its bytes over the slowest link and its rounds of latency.
TEST(Simulate, SlowLinks) {
  const Config c = config_of({"train.micro_batch=1", "train.tokens_per_step=4096"});
  SimulatedRates rates;
  rates.tile_forward_ns = rates.list_forward_ns = rates.tile_backward_ns = rates.list_backward_ns = 0;
  const double part = 4096.0 / 8 * 512 * 2;  // bytes of one tensor's part
  const auto exchange = [&](SequenceExchange e, const SimulatedCluster& cluster) {
    return step_of(c, 8, e, cluster, SequenceLayout::contiguous, rates).exchange / 3;  // ms a layer
  };
  const auto ms = [](double bytes, double gbps) { return bytes * 8 / (gbps * 1e9) * 1e3; };
  const SimulatedCluster one{.gpus = 8, .node_size = 8, .link_gbps = 10, .node_gbps = kInfinite, .latency_us = 0};
  EXPECT_NEAR(exchange(SequenceExchange::ring, one), ms(2 * 7 * part + 2 * 7 * part + 2 * 8 * 2 * part, 10), 1e-9);  // fp32 sums are twice as wide
  EXPECT_NEAR(exchange(SequenceExchange::heads, one), ms(12 * part * 7 / 8, 10), 1e-9);
  // needed, causal: forward rank 0 sends its part to 7 and rank 7 receives 7; backward every rank sends and receives 7 pairs of tensors.
  EXPECT_NEAR(exchange(SequenceExchange::needed, one), ms(2 * 7 * part + 2 * 7 * part, 10), 1e-9);

  SimulatedCluster late = one;
  late.link_gbps = kInfinite;
  late.latency_us = 1000;
  EXPECT_NEAR(exchange(SequenceExchange::ring, late), 7 + 8, 1e-9);
  EXPECT_NEAR(exchange(SequenceExchange::heads, late), 4, 1e-9);
  EXPECT_NEAR(exchange(SequenceExchange::needed, late), 2, 1e-9);

  // Two nodes: 4 ranks on each side of the slow link, so heads sends 4 of its 7 messages over it.
  const SimulatedCluster two{.gpus = 8, .node_size = 4, .link_gbps = kInfinite, .node_gbps = 1, .latency_us = 0};
  EXPECT_NEAR(exchange(SequenceExchange::heads, two), ms(12 * part * 4 / 8, 1), 1e-9);
  EXPECT_NEAR(exchange(SequenceExchange::ring, two), ms(2 * 7 * part + 2 * 7 * part + 2 * 8 * 2 * part, 1), 1e-9);
}

// With a the kernels' time and c the messages', as simulate.h has it.
TEST(Simulate, Overlap) {
  const Config c = config_of({"train.micro_batch=1", "train.tokens_per_step=4096", "model.layers=1"});
  SimulatedRates rates;
  rates.list_forward_ns = rates.tile_backward_ns = rates.list_backward_ns = 0;
  const SimulatedCluster free{.gpus = 8, .node_size = 8, .link_gbps = kInfinite, .node_gbps = 1, .latency_us = 0};
  rates.tile_forward_ns = 1e6;
  const double a = step_of(c, 8, SequenceExchange::needed, free, SequenceLayout::contiguous, rates).attention;
  for (const double share : {0.1, 1.0, 7.0}) {  // c / a of the forward pass
    SimulatedCluster cluster = free;
    const double bytes = 2 * 7 * (4096.0 / 8 * 512 * 2);
    cluster.link_gbps = bytes * 8 / (share * a * 1e-3) / 1e9;
    const double t = share * a;                                        // ms forward
    const double needed_backward = t, ring_backward = t + t * 16 / 7;  // no work beside it
    EXPECT_NEAR(step_of(c, 8, SequenceExchange::needed, cluster, SequenceLayout::contiguous, rates).exchange - needed_backward,
                (a + t) / 4 + 3 * std::max(a, t) / 4 - a, 1e-9 * a);
    EXPECT_NEAR(step_of(c, 8, SequenceExchange::ring, cluster, SequenceLayout::contiguous, rates).exchange - ring_backward,
                a / 8 + 7 * std::max(a / 8, t / 7) - a, 1e-9 * a);
  }
  // Heads: 8 over 2 ranks are 4 turns, over 8 one, which nothing hides. Forward 4 tensors go.
  for (const double share : {0.1, 1.0, 7.0}) {
    for (const int ranks : {2, 8}) {
      SimulatedCluster cluster = free;
      cluster.gpus = ranks;
      const double kernels = step_of(c, ranks, SequenceExchange::heads, cluster, SequenceLayout::contiguous, rates).attention;
      const double bytes = 4 * (4096.0 / ranks * 512 * 2) * (ranks - 1) / ranks;
      cluster.link_gbps = bytes * 8 / (share * kernels * 1e-3) / 1e9;
      const double t = share * kernels, turns = ranks == 2 ? 4 : 1, backward = 2 * t;  // 8 tensors, no work beside them
      EXPECT_NEAR(step_of(c, ranks, SequenceExchange::heads, cluster, SequenceLayout::contiguous, rates).exchange - backward,
                  (kernels + t) / turns + (turns - 1) * std::max(kernels, t) / turns - kernels, 1e-9 * kernels * (1 + share));
    }
  }
}

TEST(Simulate, GradientsHideBehindThePasses) {
  const Config c = config_of();
  const double P = static_cast<double>(make_parameter_layout(c.model).count);
  const SimulatedCluster slow{.gpus = 16, .node_size = 8, .link_gbps = 1e9, .node_gbps = 1e-3, .latency_us = 0};
  const SimulatedStep step = step_of(c, 1, SequenceExchange::needed, slow);
  const double ms = 6 * P * 15 / 16 * 8 / (8 * 1e-3 * 1e9) * 1e3;  // a node's eight ports
  EXPECT_NEAR(step.gradients_whole, ms, 1e-9 * ms);
  const double passes = (step.dense + step.other + step.attention) / static_cast<double>(step.micro_batches);
  EXPECT_NEAR(step.gradients, ms - passes, 1e-9 * ms);
  EXPECT_NEAR(static_cast<double>(step.gradients_bytes), 6 * P * 15 / 16, 1);
  SimulatedCluster fast = slow;
  fast.node_gbps = 1e6;
  EXPECT_EQ(step_of(c, 1, SequenceExchange::needed, fast).gradients, 0);
}

// The forward pass of every block is made twice; the classifier's is not.
TEST(Simulate, RecomputingBlocks) {
  const SimulatedCluster cluster{.gpus = 8, .link_gbps = 10};
  const Config once = config_of(), twice = config_of({"train.recompute=block"});
  const SimulatedStep a = step_of(once, 8, SequenceExchange::heads, cluster), b = step_of(twice, 8, SequenceExchange::heads, cluster);
  EXPECT_NEAR((b.dense - a.dense) / a.dense, 3 * 12 * 512.0 / (3 * (3 * 12 * 512.0 + 1024)), 1e-9);
  const double forward = 1.92 * 65 / 2 + 9.2, backward = 6.14 * 65 / 2 + 22.0;  // a list
  EXPECT_NEAR(b.attention / a.attention, (2 * forward + backward) / (forward + backward), 1e-9);
  EXPECT_NEAR(static_cast<double>(b.exchange_bytes) / static_cast<double>(a.exchange_bytes), (2 * 4 + 8) / 12.0, 1e-9);
}

// The rates give back the kernel times in tests/bench/RESULTS.md ("Attention on one NVIDIA H200": 16 heads of 64, fwd and fwd+bwd ms), of which
// two made them.
TEST(Simulate, MeasuredKernelTimes) {
  const struct {
    const char* pattern;
    int batch, context;
    double forward, both;
  } measured[] = {{"causal", 16, 1024, 0.099, 0.394},
                  {"causal", 8, 2048, 0.163, 0.645},
                  {"causal", 4, 4096, 0.295, 1.164},
                  {"causal", 1, 16384, 1.042, 4.357},
                  {"{window: {size: 1024}}", 1, 16384, 0.171, 0.677},
                  {"{window: {size: 1024}}", 1, 65536, 0.681, 2.738},
                  {"{window: {size: 256}}", 1, 16384, 0.080, 0.295},
                  {"{window: {size: 256}}", 1, 65536, 0.308, 1.171}};
  for (const auto& m : measured) {
    SCOPED_TRACE(std::string(m.pattern) + " at " + std::to_string(m.context));
    const Config c = config_of({"model.layers=1", "model.heads=16", "model.width=1024", std::string("attention.pattern=") + m.pattern,
                                "model.context=" + std::to_string(m.context), "train.micro_batch=" + std::to_string(m.batch),
                                "train.tokens_per_step=" + std::to_string(m.context * m.batch)});
    constexpr double tolerance = 0.07;
    EXPECT_NEAR(step_of(c, 1, SequenceExchange::needed, {.gpus = 1}).attention / m.both, 1, tolerance);
    SimulatedRates forward;
    forward.tile_backward_ns = forward.list_backward_ns = 0;
    EXPECT_NEAR(step_of(c, 1, SequenceExchange::needed, {.gpus = 1}, SequenceLayout::contiguous, forward).attention / m.forward, 1, tolerance);
  }
}

TEST(Simulate, Report) {
  const Config c = config_of();
  const auto report = simulate(c, {1, 8, 16}, 0, {}, {});
  ASSERT_EQ(report["steps"].size(), 1u + 9 + 9);
  for (const auto& step : report["steps"]) {
    double sum = 0;
    for (const auto& [part, ms] : step["ms"].items()) sum += part == "step" ? 0 : ms.get<double>();
    EXPECT_NEAR(step["ms"]["step"].get<double>(), sum, 1e-9);
    EXPECT_NEAR(step["tokens_per_second"].get<double>(), step["tokens"].get<double>() / sum * 1e3, 1e-3);
    EXPECT_EQ(step["sequence"], step["gpus"] == 1 ? 1 : 8);
    EXPECT_EQ(step["layout"].is_null(), step["gpus"] == 1);
  }
  EXPECT_TRUE(report["left_out"].empty());
  for (const auto& a : report["assumptions"]) EXPECT_NE(a["source"], "given") << a;

  SimulatedRates rates;
  set_rate(rates, "gemm_tflops=500");
  const auto three = simulate(c, {6}, 3, {.latency_us = 7}, rates);
  EXPECT_EQ(three["steps"].size(), 6u);
  ASSERT_EQ(three["left_out"].size(), 3u);  // 3 ranks do not divide 8 heads
  EXPECT_EQ(three["left_out"][0]["exchange"], "heads");
  int given = 0;
  for (const auto& a : three["assumptions"]) given += a["source"] == "given";
  EXPECT_EQ(given, 2);
  EXPECT_EQ(simulate(c, {64}, 64, {}, rates)["left_out"][1]["layout"], "zigzag");  // 64 blocks make no 128 parts
}

TEST(Simulate, Errors) {
  const auto error = [](auto&& call) -> std::string {
    try {
      call();
    } catch (const ConfigError& e) {
      return e.what();
    }
    return "";
  };
  SimulatedRates rates;
  EXPECT_NE(error([&] { set_rate(rates, "gem_tflops=3"); }).find("nearest is gemm_tflops"), std::string::npos);
  EXPECT_NE(error([&] { set_rate(rates, "gemm_tflops"); }).find("NAME=VALUE"), std::string::npos);
  for (const char* bad : {"gemm_tflops=0", "gemm_tflops=", "gemm_tflops=nan", "gemm_tflops=3x", "other_ps=-1", "stages=0.5"})
    EXPECT_NE(error([&] { set_rate(rates, bad); }).find("expected a number"), std::string::npos) << bad;
  EXPECT_NE(error([] { simulate(config_of(), {12}, 8, {}, {}); }).find("multiple of 8, as 8 or 16"), std::string::npos);
  EXPECT_NE(error([] { simulate(parse_config("{}", "", {"model.vocabulary=300"}), {8}, 8, {}, {}); }).find("device: cuda"), std::string::npos);
}

}  // namespace
}  // namespace tessera
