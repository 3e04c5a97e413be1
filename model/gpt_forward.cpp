// The forward pass.

#include "model/gpt_impl.h"

namespace tessera {

/// Norm 0 reads the stream as the embedding left it; every other one first adds the branch in narrow() to the stream. One computed again reads the
/// stream that it left the first time.
void Gpt::Impl::norm_forward(int norm, NormInput input) {
  const NormTensors p = norm_of(w, norm);
  NormForward a;
  a.kind = config.norm;
  if (input == NormInput::stream) {
    a.x = stream(norm);
  } else {
    a.x = narrow();
    a.residual = stream(norm - 1);
    a.residual_out = stream(norm);
  }
  a.gain = p.gain;
  a.bias = p.bias;
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

AttentionForward Gpt::Impl::attention(int layer, const Batch& batch) const {
  const BlockSlots& s = memory.blocks[layer];
  const Tensor qkv = rows(s.qkv, 3 * C);
  const std::int64_t query_tiles = (T + config.attention.tile_query - 1) / config.attention.tile_query;
  const std::int64_t key_tiles = (T + config.attention.tile_key - 1) / config.attention.tile_key;
  AttentionForward a;
  a.shape = {B, H, T, D};
  a.math = math;
  a.visit = visit;
  a.q = packed_heads(qkv, 0, T, C, D);
  a.k = packed_heads(qkv, 1, T, C, D);
  a.v = packed_heads(qkv, 2, T, C, D);
  a.o = heads_of(plan[s.attention], T, C, D);
  a.scale = scale(layer);
  a.threshold = threshold(layer);
  if (shared) {
    a.z = plan[s.z];
    a.active_tiles = plan[s.active_tiles];
    return a;
  }
  a.tiles = device_tiles[layer].get();
  if (config.attention.document_mask) a.document_start = batch.document_start.view({B, T});
  a.z = plan[s.z].view({B, H, T});
  a.active_tiles = plan[s.active_tiles].view({B, H, query_tiles, bitmap_words(key_tiles)});
  return a;
}

/// Part 0, 1, 2 (q, k, v) of a layer, from head `first` on.
HeadsView Gpt::Impl::heads_part(int layer, std::int64_t part, std::int64_t first) const {
  return from_head(packed_heads(rows(memory.blocks[layer].qkv, 3 * C), part, T, C, D), first);
}

/// A SelfEdge or Sinks with what both have.
template <class Call>
Call Gpt::Impl::added_edges(int layer, Stretch heads) const {
  const BlockSlots& s = memory.blocks[layer];
  Call e;
  e.shape = {B, heads.count, T, D};
  e.score = math.score;
  e.gate = math.gate;
  e.q = heads_part(layer, 0, heads.first);
  e.o = from_head(heads_of(plan[s.attention], T, C, D), heads.first);
  e.scale = heads_slice(scale(layer), heads);
  e.z = plan[s.z].slice(B * heads.first * T, B * heads.count * T);
  return e;
}

SelfEdge Gpt::Impl::self_edge(int layer, Stretch heads, const Tensor& counters) const {
  auto e = added_edges<SelfEdge>(layer, heads);
  e.k = heads_part(layer, 1, heads.first);
  e.v = heads_part(layer, 2, heads.first);
  e.bias = heads_slice(w.blocks[layer].self_bias, heads);
  e.counters = counters_slice(counters, heads);
  return e;
}

Sinks Gpt::Impl::sinks(int layer, Stretch heads) const {
  const BlockTensors& p = w.blocks[layer];
  auto e = added_edges<Sinks>(layer, heads);
  e.keys = heads_slice(p.sink_keys, heads);
  e.values = heads_slice(p.sink_values, heads);
  e.bias = heads_slice(p.sink_bias, heads);
  return e;
}

void Gpt::Impl::run(int layer, const AttentionForward& a) {
  if (shared)
    shared->forward(layer, a);
  else
    ops.attention_forward(a);
}

/// The output of the block's attention over all heads: with normalizer rms after the norm of each.
Tensor Gpt::Impl::head_norm_forward(int layer) {
  const BlockSlots& s = memory.blocks[layer];
  const Tensor o = rows(s.attention, C), gain = w.blocks[layer].head_gain;
  if (!gain) return o;
  const Tensor y = rows(s.head_norm, C);
  ops.head_norm_forward({.x = per_head(o), .gain = gain, .y = per_head(y), .rstd = head_rstd(s)});
  return y;
}

/// What c_proj reads. The backward pass needs o itself, and makes this again; without one it replaces o.
Tensor Gpt::Impl::output_gate_forward(int layer, const Tensor& o) {
  if (!config.attention.output_gate) return o;
  const Tensor y = options.training ? rows(memory.wide, C) : o;
  ops.output_gate_forward({.u = rows(memory.blocks[layer].gate, C), .o = o, .y = y});
  return y;
}

/// From the output of ln_1 to narrow().
void Gpt::Impl::attention_branch(int layer, const Batch& batch, bool count, const CachePass* cache) {
  const BlockTensors& p = w.blocks[layer];
  const Tensor x = normed(2 * layer);
  ops.linear_forward({.x = x, .w = p.qkv, .bias = p.qkv_bias, .y = rows(memory.blocks[layer].qkv, 3 * C), .pre_activation = {}});
  if (p.gate) ops.linear_forward({.x = x, .w = p.gate, .bias = {}, .y = rows(memory.blocks[layer].gate, C), .pre_activation = {}});
  if (transforms_qk()) ops.qk_transform_forward(qk_transform(layer, batch));

  Tensor counters;
  if (count) counters = plan[memory.counters].slice(layer * H * kAttentionCounters, H * kAttentionCounters).view({H, kAttentionCounters});
  if (cache) append_to_cache(layer, *cache);
  if (cache && cache->decode) {
    attend_to_cache(layer, *cache);
  } else {
    AttentionForward a = attention(layer, batch);
    a.counters = counters;
    run(layer, a);
  }
  if (config.attention.self_edge())
    for (const Stretch heads : z_heads()) ops.self_edge_forward(self_edge(layer, heads, counters));
  if (config.attention.sinks())
    for (const Stretch heads : z_heads()) ops.sinks_forward(sinks(layer, heads));

  const Tensor y = output_gate_forward(layer, head_norm_forward(layer));
  ops.linear_forward({.x = y, .w = p.proj, .bias = p.proj_bias, .y = narrow(), .pre_activation = {}});
}

/// From the output of ln_2 to the gelu.
void Gpt::Impl::mlp_hidden(int layer) {
  const BlockSlots& s = memory.blocks[layer];
  const BlockTensors& p = w.blocks[layer];
  const Tensor x = normed(2 * layer + 1), argument = rows(s.hidden, hidden), gelu = rows(s.hidden_gelu, hidden);
  if (options.recompute == Recompute::gelu_norm) {
    // The gelu comes again from its stored argument, so it must now; and x may be in the same memory as the gelu.
    ops.linear_forward({.x = x, .w = p.fc, .bias = p.fc_bias, .y = argument, .pre_activation = {}});
    ops.gelu(gelu, argument);
  } else {
    ops.linear_forward({.x = x, .w = p.fc, .bias = p.fc_bias, .y = gelu, .activation = Activation::gelu, .pre_activation = argument});
  }
}

/// From the output of ln_2 to narrow().
void Gpt::Impl::mlp_branch(int layer) {
  mlp_hidden(layer);
  const BlockTensors& p = w.blocks[layer];
  ops.linear_forward({.x = rows(memory.blocks[layer].hidden_gelu, hidden), .w = p.out, .bias = p.out_bias, .y = narrow(), .pre_activation = {}});
}

void Gpt::Impl::trunk(const Batch& batch, bool count, const CachePass* cache) {
  const auto hook = [&](int block) {
    if (hooks.before_forward) hooks.before_forward(block);
  };
  hook(-1);
  ops.embedding_forward(stream(0), rows(batch.tokens), rows(batch.positions), w.wte, w.wpe);
  for (int l = 0; l < config.layers; ++l) {
    hook(l);
    norm_forward(2 * l, l == 0 ? NormInput::stream : NormInput::stream_and_branch);
    attention_branch(l, batch, count, cache);
    norm_forward(2 * l + 1, NormInput::stream_and_branch);
    mlp_branch(l);
  }
  norm_forward(2 * config.layers, NormInput::stream_and_branch);
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

}  // namespace tessera
