// What no key can check alone: values that follow from others, and values that do not go together.

#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>

#include "trainer/schedule.h"
#include "trainer/schema_values.h"

namespace tessera {

namespace {

struct Shape {
  const char* name;
  int layers, heads, width;
};

Shape shape_of(ModelSize size) {
  switch (size) {  // Radford et al. 2019, table 2
    case ModelSize::gpt2: return {"gpt2", 12, 12, 768};
    case ModelSize::gpt2_medium: return {"gpt2-medium", 24, 16, 1024};
    case ModelSize::gpt2_large: return {"gpt2-large", 36, 20, 1280};
    case ModelSize::gpt2_xl: return {"gpt2-xl", 48, 25, 1600};
    case ModelSize::custom: break;
  }
  return {"custom", 0, 0, 0};
}

/// The multiples of `unit` on both sides of `value`, in words: "64000 or 68000".
std::string neighbours(std::int64_t value, std::int64_t unit) {
  const std::int64_t below = value / unit * unit;
  return below > 0 ? fmt::format("{} or {}", below, below + unit) : fmt::format("{}", below + unit);
}

/// What divides n, up to `most`, in words: "1, 2, 4".
std::string divisors(std::int64_t n, std::int64_t most) {
  std::string text;
  for (std::int64_t d = 1; d <= std::min(n, most); ++d)
    if (n % d == 0) text += fmt::format("{}{}", text.empty() ? "" : ", ", d);
  return text;
}

/// At most so many tiles hold a visible edge (an upper bound, near enough to tell thousands from billions).
double most_tiles(const PatternSpec& p, std::int64_t tokens, int tile_query, int tile_key) {
  const double rows = std::ceil(static_cast<double>(tokens) / tile_query), columns = std::ceil(static_cast<double>(tokens) / tile_key);
  const double causal = (rows + 1) * (columns + 1) / 2;
  const auto spanning = [&](double keys) { return std::min(causal, rows * ((keys + tile_query) / tile_key + 2)); };  // `keys` in a row a query
  const auto of = [](std::int64_t n) { return static_cast<double>(n); };
  switch (p.kind) {
    case PatternSpec::Kind::window: return spanning(of(p.size));
    case PatternSpec::Kind::dilated: return spanning(of(p.size) * of(p.width));
    case PatternSpec::Kind::global: return spanning(of(p.size));
    case PatternSpec::Kind::bigbird:  // a query tile meets tile_query / block + 2 query blocks, each with its random ones
      return std::min(causal, spanning(of(p.size + 1) * of(p.block)) + spanning(of(p.width) * of(p.block)) +
                                  rows * (tile_query / of(p.block) + 2) * of(p.random) * (of(p.block) / tile_key + 2));
    case PatternSpec::Kind::any: {
      double sum = 0;
      for (const auto& child : p.children) sum += most_tiles(child, tokens, tile_query, tile_key);
      return std::min(causal, sum);
    }
    case PatternSpec::Kind::all: {
      double least = causal;
      for (const auto& child : p.children) least = std::min(least, most_tiles(child, tokens, tile_query, tile_key));
      return least;
    }
    default: return causal;
  }
}

class Resolver {
 public:
  Resolver(Config& config, const Places& places, Problems& problems) : c_(config), places_(places), problems_(problems) {}

  void run() {
    named_size();
    heads();
    softmax();
    always();
    threshold();
    check_pattern(c_.model.attention.pattern, c_.model.layers, c_.model.heads, place({"attention.pattern"}), problems_);
    tiles();
    step();
    schedule();
    mix();
    synthetic();
    tokenizer();
    tensorboard();
    device();
    if (c_.model.vocabulary > 0) c_.model.vocabulary_padded = padded(c_.model.vocabulary, c_.vocabulary_multiple);
  }

  static std::int64_t padded(std::int64_t rows, std::int64_t multiple) { return (rows + multiple - 1) / multiple * multiple; }

 private:
  Config& c_;
  const Places& places_;
  Problems& problems_;

  bool is_set(const std::string& path) const { return places_.contains(path); }
  /// Where the first of these keys that was set explicitly stands.
  std::string place(std::initializer_list<const char*> paths) const {
    for (const char* path : paths)
      if (const auto found = places_.find(path); found != places_.end()) return found->second;
    return "";
  }
  void fail(const std::vector<std::string>& paths, const std::string& message) {
    for (const std::string& path : paths)
      if (is_set(path)) return problems_.add(places_.at(path), path, message);
    problems_.add("", paths.front(), message);
  }

