// Notation: N = B T rows, C = width, H heads of D, V = rows of the embedding. A block is
//
//   stream -> ln_1 -> c_attn -> q, k to unit length, rotated -> attention -> (head norm) -> c_proj -> + stream
//          -> ln_2 -> c_fc -> gelu -> c_proj -> + stream
//
// Each norm adds the branch before it to the stream (NormForward::residual), so no addition is a pass of its own.

#include "model/gpt.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>
#include <stdexcept>

#include "model/gpt_memory.h"

namespace tessera {
namespace {

using HostTiles = std::vector<std::shared_ptr<const TileMap>>;  // a layer

/// The tile lists of every layer; layers with equal patterns share them.
HostTiles make_layer_tiles(const ModelConfig& config, std::int64_t tokens) {
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

Gpt::Options resolved(const ModelConfig& config, Gpt::Options o) {
  check_model(config);
  if (o.tokens == 0) o.tokens = config.context;
  const auto require_positive = [](std::int64_t value, const char* what) {
    if (value < 1) throw std::invalid_argument(fmt::format("{} is {}; it must be at least 1", what, value));
  };
  require_positive(o.micro_batch, "the micro-batch");
  require_positive(o.tokens, "the length of a sequence");
  require_positive(o.shard_multiple, "the multiple of the flat buffers");
  if (config.positions == Positions::learned && o.tokens > config.context)
    throw std::invalid_argument(
        fmt::format("sequences of {} tokens, but positions are learned for model.context {} tokens", o.tokens, config.context));
  return o;
}

}  // namespace

struct Gpt::Impl {
  Impl(const ModelConfig& c, Ops& o, MemoryPlan& p, const Options& options_in)
      : config(c),
        ops(o),
        plan(p),
        options(resolved(c, options_in)),
        layout(make_parameter_layout(c)),
        tiles(make_layer_tiles(c, options.tokens)),
        memory(c, layout, options, p) {
    math = {
        .score = c.attention.score,
        .gate = c.attention.gate,
        .normalizer = c.attention.gate == Gate::softmax ? Normalizer::none : c.attention.normalizer,
        .length_alpha = c.attention.length_alpha,
        .epsilon = c.attention.epsilon,
        .length_beta = c.attention.threshold.mode == ThresholdMode::length && c.attention.gate != Gate::softmax ? c.attention.threshold.beta : 0.0f};
  }

  // -- set-up (gpt.cpp)
  void fill_tables();
  void begin(const Batch& batch);

  // -- views of the current batch
  Tensor rows(MemoryPlan::Slot slot, std::int64_t columns) const { return plan[slot].view({N, columns}); }
  Tensor rows(const Tensor& t) const { return t.view({N}); }
  Tensor optional_rows(MemoryPlan::Slot slot) const { return slot < 0 ? Tensor{} : plan[slot].view({N}); }
  Tensor stream(int norm) const { return rows(memory.norms[norm].stream, C); }
  Tensor normed(int norm) const { return rows(memory.norms[norm].y, C); }
  Tensor narrow() const { return rows(memory.narrow, C); }
  Tensor head_rstd(const BlockSlots& s) const { return rows(s.head_rstd, H); }
  Tensor per_head(const Tensor& heads) const { return heads.view({N, H, D}); }

  // -- forward
  void norm_forward(int norm, const Tensor& gain, const Tensor& bias);
  QkTransform qk_transform(int layer, const Batch& batch) const;
  AttentionForward attention(int layer, const Batch& batch) const;
  void attention_branch(int layer, const Batch& batch, bool count);
  void mlp_branch(int layer);
  void trunk(const Batch& batch, bool count);
  Classifier classifier(const Batch& batch) const;

  // -- backward
  void norm_backward(int norm, const Tensor& dy, const Tensor& gain, const Tensor& dgain, const Tensor& dbias);
  void attention_branch_backward(int layer, const Batch& batch);
  void mlp_branch_backward(int layer);
  void trunk_backward(const Batch& batch);

  const ModelConfig config;
  Ops& ops;
  MemoryPlan& plan;
  const Options options;
  const ParameterLayout layout;
  const HostTiles tiles;
  const GptMemory memory;
  AttentionMath math;

