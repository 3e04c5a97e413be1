// Sweep files: what stands in them, and mistakes in them with their places.

#include "trainer/sweep/sweep_file.h"

#include <random>

#include "tests/trainer/config_testing.h"
#include "tests/trainer/sweep_testing.h"

namespace tessera {
namespace {

using testing::SweepFiles;

TEST_F(SweepFiles, EveryPartIsRead) {
  const SweepFile s = parse_sweep_file(R"(
base: ../base.yaml
dir: runs/x
set: {model.layers: 3}
grid:
  attention.gate: [relu, relu2]
zip:
  model.context: [32, 64]
  train.micro_batch: [4, 2]
list:
  - {name: softmax, set: {attention.gate: softmax}}
overrides:
  - {if: {attention.gate: relu, model.context: [32, 64]}, set: {optimizer.lr: 0.002}}
skip_if:
  - {optimizer.betas: [0.9, 0.95], optimizer.lr: 7}
seeds: [1, 18446744073709551615]
budget: {tokens: 5.0e+6}
resources: {ranks: 2, at_once: 3}
)",
                                       "a/b/s.yaml", {"train.tokens_per_step=1024"});
  EXPECT_EQ(s.base, "a/base.yaml");
  EXPECT_EQ(s.dir, "runs/x");
  ASSERT_EQ(s.set.size(), 2u);
  EXPECT_EQ(s.set[0].key->path, "model.layers");
  EXPECT_EQ(s.set[1].written, 1024);
  ASSERT_EQ(s.grid.size(), 1u);
  EXPECT_EQ(s.grid[0].values[1].written, "relu2");
  EXPECT_EQ(s.grid[0].values[1].value.place, "a/b/s.yaml:6:26");
  ASSERT_EQ(s.zip.size(), 2u);
  EXPECT_EQ(s.zip[1].values[0].written, 4);
  EXPECT_EQ(s.list[0].name, "softmax");
  EXPECT_EQ(s.overrides[0].condition.terms[1].values.size(), 2u);
  ASSERT_EQ(s.skip_if[0].terms.size(), 2u);
  EXPECT_EQ(s.skip_if[0].terms[0].values.size(), 1u);  // of a key whose value is a list, a list is one value
  EXPECT_EQ(s.seeds, (std::vector<std::uint64_t>{1, 18446744073709551615u}));
  EXPECT_EQ(s.budget.tokens, 5'000'000);
  EXPECT_EQ(s.resources.ranks, 2);
  EXPECT_EQ(s.resources.at_once, 3);
}

TEST_F(SweepFiles, TheFolderIsNamedAfterTheFile) { EXPECT_EQ(parse_sweep_file("base: x.yaml", "a/gates.yaml", {}).dir, "runs/gates"); }

TEST_F(SweepFiles, NamesThatAreNotUtf8AreRefused) {
  const std::string file = (folder / "s\xff.yaml").string();
  try {
    read_sweep_file(file, {});
    FAIL();
  } catch (const ConfigError& e) {
    expect_error(e.what(), file + ": the file's name is not UTF-8");
  }
}

TEST_F(SweepFiles, ConditionsCompareValuesNotText) {
  Config c;
  const auto holds = [&](const std::string& condition) {
    return parse_sweep_file("base: x\nskip_if: [" + condition + "]", "s.yaml", {}).skip_if[0].holds(c);
  };
  EXPECT_TRUE(holds("{optimizer.lr: 1.0e-3}"));
  EXPECT_TRUE(holds("{optimizer.lr: 0.0010}"));
  EXPECT_FALSE(holds("{optimizer.lr: 0.002}"));
  EXPECT_TRUE(holds("{optimizer.lr: [0.002, 0.001]}"));
  EXPECT_FALSE(holds("{optimizer.lr: 0.001, model.layers: 1}"));
  EXPECT_TRUE(holds("{optimizer.betas: [0.9, 0.950]}"));
  EXPECT_TRUE(holds("{attention.pattern: causal}"));
  EXPECT_FALSE(holds("{attention.pattern: {window: {size: 4}}}"));
}

TEST_F(SweepFiles, Mistakes) {
  expect_error(error("grid: {attention.gat: [relu]}"), "s.yaml:2:8: grid: attention.gat: unknown key; nearest valid key \"attention.gate\"");
  expect_error(error("grid: {data.synthetic.mqar.pairs: [2, 4]}"),
               "s.yaml:2:8: grid: data.synthetic.mqar.pairs: no key of its own: \"data.synthetic={mqar: {pairs: 2}}\" sets it");
  expect_error(error("grid: {attention: [relu]}"),
               "s.yaml:2:8: grid: attention: this is a section; expected one of its keys with dots, as attention.score");
  expect_error(error("grid: {attention.gate: relu}"), "s.yaml:2:24: grid: attention.gate: expected a list of values, as [A, B], found relu");
  expect_error(error("grid: {attention.gate: []}"), "expected a list of values, as [A, B], found an empty list");
  expect_error(error("grid: {attention.gate: [relu, rleu2]}"), "s.yaml:2:31: attention.gate: expected relu | relu2", "nearest is \"relu2\"");
  expect_error(error("grid: {train.steps: [5, 0]}"), "s.yaml:2:25: train.steps: expected an integer >= 1", "found 0");
  expect_error(error("grid: [1]"), "grid: expected a map of keys", "found a list");
  expect_error(error("grid: {run.dir: [a, b]}"), "run.dir: every run has a folder of its own");
  expect_error(error("set: {run.seed: 3}"), "s.yaml:2:7: set: run.seed: expected seeds: [1, 2, 3], with each of which every variant runs");
  expect_error(error("seeds: [1, 2]\nskip_if: [{run.seed: 2}]"), "s.yaml:3:12: skip_if[0]: run.seed: expected seeds: [1, 2, 3], with each");
  expect_error(error("gird: {}"), "s.yaml:2:1: gird: unknown key; nearest valid key \"grid\"");
  expect_error(error("zip: {model.layers: [1, 2], model.heads: [1, 2, 4]}"), "s.yaml:2:43", "zip: model.heads",
               "a list of 3 beside model.layers of 2; expected lists of one length");
  expect_error(error("grid: {model.layers: [1]}\nzip: {model.layers: [2]}"), "zip: model.layers: the key stands in grid too");
  expect_error(error("list: [{name: a, set: {}}, {name: a}]"), "s.yaml:2:35: list: the name a stands here a second time");
  expect_error(error("list: [{name: a/b}]"), "s.yaml:2:15: list[0].name: expected the name of a folder", "found \"a/b\"");
  expect_error(error("list: [{name: logs}]"), "logs is the folder of what the runs print");
  expect_error(error("list: [{name: sweep.json}]"), "sweep.json says whose the folder is");
  expect_error(error("list: [{set: {}}]"), "s.yaml:2:8: list[0]: the name is missing: {name: NAME, set: KEYS}");
  expect_error(error("list: [{name: a, sett: {}}]"), "list[0].sett: unknown key; nearest valid key \"set\"");
  expect_error(error("list: {a: {}}"), "list: expected a list, as [{name: softmax");
  expect_error(error("overrides: [{set: {model.layers: 1}}]"), "overrides[0]: if is missing");
  expect_error(error("skip_if: [{}]"), "without keys it would meet every variant, found an empty map");
  expect_error(error("skip_if: [{model.layer: 2}]"), "skip_if[0]: model.layer: unknown key; nearest valid key \"model.layers\"");
  expect_error(error("seeds: [1, 2, 1]"), "s.yaml:2:15: seeds[2]: seed 1 stands here a second time");
  expect_error(error("seeds: 3"), "seeds: expected a list of seeds, as [1, 2, 3], found 3");
  expect_error(error("seeds: [-1]"), "s.yaml:2:9: seeds[0]: expected an integer >= 0");
  expect_error(error("budget: {steps: 5, minutes: 2}"),
               "s.yaml:2:9: budget: expected one of {steps: N}, {tokens: N} and {minutes: M}, found 2 keys; keep one");
  expect_error(error("budget: {}"), "budget: expected one of {steps: N}, {tokens: N} and {minutes: M}, found an empty map");
  expect_error(error("budget: {minutes: 0}"), "budget.minutes: expected a number > 0");
  expect_error(error("budget: {hours: 1}"), "budget.hours: unknown key");
  expect_error(error("budget: {steps: 5}\nset: {train.steps: 7}"), "s.yaml:3:20: train.steps: budget says how long every run is");
  expect_error(error("resources: {rank: 2}"), "resources.rank: unknown key; nearest valid key \"ranks\"");
  expect_error(error("resources: {gpus: 1}"), "resources: gpus 1 with device cpu");
  expect_error(error("resources: {ranks: 2, gpus: 3}"), "gpus 3 are more than ranks 2");
  expect_error(error("", {"model.layer=2"}), "--set: model.layer: unknown key");
  expect_error(error("", {"run.dir=x"}), "--set: run.dir: every run has a folder of its own");
  expect_error(error("grid: {a: [1]}\nseeds: [x]\nfoo: 1"), "3 mistakes in s.yaml:", "grid: a: unknown key", "seeds[0]", "foo: unknown key");
  const auto whole = [](const std::string& yaml) {
    try {
      parse_sweep_file(yaml, "s.yaml", {});
    } catch (const ConfigError& e) {
      return std::string(e.what());
    }
    return std::string();
  };
  expect_error(whole("grid: {}"), "s.yaml: base: the key is missing");
  expect_error(whole("[1, 2]"), "s.yaml:1:1: expected a map of base, grid");
  expect_error(whole(""), "s.yaml: there is no sweep file in it; expected keys like base");
  expect_error(whole("base: [x"), "s.yaml:1:", "this is not YAML");
  expect_error(error("grid: {train.steps: [5, 6]}\n---\nx: 1"), "expected one YAML document, found 2");
}

TEST_F(SweepFiles, WithoutItsBase) {
  try {
    expand_sweep(parse_sweep_file("base: none.yaml", folder / "s.yaml", {}));
    FAIL();
  } catch (const ConfigError& e) {
    expect_error(e.what(), "s.yaml:1:7: base: " + (folder / "none.yaml").string() + ": there is no such file");
  }
}

// Whatever bytes come in, the answer is a sweep or a ConfigError.
TEST_F(SweepFiles, RandomDamageIsAlwaysAConfigError) {
  const std::string sound =
      "grid: {attention.gate: [relu, relu2], optimizer.betas: [[0.9, 0.95], [0.8, 0.9]]}\nzip: {model.layers: [1, 2]}\nlist:\n  - {name: softmax, "
      "set: {attention.gate: softmax}}\noverrides: [{if: {model.layers: 1}, set: {optimizer.lr: 0.1}}]\nskip_if: [{attention.gate: relu}]\nseeds: "
      "[1, 2]\nbudget: {steps: 30}\nresources: {ranks: 2}\n";
  ASSERT_EQ(error(sound), "");
  std::mt19937 random(1);
  const std::string alphabet = "{}[]:,&*!|>'\"%@`-? \n\t#0129.abz\xC3\xA9";
  for (int round = 0; round < 300; ++round) {
    std::string text = sound;
    for (int n = 1 + static_cast<int>(random() % 4); n > 0; --n) {
      const std::size_t at = random() % text.size();
      switch (random() % 3) {
        case 0: text[at] = alphabet[random() % alphabet.size()]; break;
        case 1: text.erase(at, 1 + random() % 8); break;
        default: text.insert(at, 1, alphabet[random() % alphabet.size()]); break;
      }
    }
    try {
      sweep(text);
    } catch (const ConfigError&) {
    } catch (const std::exception& e) {
      FAIL() << e.what() << "\n" << text;
    }
  }
}

}  // namespace
}  // namespace tessera
