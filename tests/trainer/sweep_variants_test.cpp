// The runs that a sweep file makes, and their names.

#include "trainer/sweep/sweep_variants.h"

#include <set>

#include "tests/trainer/config_testing.h"
#include "tests/trainer/sweep_testing.h"

namespace tessera {
namespace {

using testing::SweepFiles;
using Names = std::vector<std::string>;
using Json = nlohmann::ordered_json;

TEST_F(SweepFiles, ProductsRowsAndNamedOnes) {
  const Sweep s = sweep(
      "grid: {attention.gate: [relu, relu4], optimizer.lr: [0.01, 0.02]}\nzip: {model.context: [32, 128], train.micro_batch: [4, 1]}\n"
      "list: [{name: twin, set: {attention.gate: softmax}}]");
  ASSERT_EQ(s.runs.size(), 9u);
  std::set<std::tuple<Gate, double, std::int64_t, std::int64_t>> seen;
  for (std::size_t i = 0; i < 8; ++i) {
    const Config& c = s.runs[i].config;
    seen.insert({c.model.attention.gate, c.optimizer.lr, c.model.context, c.train.micro_batch});
    EXPECT_EQ(c.run.dir, "runs/s/" + s.runs[i].name);
  }
  std::set<std::tuple<Gate, double, std::int64_t, std::int64_t>> all;
  for (const Gate gate : {Gate::relu, Gate::relu4})
    for (const double lr : {0.01, 0.02})
      for (const auto& [context, batch] : {std::pair{32, 4}, std::pair{128, 1}}) all.insert({gate, lr, context, batch});
  EXPECT_EQ(seen, all);
  EXPECT_EQ(s.runs[0].name, "gate=relu,lr=0.01,context=32,micro_batch=4");
  EXPECT_EQ(s.runs[8].name, "twin");
  EXPECT_EQ(s.runs[8].config.model.attention.gate, Gate::softmax);
  EXPECT_EQ(names("list: [{name: a}, {name: b, set: {model.layers: 3}}]"), (Names{"a", "b"}));
  EXPECT_EQ(names(""), (Names{"base"}));
}

TEST_F(SweepFiles, NamesSayWhatDiffersFromTheBase) {
  EXPECT_EQ(names("grid: {attention.gate: [relu, relu2]}"), (Names{"gate=relu", "base"}));  // relu2 is the base's
  EXPECT_EQ(names("grid: {attention.threshold.target_edge_sparsity: [0.5, 0.99]}"), (Names{"target_edge_sparsity=0.5", "target_edge_sparsity=0.99"}));
  EXPECT_EQ(names("grid: {eval.every: [5], checkpoint.every: [7]}"), (Names{"eval.every=5,checkpoint.every=7"}));
  EXPECT_EQ(names("grid: {attention.pattern: [causal, {window: {size: 8}}, {any: [{window: {size: 8}}, {global: {tokens: 2}}]}]}"),
            (Names{"base", "pattern=window-8", "pattern=any-window-8+global-2"}));
  EXPECT_EQ(names("seeds: [1, 2]"), (Names{"base", "base,seed=2"}));  // 1 is the base's
  EXPECT_EQ(names("grid: {attention.gate: [relu, relu4]}\nseeds: [3, 4]"),
            (Names{"gate=relu,seed=3", "gate=relu4,seed=3", "gate=relu,seed=4", "gate=relu4,seed=4"}));
}

TEST_F(SweepFiles, TheBaseIsExplained) {
  EXPECT_EQ(base_note(sweep("grid: {attention.gate: [relu, relu2]}\nzip: {model.layers: [2, 3], optimizer.lr: [0.01, 0.02]}")), "");
  EXPECT_EQ(base_note(sweep("grid: {attention.gate: [relu, relu2]}\nzip: {attention.pattern: [{window: {size: 8}}, causal]}")),
            "base is attention.gate: relu2, attention.pattern: causal");
  EXPECT_EQ(base_note(sweep("list: [{name: a}]")), "");
  EXPECT_EQ(base_note(sweep("")), "");
}

// A name may not depend on what is added.
TEST_F(SweepFiles, NamesStayWhenMoreIsAdded) {
  const std::string before = "grid: {attention.gate: [relu, relu4]}\n";
  const Names old = names(before);
  const std::vector<std::string> after = {"grid: {attention.gate: [relu2, relu, relu4]}\n",
                                          "grid: {attention.gate: [relu, relu4], model.layers: [2, 3]}\n", before + "seeds: [1, 2]\n",
                                          before + "list: [{name: x, set: {model.layers: 1}}]\n", before + "zip: {model.width: [32, 64]}\n"};
  for (const std::string& text : after) {
    const Names now = names(text);
    for (const std::string& name : old) EXPECT_NE(std::find(now.begin(), now.end(), name), now.end()) << name << " in " << text;
    EXPECT_GT(now.size(), old.size());
  }
}

TEST(SweepNames, Keys) {
  EXPECT_EQ(short_key("attention.gate"), "gate");
  EXPECT_EQ(short_key("device"), "device");
  EXPECT_EQ(short_key("eval.every"), "eval.every");
  EXPECT_EQ(short_key("attention.threshold.mode"), "mode");
  std::set<std::string> seen;
  for (const Key& key : schema()) EXPECT_TRUE(seen.insert(short_key(key.path)).second) << key.path;
}

TEST(SweepNames, ValuesAreFoldersNamesAndTellValuesApart) {
  EXPECT_EQ(short_value("relu2"), "relu2");
  EXPECT_EQ(short_value(0.9966), "0.9966");
  EXPECT_EQ(short_value(-1.5), "-1.5");
  EXPECT_EQ(short_value(true), "true");
  EXPECT_EQ(short_value(Json{0.9, 0.95}), "0.9+0.95");
  EXPECT_EQ(short_value(Json{{"bigbird", {{"window", 3}, {"global", 1}, {"random", 2}, {"block", 64}, {"seed", 0}}}}), "bigbird-3-1-2-64-0");
  std::set<std::string> seen;
  const std::vector<Json> values = {"a/b",
                                    "a_b",
                                    "a b",
                                    "",
                                    "..",
                                    std::string(200, 'x'),
                                    std::string(200, 'x') + "y",
                                    Json::array(),
                                    Json{{"any", {{{"all", {"a", "b"}}}, "c"}}},
                                    Json{{"any", {{{"all", {"a", "b", "c"}}}}}},
                                    Json{{"default", "causal"}, {"per_layer", {{"0-3", {{"window", {{"size", 4}}}}}}}}};
  for (const Json& value : values) {
    const std::string name = short_value(value);
    EXPECT_TRUE(seen.insert(name).second) << value.dump() << " " << name;
    EXPECT_LE(name.size(), 40u);
    EXPECT_EQ(name.find_first_not_of("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._+-"), std::string::npos) << name;
    EXPECT_EQ(short_value(value), name);
  }
}

TEST_F(SweepFiles, LongNamesStayFolders) {
  const std::string text =
      "grid: {attention.threshold.target_edge_sparsity: [0.123456], attention.threshold.anneal_from: [0.123456], attention.scale_learned: [false], "
      "attention.document_mask: [true], model.vocabulary_multiple: [8], optimizer.weight_decay: [0.123456], train.max_nonfinite: [77, 78]}";
  const Names n = names(text);
  ASSERT_EQ(n.size(), 2u);
  EXPECT_NE(n[0], n[1]);
  for (const std::string& name : n) EXPECT_LE(name.size(), 120u);
}

TEST_F(SweepFiles, OverridesSeeWhatIsSetSoFar) {
  const Sweep s = sweep(
      "grid: {model.context: [32, 64]}\noverrides:\n  - {if: {model.context: 32}, set: {train.micro_batch: 4}}\n"
      "  - {if: {train.micro_batch: 4}, set: {optimizer.lr: 0.5}}\n  - {if: {model.layers: 9}, set: {optimizer.lr: 0.1}}\n");
  ASSERT_EQ(s.runs.size(), 2u);
  EXPECT_EQ(s.runs[0].name, "context=32");  // what follows is not named
  const std::vector<std::pair<std::string, nlohmann::ordered_json>> differs = {
      {"model.context", 32}, {"train.micro_batch", 4}, {"optimizer.lr", 0.5}};
  EXPECT_EQ(s.runs[0].differs, differs);  // but listed
  EXPECT_EQ(s.runs[0].config.train.micro_batch, 4);
  EXPECT_EQ(s.runs[0].config.optimizer.lr, 0.5);
  EXPECT_EQ(s.runs[1].config.train.micro_batch, 2);
  ASSERT_EQ(s.notices.size(), 1u);
  expect_error(s.notices[0], "overrides[2] meets no variant");
}

TEST_F(SweepFiles, SkipIf) {
  const std::string grid = "grid: {attention.gate: [relu, relu4], attention.score: [dot, fidelity]}\nset: {attention.threshold.init: 0.5}\n";
  const Sweep s = sweep(grid + "skip_if: [{attention.gate: relu, attention.score: [dot, cosine]}, {attention.score: cosine}]");
  ASSERT_EQ(s.runs.size(), 3u);
  EXPECT_EQ(s.skipped, (Names{"gate=relu,score=dot"}));
  expect_error(s.notices.at(0), "skip_if[1] meets no variant");
  // As resolved: softmax has no normalizer; and as set.
  EXPECT_EQ(names("grid: {attention.gate: [relu, softmax]}\nskip_if: [{attention.normalizer: none}]"), (Names{"gate=relu"}));
  EXPECT_EQ(names("grid: {attention.gate: [relu, softmax], attention.normalizer: [rms, sum]}\n"
                  "skip_if: [{attention.gate: softmax, attention.normalizer: rms}]"),
            (Names{"gate=relu,normalizer=rms", "gate=relu", "gate=softmax"}));
  // Also a variant that would not resolve.
  EXPECT_EQ(names("grid: {model.heads: [2, 3]}\nskip_if: [{model.heads: 3}]"), (Names{"base"}));
  expect_error(error("grid: {model.heads: [3]}\nskip_if: [{model.heads: 3}]"),
               "s.yaml:3:11: skip_if leaves out all of 1 variants; expected it to leave one");
}

TEST_F(SweepFiles, OneConfigurationIsRunOnce) {
  const Sweep s = sweep("grid: {attention.gate: [relu, softmax], attention.normalizer: [sum, rms]}");
  ASSERT_EQ(s.runs.size(), 3u);
  EXPECT_EQ(s.runs[2].name, "gate=softmax");
  ASSERT_EQ(s.notices.size(), 1u);
  EXPECT_EQ(s.notices[0], "gate=softmax,normalizer=rms is the same run as gate=softmax, and left out");
}

TEST_F(SweepFiles, Budgets) {
  EXPECT_EQ(sweep("budget: {steps: 77}").runs[0].config.train.steps, 77);
  const Sweep s = sweep("budget: {tokens: 10000}\ngrid: {train.tokens_per_step: [512, 1024]}");
  EXPECT_EQ(s.runs[0].config.train.steps, 20);  // 19.5 steps
  EXPECT_EQ(s.runs[1].config.train.steps, 10);
  EXPECT_EQ(s.runs[1].config.optimizer.warmup, 1);  // follows
  const Sweep minutes = sweep("budget: {minutes: 3}");
  EXPECT_EQ(minutes.runs[0].config.train.steps, 20);  // until they are timed
  EXPECT_EQ(with_steps(minutes, minutes.runs[0], 500).config.train.steps, 500);
  EXPECT_EQ(with_steps(minutes, minutes.runs[0], 500).config.optimizer.warmup, 50);
  EXPECT_EQ(with_steps(minutes, minutes.runs[0], 500).config.run.dir, "runs/s/base");
}

TEST_F(SweepFiles, SeedsAreInnermostInTime) {
  const Sweep s = sweep("grid: {attention.gate: [relu, relu4]}\nseeds: [5, 6]");
  ASSERT_EQ(s.runs.size(), 4u);
  EXPECT_EQ(s.runs[0].config.run.seed, 5u);
  EXPECT_EQ(s.runs[1].config.run.seed, 5u);
  EXPECT_EQ(s.runs[1].variant, "gate=relu4");
  EXPECT_EQ(s.runs[2].variant, "gate=relu");
  EXPECT_EQ(to_yaml(load_variant(s.file.base, s.runs[3].values)), to_yaml(s.runs[3].config));
}

TEST_F(SweepFiles, VariantsThatDoNotResolve) {
  expect_error(error("grid:\n  model.heads: [2, 3]"), "variant heads=3: ", "s.yaml:3:20: model.heads: model.width 32 / model.heads 3");
  expect_error(error("grid: {model.heads: [3, 5]}"), "2 mistakes in s.yaml", "variant heads=3", "variant heads=5");
  expect_error(error("grid: {optimizer.lr: [0.1, 0.10]}"), "s.yaml:2:28: the variant lr=0.1 is there already", "s.yaml:2:23");
  expect_error(error("grid: {attention.gate: [relu]}\nlist: [{name: gate=relu}]"), "the variant gate=relu is there already");
  expect_error(error("list: [{name: a}, {name: \"a,seed=2\", set: {model.layers: 1}}]\nseeds: [1, 2]"), "two runs are called a,seed=2");
  std::string many = "grid: {run.threads: [0";
  for (int i = 1; i < 200; ++i) many += ", " + std::to_string(i);
  many += "], data.prefetch: [1";
  for (int i = 2; i < 200; ++i) many += ", " + std::to_string(i);
  expect_error(error(many + "]}"), "grid and zip make more than 10000 variants");
}

}  // namespace
}  // namespace tessera
