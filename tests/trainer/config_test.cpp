// Reading, writing and resolving configurations.

#include "trainer/config.h"

#include <fmt/core.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <random>

#include "tests/trainer/config_testing.h"

namespace tessera {
namespace {

TEST(Config, DefaultsLoadAndAreTheStructs) {
  const Config c = load_config("", {});
  const Config d;
  EXPECT_EQ(c.run.dir, d.run.dir);
  EXPECT_EQ(c.train.tokens_per_step, d.train.tokens_per_step);
  EXPECT_EQ(c.optimizer.warmup, d.optimizer.warmup);
  EXPECT_EQ(c.model.attention.threshold.mode, d.model.attention.threshold.mode);
  EXPECT_TRUE(c.notices.empty());
  EXPECT_EQ(to_yaml(parse_config("{}", "x", {})), to_yaml(c));
}

// Every key with a value that is not its default, against the members by name: the table's pointers cannot be crossed.
TEST(Config, EveryKeyReachesItsMember) {
  const char* const yaml = R"(
run: {dir: a/b, seed: 18446744073709551615, init: c/d, threads: 3, peak_tflops: 1.5}
device: cpu
model:
  {size: custom, layers: 3, heads: 5, width: 120, context: 96, mlp_ratio: 2, positions: learned, rotary_base: 500, norm: layernorm, bias: true,
   vocabulary: 1000, vocabulary_multiple: 48}
attention:
  {score: fidelity, gate: relu4, normalizer: length, length_alpha: 0.5, epsilon: 1e-5, scale_init: 3, scale_learned: false, document_mask: true,
   threshold: {mode: learned, init: 0.25, target_edge_sparsity: 0.9966, anneal: 0.3, anneal_from: 0.6, rate: 0.01, balance: 0.03, beta: 0.7},
   pattern: {window: {size: 7}}, tile: {query: 32, key: 16}, visit: all}
data: {path: some/data, tokenizer: bytes, prefetch: 2}
train: {steps: 77, tokens_per_step: 1152, micro_batch: 6, precision: fp32, recompute: gelu+norm, max_nonfinite: 5}
optimizer: {lr: 2e-4, betas: [0.8, 0.99], eps: 1e-7, weight_decay: 0.2, clip: 0, warmup: 4, schedule: wsd, final_lr: 0.05, decay: 0.4}
eval: {every: 11, batches: 12}
checkpoint: {every: 13, keep: 14}
sample: {every: 15, prompt: "It is: 5", tokens: 16, temperature: 0.1, top_k: 17}
log: {every: 18, heads_every: 19}
tensorboard: {enabled: false, histogram_every: 20}
parallel: {sequence: 1, exchange: ring, layout: zigzag, bucket_mib: 7, deadline: 12.5, share_gpu: true}
)";
  const Config c = parse_config(yaml, "test.yaml", {});
  EXPECT_EQ(c.run.dir, "a/b");
  EXPECT_EQ(c.run.seed, 18446744073709551615ull);
  EXPECT_EQ(c.run.init, "c/d");
  EXPECT_EQ(c.run.threads, 3);
  EXPECT_EQ(c.run.peak_tflops, 1.5);
  EXPECT_EQ(c.device, "cpu");
  EXPECT_EQ(c.model.layers, 3);
  EXPECT_EQ(c.model.heads, 5);
  EXPECT_EQ(c.model.width, 120);
  EXPECT_EQ(c.model.context, 96);
  EXPECT_EQ(c.model.mlp_ratio, 2);
  EXPECT_EQ(c.model.positions, Positions::learned);
  EXPECT_EQ(c.model.rotary_base, 500);
  EXPECT_EQ(c.model.norm, NormKind::layernorm);
  EXPECT_TRUE(c.model.bias);
  EXPECT_EQ(c.model.vocabulary, 1000);
  EXPECT_EQ(c.vocabulary_multiple, 48);
  EXPECT_EQ(c.model.vocabulary_padded, 1008);
  const AttentionConfig& a = c.model.attention;
  EXPECT_EQ(a.score, Score::fidelity);
  EXPECT_EQ(a.gate, Gate::relu4);
  EXPECT_EQ(a.normalizer, Normalizer::length);
  EXPECT_EQ(a.length_alpha, 0.5f);
  EXPECT_EQ(a.epsilon, 1e-5f);
  EXPECT_EQ(a.scale_init, 3.0f);
  EXPECT_FALSE(a.scale_learned);
  EXPECT_TRUE(a.document_mask);
  EXPECT_EQ(a.threshold.mode, ThresholdMode::learned);
  EXPECT_EQ(a.threshold.init, 0.25f);
  EXPECT_EQ(a.threshold.target_edge_sparsity, 0.9966);
  EXPECT_EQ(a.threshold.anneal, 0.3);
  EXPECT_EQ(a.threshold.anneal_from, 0.6);
  EXPECT_EQ(a.threshold.rate, 0.01f);
  EXPECT_EQ(a.threshold.balance, 0.03f);
  EXPECT_EQ(a.threshold.beta, 0.7f);
  EXPECT_EQ(a.pattern.base.kind, PatternSpec::Kind::window);
  EXPECT_EQ(a.pattern.base.size, 7);
  EXPECT_EQ(a.tile_query, 32);
  EXPECT_EQ(a.tile_key, 16);
  EXPECT_EQ(a.visit, Visit::all);
  EXPECT_EQ(c.data.path, "some/data");
  EXPECT_EQ(c.data.tokenizer, "bytes");
  EXPECT_EQ(c.data.prefetch, 2);
  EXPECT_EQ(c.train.steps, 77);
  EXPECT_EQ(c.train.tokens_per_step, 1152);
  EXPECT_EQ(c.train.micro_batch, 6);
  EXPECT_EQ(c.train.precision, Precision::fp32);
  EXPECT_EQ(c.train.recompute, Recompute::gelu_norm);
  EXPECT_EQ(c.train.max_nonfinite, 5);
  EXPECT_EQ(c.optimizer.lr, 2e-4);
  EXPECT_EQ(c.optimizer.beta1, 0.8);
  EXPECT_EQ(c.optimizer.beta2, 0.99);
  EXPECT_EQ(c.optimizer.eps, 1e-7);
  EXPECT_EQ(c.optimizer.weight_decay, 0.2);
  EXPECT_EQ(c.optimizer.clip, 0);
  EXPECT_EQ(c.optimizer.warmup, 4);
  EXPECT_EQ(c.optimizer.schedule, Schedule::wsd);
  EXPECT_EQ(c.optimizer.final_lr, 0.05);
  EXPECT_EQ(c.optimizer.decay, 0.4);
  EXPECT_EQ(c.eval.every, 11);
  EXPECT_EQ(c.eval.batches, 12);
  EXPECT_EQ(c.checkpoint.every, 13);
  EXPECT_EQ(c.checkpoint.keep, 14);
  EXPECT_EQ(c.sample.every, 15);
  EXPECT_EQ(c.sample.prompt, "It is: 5");
  EXPECT_EQ(c.sample.tokens, 16);
  EXPECT_EQ(c.sample.temperature, 0.1);
  EXPECT_EQ(c.sample.top_k, 17);
  EXPECT_EQ(c.log.every, 18);
  EXPECT_EQ(c.log.heads_every, 19);
  EXPECT_FALSE(c.tensorboard.enabled);
  EXPECT_EQ(c.tensorboard.histogram_every, 20);
  EXPECT_EQ(c.parallel.sequence, 1);
  EXPECT_EQ(c.parallel.exchange, SequenceExchange::ring);
  EXPECT_EQ(c.parallel.layout, SequenceLayout::zigzag);
  EXPECT_EQ(c.parallel.bucket_mib, 7);
  EXPECT_EQ(c.parallel.deadline, 12.5);
  EXPECT_TRUE(c.parallel.share_gpu);
  EXPECT_EQ(to_yaml(parse_config(to_yaml(c), "again", {})), to_yaml(c));
}

// A stored configuration has every key of its time: what is missing is younger, and had no part in that run.
TEST(Config, AStoredOneGoesWithoutWhatIsYounger) {
  const std::string mode = "attention: {threshold: {mode: controlled, target_edge_sparsity: 0.9}}\n";
  EXPECT_EQ(parse_config(mode, "x", {}).model.attention.threshold.balance, 0.1f);
  EXPECT_EQ(parse_stored_config(mode, "x").model.attention.threshold.balance, 0.0f);
  const Config now = parse_config(mode, "x", {"attention.threshold.balance=0.25"});
  EXPECT_EQ(to_yaml(parse_stored_config(to_yaml(now), "x")), to_yaml(now));
}

TEST(Config, SetsComeAfterTheFileAndTheLastCounts) {
  const std::string yaml = "train: {steps: 10}\nmodel: {bias: true}\n";
  const Config c =
      parse_config(yaml, "x.yaml", {"train.steps=20", "train.steps=30", "optimizer.betas=[0.5, 0.6]", "attention.pattern={window: {size: 256}}"});
  EXPECT_EQ(c.train.steps, 30);
  EXPECT_TRUE(c.model.bias);
  EXPECT_EQ(c.optimizer.beta1, 0.5);
  EXPECT_EQ(c.optimizer.beta2, 0.6);
  EXPECT_EQ(describe(c.model.attention.pattern.base), "window{256}");
  // A section sets the keys it names and leaves the others.
  const Config s = parse_config(yaml, "x.yaml", {"train={micro_batch: 8}"});
  EXPECT_EQ(s.train.steps, 10);
  EXPECT_EQ(s.train.micro_batch, 8);
}

TEST(Config, SetTakesTextAsItStands) {
  EXPECT_EQ(load_config("", {"sample.prompt=Once: {upon} a #time"}).sample.prompt, "Once: {upon} a #time");
  EXPECT_EQ(load_config("", {"sample.prompt='quoted: it'"}).sample.prompt, "quoted: it");
  EXPECT_EQ(load_config("", {"sample.prompt=\"two\\nlines\""}).sample.prompt, "two\nlines");
  EXPECT_EQ(load_config("", {"data.path="}).data.path, "");
  EXPECT_EQ(load_config("", {"run.dir=a=b"}).run.dir, "a=b");
}

TEST(Config, TextSurvivesWriting) {
  for (const std::string text : {"no",  "null", "~",        "12",   "1e3",   "a: b", "- x", "#c", "'q'", "\"d\"", "tab\there", "two\nlines",
                                 "{x}", "[y",   "grüße 字", "a\\b", " lead", "true", "*a",  "&a", "!t",  "%d",    "@",         "-"}) {
    Config c = load_config("", {});
    c.sample.prompt = text;
    EXPECT_EQ(parse_config(to_yaml(c), "x", {}).sample.prompt, text) << to_yaml(c);
  }
}

TEST(Config, AnchorsAndQuotedTextAreYaml) {
  const Config c = parse_config("run: {dir: &d \"x y\"}\ndata: {path: *d}\n", "x", {});
  EXPECT_EQ(c.run.dir, "x y");
  EXPECT_EQ(c.data.path, "x y");
}

TEST(Config, NamedSizes) {
  const Config c = load_config("", {"model.size=gpt2-large"});
  EXPECT_EQ(c.model.layers, 36);
  EXPECT_EQ(c.model.heads, 20);
  EXPECT_EQ(c.model.width, 1280);
  EXPECT_EQ(load_config("", {"model.size=gpt2"}).model.width, 768);
  EXPECT_EQ(load_config("", {"model.size=gpt2-medium"}).model.layers, 24);
  EXPECT_EQ(load_config("", {"model.size=gpt2-xl", "model.heads=25"}).model.heads, 25);
  EXPECT_EQ(to_yaml(parse_config(to_yaml(c), "x", {})), to_yaml(c));
  expect_error(error_of("model: {size: gpt2, layers: 6}"), "x.yaml:1:29: model.layers: model.size: gpt2 means 12, found 6");
}

TEST(Config, SaysWhatAnotherThresholdModeHasNoUseFor) {
  const auto notices = [](const char* threshold) {
    return parse_config(std::string("attention: {threshold: {") + threshold + "}}", "x", {}).notices;
  };
  using Notices = std::vector<std::string>;
  EXPECT_EQ(notices("mode: fixed, init: 0.5"), Notices{});
  EXPECT_EQ(notices("target_edge_sparsity: 0.9, anneal: 0.2, anneal_from: 0.4, head_spread: 2, rate: 0.1, balance: 0.2"), Notices{});
  EXPECT_EQ(notices("mode: fixed, target_edge_sparsity: 0.9, balance: 0.2, beta: 1"),
            Notices{"attention.threshold.mode fixed has no use for target_edge_sparsity, balance, beta"});
  EXPECT_EQ(notices("mode: length, beta: 1, init: 0.5, anneal: 0.2"), Notices{"attention.threshold.mode length has no use for init, anneal"});
}

TEST(Config, SoftmaxTwinIsOneSetAway) {
  const Config c = parse_config("attention: {normalizer: sum, threshold: {mode: controlled}}", "x", {"attention.gate=softmax"});
  EXPECT_EQ(c.model.attention.normalizer, Normalizer::none);
  EXPECT_EQ(c.model.attention.threshold.mode, ThresholdMode::fixed);
  EXPECT_EQ(c.notices.size(), 2u);
  const Config again = parse_config(to_yaml(c), "x", {});
  EXPECT_EQ(to_yaml(again), to_yaml(c));
  EXPECT_TRUE(again.notices.empty());  // nothing is left to change
}

/// The attention that `always` sets, accepted as it stands, written and read again. Softmax's twin is the same file, and its model the one without
/// the key.
AttentionConfig with_always(const std::string& always) {
  const std::string text = "attention: {always: " + always + "}";
  const Config c = parse_config(text, "x", {});
  EXPECT_TRUE(c.notices.empty()) << always;
  EXPECT_EQ(to_yaml(parse_config(to_yaml(c), "x", {})), to_yaml(c));
  const Config twin = parse_config(text, "x", {"attention.gate=softmax"});
  EXPECT_EQ(to_yaml(twin), to_yaml(parse_config("{}", "x", {"attention.gate=softmax"})));
  EXPECT_EQ(twin.notices.size(), 3u) << always;  // beside those of the normalizer and the threshold
  return c.model.attention;
}

TEST(Config, Sinks) {
  EXPECT_EQ(load_config("", {}).model.attention.always_sinks, 0);
  EXPECT_EQ(with_always("{sinks: 4}").sinks(), 4);
  // They are no edges of the target's.
  EXPECT_TRUE(load_config("", {"attention.always.sinks=8", "model.context=64", "attention.threshold.target_edge_sparsity=0.97"}).notices.empty());
}

TEST(Config, SelfEdges) {
  EXPECT_FALSE(load_config("", {}).model.attention.always_self);
  EXPECT_TRUE(with_always("{self: true}").self_edge());
  EXPECT_TRUE(load_config("", {"attention.always.self=true", "parallel.sequence=2", "parallel.exchange=needed"}).notices.empty());
  // A target must leave more than that edge: one of (context + 1) / 2.
  const auto with = [](const char* target, const char* spread = "1") {
    return load_config("", {"attention.always.self=true", "model.context=64", std::string("attention.threshold.target_edge_sparsity=") + target,
                            std::string("attention.threshold.head_spread=") + spread});
  };
  with("0.96");
  EXPECT_THROW(with("0.97"), ConfigError);
  EXPECT_THROW(with("0.96", "4"), ConfigError);
  EXPECT_NO_THROW(load_config("", {"model.context=64", "attention.threshold.target_edge_sparsity=0.99"}));
}

TEST(Config, OutputGate) {
  EXPECT_FALSE(load_config("", {}).model.attention.output_gate);  // also where a configuration was written before there was the key
  const Config c = parse_config("attention: {output_gate: true}", "x", {});
  EXPECT_TRUE(c.model.attention.output_gate);
  EXPECT_TRUE(c.notices.empty());
  EXPECT_EQ(to_yaml(parse_config(to_yaml(c), "x", {})), to_yaml(c));
  EXPECT_TRUE(parse_config("attention: {output_gate: true}", "x", {"attention.gate=softmax"}).model.attention.output_gate);  // so has the twin
  for (const char* exchange : {"needed", "heads", "ring"})
    EXPECT_TRUE(load_config("", {"attention.output_gate=true", "parallel.sequence=2", std::string("parallel.exchange=") + exchange}).notices.empty());
}

TEST(Config, AGpuNeedsNoGpuToBeConfigured) {
  const Config c = load_config("", {"device=cuda", "train.precision=bf16", "train.recompute=block", "parallel.share_gpu=true"});
  EXPECT_EQ(c.device, "cuda");
  EXPECT_EQ(c.train.recompute, Recompute::block);
  EXPECT_TRUE(c.notices.empty());
  EXPECT_EQ(to_yaml(parse_config(to_yaml(c), "x", {})), to_yaml(c));
  EXPECT_EQ(load_config("", {"device=cuda"}).train.precision, Precision::automatic);
  EXPECT_EQ(load_config("", {"device=cuda", "model.heads=4"}).model.head_size(), 128);
  EXPECT_TRUE(load_config("", {"device=cuda", "parallel.sequence=2", "parallel.exchange=ring", "sample.every=0"}).notices.empty());
  // On the cpu, what only GPUs heed is said to have no effect, unless it is the default.
  EXPECT_EQ(load_config("", {"parallel.share_gpu=true", "parallel.deadline=10"}).notices.size(), 2u);
  EXPECT_EQ(load_config("", {"parallel.exchange=ring", "parallel.layout=zigzag"}).notices.size(), 2u);
  EXPECT_TRUE(load_config("", {"parallel.exchange=ring", "parallel.layout=zigzag", "parallel.sequence=2", "sample.every=0"}).notices.empty());
  EXPECT_TRUE(load_config("", {"parallel.share_gpu=false", "parallel.deadline=300", "parallel.bucket_mib=1"}).notices.empty());
}

TEST(Config, WarmUpFitsAShortRunUnlessItIsSet) {
  EXPECT_EQ(load_config("", {}).optimizer.warmup, 100);
  EXPECT_EQ(load_config("", {"train.steps=50"}).optimizer.warmup, 5);
  EXPECT_EQ(load_config("", {"train.steps=1"}).optimizer.warmup, 0);
  EXPECT_EQ(load_config("", {"train.steps=100000"}).optimizer.warmup, 100);
}

TEST(Config, Vocabulary) {
  Config c = load_config("", {});
  EXPECT_EQ(c.model.vocabulary_padded, 0);
  resolve_vocabulary(c, 50257, "data");
  EXPECT_EQ(c.model.vocabulary, 50257);
  EXPECT_EQ(c.model.vocabulary_padded, 50304);
  EXPECT_EQ(to_yaml(parse_config(to_yaml(c), "x", {})), to_yaml(c));
  EXPECT_EQ(parse_config(to_yaml(c), "x", {}).model.vocabulary_padded, 50304);
  EXPECT_NO_THROW(resolve_vocabulary(c, 50257, "data"));
  try {
    resolve_vocabulary(c, 257, "some/data");
    FAIL();
  } catch (const ConfigError& e) {
    expect_error(e.what(), "model.vocabulary is 50257, and some/data has a vocabulary of 257");
  }
}

TEST(Config, RanksThatDivideAStepAreNamed) {
  const Config c = load_config("", {"model.context=1024", "train.micro_batch=4", "train.tokens_per_step=65536"});  // 64 sequences
  for (const int ranks : {1, 2, 4, 8, 16}) EXPECT_NO_THROW(check_ranks(c, ranks));
  const auto message = [&](int ranks) -> std::string {
    try {
      check_ranks(c, ranks);
    } catch (const ConfigError& e) {
      return e.what();
    }
    return "";
  };
  expect_error(message(3), "64 sequences", "3 ranks x train.micro_batch 4", "with train.micro_batch 4: 1, 2, 4, 8, 16 ranks",
               "with 3 ranks and train.micro_batch 4: train.tokens_per_step 61440 or 73728");
  expect_error(message(32), "with 32 ranks: train.micro_batch 1, 2");
  EXPECT_NO_THROW(check_ranks(load_config("", {"train.tokens_per_step=61440"}), 3));
  EXPECT_NO_THROW(check_ranks(load_config("", {"train.micro_batch=2"}), 32));
}

TEST(Config, ShippedConfigurationsLoad) {
  int count = 0;
  for (const auto& entry : std::filesystem::directory_iterator(TESSERA_CONFIGS)) {
    if (entry.path().extension() != ".yaml") continue;
    SCOPED_TRACE(entry.path());
    ++count;
    const Config c = load_config(entry.path(), {});
    EXPECT_TRUE(c.notices.empty());
    EXPECT_EQ(to_yaml(parse_config(to_yaml(c), "x", {})), to_yaml(c));
    EXPECT_NO_THROW(check_ranks(c, 2));
    std::ifstream in(entry.path());
    EXPECT_EQ(in.get(), '#') << "expected a comment first that says what the run is for";
  }
  EXPECT_GE(count, 2);
}

TEST(Config, JsonHasEveryKey) {
  const auto tree = nlohmann::json::parse(to_json(load_config("", {"attention.pattern={global: {tokens: 4}}"})));
  const auto keys = nlohmann::json::parse(schema_json());
  for (const auto& key : keys) {
    std::string pointer = fmt::format("/{}", key["path"].get<std::string>());
    std::replace(pointer.begin(), pointer.end(), '.', '/');
    EXPECT_TRUE(tree.contains(nlohmann::json::json_pointer(pointer))) << pointer;
  }
  EXPECT_EQ(tree["attention"]["pattern"]["global"]["tokens"], 4);
}

// Random configurations over the whole table come back from their YAML as they were.
class RandomConfig {
 public:
  explicit RandomConfig(unsigned seed) : random_(seed) {}