  void named_size() {
    if (c_.model_size == ModelSize::custom) return;
    const Shape shape = shape_of(c_.model_size);
    const auto take = [&](const char* path, int& member, int value) {
      if (is_set(path) && member != value)
        fail({path}, fmt::format("model.size: {} means {}, found {}; leave the key out, or write model.size: custom", shape.name, value, member));
      member = value;
    };
    take("model.layers", c_.model.layers, shape.layers);
    take("model.heads", c_.model.heads, shape.heads);
    take("model.width", c_.model.width, shape.width);
  }

  void heads() {
    constexpr int kMostHeadSize = 256;
    const int width = c_.model.width, heads = c_.model.heads;
    const auto fits = [&](int h) { return width % (8 * h) == 0 && width / h <= kMostHeadSize; };
    if (fits(heads)) return;
    std::string fitting;
    for (int h = 1; h <= width / 8; ++h)
      if (fits(h)) fitting += fmt::format("{}{}", fitting.empty() ? "heads that fit this width: " : ", ", h);
    if (!fitting.empty()) fitting += "; ";
    const std::string widths = width > kMostHeadSize * heads ? fmt::format("at most {}", kMostHeadSize * heads) : neighbours(width, 8 * heads);
    fail({"model.heads", "model.width"},
         fmt::format("model.width {} / model.heads {} is a head size of {:.6g}; expected a multiple of 8 up to {}; {}widths that fit {} head{}: {}",
                     width, heads, static_cast<double>(width) / heads, kMostHeadSize, fitting, heads, heads == 1 ? "" : "s", widths));
  }

  void softmax() {
    AttentionConfig& a = c_.model.attention;
    if (a.gate != Gate::softmax) return;
    if (a.normalizer != Normalizer::none) c_.notices.push_back("attention.gate softmax normalises by itself: attention.normalizer is none");
    if (a.threshold.mode != ThresholdMode::fixed)
      c_.notices.push_back("attention.gate softmax has no threshold: attention.threshold.mode is fixed and has no effect");
    if (a.always_self) c_.notices.push_back("attention.gate softmax sees each token itself: attention.always.self is false");
    if (a.always_sinks > 0) c_.notices.push_back("attention.gate softmax has no sinks: attention.always.sinks is 0");
    a.normalizer = Normalizer::none;
    a.threshold.mode = ThresholdMode::fixed;
    a.always_self = false;
    a.always_sinks = 0;
  }

  /// The keys of attention.always that are on, and what turns them off: "attention.always.self false".
  struct Always {
    std::vector<std::string> keys, off;
  };
  Always always_on() const {
    Always on;
    const auto add = [&](const char* key, const char* off) { on.keys.push_back(key), on.off.push_back(fmt::format("{} {}", key, off)); };
    if (c_.model.attention.self_edge()) add("attention.always.self", "false");
    if (c_.model.attention.sinks() > 0) add("attention.always.sinks", "0");
    return on;
  }

  void always() {
    const AttentionConfig& a = c_.model.attention;
    if (!a.adds_edges() || a.normalizer == Normalizer::sum) return;
    Always on = always_on();
    on.keys.push_back("attention.normalizer");
    fail(on.keys, fmt::format("{} a sum of weights: expected attention.normalizer sum with it, found {}, or {}",
                              a.self_edge() ? "the edge to oneself joins" : "sinks join",
                              find_key("attention.normalizer")->write(c_).get<std::string>(), fmt::join(on.off, " and ")));
  }

  /// Says which keys of attention.threshold, set to another value than their own, belong to another mode than the one there is.
  void keys_of_other_modes() {
    const Config defaults;
    const auto key = [](const std::string& name) { return find_key("attention.threshold." + name); };
    std::vector<std::string> idle;
    const auto look = [&](bool used, std::initializer_list<const char*> names) {
      if (used) return;
      for (const char* name : names)
        if (key(name)->write(c_) != key(name)->write(defaults)) idle.push_back(name);
    };
    const ThresholdMode mode = c_.model.attention.threshold.mode;
    look(mode != ThresholdMode::length, {"init"});
    look(mode == ThresholdMode::controlled, {"target_edge_sparsity", "anneal", "anneal_from", "head_spread", "rate", "balance"});
    look(mode == ThresholdMode::length, {"beta"});
    if (!idle.empty())
      c_.notices.push_back(
          fmt::format("attention.threshold.mode {} has no use for {}", key("mode")->write(c_).get<std::string>(), fmt::join(idle, ", ")));
  }

