// The command line as a contract: subcommands, help, exit codes, one clear line for an error.

#include <gtest/gtest.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <string>

#include "tests/cli/expect_usage_error.h"
#include "tests/cli/run_tessera.h"

namespace tessera {
namespace {

using Json = nlohmann::json;

const std::string kTiny = TESSERA_CONFIGS "/tiny.yaml";
constexpr const char* kCommands[] = {"prepare", "tokenizer", "train",  "eval",      "generate", "compare",
                                     "inspect", "plan",      "config", "attention", "bench"};

TEST(CommandLine, HelpNamesEveryCommand) {
  const Outcome help = run_tessera("--help");
  EXPECT_EQ(help.code, 0);
  EXPECT_EQ(help.err, "");
  for (const char* command : kCommands) EXPECT_TRUE(has(help.out, std::string("\n  ") + command + " ")) << command << "\n" << help.out;
  EXPECT_TRUE(has(help.out, "Exit codes: 0 done, 1 failed while running, 2 bad usage or configuration"));
}

TEST(CommandLine, EveryCommandHasHelpWithAnExample) {
  for (const char* command : kCommands) {
    const Outcome help = run_tessera(std::string(command) + " --help");
    EXPECT_EQ(help.code, 0) << command;
    EXPECT_EQ(help.err, "") << command;
    EXPECT_TRUE(has(help.out, "Example")) << help.out;
    EXPECT_TRUE(has(help.out, std::string("tessera ") + command + " ")) << help.out;
    EXPECT_TRUE(help.out.ends_with("\n")) << command;
  }
}

TEST(CommandLine, OptionsOfTheContract) {
  const struct {
    const char* command;
    std::vector<std::string> options;
  } contract[] = {
      {"prepare", {"--input", "--tokenizer", "--output", "--validation-fraction", "--shard-tokens", "--threads"}},
      {"train", {"CONFIG", "--set", "--resume"}},
      {"eval", {"CHECKPOINT", "--data", "--split", "--json"}},
      {"generate",
       {"CHECKPOINT", "--prompt", "--prompts", "--tokens", "--temperature", "--top-k", "--top-p", "--samples", "--seed", "--recompute", "--json"}},
      {"inspect", {"PATH", "--verify"}},
      {"plan", {"CONFIG", "--ranks", "--sequence", "--simulate", "--gpus", "--json"}},
      {"config", {"CONFIG", "--schema", "--set"}},
      {"attention", {"IN", "OUT", "--set", "--visit"}},
      {"bench", {"--json"}},
  };
  for (const auto& [command, options] : contract) {
    const Outcome help = run_tessera(std::string(command) + " --help");
    for (const auto& option : options) EXPECT_TRUE(has(help.out, option)) << command << " " << option << "\n" << help.out;
  }
}

TEST(CommandLine, Version) {
  const Outcome version = run_tessera("--version");
  EXPECT_EQ(version.code, 0);
  EXPECT_TRUE(version.out.starts_with("tessera ")) << version.out;
}

TEST(CommandLine, BadUsageIsTwo) {
  expect_usage_error(run_tessera(""), "subcommand is required", "tessera --help");
  expect_usage_error(run_tessera("trian"), "there is no command \"trian\"; nearest is \"train\"");
  expect_usage_error(run_tessera("tokenizer trian"), "there is no command \"trian\"; nearest is \"train\" (see tessera tokenizer --help)");
  expect_usage_error(run_tessera("config --sett x=1"), "--sett", "tessera config --help");
  expect_usage_error(run_tessera("plan"), "required", "tessera plan --help");
  expect_usage_error(run_tessera("train"), "required");
  expect_usage_error(run_tessera("eval"), "required");
  expect_usage_error(run_tessera("generate"), "required");
  expect_usage_error(run_tessera("prepare"), "required");
  expect_usage_error(run_tessera("attention"), "required");
  expect_usage_error(run_tessera("inspect"), "required");
  expect_usage_error(run_tessera("plan " + kTiny + " --ranks 0"), "--ranks");
  expect_usage_error(run_tessera("prepare --input x --tokenizer bytes --output y --shard-tokens -5"), "--shard-tokens: Value -5 not in range");
  expect_usage_error(run_tessera("plan " + kTiny + " --ranks two"), "--ranks");
  expect_usage_error(run_tessera("config --schema --set a=1"), "--schema");
}

TEST(CommandLine, BadConfigurationIsTwo) {
  expect_usage_error(run_tessera("config /no/such.yaml"), "/no/such.yaml: there is no such file");
  expect_usage_error(run_tessera("config " + kTiny + " --set train.stpes=5"), "--set: train.stpes: unknown key; nearest valid key \"train.steps\"");
  expect_usage_error(run_tessera("train " + kTiny + " --set train.steps=x"), "--set: train.steps: expected an integer");
  expect_usage_error(run_tessera("train " + kTiny + " --set data.path=/no/such"), "/no/such");
  expect_usage_error(run_tessera("plan " + kTiny + " --set data.path=/no/such"), "the vocabulary is not known", "/no/such/dataset.json",
                     "model.vocabulary");
  expect_usage_error(run_tessera("plan " + kTiny + " --set model.vocabulary=99 --ranks 3"), "3 ranks", "1, 2, 4 ranks");
  expect_usage_error(run_tessera("plan " + kTiny + " --set data.tokenizer=klingon"), "--set: data.tokenizer: expected bytes, gpt2, bpe,", "klingon");
  expect_usage_error(run_tessera("eval /no/such --data /no/such"), "/no/such");
  expect_usage_error(run_tessera("inspect /no/such"), "/no/such");
}

TEST(CommandLine, OnlyRankZeroReportsWhatAllRanksFind) {
  for (const std::string name : {"OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "SLURM_PROCID"}) {
    // Another rank keeps still until the launcher has had the time to end it.
    const Outcome other = run_tessera("config /no/such.yaml", name + "=1 timeout 1");
    EXPECT_EQ(other.code, 124) << name;
    EXPECT_EQ(other.err, "") << name;
    expect_usage_error(run_tessera("config /no/such.yaml", name + "=0"), "/no/such.yaml");
  }
  // Nobody ended it: what it found is its own, and it says so.
  const Outcome alone = run_tessera("config /no/such.yaml", "OMPI_COMM_WORLD_RANK=3");
  EXPECT_EQ(alone.code, 2);
  EXPECT_TRUE(alone.err.starts_with("tessera: rank 3: error: ")) << alone.err;
}

TEST(CommandLine, OutputThatCannotBeWrittenIsOne) {
  if (!std::filesystem::exists("/dev/full")) GTEST_SKIP() << "no /dev/full here";
  for (const std::string arguments : {"config --schema", "config", "--help", "--version"}) {
    const int status = std::system(("'" TESSERA_BINARY "' " + arguments + " >/dev/full 2>/dev/null").c_str());
    EXPECT_EQ(WEXITSTATUS(status), 1) << arguments;
  }
}

TEST(ConfigCommand, PrintsWhatLoadsAgain) {
  const Outcome first = run_tessera("config " + kTiny + " --set 'attention.pattern={window: {size: 32}}' --set train.steps=5");
  ASSERT_EQ(first.code, 0) << first.err;
  EXPECT_TRUE(has(first.out, "  pattern: {window: {size: 32}}\n")) << first.out;
  EXPECT_TRUE(has(first.out, "  steps: 5\n")) << first.out;
  const auto file = std::filesystem::temp_directory_path() / ("tessera_cli_config_" + std::to_string(::getpid()) + ".yaml");
  std::ofstream(file) << first.out;
  EXPECT_EQ(run_tessera("config " + file.string()).out, first.out);
  std::filesystem::remove(file);
  const Json json = Json::parse(run_tessera("config " + kTiny + " --json").out);
  EXPECT_EQ(json["model"]["width"], 32);
}

TEST(ConfigCommand, NoticesGoToStderr) {
  const Outcome outcome = run_tessera("config " + kTiny + " --set attention.gate=softmax");
  EXPECT_EQ(outcome.code, 0);
  EXPECT_TRUE(has(outcome.err, "tessera: note: attention.gate softmax")) << outcome.err;
  EXPECT_TRUE(has(outcome.out, "normalizer: none"));
}

TEST(ConfigCommand, Schema) {
  const Outcome text = run_tessera("config --schema");
  EXPECT_EQ(text.code, 0);
  const Json keys = Json::parse(run_tessera("config --schema --json").out);
  for (const auto& key : keys) EXPECT_TRUE(has(text.out, key["path"].get<std::string>() + "  (")) << key["path"];
}

TEST(PlanCommand, CountsWhatIsKnownOfGpt2) {
  const auto file = std::filesystem::temp_directory_path() / ("tessera_cli_gpt2_" + std::to_string(::getpid()) + ".yaml");
  std::ofstream(file) << "model: {size: gpt2, context: 1024, positions: learned, norm: layernorm, bias: true, vocabulary_multiple: 1}\n"
                         "attention: {gate: softmax, score: dot, normalizer: none, threshold: {mode: fixed}}\ndata: {tokenizer: gpt2}\n";
  const Outcome outcome = run_tessera("plan " + file.string() + " --ranks 2 --json");
  std::filesystem::remove(file);
  ASSERT_EQ(outcome.code, 0) << outcome.err;
  const Json plan = Json::parse(outcome.out);
  EXPECT_EQ(plan["parameters"], 124439808);  // as published for GPT-2 small
  EXPECT_EQ(plan["checkpoint_bytes"], 124439808ll * 12);
  EXPECT_EQ(plan["vocabulary"], 50257);
  EXPECT_EQ(plan["ranks"], 2);
  EXPECT_EQ(plan["tokens_per_step"], 65536);
  EXPECT_EQ(plan["micro_batches_per_step_and_rank"], 8);  // 64 sequences, 4 a micro-batch, 2 ranks
  const Json& bytes = plan["bytes_per_rank"];
  EXPECT_GE(bytes["parameters"], 124439808ll * 4);
  EXPECT_GE(bytes["gradients"], 124439808ll * 4);
  EXPECT_NEAR(bytes["optimizer"].get<double>(), 124439808.0 * 8 / 2, 1e5);  // two moments, shared by two ranks
  std::int64_t sum = 0;
  for (const auto& [name, value] : bytes.items())
    if (name != "total") sum += value.get<std::int64_t>();
  EXPECT_EQ(bytes["total"], sum);
  // 6 x matrix parameters, and attention's 12 x layers x width x (context + 1) / 2 over causal edges.
  const double dense = 6.0 * (12 * 12 * 768.0 * 768.0 + 50257 * 768.0), causal = 12.0 * 12 * 768 * 1025 / 2;
  EXPECT_NEAR(plan["flops_per_token"]["dense_equivalent"].get<double>(), dense + causal, 1e-3 * dense);
  EXPECT_EQ(plan["flops_per_token"]["dense_equivalent"], plan["flops_per_token"]["pattern_visible"]);
}

TEST(PlanCommand, PlansAGpuWithoutOne) {
  const std::string common = "plan " TESSERA_CONFIGS "/gpt2-medium-sparse.yaml --set data.tokenizer=gpt2 --set device=cuda --json";
  const auto bytes = [&](const std::string& more) {
    const Outcome outcome = run_tessera(common + more);
    EXPECT_EQ(outcome.code, 0) << outcome.err;
    return Json::parse(outcome.out)["bytes_per_rank"];
  };
  const Json one = bytes(""), two = bytes(" --ranks 2");
  const double n = Json::parse(run_tessera(common).out)["parameters"];
  EXPECT_NEAR(one["parameters"].get<double>(), 2 * n, 0.01 * n);  // bf16
  EXPECT_NEAR(one["gradients"].get<double>(), 4 * n, 0.01 * n);
  EXPECT_NEAR(one["optimizer"].get<double>(), 12 * n, 0.01 * n);  // master and two moments
  EXPECT_NEAR(two["optimizer"].get<double>(), 6 * n, 0.01 * n);
  EXPECT_GT(one["device_libraries"].get<double>(), 0.0);
  EXPECT_FALSE(one.contains("nccl_connections"));
  EXPECT_GT(two["nccl_connections"].get<double>(), 0.0);
  EXPECT_FALSE(bytes(" --ranks 2 --set parallel.share_gpu=true").contains("nccl_connections"));
  for (const Json& of : {one, two}) {
    std::int64_t sum = 0;
    for (const auto& [name, value] : of.items())
      if (name != "total") sum += value.get<std::int64_t>();
    EXPECT_EQ(of["total"], sum);
  }
  // A rank that shares sequences with three others, and a ring, whose ranks know two. Used on four GPUs, 131,072 tokens (tests/bench/RESULTS.md).
  const std::string shared =
      " --ranks 4 --set model.context=131072 --set train.micro_batch=1 --set train.tokens_per_step=131072 --set parallel.sequence=4"
      " --set train.recompute=block --set parallel.layout=zigzag --set optimizer.warmup=2 --set parallel.exchange=";
  const auto on_four = [&](const std::string& exchange) {
    const Outcome outcome =
        run_tessera("plan " TESSERA_CONFIGS "/long-context.yaml --set data.tokenizer=gpt2 --set attention.pattern=causal --json" + shared + exchange);
    EXPECT_EQ(outcome.code, 0) << outcome.err;
    return Json::parse(outcome.out)["bytes_per_rank"]["total"].get<double>();
  };
  EXPECT_NEAR(on_four("needed"), 10824318976, 0.05 * 10824318976);
  EXPECT_NEAR(on_four("ring"), 11078074368, 0.05 * 11078074368);
  EXPECT_NEAR(on_four("heads"), 10622992384, 0.05 * 10622992384);
  const auto activations = [&](const char* recompute) {
    return bytes(std::string(" --set train.recompute=") + recompute)["activations"].get<double>();
  };
  EXPECT_LT(activations("block"), 0.5 * activations("gelu+norm"));
  EXPECT_LT(activations("gelu+norm"), 0.9 * activations("none"));
  EXPECT_TRUE(has(run_tessera("plan " TESSERA_CONFIGS "/gpt2-medium-sparse.yaml --set data.tokenizer=gpt2").out, "  device libraries "));
}

TEST(PlanCommand, PatternsShowInTheFlops) {
  const std::string common = "plan " + kTiny + " --set model.vocabulary=300 --json";
  const Json causal = Json::parse(run_tessera(common).out);
  const Json window = Json::parse(run_tessera(common + " --set 'attention.pattern={window: {size: 8}}'").out);
  EXPECT_EQ(causal["flops_per_token"]["dense_equivalent"], window["flops_per_token"]["dense_equivalent"]);
  // Mean visible keys over 64 queries: causal 32.5, window (1 + ... + 8 + 56 x 8) / 64 = 7.5625; 12 x width 32 x 2 layers each.
  EXPECT_NEAR(causal["flops_per_token"]["pattern_visible"].get<double>() - window["flops_per_token"]["pattern_visible"].get<double>(),
              12.0 * 32 * 2 * (32.5 - 7.5625), 1e-6);
}

TEST(PlanCommand, TheOutputGateShowsInFlopsAndMemory) {
  const std::string common = "plan " + kTiny + " --set model.vocabulary=300 --json";
  const Json without = Json::parse(run_tessera(common).out), with = Json::parse(run_tessera(common + " --set attention.output_gate=true").out);
  constexpr double kMatrices = 2 * 32 * 32;  // two layers of width 32
  EXPECT_EQ(with["parameters"].get<double>() - without["parameters"].get<double>(), kMatrices);
  for (const char* which : {"dense_equivalent", "pattern_visible"})
    EXPECT_NEAR(with["flops_per_token"][which].get<double>() - without["flops_per_token"][which].get<double>(), 6 * kMatrices, 1e-6);
  const auto more = [&](const char* what) {
    return with["bytes_per_rank"][what].get<std::int64_t>() - without["bytes_per_rank"][what].get<std::int64_t>();
  };
  EXPECT_EQ(more("activations"), 2 * 2 * 64 * 32 * 4);  // its argument in each layer: two sequences of 64 tokens
  EXPECT_EQ(more("gradients"), 4 * kMatrices);
  EXPECT_EQ(more("workspace"), 0);
}

TEST(PlanCommand, RefusesDataOfAnotherTokenizer) {
  const std::string folder = (std::filesystem::temp_directory_path() / ("tessera_cli_plan_" + std::to_string(::getpid()))).string();
  ASSERT_EQ(run_tessera("prepare --input - --tokenizer bytes --output " + folder, "echo some text |").code, 0);
  const std::string plan = "plan " + kTiny + " --set data.path=" + folder;
  EXPECT_EQ(run_tessera(plan).code, 0);
  EXPECT_EQ(run_tessera(plan + " --set data.tokenizer=bytes").code, 0);
  expect_usage_error(run_tessera(plan + " --set data.tokenizer=gpt2"), "data.tokenizer is gpt2, and " + folder + " was made with bytes");
  std::filesystem::remove_all(folder);
}

TEST(PlanCommand, TextForPeople) {
  const Outcome outcome = run_tessera("plan " + kTiny + " --set data.tokenizer=bytes");
  EXPECT_EQ(outcome.code, 0) << outcome.err;
  for (const char* part : {"parameters", "optimizer", "activations", "total", "checkpoint bytes", "dense-equivalent", "pattern-visible",
                           "tokens a step", "vocabulary 257"})
    EXPECT_TRUE(has(outcome.out, part)) << part << "\n" << outcome.out;
}

}  // namespace
}  // namespace tessera