  std::vector<std::string> sets() {
    std::vector<std::string> sets;
    for (const auto& key : nlohmann::json::parse(schema_json())) {
      const std::string path = key["path"], range = key["range"];
      std::string value;
      if (path == "model.size" || path == "device" || path == "train.precision" || path == "parallel.sequence" || path == "train.tokens_per_step" ||
          path == "model.width" || path == "optimizer.warmup" || path == "optimizer.decay")
        continue;  // tied to others: below, or one value for now
      if (path == "attention.pattern")
        value = pattern(2);
      else if (path == "data.mix")
        value = mix();
      else if (path == "data.synthetic")
        continue;  // instead of others: below
      else if (key["type"] == "integer")
        value = integer(range);
      else if (key["type"] == "number")
        value = number(range);
      else if (key["type"] == "two numbers")
        value = fmt::format("[{}, {}]", number(range), number(range));
      else if (key["type"] == "text")
        value = (path == "data.tokenizer" ? "bpe:" : "") + text();
      else
        value = option(range);
      if (path == "model.heads") value = std::to_string(heads_ = 1 + pick(64));
      if (path == "model.context") value = std::to_string(context_ = 1 + pick(4096));
      if (path == "train.micro_batch") value = std::to_string(micro_ = 1 + pick(64));
      if (path == "train.steps") value = std::to_string(steps_ = 1 + pick(100000));
      sets.push_back(path + "=" + value);
    }
    if (mixed_) sets.push_back("data.path=");
    if (context_ >= 4 && pick(3) == 0) {
      for (const char* without : {"data.path=", "data.mix=[]", "data.tokenizer=", "sample.every=0", "model.vocabulary=0"}) sets.push_back(without);
      sets.push_back("data.synthetic=" + synthetic());
    }
    sets.push_back(fmt::format("model.width={}", heads_ * 8 * (1 + pick(16))));
    sets.push_back(fmt::format("train.tokens_per_step={}", context_ * micro_ * (1 + pick(16))));
    sets.push_back(fmt::format("optimizer.warmup={}", pick(static_cast<int>(steps_))));
    return sets;
  }