  void threshold() {
    AttentionConfig& a = c_.model.attention;
    if (a.gate == Gate::softmax) return;
    if (a.threshold.mode == ThresholdMode::length && a.score != Score::cosine)
      fail({"attention.threshold.mode", "attention.score"}, "mode length is the extreme value of cosines: expected attention.score cosine with it");
    const bool uses_init = a.threshold.mode != ThresholdMode::length;
    keys_of_other_modes();
    if (a.score == Score::fidelity && a.threshold.mode == ThresholdMode::controlled && a.threshold.balance > 0) {
      if (is_set("attention.threshold.balance"))
        fail({"attention.threshold.balance", "attention.score"},
             fmt::format("score fidelity has no balance: expected 0 with it, or attention.score dot or cosine, found {:g}", a.threshold.balance));
      a.threshold.balance = 0;
    }
    if (a.score == Score::fidelity && uses_init && !(a.threshold.init >= 0 && a.threshold.init < 1))
      fail({"attention.threshold.init", "attention.score"},
           fmt::format("score fidelity is a squared cosine: expected a threshold >= 0 and < 1, found {}", a.threshold.init));
    if (const double densest = head_target(a.threshold, c_.model.heads, 0); a.threshold.mode == ThresholdMode::controlled && densest > 1)
      fail({"attention.threshold.head_spread", "attention.threshold.target_edge_sparsity"},
           fmt::format("the first of {} heads would need {:.2f} times the edges there are: expected a smaller spread or a higher target",
                       c_.model.heads, densest));
    const double fewest = head_target(a.threshold, c_.model.heads, c_.model.heads - 1), mean_keys = (static_cast<double>(c_.model.context) + 1) / 2;
    if (a.self_edge() && a.threshold.mode == ThresholdMode::controlled && fewest * mean_keys <= 1) {
      std::vector<std::string> helps;
      if (const double below = 1 - (1 - a.threshold.target_edge_sparsity) / (fewest * mean_keys); below > 0)
        helps.push_back(fmt::format("a target below {:.6g}", below));
      if (a.threshold.head_spread > 1) helps.push_back("a smaller attention.threshold.head_spread");
      helps.push_back(fmt::format("model.context of at least {:.0f}", std::floor(2 / fewest)));
      fail({"attention.always.self", "attention.threshold.target_edge_sparsity", "model.context"},
           fmt::format("target_edge_sparsity {} leaves a query {:.2f} edges at context {}, and the edge to itself is one: expected {}, or "
                       "attention.always.self false",
                       a.threshold.target_edge_sparsity, fewest * mean_keys, c_.model.context, fmt::join(helps, ", ")));
    }
  }

  /// Each pattern's tile lists are held in memory, an entry a tile and direction.
  void tiles() {
    constexpr double kMostTiles = 1e8;
    const AttentionConfig& a = c_.model.attention;
    double tiles = most_tiles(a.pattern.base, c_.model.context, a.tile_query, a.tile_key);
    for (const auto& o : a.pattern.overrides) tiles = std::max(tiles, most_tiles(o.pattern, c_.model.context, a.tile_query, a.tile_key));
    if (tiles <= kMostTiles) return;
    fail({"model.context", "attention.pattern", "attention.tile.query", "attention.tile.key"},
         fmt::format(
             "attention.pattern over model.context {} has up to {:.2g} tiles of {} x {}, whose lists take {:.3g} GB; expected at most {:.0e}: larger "
             "attention.tile.query and attention.tile.key (up to 128), a narrower pattern (window), or a shorter context",
             c_.model.context, tiles, a.tile_query, a.tile_key, tiles * 2 * sizeof(TileEntry) / 1e9, kMostTiles));
  }

  void step() {
    const std::int64_t unit = c_.model.context * c_.train.micro_batch;
    if (c_.train.tokens_per_step % unit == 0) return;
    fail({"train.tokens_per_step", "train.micro_batch", "model.context"},
         fmt::format("train.tokens_per_step {} is no multiple of model.context {} x train.micro_batch {} = {}; expected {}", c_.train.tokens_per_step,
                     c_.model.context, c_.train.micro_batch, unit, neighbours(c_.train.tokens_per_step, unit)));
  }

  void schedule() {
    OptimizerConfig& o = c_.optimizer;
    const std::int64_t steps = c_.train.steps;
    if (!is_set("optimizer.warmup")) o.warmup = usual_warmup(steps);
    if (o.warmup >= steps)
      fail({"optimizer.warmup", "train.steps"},
           fmt::format("optimizer.warmup {} leaves nothing of train.steps {}; expected fewer steps, as {}", o.warmup, steps, steps / 10));
    else if (o.schedule == Schedule::wsd && static_cast<double>(o.warmup) + o.decay * static_cast<double>(steps) > static_cast<double>(steps))
      fail({"optimizer.decay", "optimizer.warmup", "train.steps"},
           fmt::format("optimizer.warmup {} and a decay of {:g} x {} steps overlap; expected a decay of at most {:.3g}", o.warmup, o.decay, steps,
                       1.0 - static_cast<double>(o.warmup) / static_cast<double>(steps)));
  }

