// The shipped configurations: each can be planned without its data and without a GPU, and says what its comments say.

#include <gtest/gtest.h>

#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>

#include "tests/cli/run_tessera.h"

namespace tessera {
namespace {

using Json = nlohmann::json;

constexpr double kGiB = 1 << 30;

std::string file(const std::string& name) { return TESSERA_CONFIGS "/" + name + ".yaml"; }

Json json_of(const std::string& arguments) {
  const Outcome outcome = run_tessera(arguments + " --json");
  EXPECT_EQ(outcome.code, 0) << arguments << "\n" << outcome.err;
  EXPECT_EQ(outcome.err, "") << arguments;
  return outcome.code == 0 ? Json::parse(outcome.out) : Json::object();
}

Json config(const std::string& name) { return json_of("config " + file(name)); }
Json plan(const std::string& name, const std::string& more = "") {
  const bool text = config(name)["data"]["synthetic"] == "none";
  return json_of("plan " + file(name) + (text ? " --set data.path= --set data.tokenizer=gpt2 " : " ") + more);
}

/// Embedding, and a block's matrices, norms and score scales, without biases.
std::int64_t parameters(std::int64_t layers, std::int64_t heads, std::int64_t width) {
  return 50304 * width + layers * (12 * width * width + 2 * width + heads) + width;
}

TEST(Configurations, EveryOneHasAPlanOnOneAndTwoRanks) {
  int count = 0;
  for (const auto& entry : std::filesystem::directory_iterator(TESSERA_CONFIGS)) {
    if (entry.path().extension() != ".yaml") continue;
    ++count;
    const std::string name = entry.path().stem();
    SCOPED_TRACE(name);
    const Json one = plan(name), two = plan(name, "--ranks 2");
    ASSERT_TRUE(one.contains("bytes_per_rank") && two.contains("bytes_per_rank"));
    EXPECT_GT(one["bytes_per_rank"]["total"].get<double>(), 0);
    EXPECT_EQ(one["micro_batches_per_step_and_rank"], 2 * two["micro_batches_per_step_and_rank"].get<int>());
    // The optimizer's state is shared out.
    EXPECT_NEAR(one["bytes_per_rank"]["optimizer"].get<double>(), 2 * two["bytes_per_rank"]["optimizer"].get<double>(), 1 << 20);
  }
  EXPECT_GE(count, 8);
}

TEST(Configurations, Gpt2Medium) {
  for (const std::string name : {"gpt2-medium-sparse", "gpt2-medium-softmax"}) {
    SCOPED_TRACE(name);
    const Json c = config(name), p = plan(name);
    EXPECT_EQ(c["device"], "cuda");
    EXPECT_EQ(c["model"]["layers"], 24);
    EXPECT_EQ(c["model"]["heads"], 16);
    EXPECT_EQ(c["model"]["width"], 1024);
    EXPECT_EQ(c["model"]["context"], 1024);
    EXPECT_EQ(p["vocabulary"], 50257);
    EXPECT_EQ(p["vocabulary_padded"], 50304);
    EXPECT_EQ(p["parameters"], parameters(24, 16, 1024));
    EXPECT_EQ(p["tokens_per_step"], 524288);
    EXPECT_EQ(p["steps"], 22000);
    EXPECT_EQ(p["tokens"], 11'534'336'000);
    EXPECT_LT(p["bytes_per_rank"]["total"].get<double>(), 72 * kGiB);  // what a GPU of 80 GB has free, with room
    for (const int ranks : {4, 8}) EXPECT_EQ(plan(name, "--ranks " + std::to_string(ranks))["ranks"], ranks);
  }
  EXPECT_EQ(config("gpt2-medium-sparse")["attention"]["threshold"]["target_edge_sparsity"], 0.9966);
  // As published: learned positions, layernorm, biases.
  const Json published = plan("gpt2-medium-softmax",
                              "--set model.positions=learned --set model.norm=layernorm --set model.bias=true --set attention.scale_learned=false");
  EXPECT_EQ(published["parameters"], 50304 * 1024 + 1024 * 1024 + 24 * (12 * 1024 * 1024 + 13 * 1024) + 2 * 1024);
}

TEST(Configurations, Gpt2Small) {
  for (const std::string name : {"gpt2-small-sparse", "gpt2-small-softmax"}) {
    SCOPED_TRACE(name);
    EXPECT_EQ(plan(name)["parameters"], parameters(12, 12, 768));
    EXPECT_LT(plan(name)["bytes_per_rank"]["total"].get<double>(), 36 * kGiB);
    // On processors, as the comment says.
    EXPECT_EQ(plan(name, "--set device=cpu --set train.micro_batch=4")["parameters"], parameters(12, 12, 768));
  }
}

// And in how fast rotary positions turn, each at what is better for it.
TEST(Configurations, TwinsDifferInTheGateAlone) {
  for (const std::string size : {"gpt2-small", "gpt2-medium"}) {
    SCOPED_TRACE(size);
    Json sparse = config(size + "-sparse"), softmax = config(size + "-softmax");
    EXPECT_EQ(sparse["attention"]["gate"], "relu2");
    EXPECT_EQ(softmax["attention"]["gate"], "softmax");
    EXPECT_EQ(sparse["model"]["rotary_base"], 100);
    EXPECT_EQ(softmax["model"]["rotary_base"], 10000);
    for (Json* c : {&sparse, &softmax}) {
      (*c)["run"].erase("dir");
      (*c)["model"].erase("rotary_base");
      for (const char* key : {"gate", "normalizer", "threshold"}) (*c)["attention"].erase(key);
    }
    EXPECT_EQ(sparse, softmax);
  }
}

TEST(Configurations, LongContext) {
  const Json c = config("long-context"), p = plan("long-context");
  EXPECT_EQ(c["model"]["context"], 32768);
  EXPECT_EQ(c["model"]["positions"], "rotary");
  EXPECT_EQ(p["parameters"], parameters(24, 16, 1024));
  EXPECT_LT(p["bytes_per_rank"]["total"].get<double>(), 72 * kGiB);
  // 6 of 24 layers see all: 12 x width x (16,384 keys on average there, about 2,048 + 64 elsewhere).
  const double dense = 6.0 * (24 * 12 * 1024 * 1024 + 50304 * 1024), key = 12 * 1024;
  EXPECT_NEAR(p["flops_per_token"]["dense_equivalent"].get<double>(), dense + 24 * key * 16384, 0.01 * dense);
  EXPECT_NEAR(p["flops_per_token"]["pattern_visible"].get<double>(), dense + 6 * key * 16384 + 18 * key * 2048, 0.03 * dense);
}

TEST(Configurations, RecomputationTakesLessMemory) {
  const auto bytes = [](const std::string& how) {
    return plan("gpt2-medium-sparse", "--set train.recompute=" + how)["bytes_per_rank"]["total"].get<double>();
  };
  const double none = bytes("none"), gelu_norm = bytes("gelu+norm"), block = bytes("block");
  EXPECT_LT(gelu_norm, 0.8 * none);
  EXPECT_LT(block, 0.6 * gelu_norm);
}

}  // namespace
}  // namespace tessera
