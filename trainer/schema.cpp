// The one place that knows every key of the configuration: path, range, meaning and the struct member behind it. Defaults are the members'.

#include "trainer/schema.h"

#include <limits>
#include <optional>

#include "trainer/schema_values.h"

namespace tessera {

namespace {

using Json = nlohmann::ordered_json;

/// Floats print with the digits that make them, not those of their double.
double shortest(float v) { return std::stod(fmt::format("{}", v)); }
double shortest(double v) { return v; }

template <class Access>
Key integer(const char* path, Access access, std::int64_t low, std::int64_t high, const char* meaning, std::int64_t step = 1) {
  Key key{path, "integer", "", meaning, false, {}, {}};
  const Bounds<std::int64_t> bounds{low, high, false, false, step};
  key.range = bounds.str();
  key.read = [=](Config& c, const Value& value, Problems& problems) {
    using T = std::remove_reference_t<decltype(access(c))>;
    if (const auto v = read_integer(value, bounds, problems)) access(c) = static_cast<T>(*v);
  };
  key.write = [=](const Config& c) { return Json(access(c)); };
  return key;
}

template <class Access>
Key number(const char* path, Access access, Bounds<double> bounds, const char* meaning) {
  Key key{path, "number", bounds.str(), meaning, false, {}, {}};
  key.read = [=](Config& c, const Value& value, Problems& problems) {
    using T = std::remove_reference_t<decltype(access(c))>;
    if (const auto v = read_number(value, bounds, problems)) access(c) = static_cast<T>(*v);
  };
  key.write = [=](const Config& c) { return Json(shortest(access(c))); };
  return key;
}

template <class Access>
Key boolean(const char* path, Access access, const char* meaning) {
  Key key{path, "boolean", "true | false", meaning, false, {}, {}};
  key.read = [=](Config& c, const Value& value, Problems& problems) {
    if (const auto v = read_boolean(value, problems)) access(c) = *v;
  };
  key.write = [=](const Config& c) { return Json(access(c)); };
  return key;
}

template <class Access>
Key text(const char* path, Access access, bool may_be_empty, const char* meaning) {
  Key key{path, "text", may_be_empty ? "" : "not empty", meaning, true, {}, {}};
  key.read = [=](Config& c, const Value& value, Problems& problems) {
    if (const auto v = read_text(value, may_be_empty, problems)) access(c) = *v;
  };
  key.write = [=](const Config& c) { return Json(access(c)); };
  return key;
}

template <class T, class Access>
Key choice(const char* path, Access access, std::vector<std::pair<std::string, T>> options, const char* meaning) {
  std::vector<std::string> names;
  std::string range;
  for (const auto& [name, value] : options) {
    names.push_back(name);
    range += (range.empty() ? "" : " | ") + name;
  }
  Key key{path, "choice", range, meaning, false, {}, {}};
  key.read = [=](Config& c, const Value& value, Problems& problems) {
    const auto chosen = read_choice(value, names, problems);
    for (const auto& [name, v] : options)
      if (chosen && name == *chosen) access(c) = v;
  };
  key.write = [=](const Config& c) {
    for (const auto& [name, v] : options)
      if (v == access(c)) return Json(name);
    throw std::logic_error(fmt::format("{}: a value without a name", path));
  };
  return key;
}

Key seed() {
  const Bounds<std::uint64_t> bounds{0, std::numeric_limits<std::uint64_t>::max()};
  return {"run.seed",
          "integer",
          bounds.str(),
          "Seed of the initial parameters and of the order of the data.",
          false,
          [=](Config& c, const Value& value, Problems& problems) {
            if (const auto v = read_integer(value, bounds, problems)) c.run.seed = *v;
          },
          [](const Config& c) { return Json(c.run.seed); }};
}

Key betas() {
  const Bounds<double> bounds{0, 1, false, true};
  return {"optimizer.betas",
          "two numbers",
          bounds.str(),
          "Decay of AdamW's averages of the gradient and of its square.",
          false,
          [=](Config& c, const Value& value, Problems& problems) {
            if (!value.node.IsSequence() || value.node.size() != 2) {
              const std::string found = value.node.IsSequence() ? fmt::format("a list of {}", value.node.size()) : describe(value.node);
              problems.add(value.place, value.path, fmt::format("expected a list of two numbers, as [0.9, 0.95], found {}", found));
              return;
            }
            refuse_tag(value, "seq", problems);
            double* const members[] = {&c.optimizer.beta1, &c.optimizer.beta2};
            for (std::size_t i = 0; i < 2; ++i) {
              const YAML::Node node = value.node[i];
              const Value element = value.child(node, fmt::format("{}[{}]", value.path, i));
              if (const auto v = read_number(element, bounds, problems)) *members[i] = *v;
            }
          },
          [](const Config& c) {
            return Json::array({c.optimizer.beta1, c.optimizer.beta2});
          }};
}

/// An entry of data.mix; nothing when there are mistakes, which are added to `problems`.
std::optional<MixEntry> read_mix_entry(const Value& value, Problems& problems) {
  if (!value.node.IsMap()) {
    problems.add(value.place, value.path, fmt::format("expected {{path: DIR, weight: NUMBER}}, found {}", describe(value.node)));
    return {};
  }
  const std::size_t before = problems.count();
  std::optional<std::string> path;
  std::optional<double> weight;
  for (const auto& [name, child] : read_map(value, problems)) {
    if (name == "path")
      path = read_text(child, false, problems);
    else if (name == "weight")
      weight = read_number(child, {0, 1e12, true, false}, problems);
    else
      problems.add(child.key_place, child.path, fmt::format("unknown key; nearest valid key \"{}\"", nearest(name, {"path", "weight"})));
  }
  if (problems.count() > before) return {};
  if (path && weight) return MixEntry{*path, *weight};
  problems.add(value.place, value.path, fmt::format("{} is missing: {{path: DIR, weight: NUMBER}}", path ? "weight" : "path"));
  return {};
}

Key data_mix() {
  return {"data.mix",
          "list",
          "[{path: DIR, weight: > 0}, ...]",
          "Instead of data.path: several datasets of one tokenizer, each with its share of every step's sequences, its weight divided by their sum, "
          "and epochs of its own.",
          false,
          [](Config& c, const Value& value, Problems& problems) {
            if (!value.node.IsSequence()) {
              problems.add(value.place, value.path, fmt::format("expected a list of {{path: DIR, weight: NUMBER}}, found {}", describe(value.node)));
              return;
            }
            c.data.mix.clear();
            for (std::size_t i = 0; i < value.node.size(); ++i) {
              const YAML::Node node = value.node[i];
              if (auto entry = read_mix_entry(value.child(node, fmt::format("{}[{}]", value.path, i)), problems))
                c.data.mix.push_back(std::move(*entry));
            }
          },
          [](const Config& c) {
            Json list = Json::array();
            for (const MixEntry& entry : c.data.mix) list.push_back({{"path", entry.path}, {"weight", entry.weight}});
            return list;
          }};
}

Key synthetic() {
  return {
      "data.synthetic",
      "task",
      "none | mqar: {vocabulary, pairs, power_a, filler} | copy: {vocabulary, lengths or shortest, longest} | needle: {vocabulary, distances or "
      "shortest, longest}",
      "Instead of data.path: made-up sequences that ask for what stood earlier, with loss and accuracy at the answers alone. mqar: `pairs` (8) of "
      "a key and its value, then each key again, sooner the smaller power_a (0.01; 1: anywhere), among tokens that are `filler`: random or "
      "padding. copy: a random string, a separator, the string again. needle: a key and its value among random tokens, and at the end the key "
      "again. lengths, distances: numbers to draw from; without them the logarithm is uniform from shortest (1) to longest (0: as far as the "
      "sequence goes). vocabulary (8192) is the model's. Validation is on 1024 sequences, the same for every seed.",
      false,
      [](Config& c, const Value& value, Problems& problems) { read_synthetic(c.data.synthetic, value, problems); },
      [](const Config& c) { return write_synthetic(c.data.synthetic); }};
}

Key pattern() {
  return {
      "attention.pattern",
      "pattern",
      "causal | window: {size} | strided: {stride, width} | dilated: {window, dilation} | global: {tokens} | "
      "bigbird: {window, global, random, seed, block} | blocks: {file} | any: [...] | all: [...] | {default, per_layer, per_head}",
      "Which keys a query may see, besides causality. window: the last `size` keys. strided: (query - key) mod stride < width. dilated: `window` "
      "keys, "
      "every `dilation`-th. global: the first `tokens` keys. bigbird: blocks of `block` tokens: the last `window`, the first `global` and `random` "
      "drawn by "
      "seed. blocks: a block mask in a text file, whose contents a resolved configuration pins down as sha256. any, all: union, intersection of a "
      "list. per_layer: {0: ..., \"4-7\": ...}, per_head: {\"0-3\": "
      "...} "
      "replace the default for these layers or heads (per_head goes before per_layer; a per_layer entry may hold {default, per_head} of its own).",
      false,
      [](Config& c, const Value& value, Problems& problems) { read_pattern(c.model.attention.pattern, value, problems); },
      [](const Config& c) { return write_pattern(c.model.attention.pattern); }};
}

#define FIELD(member) \
  [](auto& c) -> auto& { return c.member; }

std::vector<Key> make_schema() {
  constexpr std::int64_t kSteps = 1'000'000'000;
  constexpr double kLarge = 1e12;
  const Bounds<double> share{0, 1};
  return {
      text("run.dir", FIELD(run.dir), false,
           "Folder of the run: config.yaml, metrics.jsonl, TensorBoard's events, checkpoints, samples. Paths are relative to the working directory."),
      seed(),
      text("run.init", FIELD(run.init), true,
           "A checkpoint or run folder whose parameters a new run starts from, instead of initial values: all but those that the attention of only "
           "one "
           "side has. Its shape and tokenizer must be this run's."),
      integer("run.threads", FIELD(run.threads), 0, 4096, "CPU threads a rank. 0: the host's cores divided by its ranks."),
      number("run.peak_tflops", FIELD(run.peak_tflops), {0, 1e6},
             "The device's peak, for model FLOPs utilisation. 0: what the device states, if it does."),

      choice<std::string>("device", FIELD(device), {{"cpu", "cpu"}, {"cuda", "cuda"}}, "Where the run computes."),

      choice<ModelSize>("model.size", FIELD(model_size),
                        {{"custom", ModelSize::custom},
                         {"gpt2", ModelSize::gpt2},
                         {"gpt2-medium", ModelSize::gpt2_medium},
                         {"gpt2-large", ModelSize::gpt2_large},
                         {"gpt2-xl", ModelSize::gpt2_xl}},
                        "A named shape: layers/heads/width 12/12/768, 24/16/1024, 36/20/1280, 48/25/1600. custom: the three keys say it."),
      integer("model.layers", FIELD(model.layers), 1, 1000, "Transformer blocks."),
      integer("model.heads", FIELD(model.heads), 1, 1024, "Attention heads a layer; divides model.width into heads of a multiple of 8."),
      integer("model.width", FIELD(model.width), 8, 65536, "Size of the residual stream."),
      integer("model.context", FIELD(model.context), 1, 1 << 20, "Tokens a sequence."),
      integer("model.mlp_ratio", FIELD(model.mlp_ratio), 1, 64, "Hidden size of the MLP, in widths."),
      choice<Positions>("model.positions", FIELD(model.positions), {{"learned", Positions::learned}, {"rotary", Positions::rotary}},
                        "How the model knows positions: a learned vector each, or rotated queries and keys."),
      number("model.rotary_base", FIELD(model.rotary_base), {1, kLarge, true, false}, "Base of the rotary frequencies."),
      choice<NormKind>("model.norm", FIELD(model.norm), {{"layernorm", NormKind::layernorm}, {"rmsnorm", NormKind::rmsnorm}},
                       "Normalisation before each part of a block."),
      boolean("model.bias", FIELD(model.bias), "Biases in linear layers and layernorms."),
      integer("model.vocabulary", FIELD(model.vocabulary), 0, std::numeric_limits<std::int32_t>::max(), "Tokens of the tokenizer. 0: from the data."),
      integer("model.vocabulary_multiple", FIELD(vocabulary_multiple), 1, 65536, "The embedding's rows are padded to a multiple of this."),

      choice<Score>("attention.score", FIELD(model.attention.score), {{"dot", Score::dot}, {"cosine", Score::cosine}, {"fidelity", Score::fidelity}},
                    "Score of an edge: scaled dot product; scaled product of unit vectors; the square of that."),
      choice<Gate>("attention.gate", FIELD(model.attention.gate),
                   {{"relu", Gate::relu}, {"relu2", Gate::relu2}, {"relu4", Gate::relu4}, {"softmax", Gate::softmax}},
                   "Weight of an edge: max(0, score - threshold) to the power 1, 2 or 4; or softmax, which has neither normalizer nor threshold."),
      choice<Normalizer>("attention.normalizer", FIELD(model.attention.normalizer),
                         {{"none", Normalizer::none}, {"length", Normalizer::length}, {"sum", Normalizer::sum}, {"rms", Normalizer::rms}},
                         "What the weighted sum of values is divided by: nothing; visible keys^length_alpha; epsilon + the sum of weights; its rms, "
                         "then times a gain."),
      number("attention.length_alpha", FIELD(model.attention.length_alpha), {0, 4}, "Exponent of normalizer length."),
      number(
          "attention.epsilon", FIELD(model.attention.epsilon), {0, 1e3, true, false},
          "Epsilon of normalizer sum: weights of this sum give half an output. Far below the weights, a query's only edge learns next to nothing."),
      number("attention.scale_init", FIELD(model.attention.scale_init), {0, 1e4, true, false},
             "First value of each head's score scale (cosine, fidelity)."),
      boolean("attention.scale_learned", FIELD(model.attention.scale_learned), "Whether the score scale is trained (cosine, fidelity)."),
      boolean("attention.document_mask", FIELD(model.attention.document_mask), "Whether tokens see only their own document."),
      boolean(
          "attention.always.self", FIELD(model.attention.always_self),
          "Whether each token also has an edge to itself that no threshold closes, with a learned bias of its own (normalizer sum; no effect with "
          "gate softmax). It counts as an active edge where it is open."),
      integer(
          "attention.always.sinks", FIELD(model.attention.always_sinks), 0, kMostSinks,
          "Learned keys and values of each head that every query sees whatever its pattern and document, each with a learned bias (normalizer sum; "
          "no effect with gate softmax). They are no edges between tokens: no count has them, and a query with nothing else counts as empty."),
      boolean(
          "attention.output_gate", FIELD(model.attention.output_gate),
          "Whether the attention's output is multiplied, element by element, by 2 sigmoid(W x), W learned and zero at first, x what the queries are "
          "made of (any gate)."),
      choice<ThresholdMode>("attention.threshold.mode", FIELD(model.attention.threshold.mode),
                            {{"fixed", ThresholdMode::fixed},
                             {"learned", ThresholdMode::learned},
                             {"controlled", ThresholdMode::controlled},
                             {"length", ThresholdMode::length}},
                            "Threshold of each head: fixed at init; trained; moved after each step towards target_edge_sparsity; "
                            "beta sqrt(2 ln(i + 2) / head size) for query i (cosine only)."),
      number("attention.threshold.init", FIELD(model.attention.threshold.init), {-1e4, 1e4}, "First value of each head's threshold."),
      number("attention.threshold.target_edge_sparsity", FIELD(model.attention.threshold.target_edge_sparsity), {0, 1, false, true},
             "Share of causal edges that mode controlled makes zero."),
      number("attention.threshold.anneal", FIELD(model.attention.threshold.anneal), share,
             "Share of the run over which the wanted density falls geometrically from anneal_from to 1 - target_edge_sparsity."),
      number("attention.threshold.anneal_from", FIELD(model.attention.threshold.anneal_from), {0, 1, true, false},
             "Wanted density at the first step."),
      number(
          "attention.threshold.head_spread", FIELD(model.attention.threshold.head_spread), {1, 1e6},
          "Mode controlled: the first head of a layer ends with this many times the density of the last, those between fall geometrically; the mean "
          "is the target, unless a static pattern lets a head see less than its share. 1: all heads alike."),
      number("attention.threshold.rate", FIELD(model.attention.threshold.rate), {0, 10, true, false},
             "Gain of mode controlled: the most a threshold moves a step."),
      number("attention.threshold.balance", FIELD(model.attention.threshold.balance), {0, 1},
             "Mode controlled, scores dot and cosine: how fast, a step, the gradients of a head's active edges near the threshold are shifted so "
             "that the sum over all of them becomes zero: what scores rise together its threshold undoes. 0: never."),
      number("attention.threshold.beta", FIELD(model.attention.threshold.beta), {0, 10, true, false}, "Factor of mode length."),
      pattern(),
      integer("attention.tile.query", FIELD(model.attention.tile_query), 16, 128, "Queries a tile: what is computed or skipped as one.", 8),
      integer("attention.tile.key", FIELD(model.attention.tile_key), 16, 128, "Keys a tile.", 8),
      choice<Visit>("attention.visit", FIELD(model.attention.visit), {{"all", Visit::all}, {"active", Visit::active}},
                    "Whether tiles without an active edge are computed all the same. Same bits either way; all is slower."),

      text("data.path", FIELD(data.path), true, "Folder that `tessera prepare` wrote. Training needs it, data.mix or data.synthetic."),
      data_mix(),
      synthetic(),
      text("data.tokenizer", FIELD(data.tokenizer), true,
           "The tokenizer that the data must have been made with: bytes, gpt2, bpe, or one itself, gpt2:DIR or bpe:FILE. Empty: whichever it was."),
      integer("data.prefetch", FIELD(data.prefetch), 1, 1024, "Micro-batches read ahead."),

      integer("train.steps", FIELD(train.steps), 1, kSteps, "Updates of the run."),
      integer("train.tokens_per_step", FIELD(train.tokens_per_step), 1, std::int64_t{1} << 40,
              "Tokens an update over all ranks; a multiple of context x micro_batch x ranks."),
      integer("train.micro_batch", FIELD(train.micro_batch), 1, 1 << 20,
              "Sequences that a rank computes at once; more makes a step faster and takes memory."),
      choice<Precision>("train.precision", FIELD(train.precision),
                        {{"auto", Precision::automatic}, {"fp32", Precision::fp32}, {"bf16", Precision::bf16}},
                        "Arithmetic of activations; the optimizer is fp32. auto: the device's, fp32 on the cpu, bf16 on cuda."),
      choice<Recompute>("train.recompute", FIELD(train.recompute),
                        {{"none", Recompute::none}, {"gelu+norm", Recompute::gelu_norm}, {"block", Recompute::block}},
                        "What the backward pass computes again instead of keeping it, for memory: nothing; outputs of norms and of the gelu; "
                        "everything inside a block. Same bits, but for gelu+norm on cuda, whose gelu reads a rounded argument."),
      integer("train.max_nonfinite", FIELD(train.max_nonfinite), 1, 1'000'000,
              "Steps in a row with a loss or gradient that is not finite, each skipped, after which the run stops."),

      number("optimizer.lr", FIELD(optimizer.lr), {0, 100, true, false}, "Highest learning rate of AdamW."),
      betas(),
      number("optimizer.eps", FIELD(optimizer.eps), {0, 1, true, false}, "AdamW's epsilon."),
      number("optimizer.weight_decay", FIELD(optimizer.weight_decay), {0, 100}, "Decoupled decay of matrices; vectors do not decay."),
      number("optimizer.clip", FIELD(optimizer.clip), {0, kLarge}, "Most global norm of the gradient. 0: any."),
      integer("optimizer.warmup", FIELD(optimizer.warmup), 0, kSteps,
              "Steps over which the learning rate rises from 0. Not set: 100, and at most a tenth of the run."),
      choice<Schedule>("optimizer.schedule", FIELD(optimizer.schedule),
                       {{"constant", Schedule::constant}, {"cosine", Schedule::cosine}, {"wsd", Schedule::wsd}},
                       "Learning rate after warm-up: constant; cosine to final_lr; stable, then falling over the last `decay` share of the run."),
      number("optimizer.final_lr", FIELD(optimizer.final_lr), share, "Learning rate at the end, as a share of lr."),
      number("optimizer.decay", FIELD(optimizer.decay), share, "Schedule wsd: share of the run in which the learning rate falls."),

      integer("eval.every", FIELD(eval.every), 0, kSteps, "Steps between evaluations. 0: only at the end."),
      integer("eval.batches", FIELD(eval.batches), 0, kSteps,
              "Micro-batches an evaluation over all ranks together, of each dataset. 0: the whole validation split."),

      integer("checkpoint.every", FIELD(checkpoint.every), 0, kSteps, "Steps between checkpoints. 0: only at the end."),
      integer("checkpoint.keep", FIELD(checkpoint.keep), 0, 1'000'000, "Newest checkpoints kept. 0: all."),

      integer("sample.every", FIELD(sample.every), 0, kSteps, "Steps between generated texts in samples/. 0: none."),
      text("sample.prompt", FIELD(sample.prompt), false, "Text that the samples continue."),
      integer("sample.tokens", FIELD(sample.tokens), 1, 1 << 20, "Tokens a sample."),
      number("sample.temperature", FIELD(sample.temperature), {0, 100}, "Temperature of sampling. 0: the likeliest token."),
      integer("sample.top_k", FIELD(sample.top_k), 0, 1'000'000, "Tokens that sampling chooses among. 0: all."),

      integer("log.every", FIELD(log.every), 1, kSteps, "Steps between console lines; metrics.jsonl has every step."),
      integer("log.heads_every", FIELD(log.heads_every), 0, kSteps, "Steps between rows with the active-edge share by layer and head. 0: none."),

      boolean("tensorboard.enabled", FIELD(tensorboard.enabled),
              "Whether events for TensorBoard (tensorboard --logdir) are written beside metrics.jsonl: its numbers; histograms over heads; images."),
      integer("tensorboard.histogram_every", FIELD(tensorboard.histogram_every), 0, kSteps,
              "Steps between histograms, values by layer and the image of active shares, beside those every eval.every steps and at the end. 0: only "
              "those."),

      integer("parallel.sequence", FIELD(parallel.sequence), 1, 1024, "Ranks that share one sequence. They divide the ranks of the job."),
      choice<SequenceExchange>(
          "parallel.exchange", FIELD(parallel.exchange),
          {{"needed", SequenceExchange::needed},
           {"ring", SequenceExchange::ring},
           {"heads", SequenceExchange::heads},
           {"auto", SequenceExchange::automatic}},
          "How the ranks of a sequence see each other's keys: fetch the tiles that the pattern needs; pass all of them round a ring; "
          "trade tokens for heads, which the ranks must divide, without attention.always. auto: whichever moves fewest bytes."),
      choice<SequenceLayout>(
          "parallel.layout", FIELD(parallel.layout),
          {{"contiguous", SequenceLayout::contiguous}, {"zigzag", SequenceLayout::zigzag}, {"balanced", SequenceLayout::balanced}},
          "Which tokens of a sequence a rank holds: neighbours; a part from the front and one from the back; whichever give every rank "
          "as many visible tiles."),
      integer("parallel.bucket_mib", FIELD(parallel.bucket_mib), 1, 1 << 20,
              "MiB of gradients that the ranks add up as one, beside the backward pass of what comes before."),
      number("parallel.deadline", FIELD(parallel.deadline), {0, 1e6, true, false},
             "Seconds that a collective between GPUs may take before the run ends with a message."),
      boolean("parallel.share_gpu", FIELD(parallel.share_gpu),
              "Whether ranks may share a GPU (slow, for tests); otherwise more ranks than GPUs stop."),
  };
}

#undef FIELD

}  // namespace

const std::vector<Key>& schema() {
  static const std::vector<Key> keys = make_schema();
  return keys;
}

const Key* find_key(const std::string& path) {
  for (const Key& key : schema())
    if (key.path == path) return &key;
  return nullptr;
}

bool is_section(const std::string& path) {
  for (const Key& key : schema())
    if (path.empty() || key.path.starts_with(path + ".")) return true;
  return false;
}

}  // namespace tessera