  void mix() {
    if (!c_.data.mix.empty() && !c_.data.path.empty())
      fail({"data.mix", "data.path"},
           fmt::format("data.path {} is set too: expected one of them (--set data.mix=[] or --set data.path= clears one)", c_.data.path));
  }

  /// After what sets model.context.
  void synthetic() {
    if (!c_.data.synthetic) return;
    const SyntheticTask& task = *c_.data.synthetic;
    const auto alone = [&](const char* other, const std::string& found, const char* clear) {
      fail({"data.synthetic", other},
           fmt::format("{} {} is set too: expected one of them (--set data.synthetic=none or --set {}={} clears one)", other, found, other, clear));
    };
    if (!c_.data.path.empty()) alone("data.path", c_.data.path, "");
    if (!c_.data.mix.empty()) alone("data.mix", fmt::format("of {}", c_.data.mix.size()), "[]");
    if (!c_.data.tokenizer.empty()) alone("data.tokenizer", c_.data.tokenizer, "");
    if (c_.sample.every > 0) fail({"sample.every", "data.synthetic"}, "data.synthetic has tokens and no text; expected sample.every 0");
    if (c_.model.vocabulary != 0 && c_.model.vocabulary != task.vocabulary)
      fail({"model.vocabulary", "data.synthetic"},
           fmt::format("model.vocabulary is {}, and data.synthetic has a vocabulary of {}: expected them equal, or model.vocabulary 0",
                       c_.model.vocabulary, task.vocabulary));
    else
      c_.model.vocabulary = task.vocabulary;
    if (const std::string problem = synthetic_problem(task, c_.model.context); !problem.empty())
      fail({"data.synthetic"}, fmt::format("{}: {}", name_of(task.kind), problem));
  }

  void tokenizer() {
    const std::string& name = c_.data.tokenizer;
    const bool file = (name.starts_with("gpt2:") && name.size() > 5) || (name.starts_with("bpe:") && name.size() > 4);
    if (name.empty() || name == "bytes" || name == "gpt2" || name == "bpe" || file) return;
    fail({"data.tokenizer"}, fmt::format("expected bytes, gpt2, bpe, gpt2:DIR or bpe:FILE, found \"{:.60}\"", name));
  }

  void tensorboard() {
    if (!c_.tensorboard.enabled && c_.tensorboard.histogram_every != 0)
      c_.notices.push_back("tensorboard.histogram_every has no effect with tensorboard.enabled false");
  }

  void device() {
    if (c_.device == "cuda")
      cuda();
    else
      cpu();
    shared_sequences();
  }

  void shared_sequences() {
    if (c_.parallel.sequence == 1) {
      if (c_.parallel.exchange != ParallelConfig().exchange) c_.notices.push_back("parallel.exchange has no effect with parallel.sequence 1");
      if (c_.parallel.layout != ParallelConfig().layout) c_.notices.push_back("parallel.layout has no effect with parallel.sequence 1");
      return;
    }
    if (c_.parallel.exchange == SequenceExchange::heads && c_.model.heads % c_.parallel.sequence != 0)
      fail({"parallel.exchange", "parallel.sequence", "model.heads"},
           fmt::format("exchange heads deals {} heads to {} ranks, which does not come out even; expected parallel.sequence {}, or another exchange",
                       c_.model.heads, c_.parallel.sequence, divisors(c_.model.heads, 1024)));
    if (c_.parallel.exchange == SequenceExchange::heads && c_.model.attention.adds_edges()) {
      Always on = always_on();
      const std::string what = fmt::format("{} {}", fmt::join(on.keys, " and "), on.keys.size() > 1 ? "do" : "does");
      on.keys.insert(on.keys.begin(), "parallel.exchange");
      fail(on.keys, fmt::format("exchange heads keeps each query's sum of weights with another rank, where {} not reach it; expected exchange needed "
                                "or ring, or {}",
                                what, fmt::join(on.off, " and ")));
    }
    if (c_.sample.every > 0)
      fail({"sample.every", "parallel.sequence"},
           fmt::format("a text is made by one rank, which holds no whole sequence with parallel.sequence {}; expected sample.every 0, and tessera "
                       "generate for texts",
                       c_.parallel.sequence));
  }

