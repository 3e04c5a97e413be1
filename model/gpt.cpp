// A Gpt's set-up and its public functions.

#include "model/gpt.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <set>
#include <stdexcept>

#include "kernels/bf16.h"
#include "model/gpt_impl.h"
#include "model/sequence_bytes.h"

namespace tessera {

std::vector<std::shared_ptr<const TileMap>> make_layer_tiles(const ModelConfig& config, std::int64_t tokens) {
  const AttentionConfig& a = config.attention;
  std::map<std::vector<std::string>, std::shared_ptr<const TileMap>> by_patterns;
  HostTiles tiles;
  for (int l = 0; l < config.layers; ++l) {
    std::vector<std::string> patterns;
    for (int h = 0; h < config.heads; ++h) patterns.push_back(describe(a.pattern.at(l, h)));
    auto& map = by_patterns[patterns];
    if (!map) map = make_tile_map(a.pattern, l, config.heads, tokens, a.tile_query, a.tile_key);
    tiles.push_back(map);
  }
  return tiles;
}

namespace {

/// What the kernels of a GPU are made for, beyond check_model().
void check_cuda(const ModelConfig& m) {
  const AttentionConfig& a = m.attention;
  if (a.tile_query != 64 || a.tile_key != 64)
    throw std::invalid_argument(
        fmt::format("attention.tile.query is {} and attention.tile.key {}; on device cuda both must be 64", a.tile_query, a.tile_key));
  if (m.head_size() != 64 && m.head_size() != 128)
    throw std::invalid_argument(
        fmt::format("model.width {} / model.heads {} is a head size of {}; on device cuda it must be 64 or 128", m.width, m.heads, m.head_size()));
  if (m.vocabulary_padded % 8 != 0)
    throw std::invalid_argument(
        fmt::format("the embedding has {} rows; on device cuda they must be a multiple of 8: set model.vocabulary_multiple to one, such as 64",
                    m.vocabulary_padded));
}

Gpt::Options resolved(const ModelConfig& config, Gpt::Options o, const Ops& ops) {
  if (!o.device) o.device = ops.kind();
  check_model(config);
  if (*o.device == DeviceKind::cuda) check_cuda(config);
  if (o.tokens == 0) o.tokens = config.context;
  const auto require_positive = [](std::int64_t value, const char* what) {
    if (value < 1) throw std::invalid_argument(fmt::format("{} is {}; it must be at least 1", what, value));
  };
  require_positive(o.micro_batch, "the micro-batch");
  require_positive(o.tokens, "the length of a sequence");
  require_positive(o.shard_multiple, "the multiple of the flat buffers");
  if (o.cache < 0 || (o.cache > 0 && o.sequence.ranks > 1))
    throw std::logic_error(fmt::format("Gpt: a cache of {} sequences that {} ranks share", o.cache, o.sequence.ranks));
  if (config.positions == Positions::learned && o.tokens > config.context)
    throw std::invalid_argument(
        fmt::format("sequences of {} tokens, but positions are learned for model.context {} tokens", o.tokens, config.context));
  return o;
}

SequenceSplit split_of(const Gpt::Options& options, const HostTiles& tiles) {
  const SequencePart& part = options.sequence;
  if (part.rank < 0 || part.rank >= part.ranks) throw std::logic_error(fmt::format("Gpt: rank {} of {} of a sequence", part.rank, part.ranks));
  if (part.ranks == 1) return {options.tokens, options.tokens, {{0}}};
  return split_sequence(part.layout, options.tokens, part.ranks, tiles, *options.device);
}

std::unique_ptr<SharedAttention> shared_attention(const ModelConfig& config, Gpt::Options& options, const SequenceSplit& split,
                                                  const HostTiles& tiles, MemoryPlan& plan) {
  SequencePart& part = options.sequence;
  if (split.ranks() == 1) return nullptr;
  const SharedAttention::Shape shape{.sequences = options.micro_batch,
                                     .heads = config.heads,
                                     .head_size = config.head_size(),
                                     .device = *options.device,
                                     .training = options.training,
                                     .document_mask = config.attention.document_mask,
                                     .positions = config.attention.threshold.mode == ThresholdMode::length,
                                     .added_edges = config.attention.adds_edges()};
  if (part.exchange == SequenceExchange::automatic)
    part.exchange = cheapest_exchange(
        split, tiles,
        {shape.sequences, shape.heads, shape.head_size, static_cast<std::int64_t>(size_of(compute_type(shape.device))), shape.added_edges});
  return make_shared_attention(part, split, tiles, shape, plan);
}

GptMemory memory_of(const ModelConfig& config, const ParameterLayout& layout, const Gpt::Options& options, const SequenceSplit& split,
                    const SharedAttention* shared, MemoryPlan& plan) {
  const std::int64_t tokens = split.tokens_of(options.sequence.rank);
  if (shared) return {config, layout, options, tokens, shared->sizes(), plan};
  const std::int64_t B = options.micro_batch, H = config.heads, query = config.attention.tile_query, key = config.attention.tile_key;
  SharedAttention::Sizes sizes;
  sizes.z = H * std::max(B * tokens, options.cache);
  sizes.active_tiles = B * H * ((tokens + query - 1) / query) * bitmap_words((tokens + key - 1) / key);
  sizes.workspace = attention_backward_workspace({B, H, tokens, config.head_size()}, config.attention.tile_query);
  return {config, layout, options, tokens, sizes, plan};
}

}  // namespace

// -- Set-up -----------------------------------------------------------------------------------------------------------

Gpt::Impl::Impl(const ModelConfig& c, Ops& o, MemoryPlan& p, const Options& given)
    : config(c),
      ops(o),
      plan(p),
      options(resolved(c, given, o)),
      layout(make_parameter_layout(c)),
      tiles(make_layer_tiles(c, options.tokens)),
      split(split_of(options, tiles)),
      shared(shared_attention(c, options, split, tiles, p)),
      memory(memory_of(c, layout, options, split, shared.get(), p)) {
  const AttentionConfig& a = c.attention;
  math = {.score = a.score,
          .gate = a.gate,
          .normalizer = a.gate == Gate::softmax ? Normalizer::none : a.normalizer,
          .length_alpha = a.length_alpha,
          .epsilon = a.epsilon,
          .length_beta = a.threshold.mode == ThresholdMode::length && a.gate != Gate::softmax ? a.threshold.beta : 0.0f};

  const DeviceKind device = *options.device;
  if (!shared)
    for (const auto& map : std::set(tiles.begin(), tiles.end())) plan.account(MemoryCategory::workspace, "tile lists", tiles_bytes(device, *map));
  plan.account(MemoryCategory::workspace, "scratch", scratch_bytes(device, most_rows(), widest()));
}

void Gpt::Impl::bind(const SequenceGroup& group) {
  if (ops.kind() != *options.device)
    throw std::logic_error(fmt::format("Gpt: planned for device {}, and bound on {}", name_of(*options.device), ops.device_name()));
  std::map<const TileMap*, std::shared_ptr<const DeviceTiles>> uploaded;
  device_tiles.clear();
  if (shared) shared->bind(ops, group);
  for (const auto& map : shared ? HostTiles{} : tiles) {
    auto& device = uploaded[map.get()];
    if (!device) device = ops.upload_tiles(map);
    device_tiles.push_back(device);
  }
  ops.prepare(most_rows(), widest());
  w = slice_flat(layout, config.layers, weights(), vectors());
  if (options.training) {
    const Tensor gradients = plan[memory.gradients];
    d = slice_flat(layout, config.layers, gradients, vectors_of(layout, gradients));
    ops.zero(gradients);
    for (const auto slot : {memory.balances, memory.threshold_gradients})
      if (slot >= 0) ops.zero(plan[slot]);
  }
  ops.zero(plan[memory.counters]);
  cached.assign(static_cast<std::size_t>(options.cache), 0);
  decoding = {};  // a recorded pass knows the old lists
  fill_tables();
  bound = true;
}

void Gpt::Impl::fill_tables() {
  const AttentionConfig& a = config.attention;
  const auto fill = [&](const Tensor& t, float value) {
    const std::vector<float> host(static_cast<std::size_t>(t.numel()), value);
    ops.upload(t, host.data());
  };
  const bool uses_thresholds = a.gate != Gate::softmax && (a.threshold.mode == ThresholdMode::fixed || a.threshold.mode == ThresholdMode::controlled);
  fill(plan[memory.thresholds], uses_thresholds ? a.threshold.init : 0.0f);
  fill(plan[memory.constant_scale], unit ? a.scale_init : 1.0f / std::sqrt(static_cast<float>(D)));

  if (memory.rotary >= 0) {  // Su et al., arXiv 2104.09864
    std::vector<float> table;
    for (std::int64_t p = 0; p < options.tokens; ++p) {
      for (std::int64_t i = 0; i < D / 2; ++i) {
        const double angle = static_cast<double>(p) * std::pow(config.rotary_base, -2.0 * static_cast<double>(i) / static_cast<double>(D));
        table.push_back(static_cast<float>(std::cos(angle)));
        table.push_back(static_cast<float>(std::sin(angle)));
      }
    }
    ops.upload(plan[memory.rotary], table.data());
  }
}

void Gpt::Impl::begin(const Batch& batch) {
  if (!bound) throw std::logic_error("Gpt: bind() comes before the first batch");
  const Shape& s = batch.tokens.shape;
  const std::int64_t own = own_tokens();
  if (s.rank != 2 || s[0] < 1 || s[0] > options.micro_batch || s[1] < (shared ? own : 1) || s[1] > own)
    throw std::logic_error(fmt::format("Gpt: a batch {} for a model of at most {} sequences of {}{} tokens", s.str(), options.micro_batch, own,
                                       shared ? " and no fewer" : ""));
  if (!batch.positions || (config.attention.document_mask && !batch.document_start))
    throw std::logic_error("Gpt: a batch without positions, or without document_start where attention.document_mask is on");
  B = s[0], T = s[1], N = B * T;
  if (shared) shared->begin(config.attention.document_mask ? rows(batch.document_start) : Tensor{});
}

// -- Public -----------------------------------------------------------------------------------------------------------

Gpt::Gpt(const ModelConfig& config, Ops& ops, MemoryPlan& plan, const Options& options) : impl_(std::make_unique<Impl>(config, ops, plan, options)) {}
Gpt::~Gpt() = default;

void Gpt::bind(const SequenceGroup& group) { impl_->bind(group); }

const ModelConfig& Gpt::config() const { return impl_->config; }
const Gpt::Options& Gpt::options() const { return impl_->options; }
std::vector<std::int32_t> Gpt::positions() const { return impl_->split.positions(impl_->options.sequence.rank); }
const SequenceSplit& Gpt::split() const { return impl_->split; }
const ParameterLayout& Gpt::layout() const { return impl_->layout; }
Tensor Gpt::weights() const { return impl_->weights(); }
Tensor Gpt::vectors() const { return impl_->vectors(); }
Tensor Gpt::gradients() const {
  if (!impl_->options.training) throw std::logic_error("Gpt: a model that is not for training has no gradients");
  return impl_->plan[impl_->memory.gradients];
}
Tensor Gpt::parameter(const std::string& name) const {
  const ParameterInfo& p = impl_->layout.find(name);
  const Tensor from = p.decayed ? weights().slice(p.offset, p.shape.numel()) : vectors().slice(p.offset - layout().decayed_count, p.shape.numel());
  return from.view(p.shape);
}
void Gpt::set_parameters(std::int64_t first, std::span<const float> values) {
  const auto count = static_cast<std::int64_t>(values.size());
  if (first < 0 || first + count > layout().count)
    throw std::logic_error(fmt::format("Gpt: set_parameters of [{}, {}) of {} parameters", first, first + count, layout().count));
  if (count == 0) return;
  const Tensor to = weights().slice(first, count);
  if (to.dtype == DType::f32) return impl_->ops.upload(to, values.data());
  std::vector<std::uint16_t> rounded(values.size());
  std::transform(values.begin(), values.end(), rounded.begin(), to_bf16);
  impl_->ops.upload(to, rounded.data());
  const std::int64_t matrices = std::max<std::int64_t>(0, layout().decayed_count - first);  // elements of them among the values
  if (matrices < count) impl_->ops.upload(vectors().slice(first + matrices - layout().decayed_count, count - matrices), values.data() + matrices);
}
Tensor Gpt::thresholds() const { return impl_->plan[impl_->memory.thresholds]; }
Tensor Gpt::balances() const { return impl_->memory.balances < 0 ? Tensor{} : impl_->plan[impl_->memory.balances]; }
Tensor Gpt::threshold_gradients() const { return impl_->memory.balances < 0 ? Tensor{} : impl_->plan[impl_->memory.threshold_gradients]; }
Tensor Gpt::counters() const { return impl_->plan[impl_->memory.counters]; }
Tensor Gpt::losses() const { return impl_->plan[impl_->memory.losses].view({impl_->N}); }
Tensor Gpt::predictions() const { return impl_->plan[impl_->memory.predictions].view({impl_->N}); }

void Gpt::initialize(std::uint64_t seed) {
  for (const auto& p : layout().parameters) set_parameters(p.offset, initial_values(p, seed));
}
void Gpt::zero_gradients() {
  impl_->ops.zero(gradients());
  if (const Tensor g = threshold_gradients()) impl_->ops.zero(g);
}
void Gpt::zero_counters() { impl_->ops.zero(counters()); }

void Gpt::forward(const Batch& batch, bool predictions) {
  impl_->begin(batch);
  impl_->trunk(batch, true);
  Classifier c = impl_->classifier(batch);
  if (predictions) c.predictions = this->predictions();
  impl_->ops.classifier(c);
}

void Gpt::forward_backward(const Batch& batch, float gradient_scale) {
  if (!impl_->options.training) throw std::logic_error("Gpt: forward_backward of a model that is not for training");
  impl_->begin(batch);
  impl_->trunk(batch, true);
  Classifier c = impl_->classifier(batch);
  c.dx = impl_->narrow();
  c.dw = impl_->d.wte;
  c.gradient_scale = gradient_scale;
  impl_->ops.classifier(c);
  impl_->trunk_backward(batch);
}

double Gpt::attention_seconds(const Batch& batch) {
  if (!impl_->options.training) throw std::logic_error("Gpt: attention_seconds of a model that is not for training");
  impl_->begin(batch);
  return impl_->attention_seconds(batch);
}

void Gpt::set_hooks(Hooks hooks) { impl_->hooks = std::move(hooks); }
void Gpt::set_visit(Visit visit) { impl_->visit = visit; }

Gpt::Flops Gpt::flops_per_token() const {
  const ModelConfig& c = impl_->config;
  const double C = c.width, L = c.layers, T = static_cast<double>(c.context);
  const double matrices = L * static_cast<double>(c.block_matrix_elements()) + static_cast<double>(c.vocabulary_padded) * C;
  Flops f;
  f.dense = 6 * matrices;
  f.attention_causal = 12 * C * L * (T + 1) / 2;
  for (const auto& map : impl_->options.tokens == c.context ? impl_->tiles : make_layer_tiles(c, c.context)) {
    for (auto group : map->group_of_head) f.attention_visible += 12 * c.head_size() * static_cast<double>(map->groups[group].visible_edges) / T;
  }
  return f;
}

}  // namespace tessera
