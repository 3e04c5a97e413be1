// The backward pass: the forward pass read from its end. The stream's gradient passes each branch unchanged and takes the branch's own.

#include <chrono>

#include "model/gpt_impl.h"

namespace tessera {

void Gpt::Impl::norm_backward(int norm, const Tensor& dy) {
  const NormSlots& s = memory.norms[norm];
  const NormTensors g = norm_of(d, norm);
  ops.norm_backward({.kind = config.norm,
                     .dy = dy,
                     .x = stream(norm),
                     .gain = norm_of(w, norm).gain,
                     .mean = optional_rows(s.mean),
                     .rstd = optional_rows(s.rstd),
                     .dx = rows(memory.d_stream, C),
                     .dgain = g.gain,
                     .dbias = g.bias});
}

/// Fills the memory that blocks share, from the stream that this one began with: the same calls as in the forward pass, up to the last tensor that
/// the backward pass reads. narrow() is free between two blocks.
void Gpt::Impl::compute_again(int layer, const Batch& batch) {
  norm_forward(2 * layer, NormInput::stream);
  attention_branch(layer, batch, false);
  norm_forward(2 * layer + 1, NormInput::stream_and_branch);
  mlp_hidden(layer);
}

void Gpt::Impl::mlp_branch_backward(int layer) {
  const BlockSlots& s = memory.blocks[layer];
  const BlockTensors &p = w.blocks[layer], &g = d.blocks[layer];
  const bool again = options.recompute == Recompute::gelu_norm;
  const Tensor argument = rows(s.hidden, hidden), gelu = rows(s.hidden_gelu, hidden), d_hidden = rows(memory.wide, hidden);
  if (again) ops.gelu(gelu, argument);
  ops.linear_backward(
      {.dy = rows(memory.d_stream, C), .x = gelu, .w = p.out, .dx = d_hidden, .gelu_argument = argument, .dw = g.out, .dbias = g.out_bias});
  if (again) norm_forward(2 * layer + 1, NormInput::stream);
  ops.linear_backward({.dy = d_hidden, .x = normed(2 * layer + 1), .w = p.fc, .dx = narrow(), .gelu_argument = {}, .dw = g.fc, .dbias = g.fc_bias});
  norm_backward(2 * layer + 1, narrow());
}

/// Without dscale and dthreshold.
AttentionBackward Gpt::Impl::attention_backward(int layer, const Batch& batch, const Tensor& d_o, const Tensor& d_qkv) const {
  AttentionBackward a;
  a.forward = attention(layer, batch);
  a.d_o = heads_of(d_o, T, C, D);
  a.dq = packed_heads(d_qkv, 0, T, C, D);
  a.dk = packed_heads(d_qkv, 1, T, C, D);
  a.dv = packed_heads(d_qkv, 2, T, C, D);
  a.workspace = plan[memory.attention_workspace];
  a.balance = of_heads(memory.balances, layer);
  return a;
}

void Gpt::Impl::run(int layer, const AttentionBackward& a, const Tensor& d_qkv) {
  if (shared) {
    ops.zero(d_qkv);
    shared->backward(layer, a);
  } else {
    ops.attention_backward(a);
  }
}

void Gpt::Impl::attention_branch_backward(int layer, const Batch& batch) {
  const BlockSlots& s = memory.blocks[layer];
  const BlockTensors &p = w.blocks[layer], &g = d.blocks[layer];
  const bool again = options.recompute == Recompute::gelu_norm;
  const Tensor o = again ? head_norm_forward(layer) : rows(p.head_gain ? s.head_norm : s.attention, C);
  const Tensor gate = p.gate ? rows(s.gate, C) : Tensor{};  // its argument, and once the pass is through it the gradient of that
  Tensor d_o = narrow();
  LinearBackward proj{.dy = rows(memory.d_stream, C), .x = o, .w = p.proj, .dx = d_o, .gelu_argument = {}, .dw = g.proj, .dbias = g.proj_bias};
  if (p.gate) {  // c_proj's input comes again on the way through the gate: only then can its matrix have its gradient
    LinearBackward input = proj;
    input.dw = input.dbias = {};
    ops.linear_backward(input);
    proj.x = rows(memory.wide, C);
    proj.dx = {};
    ops.output_gate_backward({.dy = d_o, .u = gate, .o = o, .d_o = d_o, .du = gate, .y = proj.x});
  }
  ops.linear_backward(proj);
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
  AttentionBackward a = attention_backward(layer, batch, d_o, d_qkv);
  a.dscale = g.scale;
  a.dthreshold = g.threshold ? g.threshold : of_heads(memory.threshold_gradients, layer);
  run(layer, a, d_qkv);
  if (config.attention.self_edge()) {
    for (const Stretch heads : z_heads())
      ops.self_edge_backward({.forward = self_edge(layer, heads),
                              .d_o = from_head(a.d_o, heads.first),
                              .dq = from_head(a.dq, heads.first),
                              .dk = from_head(a.dk, heads.first),
                              .dv = from_head(a.dv, heads.first),
                              .dscale = heads_slice(g.scale, heads),
                              .dbias = heads_slice(g.self_bias, heads)});
  }
  if (config.attention.sinks()) {
    for (const Stretch heads : z_heads())
      ops.sinks_backward({.forward = sinks(layer, heads),
                          .d_o = from_head(a.d_o, heads.first),
                          .dq = from_head(a.dq, heads.first),
                          .dscale = heads_slice(g.scale, heads),
                          .dkeys = heads_slice(g.sink_keys, heads),
                          .dvalues = heads_slice(g.sink_values, heads),
                          .dbias = heads_slice(g.sink_bias, heads)});
  }

  if (transforms_qk()) ops.qk_transform_backward(qk_transform(layer, batch), d_qkv);
  if (again) norm_forward(2 * layer, NormInput::stream);
  ops.linear_backward({.dy = d_qkv, .x = normed(2 * layer), .w = p.qkv, .dx = narrow(), .gelu_argument = {}, .dw = g.qkv, .dbias = g.qkv_bias});
  if (p.gate)
    ops.linear_backward(
        {.dy = gate, .x = normed(2 * layer), .w = p.gate, .dx = narrow(), .add_dx = true, .gelu_argument = {}, .dw = g.gate, .dbias = {}});
  norm_backward(2 * layer, narrow());
}

/// From the gradient of the last norm's output in narrow().
void Gpt::Impl::trunk_backward(const Batch& batch) {
  const auto hook = [&](int block) {
    if (hooks.after_backward) hooks.after_backward(block);
  };
  const Tensor d_stream = rows(memory.d_stream, C);
  ops.zero(d_stream);
  norm_backward(2 * config.layers, narrow());
  for (int l = config.layers - 1; l >= 0; --l) {
    // The last block's own memory still stands as the forward pass left it.
    if (options.recompute == Recompute::block && l + 1 < config.layers) compute_again(l, batch);
    mlp_branch_backward(l);
    attention_branch_backward(l, batch);
    hook(l);
  }
  ops.embedding_backward(d_stream, rows(batch.tokens), rows(batch.positions), d.wte, d.wpe);
  hook(-1);
}

/// What goes to the attention's outputs is overwritten in the next pass; narrow() stands for their gradient.
double Gpt::Impl::attention_seconds(const Batch& batch) {
  using Clock = std::chrono::steady_clock;
  const auto seconds = [&](const auto& work) {
    ops.synchronize();
    const Clock::time_point begin = Clock::now();
    work();
    ops.synchronize();
    return std::chrono::duration<double>(Clock::now() - begin).count();
  };
  const Tensor d_qkv = rows(memory.wide, 3 * C);
  double sum = 0;
  for (int l = config.layers - 1; l >= 0; --l) {
    const bool shares_memory = options.recompute == Recompute::block;
    if (shares_memory) compute_again(l, batch);
    const double forward = seconds([&] { run(l, attention(l, batch)); });
    sum += shares_memory && l + 1 < config.layers ? 2 * forward : forward;
    sum += seconds([&] { run(l, attention_backward(l, batch, narrow(), d_qkv), d_qkv); });
  }
  return sum;
}

}  // namespace tessera
