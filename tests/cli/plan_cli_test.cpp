// tessera plan --sequence and --simulate.

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <string>

#include "tests/cli/expect_usage_error.h"
#include "tests/cli/run_tessera.h"

namespace tessera {
namespace {

using Json = nlohmann::json;

const std::string kTiny = "plan " TESSERA_CONFIGS "/tiny.yaml";  // 2 layers, 2 heads of 16, 64 tokens in tiles of 16, micro-batches of 2, fp32
const std::string kLong = "plan " TESSERA_CONFIGS "/long-context.yaml --set data.path= --set data.tokenizer=gpt2 --set train.micro_batch=1";

Json json_of(const std::string& arguments) {
  const Outcome outcome = run_tessera(arguments + " --json");
  EXPECT_EQ(outcome.code, 0) << outcome.err;
  return Json::parse(outcome.out);
}

TEST(PlanSequence, BytesOfEachExchange) {
  const Json plan = json_of(kTiny + " --sequence 2 --ranks 4 --set parallel.layout=contiguous")["sequence"];
  EXPECT_EQ(plan["layout"], "contiguous");
  EXPECT_EQ(plan["exchange"], "needed");
  const std::int64_t part = 32 * 2 * 16 * 4 * 2;                 // bytes of one tensor: tokens, heads, size, fp32, sequences
  EXPECT_EQ(plan["bytes"]["needed"], 2 * (2 + 4) * part);        // layers; k, v forward; k, v and dk, dv backward, of one part
  EXPECT_EQ(plan["bytes"]["ring"], 2 * (2 * 4 + 4 * 2) * part);  // both parts there, k and v twice; sums of two tensors two hops
  EXPECT_EQ(plan["bytes"]["heads"], 2 * 12 * part);              // half of both parts, twelve tensors
  ASSERT_EQ(plan["layers"].size(), 1u);
  EXPECT_EQ(plan["layers"][0]["layers"], Json({0, 1}));
  const Json& last = plan["layers"][0]["ranks"][1];
  EXPECT_EQ(last["visible_tiles"], 2 * 2 * (3 + 4));
  EXPECT_EQ(last["keys"], 64);
  EXPECT_EQ(last["needed"]["forward_received"], 2 * part);
  EXPECT_EQ(last["needed"]["forward_sent"], 0);
  EXPECT_EQ(last["needed"]["backward_received"], 2 * part);
  EXPECT_EQ(last["needed"]["backward_sent"], 2 * part);
}

TEST(PlanSequence, TextForPeople) {
  const Outcome outcome = run_tessera(kTiny + " --sequence 4 --set parallel.layout=contiguous");
  ASSERT_EQ(outcome.code, 0) << outcome.err;
  for (const char* part : {"a sequence of 64 tokens over 4 ranks, layout contiguous, blocks of 16 tokens; exchange needed, which moves fewest bytes",
                           "visible tiles", "needed sent", "ring sent", "0-1", "heads not possible (4 ranks do not divide 2 heads)"})
    EXPECT_TRUE(has(outcome.out, part)) << part << "\n" << outcome.out;
  const Outcome self = run_tessera(kTiny + " --sequence 2 --set attention.always.self=true");
  EXPECT_TRUE(has(self.out, "heads not possible (attention.always.self or attention.always.sinks is set)")) << self.out << self.err;
}

TEST(PlanSequence, LayersWithOtherPatternsAreApart) {
  const Json plan = json_of(kLong + " --sequence 4 --set model.context=8192")["sequence"];
  ASSERT_EQ(plan["layers"].size(), 2u);
  EXPECT_EQ(plan["layers"][1]["layers"], Json({3, 7, 11, 15, 19, 23}));
  EXPECT_EQ(plan["element_bytes"], 2);
}

TEST(PlanSequence, Errors) {
  expect_usage_error(run_tessera(kTiny + " --sequence 5"), "5 ranks", "at most 4 ranks");
  expect_usage_error(run_tessera(kTiny + " --sequence 0"), "--sequence");
  expect_usage_error(run_tessera(kTiny + " --sequence 2 --ranks 3"), "--ranks 3: 2 ranks share a sequence; expected a multiple of 2");
  expect_usage_error(run_tessera(kTiny + " --sequence 4 --set parallel.exchange=heads"), "2 heads", "1, 2 ranks");
  expect_usage_error(run_tessera(kTiny + " --set parallel.exchange=rings"), "parallel.exchange", "needed");
  expect_usage_error(run_tessera(kTiny + " --gpus 8"), "--gpus", "--simulate");
}

TEST(PlanSimulate, TableAndJson) {
  const std::string simulate = kLong + " --simulate --gpus 8,16 --context 8192 --link-gbps 3000 --rate gemm_tflops=600";
  const Json plan = json_of(simulate);
  EXPECT_EQ(plan["context"], 8192);
  EXPECT_EQ(plan["steps"].size(), 18u);
  for (const Json& a : plan["assumptions"]) EXPECT_EQ(a["source"] == "given", a["name"] == "link_gbps" || a["name"] == "gemm_tflops") << a;
  const Outcome text = run_tessera(simulate);
  for (const char* part : {"predicted, not measured", "gemm_tflops", "given", "tokens/s", "zigzag", "ring"})
    EXPECT_TRUE(has(text.out, part)) << part << "\n" << text.out;
}

TEST(PlanSimulate, Errors) {
  const std::string simulate = kLong + " --simulate --context 8192";
  expect_usage_error(run_tessera(simulate + " --ranks 2"), "--ranks");
  expect_usage_error(run_tessera(simulate + " --gpus 8,x"), "--gpus");
  for (const char* numbers : {"8,,64", ",8", "8,", "'8 64'", "0", "8,2000000", "''"})
    expect_usage_error(run_tessera(simulate + " --gpus " + numbers), "--gpus ", "whole numbers from 1 to 1048576");
  const Outcome none = run_tessera(simulate + " --gpus 256 --sequence 256");  // 8192 tokens are 128 blocks
  expect_usage_error(none, "no layout is possible; 256 GPUs, layout contiguous", "at most 128 ranks");
  EXPECT_FALSE(has(none.err, "smaller tiles")) << "device cuda has one size\n" << none.err;
  expect_usage_error(run_tessera(simulate + " --gpus 12 --sequence 8"), "--gpus 12", "8 or 16");
  expect_usage_error(run_tessera(simulate + " --link-gbps 0"), "--link-gbps");
  expect_usage_error(run_tessera(simulate + " --latency-us nan"), "--latency-us");
  expect_usage_error(run_tessera(simulate + " --rate gemm_tflop=5"), "nearest is gemm_tflops");
  expect_usage_error(run_tessera(kTiny + " --set model.vocabulary=300 --simulate"), "device: cuda");
}

}  // namespace
}  // namespace tessera
