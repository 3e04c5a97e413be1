// Every mistake in a configuration has one message with its place, its key and what would be right.

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <random>

#include "tests/trainer/config_testing.h"

namespace tessera {
namespace {

namespace fs = std::filesystem;

TEST(ConfigErrors, UnknownKeysNameTheNearest) {
  expect_error(error_of("train:\n  stpes: 5\n"), "x.yaml:2:3: train.stpes: unknown key; nearest valid key \"train.steps\"");
  expect_error(error_of("optimiser: {lr: 1}\n"), "x.yaml:1:1: optimiser: unknown key; nearest valid key \"optimizer\"");
  expect_error(error_of("train: {lr: 1}\n"), "x.yaml:1:9: train.lr: unknown key; nearest valid key \"optimizer.lr\"");
  expect_error(error_of("attention: {tile: {qurey: 16}}\n"), "attention.tile.qurey", "\"attention.tile.query\"");
  expect_error(error_of("devcie: cpu\n"), "\"device\"");
  expect_error(error_of("{}", {"train.stpes=5"}), "--set: train.stpes: unknown key; nearest valid key \"train.steps\"");
  expect_error(error_of("{}", {"layers=5"}), "\"model.layers\"");
  expect_error(error_of(std::string(1000, 'k') + ": 1\n"), "unknown key");
  expect_error(error_of("train.steps: 5\n"), "x.yaml:1:1: train.steps: dots are for --set");
}

TEST(ConfigErrors, PartsOfAKeyWhoseValueIsAMap) {
  expect_error(error_of("{}", {"data.synthetic.mqar.pairs=2"}),
               "--set: data.synthetic.mqar.pairs: no key of its own: \"data.synthetic={mqar: {pairs: 2}}\" sets it");
  expect_error(error_of("{}", {"data.synthetic.needle.distances=[16, 64]"}), "\"data.synthetic={needle: {distances: [16, 64]}}\"");
  expect_error(error_of("{}", {"attention.pattern.window.size=8"}), "\"attention.pattern={window: {size: 8}}\"");
  // What is said to do can be done.
  EXPECT_EQ(load_config("", {"data.synthetic={mqar: {pairs: 2}}"}).data.synthetic->pairs, 2);
  // What is wrong with the part comes first.
  expect_error(error_of("{}", {"data.synthetic.mqar.pears=2"}), "--set: data.synthetic.mqar.pears: mqar has no such parameter; nearest is \"pairs\"");
  expect_error(error_of("{}", {"data.synthetic.mqar.pairs=0"}), "--set: data.synthetic.mqar.pairs: expected an integer >= 1");
  expect_error(error_of("{}", {"train.steps.more=2"}), "--set: train.steps: expected an integer >= 1", "found a map");
  expect_error(error_of("train: {steps.more: 2}"), "x.yaml:1:21: train.steps: expected an integer >= 1", "found a map");
}

TEST(ConfigErrors, WrongTypes) {
  expect_error(error_of("train: {steps: abc}"), "x.yaml:1:16: train.steps: expected an integer >= 1 and <= 1000000000, found abc");
  expect_error(error_of("train: {steps: \"5\"}"), "train.steps: expected an integer", "found the text \"5\"");
  expect_error(error_of("train: {steps: 5.0}"), "train.steps: expected an integer", "found 5.0");
  expect_error(error_of("train: {steps: 1e3}"), "found 1e3");
  expect_error(error_of("train: {steps: 010}"), "expected an integer", "found 010");  // eight or ten: YAML 1.1 and 1.2 differ
  expect_error(error_of("train: {steps: 0x10}"), "found 0x10");
  expect_error(error_of("optimizer: {lr: 010}"), "expected a number", "found 010");
  expect_error(error_of("attention: {threshold: {init: +-1}}"), "found +-1");
  EXPECT_EQ(parse_config("attention: {threshold: {init: +0.5}}", "x.yaml", {}).model.attention.threshold.init, 0.5f);
  EXPECT_EQ(parse_config("attention: {threshold: {init: -0.5}}", "x.yaml", {}).model.attention.threshold.init, -0.5f);
  expect_error(error_of("train: {<<: {steps: 5}}"), "x.yaml:1:9: train.<<: merge keys are not supported; write the keys out");
  expect_error(error_of("data: {tokenizer: klingon}"), "x.yaml:1:", "data.tokenizer: expected bytes, gpt2, bpe, gpt2:DIR or bpe:FILE", "klingon");
  expect_error(error_of("data: {tokenizer: \"bpe:\"}"), "data.tokenizer: expected");
  EXPECT_EQ(error_of("data: {tokenizer: \"bpe:my.json\"}"), "");
  expect_error(error_of("train: {steps: [1]}"), "found a list");
  expect_error(error_of("train: {steps: {a: 1}}"), "found a map");
  expect_error(error_of("train: {steps: !!int 5}"), "found a value tagged");
  expect_error(error_of("train: {steps: !mine 5}"), "found a value tagged !mine");
  expect_error(error_of("train: !mine {steps: 5}"), "x.yaml:1:8: train: the tag !mine has no meaning here; leave it out");
  expect_error(error_of("!mine {train: {steps: 5}}"), "x.yaml:1:1: the tag !mine has no meaning here");
  expect_error(error_of("optimizer: {betas: !mine [0.9, 0.95]}"), "optimizer.betas: the tag !mine has no meaning here");
  expect_error(error_of("attention: {pattern: {any: !set [causal, causal]}}"), "attention.pattern.any: the tag !set has no meaning here");
  expect_error(error_of("attention: {pattern: {window: !mine {size: 5}}}"), "attention.pattern.window: the tag !mine has no meaning here");
  EXPECT_EQ(error_of("train: !!map {steps: 200}"), "");
  EXPECT_EQ(error_of("optimizer: {betas: !!seq [0.9, 0.95]}"), "");
  expect_error(error_of("model: {bias: yes}"), "model.bias: expected true or false, found yes");
  expect_error(error_of("model: {bias: \"true\"}"), "found the text \"true\"");
  expect_error(error_of("optimizer: {lr: fast}"), "optimizer.lr: expected a number > 0 and <= 100, found fast");
  expect_error(error_of("run: {dir: [a]}"), "run.dir: expected a text, found a list");
  expect_error(error_of("attention: {gate: relu3}"), "attention.gate: expected relu | relu2 | relu4 | softmax, found relu3; nearest is \"relu");
  expect_error(error_of("train: {recompute: gelu}"), "train.recompute: expected none | gelu+norm | block, found gelu; nearest is \"gelu+norm\"");
  expect_error(error_of("train: 5"), "x.yaml:1:8: train: expected a map of keys, found 5");
  expect_error(error_of("- a\n- b\n"), "x.yaml:1:1: expected a map of keys, found a list");
  expect_error(error_of("words"), "x.yaml:1:1: expected a map of keys, found words");
  expect_error(error_of("? [a, b]\n: 1\n"), "expected a key, found a list");
  expect_error(error_of("optimizer: {betas: 0.9}"), "optimizer.betas: expected a list of two numbers, as [0.9, 0.95], found 0.9");
  expect_error(error_of("optimizer: {betas: [0.9]}"), "found a list of 1");
  expect_error(error_of("optimizer: {betas: [0.9, x]}"), "x.yaml:1:26: optimizer.betas[1]: expected a number", "found x");
}

TEST(ConfigErrors, Ranges) {
  for (const char* set : {"train.steps=0",
                          "train.steps=-1",
                          "train.steps=99999999999999999999",
                          "run.seed=-1",
                          "run.seed=18446744073709551616",
                          "optimizer.lr=0",
                          "optimizer.lr=nan",
                          "optimizer.lr=inf",
                          "optimizer.lr=1e400",
                          "optimizer.betas=[0.9, 1]",
                          "attention.threshold.target_edge_sparsity=1",
                          "attention.threshold.target_edge_sparsity=-0.1",
                          "attention.tile.query=20",
                          "attention.tile.key=8",
                          "attention.tile.key=136",
                          "model.context=0",
                          "run.dir=",
                          "train.recompute=some",
                          "parallel.bucket_mib=0",
                          "parallel.bucket_mib=1.5",
                          "parallel.deadline=0",
                          "parallel.deadline=-1",
                          "parallel.share_gpu=yes",
                          "train.steps=0x10",
                          "train.steps=1_000",
                          "train.steps=--5"}) {
    const std::string path = std::string(set).substr(0, std::string(set).find('='));
    expect_error(error_of("{}", {set}), "--set: " + path, "expected ");
  }
}

TEST(ConfigErrors, NullsAndDuplicates) {
  expect_error(error_of("train:\n  steps:\n"), "x.yaml:2:3: train.steps: expected an integer", "found nothing (null)");
  expect_error(error_of("run: {dir: ~}"), "run.dir: expected a text, found nothing (null)");
  expect_error(error_of("train:\n"), "x.yaml:1:1: train: expected a map of keys, found nothing (null)");
  expect_error(error_of("train:\n  steps: 5\n  steps: 6\n"), "x.yaml:3:3: train.steps: the key stands here a second time");
  expect_error(error_of("run: {seed: 1}\nrun: {seed: 2}\n"), "x.yaml:2:1: run: the key stands here a second time");
}

TEST(ConfigErrors, NotYaml) {
  expect_error(error_of("train: {steps: 5\n"), "x.yaml:2:1: this is not YAML");
  expect_error(error_of("a: b: c\n"), "x.yaml:1:5: this is not YAML");
  expect_error(error_of("\tx: 1\n"), "x.yaml:1:", "not YAML");
  expect_error(error_of("a: *nowhere\n"), "x.yaml:1:", "not YAML");
  expect_error(error_of(""), "x.yaml: there is no configuration in it");
  expect_error(error_of("# only a comment\n"), "x.yaml: there is no configuration in it");
  expect_error(error_of("train: {steps: 5}\n---\nrun: {seed: 1}\n"), "x.yaml:3:1: expected one YAML document, found 2");
  expect_error(error_of("run: {dir: \xff}\n"), "x.yaml:1:12: byte 0xff is not text");
  expect_error(error_of(std::string("a: 1\nb\0: 2\n", 10)), "x.yaml:2:2: byte 0x00 is not text");
  expect_error(error_of("run: {dir: \"a\\0b\"}\n"), "run.dir: expected text in UTF-8 without control characters");
  expect_error(error_of("run: {seed: " + std::string(3000, '[') + std::string(3000, ']') + "}"), "x.yaml:1:", "nested too deeply");
  expect_error(error_of(std::string(2 << 20, ' ')), "more than 1048576 bytes");
}

TEST(ConfigErrors, BadSets) {
  expect_error(error_of("{}", {"train.steps"}), "--set train.steps: expected key=value");
  expect_error(error_of("{}", {"=5"}), "expected key=value");
  expect_error(error_of("{}", {"train.steps="}), "train.steps: expected an integer", "found an empty text");
  expect_error(error_of("{}", {"train=5"}), "--set: train: expected a map of keys, found 5");
  expect_error(error_of("{}", {"optimizer.betas=[0.9"}), "--set: optimizer.betas: the value is not YAML");
  expect_error(error_of("{}", {"train.steps=5\n---\n6"}), "train.steps: expected one YAML value, found 2");
  expect_error(error_of("{}", {"run.dir=\xff"}), "byte 0xff is not text");
}

TEST(ConfigErrors, AllAreReportedAtOnce) {
  const std::string message = error_of("train: {stpes: 5, micro_batch: 0}\nmodel: {width: x}\n", {"foo.bar=1"});
  expect_error(message, "4 mistakes in the configuration:", "train.stpes", "train.micro_batch", "model.width", "foo.bar");
  std::string many = "train:\n";
  for (int i = 0; i < 100; ++i) many += "  unknown" + std::to_string(i) + ": 1\n";
  expect_error(error_of(many), "100 mistakes", "and 80 more");
}

TEST(ConfigErrors, CrossChecks) {
  expect_error(error_of("model:\n  heads: 7\n"),
               "x.yaml:2:10: model.heads: model.width 512 / model.heads 7 is a head size of 73.1429; expected a multiple of 8 up to 256",
               "heads that fit this width: 2, 4, 8, 16, 32, 64", "widths that fit 7 heads: 504 or 560");
  expect_error(error_of("model: {heads: 8, width: 96}"), "head size of 12", "heads that fit this width: 1, 2, 3, 4, 6, 12;", "64 or 128");
  expect_error(error_of("model: {heads: 1, width: 100}"), "head size of 100; expected a multiple of 8 up to 256; widths that fit 1 head: 96 or 104");
  expect_error(error_of("model: {heads: 1, width: 512}"), "head size of 512", "widths that fit 1 head: at most 256");
  expect_error(error_of("train: {tokens_per_step: 1000}"), "x.yaml:1:26: train.tokens_per_step",
               "model.context 1024 x train.micro_batch 4 = 4096; expected 4096");
  expect_error(error_of("model: {context: 1000}"), "x.yaml:1:18: model.context: train.tokens_per_step 65536", "expected 64000 or 68000");
  expect_error(error_of("optimizer: {warmup: 50}\ntrain: {steps: 50}"), "optimizer.warmup 50 leaves nothing of train.steps 50");
  expect_error(error_of("optimizer: {schedule: wsd, decay: 0.95}"), "optimizer.warmup 100 and a decay of 0.95 x 1000 steps overlap", "at most 0.9");
  expect_error(error_of("train: {precision: bf16}"), "x.yaml:1:20: train.precision: the cpu computes in fp32",
               "expected train.precision auto or fp32, or device cuda");
  expect_error(error_of("device: cuda\ntrain: {precision: fp32}"), "x.yaml:2:20: train.precision: a GPU computes in bf16", "auto or bf16");
  expect_error(error_of("device: cuda\nattention: {tile: {query: 32, key: 128}}"), "2 mistakes",
               "x.yaml:2:27: attention.tile.query: device cuda computes tiles of 64 x 64; expected attention.tile.query 64, found 32",
               "attention.tile.key: device cuda computes tiles of 64 x 64; expected attention.tile.key 64, found 128");
  expect_error(
      error_of("device: cuda\nmodel: {heads: 16}"),
      "x.yaml:2:16: model.heads: model.width 512 / model.heads 16 is a head size of 32; expected 64 or 128 with device cuda: model.heads 8 or 4");
  expect_error(error_of("device: cuda\nmodel: {heads: 1, width: 192}"), "a head size of 192", "model.heads 3");
  expect_error(error_of("device: cuda\nmodel: {heads: 1, width: 96}"), "a head size of 96", "model.heads 1 with model.width 64 or 128");
  expect_error(error_of("device: cuda\nmodel: {vocabulary_multiple: 1}"), "model.vocabulary_multiple", "expected a multiple of 8, found 1");
  expect_error(error_of("parallel: {sequence: 2}\nsample: {every: 5}"), "x.yaml:2:17: sample.every", "holds no whole sequence",
               "expected sample.every 0");
  expect_error(error_of("attention: {score: dot, threshold: {mode: length}}"), "attention.threshold.mode: mode length",
               "expected attention.score cosine");
  expect_error(error_of("attention: {score: fidelity, threshold: {init: 1}}"), "attention.threshold.init",
               "expected a threshold >= 0 and < 1, found 1");
  expect_error(error_of("attention: {score: fidelity, threshold: {balance: 0.1}}"),
               "x.yaml:1:51: attention.threshold.balance: score fidelity has no balance: expected 0 with it", "found 0.1");
  EXPECT_EQ(error_of("attention: {score: fidelity}"), "");
  EXPECT_EQ(error_of("attention: {score: fidelity, threshold: {mode: fixed, balance: 0.1}}"), "");
  expect_error(error_of("attention: {threshold: {balance: 1.5}}"), "attention.threshold.balance: expected", "found 1.5");
  expect_error(error_of("attention: {normalizer: rms, always: {self: true}}"), "x.yaml:1:45: attention.always.self: the edge to oneself joins a sum",
               "expected attention.normalizer sum with it, found rms");
  expect_error(error_of("attention: {normalizer: rms, always: {sinks: 2}}"), "x.yaml:1:46: attention.always.sinks: sinks join a sum of weights",
               "expected attention.normalizer sum with it, found rms, or attention.always.sinks 0");
  expect_error(error_of("attention: {normalizer: none, always: {sinks: 2, self: true}}"), "attention.always.self: the edge to oneself joins a sum",
               "or attention.always.self false and attention.always.sinks 0");
  expect_error(error_of("attention: {always: {sinks: 9}}"), "attention.always.sinks: expected", "found 9");
  expect_error(error_of("attention: {always: {sinks: -1}}"), "attention.always.sinks: expected", "found -1");
  expect_error(error_of("attention: {always: {sinks: true}}"), "attention.always.sinks: expected", "found true");
  expect_error(error_of("attention: {always: {self: 1}}"), "attention.always.self: expected true or false, found 1");
  // Fewer edges a query than the one to itself: what helps depends on why.
  const std::string self = "model: {context: 64}\nattention: {always: {self: true}, threshold: {target_edge_sparsity: 0.95, head_spread: ";
  expect_error(error_of(self + "4}}"), "x.yaml:2:28: attention.always.self: target_edge_sparsity 0.95 leaves a query", "expected a target below 0.9");
  expect_error(error_of(self + "1000}}"), "leaves a query 0.01 edges at context 64",
               "expected a smaller attention.threshold.head_spread, model.context of at least");
  expect_error(error_of("model: {context: 1}\nattention: {always: {self: true}}"), "at context 1, and", "expected model.context of at least");
  expect_error(error_of("attention: {always: {self: true}, threshold: {target_edge_sparsity: 0.9966}}\nmodel: {context: 512}"),
               "a target below 0.996", "model.context of at least 588, or attention.always.self false");
  expect_error(error_of("attention: {output_gate: sigmoid}"), "attention.output_gate: expected true or false, found sigmoid");
  expect_error(error_of("attention: {always: true}"), "attention.always");
  expect_error(error_of("attention: {always: {self: true}}\nparallel: {sequence: 2, exchange: heads}"),
               "x.yaml:2:35: parallel.exchange: exchange heads", "expected exchange needed or ring, or attention.always.self false");
  expect_error(error_of("attention: {always: {sinks: 1}}\nparallel: {sequence: 2, exchange: heads}"),
               "x.yaml:2:35: parallel.exchange: exchange heads", "where attention.always.sinks does not reach it", "or attention.always.sinks 0");
  EXPECT_EQ(error_of("attention: {gate: softmax, always: {self: true}}\nparallel: {sequence: 2, exchange: heads}"), "");
  const std::vector<std::string> longest = {"model.context=1048576", "train.tokens_per_step=4194304", "attention.tile.query=16",
                                            "attention.tile.key=16"};
  expect_error(error_of("{}", longest), "--set: model.context: attention.pattern over model.context 1048576 has up to 2.1e+09 tiles of 16 x 16");
  auto windowed = longest;
  for (const char* narrow : {"{window: {size: 512}}", "{any: [{dilated: {window: 64, dilation: 4}}, {global: {tokens: 4}}]}",
                             "{all: [causal, {window: {size: 512}}]}", "{bigbird: {window: 3, global: 1, random: 3}}"}) {
    windowed.push_back(std::string("attention.pattern=") + narrow);
    EXPECT_EQ(error_of("{}", windowed), "");
  }
  // Several at once, too.
  expect_error(error_of("model: {heads: 7}\ntrain: {precision: bf16}"), "2 mistakes", "model.heads", "train.precision");
}

class ConfigFiles : public testing::Test {
 protected:
  fs::path folder = fs::temp_directory_path() / ("tessera_config_" + std::to_string(::getpid()));
  void SetUp() override { fs::create_directories(folder); }
  void TearDown() override { fs::remove_all(folder); }
  std::string error(const fs::path& file) {
    try {
      load_config(file, {});
    } catch (const ConfigError& e) {
      return e.what();
    }
    return "";
  }
  fs::path write(const std::string& text) {
    std::ofstream(folder / "c.yaml", std::ios::binary) << text;
    return folder / "c.yaml";
  }
};

TEST_F(ConfigFiles, FilesThatAreNoConfiguration) {
  expect_error(error(folder / "none.yaml"), "none.yaml: there is no such file");
  expect_error(error(folder), folder.string() + ": this is a folder");
  expect_error(error(write("")), "c.yaml: there is no configuration in it");
  expect_error(error(write(std::string("\x7f"
                                       "ELF\2\1\1\0\0",
                                       9))),
               "c.yaml:1:1: byte 0x7f is not text");
  const fs::path big = write("");
  fs::resize_file(big, 100'000'000);
  expect_error(error(big), "c.yaml: more than 1048576 bytes");
  if (::geteuid() != 0) {
    const fs::path closed = write("{}");
    fs::permissions(closed, fs::perms::none);
    expect_error(error(closed), "c.yaml: cannot be opened: ");
  }
}

TEST_F(ConfigFiles, ByteOrderMarkAndWindowsLineEnds) { EXPECT_EQ(load_config(write("\xEF\xBB\xBFtrain:\r\n  steps: 5\r\n"), {}).train.steps, 5); }

// Whatever bytes come in, the answer is a configuration or a ConfigError.
TEST(ConfigErrors, RandomDamageIsAlwaysAConfigError) {
  const std::string sound =
      "run: {dir: &d \"x\", seed: 3}\nmodel:\n  layers: 2\n  heads: 2\n  width: 32\nattention:\n  pattern: {default: causal, per_layer: {0: {any: "
      "[{window: "
      "{size: 5}}, {global: {tokens: 2}}]}, \"1\": {bigbird: {window: 1, global: 1, random: 1}}}}\n  threshold: {mode: fixed}\noptimizer: {betas: "
      "[0.9, 0.95]}\n";
  ASSERT_EQ(error_of(sound), "");
  std::mt19937 random(1);
  const std::string alphabet = "{}[]:,&*!|>'\"%@`-? \n\t#0129.abz\xC3\xA9";
  for (int round = 0; round < 5000; ++round) {
    std::string text = sound;
    for (int n = 1 + static_cast<int>(random() % 4); n > 0; --n) {
      const std::size_t at = random() % text.size();
      switch (random() % 4) {
        case 0: text[at] = alphabet[random() % alphabet.size()]; break;
        case 1: text.erase(at, 1 + random() % 8); break;
        case 2: text.insert(at, 1, alphabet[random() % alphabet.size()]); break;
        default: text.insert(at, text.substr(random() % text.size(), random() % 30)); break;
      }
      if (text.empty()) text.push_back(' ');
    }
    try {
      parse_config(text, "x.yaml", {});
    } catch (const ConfigError& e) {
      ASSERT_STRNE(e.what(), "") << text;
    } catch (const std::exception& e) {
      FAIL() << e.what() << "\n" << text;
    }
  }
}

}  // namespace
}  // namespace tessera
