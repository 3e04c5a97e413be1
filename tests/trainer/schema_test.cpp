// The table of keys, and attention.pattern.

#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <set>

#include "tests/trainer/config_testing.h"

namespace tessera {
namespace {

using Kind = PatternSpec::Kind;

PatternConfig pattern_of(const std::string& yaml) { return parse_config("attention: {pattern: " + yaml + "}", "x.yaml", {}).model.attention.pattern; }
std::string pattern_error(const std::string& yaml) { return error_of("attention:\n  pattern: " + yaml + "\n"); }

TEST(Schema, EveryKeyIsDocumentedOnce) {
  std::set<std::string> paths;
  for (const auto& key : nlohmann::json::parse(schema_json())) {
    const std::string path = key["path"], meaning = key["meaning"];
    EXPECT_TRUE(paths.insert(path).second) << path;
    EXPECT_GT(meaning.size(), 5u) << path;
    EXPECT_TRUE(meaning.ends_with('.') || meaning.ends_with(')')) << path;
    EXPECT_FALSE(key["type"].get<std::string>().empty()) << path;
    EXPECT_FALSE(key["default"].is_null()) << path;
    EXPECT_NE(schema_text().find("\n" + path + "  ("), path == "run.dir" ? 0 : std::string::npos) << path;
  }
  for (const char* path : {"run.dir",
                           "run.seed",
                           "device",
                           "model.layers",
                           "model.heads",
                           "model.width",
                           "model.context",
                           "model.positions",
                           "model.norm",
                           "model.bias",
                           "model.size",
                           "model.vocabulary",
                           "model.vocabulary_multiple",
                           "attention.score",
                           "attention.gate",
                           "attention.normalizer",
                           "attention.document_mask",
                           "attention.always.self",
                           "attention.always.sinks",
                           "attention.output_gate",
                           "attention.threshold.mode",
                           "attention.threshold.init",
                           "attention.threshold.target_edge_sparsity",
                           "attention.threshold.anneal",
                           "attention.threshold.balance",
                           "attention.pattern",
                           "attention.tile.query",
                           "attention.tile.key",
                           "attention.visit",
                           "data.path",
                           "data.tokenizer",
                           "train.steps",
                           "train.tokens_per_step",
                           "train.micro_batch",
                           "train.precision",
                           "optimizer.lr",
                           "optimizer.betas",
                           "optimizer.eps",
                           "optimizer.weight_decay",
                           "optimizer.clip",
                           "optimizer.warmup",
                           "optimizer.schedule",
                           "eval.every",
                           "eval.batches",
                           "checkpoint.every",
                           "checkpoint.keep",
                           "parallel.sequence",
                           "parallel.exchange",
                           "parallel.layout"})
    EXPECT_TRUE(paths.contains(path)) << path;
}

TEST(Schema, DefaultsPassTheirOwnChecks) {
  for (const auto& key : nlohmann::json::parse(schema_json())) {
    const std::string path = key["path"];
    const std::string value = key["default"].is_string() ? key["default"].get<std::string>() : key["default"].dump();
    EXPECT_EQ(error_of("{}", {path + "=" + value}), "") << path;
  }
}

TEST(Pattern, EveryForm) {
  EXPECT_EQ(pattern_of("causal").base.kind, Kind::causal);
  const PatternSpec window = pattern_of("{window: {size: 256}}").base;
  EXPECT_EQ(window.kind, Kind::window);
  EXPECT_EQ(window.size, 256);
  const PatternSpec strided = pattern_of("{strided: {stride: 8, width: 2}}").base;
  EXPECT_EQ(strided.kind, Kind::strided);
  EXPECT_EQ(strided.size, 8);
  EXPECT_EQ(strided.width, 2);
  const PatternSpec dilated = pattern_of("{dilated: {window: 5, dilation: 3}}").base;
  EXPECT_EQ(dilated.kind, Kind::dilated);
  EXPECT_EQ(dilated.size, 5);
  EXPECT_EQ(dilated.width, 3);
  const PatternSpec global = pattern_of("{global: {tokens: 4}}").base;
  EXPECT_EQ(global.kind, Kind::global);
  EXPECT_EQ(global.size, 4);
  const PatternSpec bigbird = pattern_of("{bigbird: {window: 1, global: 2, random: 3, seed: 18446744073709551615, block: 32}}").base;
  EXPECT_EQ(bigbird.kind, Kind::bigbird);
  EXPECT_EQ(bigbird.size, 1);
  EXPECT_EQ(bigbird.width, 2);
  EXPECT_EQ(bigbird.random, 3);
  EXPECT_EQ(bigbird.seed, 18446744073709551615ull);
  EXPECT_EQ(bigbird.block, 32);
  EXPECT_EQ(pattern_of("{bigbird: {window: 1, global: 2, random: 3}}").base.block, 64);
  const PatternSpec any = pattern_of("{any: [{window: {size: 2}}, {all: [causal, {global: {tokens: 1}}]}]}").base;
  EXPECT_EQ(any.kind, Kind::any);
  ASSERT_EQ(any.children.size(), 2u);
  EXPECT_EQ(any.children[0].kind, Kind::window);
  EXPECT_EQ(any.children[1].kind, Kind::all);
  EXPECT_EQ(any.children[1].children[1].size, 1);
}

TEST(Pattern, BlocksReadTheirFile) {
  const auto file = std::filesystem::temp_directory_path() / ("tessera_blocks_" + std::to_string(::getpid()) + ".txt");
  std::ofstream(file) << "block 16\n10\n11\n";
  const PatternSpec blocks = pattern_of("{blocks: {file: " + file.string() + "}}").base;
  EXPECT_EQ(blocks.kind, Kind::blocks);
  EXPECT_EQ(blocks.file, file.string());
  ASSERT_TRUE(blocks.mask);
  EXPECT_EQ(blocks.mask->block, 16);
  EXPECT_EQ(blocks.mask->rows, 2);

  // A resolved configuration holds what the file held.
  const std::string text = to_yaml(parse_config("attention: {pattern: {blocks: {file: " + file.string() + "}}}", "x.yaml", {}));
  EXPECT_NE(text.find("sha256: d82fe20f"), std::string::npos) << text;
  EXPECT_EQ(to_yaml(parse_config(text, "x.yaml", {})), text);
  std::ofstream(file) << "block 16\r\n10\r\n\r\n11";
  EXPECT_EQ(to_yaml(parse_config(text, "x.yaml", {})), text) << "the same mask";
  std::ofstream(file) << "block 16\n10\n01\n";
  expect_error(error_of(text), "attention.pattern.blocks.sha256: the mask in ", file.string(), "another one", "Put that mask back");
  expect_error(pattern_error("{blocks: {sha256: 00, file: " + file.string() + "}}"), "attention.pattern.blocks.sha256: ", "expected 00");
  std::ofstream(file) << "nonsense\n";
  expect_error(pattern_error("{blocks: {file: " + file.string() + "}}"), "x.yaml:2:28: attention.pattern.blocks.file: ", file.string());
  std::filesystem::remove(file);
  expect_error(pattern_error("{blocks: {file: " + file.string() + "}}"), "attention.pattern.blocks.file: ", file.string());
}

// default < per_layer < per_head < per_head in a per_layer entry, whatever the order in the text.
TEST(Pattern, OverridesGoFromTheGeneralToTheParticular) {
  const PatternConfig p = pattern_of(
      "{per_head: {1: {window: {size: 11}}}, per_layer: {0: {window: {size: 20}}, \"2-3\": {default: {window: {size: 30}}, per_head: {\"1,3\": "
      "{window: {size: 31}}}}, "
      "4: {per_head: {0: {window: {size: 40}}}}}, default: {window: {size: 1}}}");
  const auto size = [&](int layer, int head) { return p.at(layer, head).size; };
  EXPECT_EQ(size(1, 0), 1);
  EXPECT_EQ(size(0, 0), 20);
  EXPECT_EQ(size(0, 1), 11);
  EXPECT_EQ(size(1, 1), 11);
  EXPECT_EQ(size(2, 0), 30);
  EXPECT_EQ(size(3, 1), 31);
  EXPECT_EQ(size(2, 3), 31);
  EXPECT_EQ(size(2, 2), 30);
  EXPECT_EQ(size(4, 0), 40);
  EXPECT_EQ(size(4, 1), 11);
  EXPECT_EQ(size(4, 2), 1);

  // Without a default: causal.
  EXPECT_EQ(pattern_of("{per_layer: {0: {window: {size: 20}}}}").at(1, 0).kind, Kind::causal);

  const Config c = parse_config(
      "attention: {pattern: {default: causal, per_layer: {\"0,2\": {window: {size: 20}}}, per_head: {\"4-7\": {global: {tokens: 4}}}}}", "x", {});
  const Config again = parse_config(to_yaml(c), "x", {});
  EXPECT_EQ(to_yaml(again), to_yaml(c));
  for (int layer = 0; layer < 8; ++layer)
    for (int head = 0; head < 8; ++head)
      EXPECT_EQ(describe(again.model.attention.pattern.at(layer, head)), describe(c.model.attention.pattern.at(layer, head))) << layer << " " << head;
}

TEST(PatternErrors, EachNamesPlaceAndRemedy) {
  expect_error(pattern_error("{windw: {size: 5}}"), "x.yaml:2:13: attention.pattern.windw: unknown key; nearest valid key \"window\"");
  expect_error(pattern_error("windw"), "x.yaml:2:12: attention.pattern: expected a pattern", "found windw; nearest is \"window\"");
  expect_error(pattern_error("window"), "window needs its parameters: {window: {size: N}}");
  expect_error(pattern_error("{window: 5}"), "attention.pattern.window: expected {size: N}, found 5");
  expect_error(pattern_error("{window: {}}"), "attention.pattern.window: size is missing: window: {size: N}");
  expect_error(pattern_error("{window: {size: 0}}"), "x.yaml:2:28: attention.pattern.window.size: expected an integer >= 1", "found 0");
  expect_error(pattern_error("{window: {size: 5, sise: 6}}"), "attention.pattern.window.sise: unknown key; nearest valid key \"size\"");
  expect_error(pattern_error("{window: {size: 5, size: 6}}"), "the key stands here a second time");
  expect_error(pattern_error("{window: {size: 5}, global: {tokens: 2}}"), "expected one pattern, found a map of 2", "any: [...] is the union");
  expect_error(pattern_error("{causal: {}}"), "causal has no parameters");
  expect_error(pattern_error("{any: []}"), "attention.pattern.any: expected a list of patterns", "an empty list");
  expect_error(pattern_error("{any: causal}"), "attention.pattern.any: expected a list of patterns", "found causal");
  expect_error(pattern_error("{any: [causal, {global: {tokens: x}}]}"), "attention.pattern.any[1].global.tokens: expected an integer", "found x");
  expect_error(pattern_error("[causal]"), "attention.pattern: expected a pattern", "found a list");
  expect_error(pattern_error("~"), "attention.pattern: expected a pattern", "found nothing");
  expect_error(pattern_error("{strided: {stride: 4, width: 5}}"), "strided.width 5 is more than strided.stride 4");
  expect_error(pattern_error("{bigbird: {window: 1}}"), "global is missing", "random is missing");
  expect_error(pattern_error("{bigbird: {window: 1, global: 1, random: 1, seed: -1}}"), "attention.pattern.bigbird.seed: expected an integer");
  expect_error(pattern_error("{blocks: {}}"), "file is missing: blocks: {file: PATH}");
  expect_error(pattern_error("{blocks: x}"), "expected {file: PATH}, found x");
  expect_error(pattern_error("{blocks: {path: x}}"), "attention.pattern.blocks.path: unknown key; nearest valid key \"file\"");
  expect_error(error_of("{}", {"attention.pattern={windw: {size: 5}}"}), "--set: attention.pattern.windw: unknown key");
}

TEST(PatternErrors, Overrides) {
  expect_error(pattern_error("{default: causal, per_leyer: {0: causal}}"),
               "attention.pattern.per_leyer: unknown key; nearest valid key \"per_layer\"");
  expect_error(pattern_error("{per_layer: causal}"), "attention.pattern.per_layer: expected a map from layers to patterns", "found causal");
  for (const char* range : {"x", "-1", "3-1", "1-", "1,", "1-2-3", "99999999999", ""})
    expect_error(pattern_error("{per_layer: {\"" + std::string(range) + "\": causal}}"), "expected a layer or a range of layers");
  expect_error(pattern_error("{per_layer: {0-2: causal, 2: {window: {size: 3}}}}"), "attention.pattern.per_layer.2: layer 2 already has a pattern");
  expect_error(pattern_error("{per_head: {\"1,0-3\": causal}}"), "head 1 already has a pattern");
  expect_error(pattern_error("{per_layer: {8: causal}}"),
               "x.yaml:2:12: attention.pattern: there is no layer 8: model.layers is 8, so they are 0 to 7");
  expect_error(pattern_error("{per_head: {5-9: causal}}"), "there is no head 9: model.heads is 8");
  expect_error(pattern_error("{per_layer: {0: {default: causal, per_head: {8: causal}}}}"), "there is no head 8");
  expect_error(pattern_error("{per_layer: {0: {default: causal, per_layer: {0: causal}}}}"), "attention.pattern.per_layer.0.per_layer: unknown key");
  expect_error(pattern_error("{per_layer: {0: {window: {size: 0}}}}"), "attention.pattern.per_layer.0.window.size: expected an integer >= 1");
}

// Aliases can make a short text that means a very long or an endless one.
TEST(PatternErrors, BombsAreRefused) {
  expect_error(error_of("attention:\n  pattern: &p\n    any: [*p]\n"), "patterns nest at most 16 deep");
  std::string bomb = "attention:\n  pattern:\n    any:\n      - any: &a0 [causal, causal, causal, causal, causal, causal, causal, causal]\n";
  for (int i = 1; i < 12; ++i) {
    const std::string inner = "{any: *a" + std::to_string(i - 1) + "}";
    bomb += "      - any: &a" + std::to_string(i) + " [";
    for (int k = 0; k < 8; ++k) bomb += (k ? ", " : "") + inner;
    bomb += "]\n";
  }
  expect_error(error_of(bomb), "and are at most 4096");
}

}  // namespace
}  // namespace tessera