  void cpu() {
    if (c_.train.precision == Precision::bf16)
      fail({"train.precision", "device"}, "the cpu computes in fp32; expected train.precision auto or fp32, or device cuda");
    if (c_.parallel.share_gpu) c_.notices.push_back("parallel.share_gpu has no effect with device cpu");
    if (c_.parallel.deadline != ParallelConfig().deadline) c_.notices.push_back("parallel.deadline has no effect with device cpu");
  }

  /// What the GPU's kernels are made for.
  void cuda() {
    constexpr int kTile = 64, kRows = 8;
    if (c_.train.precision == Precision::fp32)
      fail({"train.precision", "device"}, "a GPU computes in bf16 with sums in fp32; expected train.precision auto or bf16, or device cpu");
    const auto tile = [&](const char* path, int size) {
      if (size != kTile)
        fail({path, "device"}, fmt::format("device cuda computes tiles of {0} x {0}; expected {1} {0}, found {2}", kTile, path, size));
    };
    tile("attention.tile.query", c_.model.attention.tile_query);
    tile("attention.tile.key", c_.model.attention.tile_key);
    if (const int size = c_.model.head_size(); c_.model.width % c_.model.heads == 0 && size != 64 && size != 128)
      fail({"model.heads", "model.width", "device"},
           fmt::format("model.width {} / model.heads {} is a head size of {}; expected 64 or 128 with device cuda: model.heads {}", c_.model.width,
                       c_.model.heads, size, heads_of_width(c_.model.width)));
    if (c_.vocabulary_multiple % kRows != 0)
      fail({"model.vocabulary_multiple", "device"},
           fmt::format("device cuda reads rows of logits in pieces of {0}; expected a multiple of {0}, found {1}", kRows, c_.vocabulary_multiple));
  }

  /// "8 or 4": heads of 64 or 128 that make this width.
  static std::string heads_of_width(int width) {
    if (width % 64 != 0) return fmt::format("{} with model.width {}", std::max(1, width / 64), neighbours(width, 64));
    return width % 128 == 0 ? fmt::format("{} or {}", width / 64, width / 128) : fmt::format("{}", width / 64);
  }
};

}  // namespace

void resolve(Config& config, const Places& places, Problems& problems) { Resolver(config, places, problems).run(); }

std::int64_t usual_warmup(std::int64_t steps) { return std::min(OptimizerConfig().warmup, steps / 10); }

void resolve_vocabulary(Config& config, std::int64_t vocabulary, const std::string& origin) {
  if (config.model.vocabulary != 0 && config.model.vocabulary != vocabulary)
    throw ConfigError(fmt::format("model.vocabulary is {}, and {} has a vocabulary of {}: expected them equal, or model.vocabulary 0 (from the data)",
                                  config.model.vocabulary, origin, vocabulary));
  config.model.vocabulary = vocabulary;
  config.model.vocabulary_padded = Resolver::padded(vocabulary, config.vocabulary_multiple);
}

void check_ranks(const Config& config, int job_ranks) {
  const int shared = config.parallel.sequence;
  if (job_ranks % shared != 0) {
    throw ConfigError(fmt::format("parallel.sequence {}: {} rank{} not make groups of {}. What would do: {} ranks, or parallel.sequence {}", shared,
                                  job_ranks, job_ranks == 1 ? " does" : "s do", shared, neighbours(job_ranks, shared), divisors(job_ranks, 1024)));
  }
  const int ranks = job_ranks / shared;  // that see different sequences
  const std::int64_t sequences = config.train.tokens_per_step / config.model.context;
  const std::int64_t micro = config.train.micro_batch;
  if (sequences % (micro * ranks) == 0) return;
  const std::string what_they_are = shared == 1 ? "ranks" : fmt::format("groups of {} ranks", shared);
  const std::string what =
      fmt::format("train.tokens_per_step {} is {} sequences of model.context {}, which {} {} x train.micro_batch {} do not divide",
                  config.train.tokens_per_step, sequences, config.model.context, ranks, what_they_are, micro);
  const std::string by_ranks = fmt::format("with train.micro_batch {}: {} {}", micro, divisors(sequences / micro, 1024), what_they_are);
  const std::string by_micro = sequences % ranks == 0
                                   ? fmt::format("with {} {}: train.micro_batch {}", ranks, what_they_are, divisors(sequences / ranks, 1024))
                                   : fmt::format("with {0} {1} and train.micro_batch {2}: train.tokens_per_step {3}", ranks, what_they_are, micro,
                                                 neighbours(config.train.tokens_per_step, config.model.context * micro * ranks));
  throw ConfigError(fmt::format("{}. What would do: {}; {}", what, by_ranks, by_micro));
}

}  // namespace tessera