 private:
  std::mt19937 random_;
  std::int64_t heads_ = 1, context_ = 1, micro_ = 1, steps_ = 1;

  bool mixed_ = false;

  int pick(int n) { return std::uniform_int_distribution<int>(0, n - 1)(random_); }
  std::string integer(const std::string& range) {
    long long low = 0, high = 0, step = 1;
    if (std::sscanf(range.c_str(), "a multiple of %lld, >= %lld and <= %lld", &step, &low, &high) != 3) {
      EXPECT_EQ(std::sscanf(range.c_str(), ">= %lld and <= %lld", &low, &high), 2) << range;
    }
    const long long n = std::uniform_int_distribution<long long>(low, pick(2) ? std::min(high, low + 100) : high)(random_);
    return std::to_string(std::max(low, n / step * step));
  }
  std::string number(const std::string& range) {
    double low = 0, high = 0;
    char a[3] = {}, b[3] = {};
    EXPECT_EQ(std::sscanf(range.c_str(), "%2[>=] %lf and %2[<=] %lf", a, &low, b, &high), 4) << range;
    const double share = std::uniform_real_distribution<double>(0.01, 0.99)(random_);
    const double v = pick(2) ? low + share * (high - low) : low + share * std::min(1.0, high - low);
    return pick(2) ? fmt::format("{}", v) : fmt::format("{:.3g}", v);
  }
  std::string option(const std::string& range) {
    std::vector<std::string> options;
    std::size_t start = 0;
    for (std::size_t bar; (bar = range.find(" | ", start)) != std::string::npos; start = bar + 3) options.push_back(range.substr(start, bar - start));
    options.push_back(range.substr(start));
    return options[static_cast<std::size_t>(pick(static_cast<int>(options.size())))];
  }
  std::string text() {
    const std::string alphabet = "abc:#{}[],&*!|>%@`~ -01.\\/\t";
    std::string s(1, 'x');
    for (int n = pick(12); n > 0; --n) s += alphabet[static_cast<std::size_t>(pick(static_cast<int>(alphabet.size())))];
    return s;
  }
  std::string mix() {
    std::string list;
    for (int n = pick(4); n > 0; --n)
      list += fmt::format("{}{{path: {}, weight: {}}}", list.empty() ? "" : ", ", nlohmann::json(text()).dump(), number("> 0 and <= 1000"));
    mixed_ = !list.empty();
    return "[" + list + "]";
  }
  std::string synthetic() {
    const auto up_to = [&](std::int64_t most) { return 1 + pick(static_cast<int>(most)); };
    switch (pick(5)) {
      case 0: return context_ < 32 ? "copy" : "mqar";
      case 1:
        return fmt::format("{{mqar: {{pairs: {}, vocabulary: {}, power_a: {}, filler: {}}}}}", up_to(context_ / 4), context_ + 4 + pick(999),
                           number("> 0 and <= 100"), option("random | padding"));
      case 2: return fmt::format("{{copy: {{lengths: [{}, {}]}}}}", up_to(context_ / 2), up_to(context_ / 2));
      case 3: return fmt::format("{{needle: {{distances: {}}}}}", up_to(context_ - 2));
      default: {
        const int longest = up_to(context_ - 2);
        return fmt::format("{{needle: {{vocabulary: {}, shortest: {}, longest: {}}}}}", 4 + pick(99), up_to(longest), longest);
      }
    }
  }
  std::string pattern(int depth) {
    switch (pick(depth > 0 ? 9 : 6)) {
      case 0: return "causal";
      case 1: return fmt::format("{{window: {{size: {}}}}}", 1 + pick(1000));
      case 2: {
        const int stride = 1 + pick(100);
        return fmt::format("{{strided: {{stride: {}, width: {}}}}}", stride, 1 + pick(stride));
      }
      case 3: return fmt::format("{{dilated: {{window: {}, dilation: {}}}}}", 1 + pick(100), 1 + pick(9));
      case 4: return fmt::format("{{global: {{tokens: {}}}}}", 1 + pick(9));
      case 5:
        return fmt::format("{{bigbird: {{window: {}, global: {}, random: {}, seed: {}, block: {}}}}}", 1 + pick(5), pick(5), pick(5), random_(),
                           1 + pick(99));
      case 6: return fmt::format("{{any: [{}, {}]}}", pattern(0), pattern(0));
      case 7: return fmt::format("{{all: [{}, {{any: [{}]}}]}}", pattern(0), pattern(0));
      default:
        if (depth < 2) return "causal";
        return fmt::format("{{default: {}, per_layer: {{0: {}}}, per_head: {{0: {}}}}}", pattern(0), pattern(0), pattern(1));
    }
  }
};

TEST(Config, RandomConfigurationsComeBackEqual) {
  int accepted = 0;
  for (unsigned seed = 0; seed < 700; ++seed) {
    const auto sets = RandomConfig(seed).sets();
    Config c;
    try {
      c = load_config("", sets);
    } catch (const ConfigError& e) {
      const std::string message = e.what();  // the rules that the generator does not know
      ASSERT_TRUE(message.find("mode length") != std::string::npos || message.find("squared cosine") != std::string::npos ||
                  message.find("overlap") != std::string::npos || message.find("smaller spread") != std::string::npos ||
                  message.find("joins a sum of weights") != std::string::npos || message.find("sinks join a sum of weights") != std::string::npos ||
                  message.find("the edge to itself is one") != std::string::npos)
          << message;
      continue;
    }
    ++accepted;
    const Config again = parse_config(to_yaml(c), "again", {});
    ASSERT_EQ(to_yaml(again), to_yaml(c));
    ASSERT_EQ(to_json(again), to_json(c));
    ASSERT_EQ(again.data.mix, c.data.mix);
    ASSERT_EQ(again.data.synthetic, c.data.synthetic);
    ASSERT_EQ(again.sample.prompt, c.sample.prompt);
    ASSERT_EQ(again.model.attention.pattern.overrides.size(), c.model.attention.pattern.overrides.size());
    ASSERT_EQ(again.model.attention.threshold.rate, c.model.attention.threshold.rate);
    ASSERT_EQ(again.optimizer.lr, c.optimizer.lr);
  }
  EXPECT_GT(accepted, 200);
}

}  // namespace
}  // namespace tessera