  const std::int64_t C = config.width, H = config.heads, D = config.head_size(), hidden = C * config.mlp_ratio;
  const bool unit = config.attention.score != Score::dot;

  std::vector<std::shared_ptr<const DeviceTiles>> device_tiles;  // a layer; empty until bind()
  ModelTensors w, d;                                             // parameters and gradients by name
  std::int64_t B = 0, T = 0, N = 0;                              // of the current batch
};

// -- Set-up -----------------------------------------------------------------------------------------------------------

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
  if (device_tiles.empty()) throw std::logic_error("Gpt: bind() comes before the first batch");
  const Shape& s = batch.tokens.shape;
  if (s.rank != 2 || s[0] < 1 || s[0] > options.micro_batch || s[1] < 1 || s[1] > options.tokens)
    throw std::logic_error(
        fmt::format("Gpt: a batch {} for a model of at most {} sequences of {} tokens", s.str(), options.micro_batch, options.tokens));
  if (!batch.positions || (config.attention.document_mask && !batch.document_start))
    throw std::logic_error("Gpt: a batch without positions, or without document_start where attention.document_mask is on");
  B = s[0], T = s[1], N = B * T;
}

// -- Forward ----------------------------------------------------------------------------------------------------------

/// Norm 0 reads the stream as the embedding left it; every other one first adds the branch in narrow() to the stream.
void Gpt::Impl::norm_forward(int norm, const Tensor& gain, const Tensor& bias) {
  NormForward a;
  a.kind = config.norm;
  if (norm == 0) {
    a.x = stream(0);
  } else {
    a.x = narrow();
    a.residual = stream(norm - 1);
    a.residual_out = stream(norm);
  }
  a.gain = gain;
  a.bias = bias;
  a.y = normed(norm);
  a.mean = optional_rows(memory.norms[norm].mean);
  a.rstd = optional_rows(memory.norms[norm].rstd);
  ops.norm_forward(a);
}

QkTransform Gpt::Impl::qk_transform(int layer, const Batch& batch) const {
  QkTransform t;
  t.qkv = rows(memory.blocks[layer].qkv, 3 * C);
  t.heads = H;
  t.unit = unit;
  if (unit) t.inverse_norm = plan[memory.blocks[layer].inverse_norm].view({N, 2, H});
  if (memory.rotary >= 0) {
    t.rotary = plan[memory.rotary];
    t.positions = rows(batch.positions);
  }
  return t;
}

/// Part 0, 1, 2 (q, k, v) of a packed projection [B, T, 3, H, D].
static HeadsView packed_heads(const Tensor& qkv, std::int64_t part, std::int64_t T, std::int64_t C, std::int64_t D) {
  return {qkv.slice(part * C, 1).data, qkv.dtype, T * 3 * C, D, 3 * C};
}

/// [B, T, H, D].
static HeadsView heads_of(const Tensor& t, std::int64_t T, std::int64_t C, std::int64_t D) { return {t.data, t.dtype, T * C, D, C}; }

AttentionForward Gpt::Impl::attention(int layer, const Batch& batch) const {
  const BlockSlots& s = memory.blocks[layer];
  const Tensor qkv = rows(s.qkv, 3 * C);
  const std::int64_t query_tiles = (T + config.attention.tile_query - 1) / config.attention.tile_query;
  const std::int64_t key_tiles = (T + config.attention.tile_key - 1) / config.attention.tile_key;
  AttentionForward a;
  a.shape = {B, H, T, D};
  a.math = math;
  a.visit = config.attention.visit;
  a.tiles = device_tiles[layer].get();
  a.q = packed_heads(qkv, 0, T, C, D);
  a.k = packed_heads(qkv, 1, T, C, D);
  a.v = packed_heads(qkv, 2, T, C, D);
  a.o = heads_of(plan[s.attention], T, C, D);
  a.scale = w.blocks[layer].scale ? w.blocks[layer].scale : plan[memory.constant_scale];
  a.threshold = w.blocks[layer].threshold ? w.blocks[layer].threshold : plan[memory.thresholds].slice(layer * H, H);
  if (config.attention.document_mask) a.document_start = batch.document_start.view({B, T});
  a.z = plan[s.z].view({B, H, T});
  a.active_tiles = plan[s.active_tiles].view({B, H, query_tiles, bitmap_words(key_tiles)});
  return a;
}

void Gpt::Impl::attention_branch(int layer, const Batch& batch, bool count) {
  const BlockSlots& s = memory.blocks[layer];
  const BlockTensors& p = w.blocks[layer];
  ops.linear_forward({.x = normed(2 * layer), .w = p.qkv, .bias = p.qkv_bias, .y = rows(s.qkv, 3 * C), .pre_activation = {}});
  if (unit || memory.rotary >= 0) ops.qk_transform_forward(qk_transform(layer, batch));

  AttentionForward a = attention(layer, batch);
  if (count) a.counters = plan[memory.counters].slice(layer * H * kAttentionCounters, H * kAttentionCounters).view({H, kAttentionCounters});
  ops.attention_forward(a);

  Tensor o = rows(s.attention, C);
  if (p.head_gain) {
    const Tensor y = rows(s.head_norm, C);
    ops.head_norm_forward({.x = per_head(o), .gain = p.head_gain, .y = per_head(y), .rstd = head_rstd(s)});
    o = y;
  }
  ops.linear_forward({.x = o, .w = p.proj, .bias = p.proj_bias, .y = narrow(), .pre_activation = {}});
}

void Gpt::Impl::mlp_branch(int layer) {
  const BlockSlots& s = memory.blocks[layer];
  const BlockTensors& p = w.blocks[layer];
  const Tensor gelu = rows(s.hidden_gelu, hidden);
  ops.linear_forward({.x = normed(2 * layer + 1),
                      .w = p.fc,
                      .bias = p.fc_bias,
                      .y = gelu,
                      .activation = Activation::gelu,
                      .pre_activation = rows(s.hidden, hidden)});
  ops.linear_forward({.x = gelu, .w = p.out, .bias = p.out_bias, .y = narrow(), .pre_activation = {}});
}

void Gpt::Impl::trunk(const Batch& batch, bool count) {
  ops.embedding_forward(stream(0), rows(batch.tokens), rows(batch.positions), w.wte, w.wpe);
  for (int l = 0; l < config.layers; ++l) {
    norm_forward(2 * l, w.blocks[l].ln_1, w.blocks[l].ln_1_bias);
    attention_branch(l, batch, count);
    norm_forward(2 * l + 1, w.blocks[l].ln_2, w.blocks[l].ln_2_bias);
    mlp_branch(l);
  }
  norm_forward(2 * config.layers, w.ln_f, w.ln_f_bias);
}

Classifier Gpt::Impl::classifier(const Batch& batch) const {
  Classifier c;
  c.x = normed(2 * config.layers);
  c.w = w.wte;
  c.vocabulary = config.vocabulary;
  c.targets = rows(batch.targets);
  c.losses = rows(plan[memory.losses]);
  c.workspace = plan[memory.logits];
  return c;
}

// -- Backward: the forward pass read from its end. The stream's gradient passes each branch unchanged and takes the branch's own ------------

void Gpt::Impl::norm_backward(int norm, const Tensor& dy, const Tensor& gain, const Tensor& dgain, const Tensor& dbias) {
  const NormSlots& s = memory.norms[norm];
  ops.norm_backward({.kind = config.norm,
                     .dy = dy,
                     .x = stream(norm),
                     .gain = gain,
                     .mean = optional_rows(s.mean),
                     .rstd = optional_rows(s.rstd),
                     .dx = rows(memory.d_stream, C),
                     .dgain = dgain,
                     .dbias = dbias});
}

void Gpt::Impl::mlp_branch_backward(int layer) {
  const BlockSlots& s = memory.blocks[layer];
  const BlockTensors &p = w.blocks[layer], &g = d.blocks[layer];
  const Tensor d_hidden = rows(memory.wide, hidden);
  ops.linear_backward({.dy = rows(memory.d_stream, C),
                       .x = rows(s.hidden_gelu, hidden),
                       .w = p.out,
                       .dx = d_hidden,
                       .gelu_argument = rows(s.hidden, hidden),
                       .dw = g.out,
                       .dbias = g.out_bias});
  ops.linear_backward({.dy = d_hidden, .x = normed(2 * layer + 1), .w = p.fc, .dx = narrow(), .gelu_argument = {}, .dw = g.fc, .dbias = g.fc_bias});
  norm_backward(2 * layer + 1, narrow(), p.ln_2, g.ln_2, g.ln_2_bias);
}

void Gpt::Impl::attention_branch_backward(int layer, const Batch& batch) {
  const BlockSlots& s = memory.blocks[layer];
  const BlockTensors &p = w.blocks[layer], &g = d.blocks[layer];
  const Tensor o = rows(p.head_gain ? s.head_norm : s.attention, C);
  Tensor d_o = narrow();
  ops.linear_backward({.dy = rows(memory.d_stream, C), .x = o, .w = p.proj, .dx = d_o, .gelu_argument = {}, .dw = g.proj, .dbias = g.proj_bias});
  if (p.head_gain) {
    const Tensor d_sum = rows(memory.d_heads, C);
    ops.head_norm_backward({.dy = per_head(d_o),
                            .x = per_head(rows(s.attention, C)),
                            .gain = p.head_gain,
                            .rstd = head_rstd(s),
                            .dx = per_head(d_sum),
                            .dgain = g.head_gain});
    d_o = d_sum;
  }

  const Tensor d_qkv = rows(memory.wide, 3 * C);
  AttentionBackward a;
  a.forward = attention(layer, batch);
  a.d_o = heads_of(d_o, T, C, D);
  a.dq = packed_heads(d_qkv, 0, T, C, D);
  a.dk = packed_heads(d_qkv, 1, T, C, D);
  a.dv = packed_heads(d_qkv, 2, T, C, D);
  a.dscale = g.scale;
  a.dthreshold = g.threshold;
  a.workspace = plan[memory.attention_workspace];
  ops.attention_backward(a);

  if (unit || memory.rotary >= 0) ops.qk_transform_backward(qk_transform(layer, batch), d_qkv);
  ops.linear_backward({.dy = d_qkv, .x = normed(2 * layer), .w = p.qkv, .dx = narrow(), .gelu_argument = {}, .dw = g.qkv, .dbias = g.qkv_bias});
  norm_backward(2 * layer, narrow(), p.ln_1, g.ln_1, g.ln_1_bias);
}

/// From the gradient of the last norm's output in narrow().
void Gpt::Impl::trunk_backward(const Batch& batch) {
  const Tensor d_stream = rows(memory.d_stream, C);
  ops.zero(d_stream);
  norm_backward(2 * config.layers, narrow(), w.ln_f, d.ln_f, d.ln_f_bias);
  for (int l = config.layers - 1; l >= 0; --l) {
    mlp_branch_backward(l);
    attention_branch_backward(l, batch);
  }
  ops.embedding_backward(d_stream, rows(batch.tokens), rows(batch.positions), d.wte, d.wpe);
}

// -- Public -----------------------------------------------------------------------------------------------------------

Gpt::Gpt(const ModelConfig& config, Ops& ops, MemoryPlan& plan, const Options& options) : impl_(std::make_unique<Impl>(config, ops, plan, options)) {}
Gpt::~Gpt() = default;

void Gpt::bind() {
  std::map<const TileMap*, std::shared_ptr<const DeviceTiles>> uploaded;
  impl_->device_tiles.clear();
  for (const auto& map : impl_->tiles) {
    auto& device = uploaded[map.get()];
    if (!device) device = impl_->ops.upload_tiles(map);
    impl_->device_tiles.push_back(device);
  }
  impl_->w = slice_flat(impl_->layout, impl_->config.layers, parameters());
  if (impl_->options.training) {
    impl_->d = slice_flat(impl_->layout, impl_->config.layers, gradients());
    zero_gradients();
  }
  zero_counters();
  impl_->fill_tables();
}

const ModelConfig& Gpt::config() const { return impl_->config; }
const ParameterLayout& Gpt::layout() const { return impl_->layout; }
Tensor Gpt::parameters() const { return impl_->plan[impl_->memory.parameters]; }
Tensor Gpt::gradients() const {
  if (!impl_->options.training) throw std::logic_error("Gpt: a model that is not for training has no gradients");
  return impl_->plan[impl_->memory.gradients];
}
Tensor Gpt::parameter(const std::string& name) const {
  const ParameterInfo& p = impl_->layout.find(name);
  return parameters().slice(p.offset, p.shape.numel()).view(p.shape);
}
Tensor Gpt::thresholds() const { return impl_->plan[impl_->memory.thresholds]; }
Tensor Gpt::counters() const { return impl_->plan[impl_->memory.counters]; }
Tensor Gpt::losses() const { return impl_->plan[impl_->memory.losses].view({impl_->N}); }
Tensor Gpt::predictions() const { return impl_->plan[impl_->memory.predictions].view({impl_->N}); }

void Gpt::initialize(std::uint64_t seed) {
  for (const auto& p : impl_->layout.parameters) impl_->ops.upload(parameters().slice(p.offset, p.shape.numel()), initial_values(p, seed).data());
}
void Gpt::zero_gradients() { impl_->ops.zero(gradients()); }
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

std::vector<float> Gpt::next_logits(std::span<const std::int32_t> tokens) {
  const ModelConfig& config = impl_->config;
  if (tokens.empty()) throw std::invalid_argument("there is no next token of an empty sequence; give at least one token");
  for (auto t : tokens) {
    if (t < 0 || t >= config.vocabulary)
      throw std::invalid_argument(fmt::format("token {} for a model with a vocabulary of {}", t, config.vocabulary));
  }
  const auto T = std::min({static_cast<std::int64_t>(tokens.size()), config.context, impl_->options.tokens});
  tokens = tokens.last(static_cast<std::size_t>(T));
  std::vector<std::int32_t> positions(tokens.size());
  std::iota(positions.begin(), positions.end(), 0);
  const std::vector<std::int32_t> one_document(tokens.size(), 0);

  const auto sequence = [&](MemoryPlan::Slot slot, std::span<const std::int32_t> host) {
    const Tensor t = impl_->plan[slot].view({1, T});
    impl_->ops.upload(t, host.data());
    return t;
  };
  Batch batch;
  batch.tokens = sequence(impl_->memory.prompt_tokens, tokens);
  batch.positions = sequence(impl_->memory.prompt_positions, positions);
  batch.document_start = sequence(impl_->memory.prompt_document, one_document);
  impl_->begin(batch);
  impl_->trunk(batch, false);

  const Tensor last = impl_->normed(2 * config.layers).slice((T - 1) * config.width, config.width).view({1, config.width});
  const Tensor logits = impl_->plan[impl_->memory.logits].view({1, config.vocabulary_padded});
  impl_->ops.linear_forward({.x = last, .w = impl_->w.wte, .bias = {}, .y = logits, .pre_activation = {}});
  std::vector<float> host(static_cast<std::size_t>(config.vocabulary));
  impl_->ops.download(host.data(), logits.slice(0, config.vocabulary));
  return host;
}

Gpt::Flops Gpt::flops_per_token() const {
  const ModelConfig& c = impl_->config;
  const double C = c.width, L = c.layers, T = static_cast<double>(c.context);
  const double matrices = L * (4 * C * C + 2 * C * C * c.mlp_ratio) + static_cast<double>(c.vocabulary_padded) * C;
  Flops f;
  f.dense = 6 * matrices;
  f.attention_causal = 12 * C * L * (T + 1) / 2;
  for (const auto& map : impl_->options.tokens == c.context ? impl_->tiles : make_layer_tiles(c, c.context)) {
    for (auto group : map->group_of_head) f.attention_visible += 12 * c.head_size() * static_cast<double>(map->groups[group].visible_edges) / T;
  }
  return f;
}

}  // namespace tessera
