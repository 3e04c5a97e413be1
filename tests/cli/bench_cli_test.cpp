// tessera bench: what its reports say must follow from one another, on the CPU and on a GPU.

#include <gtest/gtest.h>

#include <cstdlib>
#include <nlohmann/json.hpp>
#include <string>

#include "tests/cli/gpu.h"
#include "tests/cli/run_tessera.h"

namespace tessera {
namespace {

using Json = nlohmann::json;

Json json_of(const std::string& arguments) {
  const Outcome outcome = run_tessera(arguments + " --json");
  EXPECT_EQ(outcome.code, 0) << outcome.err;
  return outcome.code == 0 ? Json::parse(outcome.out) : Json();
}

bool has(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

const std::string kSmall =
    " --set model.layers=2 --set model.width=128 --set model.heads=2 --set model.context=128 --set train.micro_batch=2 --set "
    "train.tokens_per_step=1024";

/// A report of `bench step` on the small model: two layers of two heads of 64, four micro-batches a step.
void expect_consistent(const Json& r, const std::string& device) {
  ASSERT_TRUE(r.is_object());
  const auto number = [&](const char* key) { return r.at(key).get<double>(); };
  EXPECT_EQ(r["tokens_per_step"], 1024);
  EXPECT_EQ(r["micro_batch_tokens"], 256);
  EXPECT_EQ(r["micro_batches"], 4);
  EXPECT_NEAR(number("tokens_per_s"), 1024 / number("step_ms") * 1e3, 1e-6 * number("tokens_per_s"));
  if (r["steps_measured"] == 0) {
    EXPECT_NEAR(number("step_ms"), 4 * number("micro_batch_ms") + number("update_ms"), 1e-9 * number("step_ms"));
  }
  EXPECT_GT(number("forward_ms"), 0);
  EXPECT_GT(number("gemm_gflops"), 0);
  EXPECT_GT(number("copy_gbytes"), 0);
  EXPECT_NEAR(number("share_of_gemm"), number("gflops") / number("gemm_gflops"), 1e-9);
  // 6 FLOPs a token for each parameter of a matrix product, 12 x width for each of the (T + 1) / 2 keys that a query sees, in both layers.
  const double dense = 6 * (2 * 12 * 128 * 128 + 128 * 4096) + 2 * 12 * 128 * 64.5;
  EXPECT_NEAR(number("gflops_dense_equivalent"), number("tokens_per_s") * dense / 1e9, 1e-3 * number("gflops_dense_equivalent"));
  EXPECT_LE(number("gflops"), number("gflops_dense_equivalent"));
  EXPECT_GE(number("edge_sparsity"), number("tile_skip_rate"));
  // The plan that a run would make.
  const Json plan = json_of("plan " TESSERA_CONFIGS "/tiny.yaml --set model.vocabulary=4096 --set data.path= --set attention.tile.query=64" + kSmall +
                            " --set attention.tile.key=64 --set device=" + device);
  ASSERT_TRUE(plan.is_object());
  EXPECT_EQ(r["planned_bytes"], plan["bytes_per_rank"]["total"]);
  EXPECT_EQ(r["parameters"], plan["parameters"]);
}

TEST(BenchCommand, StepReportsItsParts) {
  const Json r = json_of("bench step --seconds 0.01 --set run.peak_tflops=2" + kSmall);
  expect_consistent(r, "cpu");
  EXPECT_EQ(r["steps_measured"], 0);
  EXPECT_EQ(r["type"], "f32");
  EXPECT_EQ(r["tile_skip_rate"], 0.0);
  EXPECT_NEAR(r["edge_sparsity"].get<double>(), 0.5, 0.1);  // an untrained model's scores are around 0, where the thresholds are
  ASSERT_TRUE(r.contains("mfu"));
  EXPECT_NEAR(r["mfu"].get<double>(), r["gflops"].get<double>() / 2000, 1e-12);
  EXPECT_FALSE(r.contains("used_bytes"));
}

TEST(BenchCommand, StepTimesWholeSteps) {
  // Scores are at most scale_init = 8: nothing passes a threshold of 9.
  const Json r = json_of("bench step --seconds 0.01 --steps 3 --set attention.threshold.init=9" + kSmall);
  expect_consistent(r, "cpu");
  EXPECT_GE(r["steps_measured"].get<int>(), 3);
  EXPECT_EQ(r["edge_sparsity"], 1.0);
  EXPECT_EQ(r["tile_skip_rate"], 1.0);
  EXPECT_FALSE(r.contains("mfu"));  // of a device whose peak nobody said
  EXPECT_EQ(r["recorded"], false);  // there are no CUDA graphs on a processor
  const Outcome text = run_tessera("bench step --seconds 0.01 --steps 3 --no-graph" + kSmall);
  EXPECT_EQ(text.code, 0) << text.err;
  EXPECT_TRUE(has(text.out, "whole steps")) << text.out;
}

TEST(BenchCommand, AttentionReportsTilesTimesAndEqualBits) {
  const Json r = json_of("bench attention --tokens 256 --heads 2 --head-size 32 --tile 32x16 --active-share 0.25 --seconds 0.001");
  ASSERT_TRUE(r.is_object());
  EXPECT_EQ(r["same_bits"], true);
  EXPECT_EQ(r["visible_tiles"], 144);
  EXPECT_NEAR(r["active_tile_share"].get<double>(), 0.25, 0.1);
}

TEST(BenchCommand, AWrongOptionOfAttentionIsNamed) {
  const auto error = [](const std::string& options) {
    const Outcome outcome = run_tessera("bench attention " + options);
    EXPECT_EQ(outcome.code, 2) << options;
    return outcome.err;
  };
  EXPECT_EQ(error("--gate tanh"),
            "tessera: error: --gate: attention.gate: expected relu | relu2 | relu4 | softmax, found tanh; nearest is \"relu\"\n");
  EXPECT_TRUE(error("--device abacus").starts_with("tessera: error: --device: abacus not in {cpu,cuda}"));
  EXPECT_TRUE(has(error("--head-size 12"), "--head-size: expected a multiple of 8, found 12"));
  EXPECT_TRUE(has(error("--tile 64x12"), "--tile: attention.tile.key: expected an integer a multiple of 8"));
  EXPECT_TRUE(has(error("--pattern '{window: {size: 0}}'"), "--pattern: attention.pattern.window.size: expected an integer >= 1"));
  EXPECT_TRUE(has(error("--pattern '{window: '"), "--pattern: attention.pattern: the value is not YAML"));
  EXPECT_TRUE(has(error("--device cuda --head-size 96"), "--head-size: model.heads: "));
  EXPECT_TRUE(has(error("--device cuda --tile 32"), "--tile: attention.tile.query: device cuda computes tiles of 64 x 64"));
}

TEST(BenchCommand, GemmReportsEveryLayer) {
  const Json r = json_of("bench gemm --tokens 64 --width 32 --vocabulary 128 --seconds 0.001");
  ASSERT_TRUE(r.is_object());
  ASSERT_EQ(r["layers"].size(), 5u);
  for (const auto& layer : r["layers"])
    for (const char* key : {"forward_gflops", "input_gradient_gflops", "weight_gradient_gflops"}) EXPECT_GT(layer[key].get<double>(), 0) << layer;
}

#if defined(__x86_64__)
// OpenBLAS reads the variable as it is loaded: Prescott is what it takes for a processor that it does not know.
TEST(BenchCommand, NamesFasterKernelsWhereOpenBlasDoesNotKnowTheProcessor) {
  const char* set = std::getenv("OPENBLAS_CORETYPE");
  const std::string before = set ? set : "";
  const auto device = [](const char* core) {
    setenv("OPENBLAS_CORETYPE", core, 1);
    return json_of("bench gemm --tokens 64 --width 32 --vocabulary 128 --seconds 0.001").value("device", "");
  };
  const bool wide = __builtin_cpu_supports("avx2");
  EXPECT_EQ(has(device("Prescott"), "faster with OPENBLAS_CORETYPE="), wide) << device("Prescott");
  if (wide) {
    EXPECT_FALSE(has(device("Haswell"), "faster with")) << device("Haswell");
  }
  set ? setenv("OPENBLAS_CORETYPE", before.c_str(), 1) : unsetenv("OPENBLAS_CORETYPE");
}
#endif

TEST(BenchCommand, GenerateReportsSpeedsBesideTheirLimit) {
  const std::string options =
      "bench generate --seconds 0.001 --prompt 40 --tokens 8 --batch 3 --set 'attention.pattern={window: {size: 16}}'" + kSmall;
  const Json r = json_of(options);
  ASSERT_TRUE(r.is_object());
  const auto number = [&](const char* key) { return r.at(key).get<double>(); };
  EXPECT_NEAR(number("decode_tokens_per_s"), 3e3 / number("decode_ms"), 1e-6 * number("decode_tokens_per_s"));
  EXPECT_NEAR(number("speedup"), number("decode_tokens_per_s") / number("recompute_tokens_per_s"), 1e-6 * number("speedup"));
  EXPECT_EQ(number("weight_bytes"), 4 * number("parameters"));
  EXPECT_EQ(number("cache_bytes_per_sequence"), 2.0 * 2 * 16 * 128 * 4);  // layers, keys and values, the window, width, fp32
  EXPECT_NEAR(number("speed_of_light_tokens_per_s"),
              3 * number("memory_gbytes") * 1e9 / (number("weight_bytes") + 3 * number("cache_bytes_per_sequence")),
              1e-6 * number("speed_of_light_tokens_per_s"));
  const Outcome text = run_tessera(options);
  EXPECT_TRUE(has(text.out, "speed of light")) << text.out << text.err;
  EXPECT_EQ(text.err, "");
  EXPECT_EQ(r.at("batch_invariant"), false) << "a promise of GPUs alone";
  EXPECT_EQ(run_tessera(options + " --fast").err, "tessera: note: --fast has no effect on the CPU, which has one way to decode\n");
  EXPECT_EQ(run_tessera("bench generate --prompt 500 --tokens 13").code, 2);  // beyond the context of 512
  EXPECT_EQ(run_tessera("bench generate --batch 17").code, 2);
}

TEST(BenchCommand, NumbersOutOfRangeAreTwo) {
  for (const char* arguments : {"gemm --seconds nan", "gemm --seconds 0", "gemm --seconds fast", "step --seconds inf", "data --seconds nan",
                                "attention --active-share nan", "attention --active-share 1.1"}) {
    const Outcome outcome = run_tessera(std::string("bench ") + arguments);
    EXPECT_EQ(outcome.code, 2) << arguments << outcome.out;
    EXPECT_TRUE(has(outcome.err, "expected a number from ")) << outcome.err;
  }
}

TEST(BenchCommand, AFlagTakesNoValue) { EXPECT_EQ(run_tessera("bench step --no-graph=perhaps").code, 2); }

TEST(BenchCommand, ProductsThatTheGpuDoesNotComputeAreTwo) {
  for (const char* size : {"--width 30", "--vocabulary 100"}) {
    const Outcome outcome = run_tessera(std::string("bench gemm --device cuda ") + size);
    EXPECT_EQ(outcome.code, 2);
    EXPECT_TRUE(has(outcome.err, "multiples of 8")) << outcome.err;
  }
}

TEST(BenchCommand, ADeviceThatCannotBeUsedIsTwo) {
  if (no_gpu().empty()) GTEST_SKIP() << "there is a GPU";
  for (const std::string what : {"step", "gemm", "attention"}) {
    const Outcome outcome = run_tessera("bench " + what + " --device cuda");
    EXPECT_EQ(outcome.code, 2) << what;
    EXPECT_TRUE(outcome.err.starts_with("tessera: error: device cuda: ")) << outcome.err;
    EXPECT_TRUE(outcome.err.ends_with("; or use device cpu\n")) << outcome.err;
    EXPECT_EQ(outcome.out, "");
  }
  const Outcome profile = run_tessera("bench step --profile");
  EXPECT_EQ(profile.code, 2);
  EXPECT_TRUE(has(profile.err, "--device cuda")) << profile.err;
}

TEST(BenchCommand, WhatTheGpuDoesNotComputeIsTwo) {
  for (const std::string options : {"--head-size 32", "--tile 32", "--tile 64x128"}) {
    const Outcome outcome = run_tessera("bench attention --device cuda " + options);
    EXPECT_EQ(outcome.code, 2) << options;
    EXPECT_TRUE(has(outcome.err, "device cuda")) << outcome.err;
    EXPECT_TRUE(has(outcome.err, "expected")) << outcome.err;
  }
}

TEST(BenchCommand, OnAGpu) {
  TESSERA_NEEDS_GPU();
  const Json step = json_of("bench step --device cuda --seconds 0.05 --steps 3" + kSmall);
  expect_consistent(step, "cuda");
  EXPECT_EQ(step["type"], "bf16");
  EXPECT_GT(step["used_bytes"].get<double>(), 0);
  EXPECT_GT(step["copy_gbytes"].get<double>(), 100);  // any GPU with bf16 does better
  EXPECT_GT(step["gemm_gflops"].get<double>(), 10000);
  if (step.contains("mfu")) {
    EXPECT_GT(step["mfu"].get<double>(), 0);
    EXPECT_LT(step["mfu"].get<double>(), 1);
  }
  EXPECT_EQ(step["recorded"], true);
  const Json calls = json_of("bench step --device cuda --seconds 0.05 --steps 3 --no-graph" + kSmall);
  expect_consistent(calls, "cuda");
  EXPECT_EQ(calls["recorded"], false);
  const Json attention = json_of("bench attention --device cuda --tokens 4096 --heads 4 --active-share 0.1 --seconds 0.01");
  ASSERT_TRUE(attention.is_object());
  EXPECT_EQ(attention["same_bits"], true);
  EXPECT_EQ(attention["visible_tiles"], 4 * 64 * 65 / 2);
  EXPECT_NEAR(attention["active_tile_share"].get<double>(), 0.1, 0.05);
  const Json gemm = json_of("bench gemm --device cuda --tokens 1024 --width 512 --vocabulary 4096 --seconds 0.01");
  ASSERT_TRUE(gemm.is_object());
  EXPECT_EQ(gemm["type"], "bf16");
  EXPECT_EQ(run_tessera("bench step --device cuda --profile" + kSmall).code, 0);
}

}  // namespace
}  // namespace tessera
