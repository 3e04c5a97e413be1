// run.init: a run that starts from a checkpoint, on any number of ranks; what fits is taken, what does not is said with both values.

#include "trainer/warm_start.h"

#include "tests/trainer/run_support.h"
#include "trainer/open_checkpoint.h"

namespace tessera::testing {
namespace {

class WarmStartTest : public RunTest {
 protected:
  /// A run of `steps` named `name`, from tiny.yaml and `sets`.
  Result train(const std::string& name, const std::string& sets, int steps = 2, int ranks = 1) const {
    const std::string arguments = "train tiny.yaml --set run.dir=runs/" + name + " --set train.steps=" + std::to_string(steps) +
                                  " --set optimizer.warmup=0 --set eval.every=0 " + sets;
    return ranks == 1 ? tessera(arguments) : tessera_on(ranks, arguments);
  }
  std::string run(const std::string& name) const { return folder / "runs" / name; }
};

constexpr const char* kDense = "--set attention.gate=softmax --set attention.score=dot";

TEST_F(WarmStartTest, ParametersThatBothHaveAreTakenAndTheRestIsSaid) {
  ASSERT_EQ(train("dense", kDense).code, 0);
  // A step whose learning rate is as good as none leaves the parameters where they started.
  const Result r = train("sparse", "--set run.init=runs/dense --set optimizer.lr=1e-30 --set attention.normalizer=rms", 1);
  ASSERT_EQ(r.code, 0) << r;
  EXPECT_TRUE(r.says("note: run.init: attn.scale of 2 layers keeps its first values: the checkpoint has none")) << r;
  EXPECT_TRUE(r.says("note: run.init: attn.norm of 2 layers keeps its first values")) << r;
  EXPECT_TRUE(r.says("note: run.init: thresholds start at attention.threshold.init 0: the checkpoint has no controlled ones")) << r;
  EXPECT_TRUE(r.says("from the parameters of runs/dense/checkpoints/step_00000002")) << r;
  const CheckpointContents dense = read_checkpoint(run("dense")), sparse = read_checkpoint(run("sparse"));
  const StoredParameters from(dense.info.directory), to(sparse.info.directory);
  for (const ParameterInfo& p : make_parameter_layout(sparse.config.model).parameters) {
    const bool attention_only = p.name.ends_with("attn.scale") || p.name.ends_with("attn.norm");
    auto expected = attention_only ? std::vector<float>(static_cast<std::size_t>(p.shape.numel()), p.init_value) : from.read(p.name, p.shape);
    auto found = to.read(p.name, p.shape);
    if (p.name == "wte.weight") {  // rows of tokens that are none keep first values
      expected.resize(257 * 32);
      found.resize(257 * 32);
    }
    EXPECT_EQ(found, expected) << p.name;
  }
  EXPECT_EQ(sparse.info.init.path, "runs/dense/checkpoints/step_00000002");
  EXPECT_EQ(sparse.info.init.step, 2);
  EXPECT_EQ(sparse.info.init.sha256.size(), 64u);
  EXPECT_TRUE(tessera("inspect runs/sparse/checkpoints/step_00000001").says("runs/dense/checkpoints/step_00000002"));

  // Back: what the dense model does not have is dropped.
  const Result back = train("back", std::string(kDense) + " --set run.init=runs/sparse", 1);
  ASSERT_EQ(back.code, 0) << back;
  EXPECT_TRUE(back.says("note: run.init: attn.scale of 2 layers is dropped: this model has none")) << back;
}

// Where thresholds go on, a self edge that is new opens where the gate would admit it: at a trained model's scale the bias of a new model is a weight
// that nothing else has.
TEST_F(WarmStartTest, SelfEdgesStartAtTheThresholds) {
  const auto stored = [&](const std::string& name) { return StoredParameters(read_checkpoint(run(name)).info.directory); };
  for (const std::string score : {"cosine", "fidelity"}) {
    const std::string from = "without_" + score, to = "with_" + score, common = "--set attention.score=" + score + " ";
    ASSERT_EQ(train(from, common).code, 0);
    const Result r = train(to, common + "--set run.init=runs/" + from + " --set optimizer.lr=1e-30 --set attention.always.self=true", 1);
    ASSERT_EQ(r.code, 0) << r;
    EXPECT_TRUE(r.says("note: run.init: attn.self_bias of 2 layers starts at the thresholds: the checkpoint has none")) << r;
    const std::vector<float> thresholds = stored(from).thresholds(2, 2), scales = stored(from).read("h.1.attn.scale", {2});
    const std::vector<float> biases = stored(to).read("h.1.attn.self_bias", {2});
    for (int h = 0; h < 2; ++h) {
      EXPECT_NE(biases[h], 0.25f);
      EXPECT_FLOAT_EQ(biases[h], -thresholds[2 + h] * (score == "fidelity" ? scales[h] : 1));
    }
  }
}

TEST_F(WarmStartTest, SelfEdgesStartAtTheirFirstBias) {
  ASSERT_EQ(train("without", "--set attention.threshold.mode=fixed").code, 0);
  const Result r = train("with", "--set run.init=runs/without --set optimizer.lr=1e-30 --set attention.always.self=true", 1);
  ASSERT_EQ(r.code, 0) << r;
  EXPECT_TRUE(r.says("note: run.init: attn.self_bias of 2 layers keeps its first values: the checkpoint has none")) << r;
  const StoredParameters stored(read_checkpoint(run("with")).info.directory);
  EXPECT_EQ(stored.read("h.1.attn.self_bias", {2}), std::vector<float>(2, 0.25f));
  const Result back = train("back", "--set run.init=runs/with", 1);
  ASSERT_EQ(back.code, 0) << back;
  EXPECT_TRUE(back.says("note: run.init: attn.self_bias of 2 layers is dropped: this model has none")) << back;
}

TEST_F(WarmStartTest, SinksStartAsInANewModel) {
  ASSERT_EQ(train("without", "").code, 0);
  const Result r = train("with", "--set run.init=runs/without --set optimizer.lr=1e-30 --set attention.always.sinks=2", 1);
  ASSERT_EQ(r.code, 0) << r;
  EXPECT_TRUE(r.says("note: run.init: attn.sink_keys of 2 layers keeps its first values: the checkpoint has none")) << r;
  const StoredParameters stored(read_checkpoint(run("with")).info.directory);
  EXPECT_EQ(stored.read("h.1.attn.sink_bias", {2, 2}), std::vector<float>(4, 0.25f));
  // They are taken on where there are as many, and nothing is guessed where there are not.
  const Result on = train("on", "--set run.init=runs/with --set optimizer.lr=1e-30 --set attention.always.sinks=2", 1);
  ASSERT_EQ(on.code, 0) << on;
  EXPECT_FALSE(on.says("attn.sink_keys")) << on;
  const Result more = train("more", "--set run.init=runs/with --set attention.always.sinks=3", 1);
  EXPECT_NE(more.code, 0);
  EXPECT_TRUE(more.says("attention.always.sinks: 2 there, 3 here (0 drops them)")) << more;
  const Result back = train("back", "--set run.init=runs/with", 1);
  ASSERT_EQ(back.code, 0) << back;
  EXPECT_TRUE(back.says("note: run.init: attn.sink_values of 2 layers is dropped: this model has none")) << back;
}

TEST_F(WarmStartTest, TheOutputGateStartsAsTheIdentity) {
  ASSERT_EQ(train("without", "").code, 0);
  const Result r = train("with", "--set run.init=runs/without --set optimizer.lr=1e-30 --set attention.output_gate=true", 1);
  ASSERT_EQ(r.code, 0) << r;
  EXPECT_TRUE(r.says("note: run.init: attn.c_gate.weight of 2 layers keeps its first values: the checkpoint has none")) << r;
  const Result same = train("same", "--set run.init=runs/without --set optimizer.lr=1e-30", 1);
  ASSERT_EQ(same.code, 0) << same;
  EXPECT_EQ(metrics("with")[0]["loss"], metrics("same")[0]["loss"]);
}

TEST_F(WarmStartTest, ControlledThresholdsGoOn) {
  ASSERT_EQ(train("first", "", 8).code, 0);
  const Result r = train("second", "--set run.init=runs/first --set attention.threshold.rate=1e-30 --set model.vocabulary_multiple=8", 1);
  ASSERT_EQ(r.code, 0) << r;
  EXPECT_FALSE(r.says("note: run.init")) << r;
  const auto thresholds = [&](const std::string& name) { return StoredParameters(read_checkpoint(run(name)).info.directory).thresholds(2, 2); };
  EXPECT_EQ(thresholds("second"), thresholds("first"));
  EXPECT_NE(thresholds("first"), std::vector<float>(4, 0.0f));
  const auto balances = [&](const std::string& name) { return StoredParameters(read_checkpoint(run(name)).info.directory).balances(2, 2); };
  ASSERT_EQ(train("still", "--set run.init=runs/first --set attention.threshold.balance=1e-30", 1).code, 0);
  EXPECT_EQ(balances("still"), balances("first"));
  EXPECT_NE(balances("first"), std::vector<float>(4, 0.0f));
  const Result other = train("third", "--set run.init=runs/first --set attention.score=fidelity", 1);
  ASSERT_EQ(other.code, 0) << other;
  EXPECT_TRUE(other.says("the checkpoint has no controlled ones for this score")) << other;
}

TEST_F(WarmStartTest, RanksAgreeAndAResumedRunNeedsItNoMore) {
  ASSERT_EQ(train("dense", kDense).code, 0);
  ASSERT_EQ(train("one", "--set run.init=runs/dense", 3).code, 0);
  const Result two = train("two", "--set run.init=runs/dense", 3, 2);
  ASSERT_EQ(two.code, 0) << two;
  EXPECT_NEAR(metrics("one")[0]["loss"].get<double>(), metrics("two")[0]["loss"].get<double>(), 1e-6);
  fs::remove_all(run("dense"));
  const Result resumed = tessera("train runs/two/config.yaml --resume --set train.steps=4");
  ASSERT_EQ(resumed.code, 0) << resumed;
  EXPECT_EQ(metrics("two").size(), 4u);
  EXPECT_EQ(read_checkpoint(run("two")).info.position.step, 4);
  EXPECT_EQ(read_checkpoint(run("two")).info.init.path, "runs/dense/checkpoints/step_00000002");
}

TEST_F(WarmStartTest, WhatDoesNotFitIsSaidWithBothValues) {
  ASSERT_EQ(train("base", "--set model.positions=learned", 1).code, 0);
  const auto refused = [&](const std::string& sets, const std::vector<std::string>& texts) {
    const Result r = train("other", "--set run.init=runs/base --set model.positions=learned " + sets, 1);
    EXPECT_EQ(r.code, 2) << r;
    for (const std::string& text : texts) EXPECT_TRUE(r.says(text)) << text << "\n" << r;
    EXPECT_FALSE(fs::exists(run("other")));
  };
  refused("--set model.width=64 --set model.layers=3", {"runs/base/checkpoints/step_00000001: its parameters do not fit this model",
                                                        "model.width: 32 there, 64 here", "model.layers: 2 there, 3 here"});
  refused("--set model.layers=3", {"Set these keys as they are there"});
  refused("--set model.context=64", {"model.context: 32 there, 64 here"});
  refused("--set model.context=16", {"model.context: 32 there, 16 here"});
  refused("--set model.heads=4", {"model.heads: 2 there, 4 here"});
  refused("--set model.positions=rotary", {"model.positions: \"learned\" there, \"rotary\" here"});
  refused("--set model.norm=layernorm", {"model.norm: \"rmsnorm\" there, \"layernorm\" here"});
  refused("--set run.init=runs/none", {"run.init: runs/none: no such folder"});
  ASSERT_EQ(tessera("tokenizer train --input text.txt --vocabulary 300 --output bpe.json").code, 0);
  ASSERT_EQ(tessera("prepare --input text.txt --tokenizer bpe:bpe.json --output bpe --validation-fraction 0.1").code, 0);
  refused("--set data.path=bpe", {"vocabulary: 257 tokens there, 300 here"});
}

TEST_F(WarmStartTest, AnImportedModelIsEvaluatedAndTrainedOn) {
  ASSERT_EQ(train("dense", std::string(kDense) + " --set model.positions=learned --set model.norm=layernorm --set model.bias=true", 3).code, 0);
  const auto loss = [&](const std::string& checkpoint) {
    return Json::parse(tessera("eval " + checkpoint + " --data data --json").output)["loss"].get<double>();
  };
  ASSERT_EQ(tessera("export runs/dense --output hf").code, 0);
  ASSERT_EQ(tessera("export runs/dense --output hf").code, 2);
  const Result imported = tessera("import hf --output mine");
  ASSERT_EQ(imported.code, 0) << imported;
  EXPECT_NEAR(loss("mine"), loss("runs/dense"), 1e-6);  // another micro-batch: a matrix product may round otherwise
  EXPECT_EQ(tessera("generate mine --prompt the --tokens 9 --temperature 0 2>/dev/null").output,
            tessera("generate runs/dense --prompt the --tokens 9 --temperature 0 2>/dev/null").output);
  EXPECT_TRUE(tessera("inspect mine --verify").says("every checksum matches"));
  EXPECT_EQ(Json::parse(tessera("inspect mine --json").output)["resumable"], false);
  const Result r = train("sparse", "--set run.init=mine --set model.positions=learned --set model.norm=layernorm --set model.bias=true", 2);
  EXPECT_EQ(r.code, 0) << r;
}

}  // namespace
}  // namespace tessera::testing
