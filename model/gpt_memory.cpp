#include "model/gpt_memory.h"

#include <fmt/format.h>

#include <algorithm>
#include <string>
#include <unordered_map>

namespace tessera {
namespace {

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

}  // namespace

Tensor vectors_of(const ParameterLayout& layout, const Tensor& flat) { return flat.slice(layout.decayed_count, layout.count - layout.decayed_count); }

ModelTensors slice_flat(const ParameterLayout& layout, int layers, const Tensor& flat, const Tensor& vectors) {
  std::unordered_map<std::string, const ParameterInfo*> by_name;
  for (const auto& p : layout.parameters) by_name[p.name] = &p;
  const auto slice = [&](const Tensor& buffer, std::int64_t start, const std::string& name) {
    const auto found = by_name.find(name);
    if (found == by_name.end()) return Tensor{};
    const ParameterInfo& p = *found->second;
    return buffer.slice(p.offset - start, p.shape.numel()).view(p.shape);
  };
  const auto linear = [&](const std::string& name) { return slice(flat, 0, name); };
  const auto vector = [&](const std::string& name) { return slice(vectors, layout.decayed_count, name); };
  ModelTensors m;
  m.wte = linear("wte.weight");
  m.wpe = linear("wpe.weight");
  for (int l = 0; l < layers; ++l) {
    const std::string h = fmt::format("h.{}.", l);
    BlockTensors b;
    b.ln_1 = vector(h + "ln_1.weight");
    b.ln_1_bias = vector(h + "ln_1.bias");
    b.qkv = linear(h + "attn.c_attn.weight");
    b.qkv_bias = linear(h + "attn.c_attn.bias");
    b.gate = linear(h + "attn.c_gate.weight");
    b.head_gain = vector(h + "attn.norm");
    b.proj = linear(h + "attn.c_proj.weight");
    b.proj_bias = linear(h + "attn.c_proj.bias");
    b.scale = vector(h + "attn.scale");
    b.threshold = vector(h + "attn.threshold");
    b.self_bias = vector(h + "attn.self_bias");
    b.sink_keys = vector(h + "attn.sink_keys");
    b.sink_values = vector(h + "attn.sink_values");
    b.sink_bias = vector(h + "attn.sink_bias");
    b.ln_2 = vector(h + "ln_2.weight");
    b.ln_2_bias = vector(h + "ln_2.bias");
    b.fc = linear(h + "mlp.c_fc.weight");
    b.fc_bias = linear(h + "mlp.c_fc.bias");
    b.out = linear(h + "mlp.c_proj.weight");
    b.out_bias = linear(h + "mlp.c_proj.bias");
    m.blocks.push_back(b);
  }
  m.ln_f = vector("ln_f.weight");
  m.ln_f_bias = vector("ln_f.bias");
  return m;
}

GptMemory::GptMemory(const ModelConfig& config, const ParameterLayout& layout, const Gpt::Options& options, std::int64_t T,
                     const SharedAttention::Sizes& sizes, MemoryPlan& plan) {
  using Slot = MemoryPlan::Slot;
  constexpr auto activations = MemoryCategory::activations, workspace = MemoryCategory::workspace;
  const AttentionConfig& attention = config.attention;
  const DeviceKind device = options.device.value();
  const DType compute = compute_type(device);
  const std::int64_t B = options.micro_batch, S = options.cache, N = std::max(B * T, S);
  const std::int64_t L = config.layers, H = config.heads, C = config.width, D = config.head_size(), hidden = C * config.mlp_ratio;
  const std::int64_t padded = ceil_div(layout.count, options.shard_multiple) * options.shard_multiple;

  const auto reserve = [&](MemoryCategory category, std::string name, Shape shape, DType type = DType::f32) {
    return plan.reserve(category, std::move(name), type, shape);
  };
  weights = reserve(MemoryCategory::parameters, "weights", {padded}, compute);
  if (compute != DType::f32) vectors = reserve(MemoryCategory::parameters, "vectors", {layout.count - layout.decayed_count});
  if (options.training) gradients = reserve(MemoryCategory::gradients, "gradients", {padded});
  thresholds = reserve(MemoryCategory::parameters, "thresholds", {L, H});
  if (options.training && attention.balances()) {
    balances = reserve(MemoryCategory::optimizer, "balances of the thresholds", {L, H});
    threshold_gradients = reserve(MemoryCategory::gradients, "gradients of the thresholds", {L, H});
  }
  constant_scale = reserve(workspace, "constant scale", {H});
  counters = reserve(workspace, "attention counters", {L, H, kAttentionCounters}, DType::u64);
  if (config.positions == Positions::rotary) rotary = reserve(workspace, "rotary table", {options.tokens, D / 2, 2});

  narrow = reserve(workspace, "branch", {N, C}, compute);
  if (options.training) {
    wide = reserve(workspace, "ln_f.output, gradient of qkv, mlp.hidden", {N, std::max(3 * C, hidden)}, compute);
    d_stream = reserve(workspace, "gradient of the residual stream", {N, C}, compute);
    if (attention.head_norm()) d_heads = reserve(workspace, "gradient of attn.output", {N, C}, compute);
    attention_workspace = reserve(workspace, "attention backward", {sizes.workspace});
  }

  const auto activation = [&](std::string name, std::int64_t columns) { return reserve(activations, std::move(name), {N, columns}, compute); };
  const auto norm = [&](const std::string& name, Slot stream, Slot y) {
    const Slot mean = config.norm == NormKind::layernorm ? reserve(activations, name + ".mean", {N}) : -1;
    return NormSlots{stream, y, mean, reserve(activations, name + ".rstd", {N})};
  };
  const auto block = [&](const std::string& name, Slot passing) {  // passing: memory of what is not kept, or -1
    const auto output = [&](const char* of, std::int64_t columns) { return passing >= 0 ? passing : activation(name + of, columns); };
    BlockSlots b;
    b.qkv = activation(name + "attn.qkv", 3 * C);
    b.inverse_norm = attention.score != Score::dot ? reserve(activations, name + "attn.inverse_norm", {N, 2, H}) : -1;
    b.attention = activation(name + "attn.output", C);
    b.z = reserve(activations, name + "attn.z", {sizes.z});
    b.active_tiles = reserve(activations, name + "attn.active_tiles", {sizes.active_tiles}, DType::u32);
    b.head_norm = attention.head_norm() ? output("attn.norm.output", C) : -1;
    b.head_rstd = attention.head_norm() ? reserve(activations, name + "attn.norm.rstd", {N, H}) : -1;
    b.gate = attention.output_gate ? activation(name + "attn.gate", C) : -1;
    b.hidden = activation(name + "mlp.hidden", hidden);
    b.hidden_gelu = output("mlp.gelu", hidden);
    return b;
  };

  if (!options.training) {
    const Slot stream = activation("norm.input", C), y = activation("norm.output", C);
    norms.assign(static_cast<std::size_t>(2 * L + 1), norm("norm", stream, y));
    blocks.assign(static_cast<std::size_t>(L), block("block.", -1));
  } else {
    const bool shared = options.recompute == Recompute::block;
    const Slot passing = options.recompute == Recompute::gelu_norm ? activation("outputs of norms and gelu", hidden) : -1;
    const auto output = [&](const std::string& name) { return passing >= 0 ? passing : activation(name + ".output", C); };
    for (int l = 0; l < config.layers; ++l) {
      const Slot input = activation(fmt::format("h.{}.ln_1.input", l), C);
      if (shared && l > 0) {
        norms.push_back(norms[0]);
        norms.back().stream = input;
        blocks.push_back(blocks[0]);
        norms.push_back(norms[1]);
        continue;
      }
      const std::string h = shared ? "block." : fmt::format("h.{}.", l);
      norms.push_back(norm(h + "ln_1", input, output(h + "ln_1")));
      blocks.push_back(block(h, passing));
      const Slot between = activation(h + "ln_2.input", C);
      norms.push_back(norm(h + "ln_2", between, output(h + "ln_2")));
    }
    norms.push_back(norm("ln_f", activation("ln_f.input", C), wide));
  }

  const auto row_bytes = static_cast<std::size_t>(config.vocabulary_padded) * size_of(compute);
  const auto chunk = static_cast<std::int64_t>(std::max<std::size_t>(1, logits_bytes(device) / row_bytes));
  logits = reserve(workspace, "logits", {std::max(std::min(chunk, N), S), config.vocabulary_padded}, compute);
  losses = reserve(workspace, "losses", {N});
  predictions = reserve(workspace, "predictions", {N}, DType::i32);
  prompt_tokens = reserve(workspace, "prompt tokens", {std::max(T, S)}, DType::i32);
  prompt_positions = reserve(workspace, "prompt positions", {T}, DType::i32);
  prompt_document = reserve(workspace, "prompt document", {T}, DType::i32);
  if (S > 0) {
    cache = reserve(activations, "key/value cache", {L, S, H * 2 * T, D}, compute);
    cache_sequences = reserve(workspace, "cached sequences", {S}, DType::i32);
    cache_positions = reserve(workspace, "cached positions", {S}, DType::i32);
    if (device == DeviceKind::cuda)
      decode_workspace = reserve(workspace, "attention of cached sequences", {attention_decode_workspace({{}, S, H, T, D})});
  }
}

}  // namespace tessera
