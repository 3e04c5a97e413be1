#include "model/gpt_memory.h"

#include <fmt/format.h>

#include <algorithm>
#include <string>
#include <unordered_map>

namespace tessera {
namespace {

constexpr std::int64_t kLogitsBytes = std::int64_t{64} << 20;  // a chunk of logits: large enough for a matrix product to be efficient

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

}  // namespace

ModelTensors slice_flat(const ParameterLayout& layout, int layers, const Tensor& flat) {
  std::unordered_map<std::string, Tensor> by_name;
  for (const auto& p : layout.parameters) by_name[p.name] = flat.slice(p.offset, p.shape.numel()).view(p.shape);
  const auto tensor = [&](const std::string& name) {
    const auto found = by_name.find(name);
    return found == by_name.end() ? Tensor{} : found->second;
  };
  ModelTensors m;
  m.wte = tensor("wte.weight");
  m.wpe = tensor("wpe.weight");
  for (int l = 0; l < layers; ++l) {
    const auto of_block = [&](const char* name) { return tensor(fmt::format("h.{}.{}", l, name)); };
    BlockTensors b;
    b.ln_1 = of_block("ln_1.weight");
    b.ln_1_bias = of_block("ln_1.bias");
    b.qkv = of_block("attn.c_attn.weight");
    b.qkv_bias = of_block("attn.c_attn.bias");
    b.head_gain = of_block("attn.norm");
    b.proj = of_block("attn.c_proj.weight");
    b.proj_bias = of_block("attn.c_proj.bias");
    b.scale = of_block("attn.scale");
    b.threshold = of_block("attn.threshold");
    b.ln_2 = of_block("ln_2.weight");
    b.ln_2_bias = of_block("ln_2.bias");
    b.fc = of_block("mlp.c_fc.weight");
    b.fc_bias = of_block("mlp.c_fc.bias");
    b.out = of_block("mlp.c_proj.weight");
    b.out_bias = of_block("mlp.c_proj.bias");
    m.blocks.push_back(b);
  }
  m.ln_f = tensor("ln_f.weight");
  m.ln_f_bias = tensor("ln_f.bias");
  return m;
}

GptMemory::GptMemory(const ModelConfig& config, const ParameterLayout& layout, const Gpt::Options& options, MemoryPlan& plan) {
  constexpr auto activations = MemoryCategory::activations, workspace = MemoryCategory::workspace;
  const AttentionConfig& attention = config.attention;
  const std::int64_t B = options.micro_batch, T = options.tokens, N = B * T;
  const std::int64_t L = config.layers, H = config.heads, C = config.width, D = config.head_size(), hidden = C * config.mlp_ratio;
  const std::int64_t padded = ceil_div(layout.count, options.shard_multiple) * options.shard_multiple;

  const auto reserve = [&](MemoryCategory category, std::string name, Shape shape, DType type = DType::f32) {
    return plan.reserve(category, std::move(name), type, shape);
  };
  parameters = reserve(MemoryCategory::parameters, "parameters", {padded});
  if (options.training) gradients = reserve(MemoryCategory::gradients, "gradients", {padded});
  thresholds = reserve(MemoryCategory::parameters, "thresholds", {L, H});
  constant_scale = reserve(workspace, "constant scale", {H});
  counters = reserve(workspace, "attention counters", {L, H, kAttentionCounters}, DType::u64);
  if (config.positions == Positions::rotary) rotary = reserve(workspace, "rotary table", {T, D / 2, 2});

  const auto norm = [&](const std::string& name) {
    const MemoryPlan::Slot stream = reserve(activations, name + ".input", {N, C}), y = reserve(activations, name + ".output", {N, C});
    const MemoryPlan::Slot mean = config.norm == NormKind::layernorm ? reserve(activations, name + ".mean", {N}) : -1;
    return NormSlots{stream, y, mean, reserve(activations, name + ".rstd", {N})};
  };
  const std::int64_t query_tiles = ceil_div(T, attention.tile_query), key_tiles = ceil_div(T, attention.tile_key);
  const auto block = [&](const std::string& name) {
    BlockSlots b;
    b.qkv = reserve(activations, name + "attn.qkv", {N, 3 * C});
    b.inverse_norm = attention.score != Score::dot ? reserve(activations, name + "attn.inverse_norm", {N, 2, H}) : -1;
    b.attention = reserve(activations, name + "attn.output", {N, C});
    b.z = reserve(activations, name + "attn.z", {B, H, T});
    b.active_tiles = reserve(activations, name + "attn.active_tiles", {B, H, query_tiles, bitmap_words(key_tiles)}, DType::u32);
    b.head_norm = attention.head_norm() ? reserve(activations, name + "attn.norm.output", {N, C}) : -1;
    b.head_rstd = attention.head_norm() ? reserve(activations, name + "attn.norm.rstd", {N, H}) : -1;
    b.hidden = reserve(activations, name + "mlp.hidden", {N, hidden});
    b.hidden_gelu = reserve(activations, name + "mlp.gelu", {N, hidden});
    return b;
  };
  if (options.training) {
    for (int l = 0; l < config.layers; ++l) {
      const std::string h = fmt::format("h.{}.", l);
      norms.push_back(norm(h + "ln_1"));
      blocks.push_back(block(h));
      norms.push_back(norm(h + "ln_2"));
    }
    norms.push_back(norm("ln_f"));
  } else {
    norms.assign(static_cast<std::size_t>(2 * L + 1), norm("norm"));
    blocks.assign(static_cast<std::size_t>(L), block("block."));
  }

  narrow = reserve(workspace, "branch", {N, C});
  if (options.training) {
    wide = reserve(workspace, "gradient of qkv, mlp.hidden", {N, std::max(3 * C, hidden)});
    d_stream = reserve(workspace, "gradient of the residual stream", {N, C});
    if (attention.head_norm()) d_heads = reserve(workspace, "gradient of attn.output", {N, C});
    attention_workspace = reserve(workspace, "attention backward", {attention_backward_workspace({B, H, T, D}, attention.tile_query)});
  }
  const std::int64_t row_bytes = config.vocabulary_padded * static_cast<std::int64_t>(sizeof(float));
  logits = reserve(workspace, "logits", {std::clamp<std::int64_t>(kLogitsBytes / row_bytes, 1, N), config.vocabulary_padded});
  losses = reserve(workspace, "losses", {N});
  predictions = reserve(workspace, "predictions", {N}, DType::i32);
  prompt_tokens = reserve(workspace, "prompt tokens", {T}, DType::i32);
  prompt_positions = reserve(workspace, "prompt positions", {T}, DType::i32);
  prompt_document = reserve(workspace, "prompt document", {T}, DType::i32);
}

}  // namespace tessera
