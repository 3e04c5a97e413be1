#pragma once
// The inside of a Gpt, which gpt.cpp (set-up, public functions), gpt_forward.cpp, gpt_backward.cpp and gpt_decode.cpp share.
//
// Notation: N = B T rows, C = width, H heads of D, V = rows of the embedding. A block is
//
//   stream -> ln_1 -> c_attn -> q, k to unit length, rotated -> attention -> (self edge, sinks, head norm, output gate) -> c_proj -> + stream
//          -> ln_2 -> c_fc -> gelu -> c_proj -> + stream
//
// Each norm adds the branch before it to the stream (NormForward::residual), so no addition is a pass of its own.

#include <algorithm>
#include <memory>
#include <vector>

#include "model/gpt.h"
#include "model/gpt_memory.h"
#include "model/shared_attention_parts.h"

namespace tessera {

using HostTiles = std::vector<std::shared_ptr<const TileMap>>;  // a layer

struct Gpt::Impl {
  Impl(const ModelConfig& config, Ops& ops, MemoryPlan& plan, const Options& options);

  // -- set-up (gpt.cpp)
  void bind(const SequenceGroup& group);
  void fill_tables();
  void begin(const Batch& batch);
  std::int64_t own_tokens() const { return split.tokens_of(options.sequence.rank); }  // of a sequence
  /// Rows that a pass has at most: those of micro_batch sequences, or a token of each cached sequence.
  std::int64_t most_rows() const { return std::max(options.micro_batch * own_tokens(), options.cache); }
  Tensor weights() const { return plan[memory.weights]; }
  Tensor vectors() const { return memory.vectors < 0 ? vectors_of(layout, weights()) : plan[memory.vectors]; }

  // -- views of the current batch
  Tensor rows(MemoryPlan::Slot slot, std::int64_t columns) const { return plan[slot].view({N, columns}); }
  Tensor rows(const Tensor& t) const { return t.view({N}); }
  Tensor optional_rows(MemoryPlan::Slot slot) const { return slot < 0 ? Tensor{} : plan[slot].view({N}); }
  Tensor stream(int norm) const { return rows(memory.norms[norm].stream, C); }
  Tensor normed(int norm) const { return rows(memory.norms[norm].y, C); }
  Tensor narrow() const { return rows(memory.narrow, C); }
  Tensor scale(int layer) const { return w.blocks[layer].scale ? w.blocks[layer].scale : plan[memory.constant_scale]; }
  Tensor threshold(int layer) const { return w.blocks[layer].threshold ? w.blocks[layer].threshold : plan[memory.thresholds].slice(layer * H, H); }
  /// Of a layer's heads, where they are kept: balances, and gradients of thresholds that are no parameters.
  Tensor of_heads(MemoryPlan::Slot slot, int layer) const { return slot < 0 ? Tensor{} : plan[slot].slice(layer * H, H); }
  Tensor head_rstd(const BlockSlots& s) const { return rows(s.head_rstd, H); }
  Tensor per_head(const Tensor& heads) const { return heads.view({N, H, D}); }
  /// Most columns that an operation's scratch memory is for: sums over rows for gains, with biases for those,
  /// and for keys, values and biases of sinks.
  std::int64_t widest() const { return std::max(config.bias ? std::max(3 * C, hidden) : C, config.attention.sinks() * (C + H)); }
  bool transforms_qk() const { return unit || memory.rotary >= 0; }

  struct NormTensors {
    Tensor gain, bias;
  };
  NormTensors norm_of(const ModelTensors& m, int norm) const {
    if (norm == 2 * config.layers) return {m.ln_f, m.ln_f_bias};
    const BlockTensors& b = m.blocks[norm / 2];
    return norm % 2 == 0 ? NormTensors{b.ln_1, b.ln_1_bias} : NormTensors{b.ln_2, b.ln_2_bias};
  }

  // -- forward (gpt_forward.cpp)
  enum class NormInput { stream, stream_and_branch };
  void norm_forward(int norm, NormInput input);
  QkTransform qk_transform(int layer, const Batch& batch) const;
  AttentionForward attention(int layer, const Batch& batch) const;
  void run(int layer, const AttentionForward& a);
  /// The stretches of heads whose z lies together.
  std::vector<Stretch> z_heads() const { return shared ? shared->z_heads() : std::vector<Stretch>{{0, H}}; }
  HeadsView heads_part(int layer, std::int64_t part, std::int64_t first) const;
  template <class Call>
  Call added_edges(int layer, Stretch heads) const;
  SelfEdge self_edge(int layer, Stretch heads, const Tensor& counters = {}) const;  // counters: of the layer, [H, kAttentionCounters]
  Sinks sinks(int layer, Stretch heads) const;
  Tensor head_norm_forward(int layer);
  Tensor output_gate_forward(int layer, const Tensor& o);
  /// A pass that generates: each row's (prefill: each sequence's) keys and values go into the cache, and decoding attends to what is there.
  struct CachePass {
    Tensor sequences, positions;  // [B] i32
    bool decode = false;
  };
  void attention_branch(int layer, const Batch& batch, bool count, const CachePass* cache = nullptr);
  void mlp_hidden(int layer);
  void mlp_branch(int layer);
  void trunk(const Batch& batch, bool count, const CachePass* cache = nullptr);
  Classifier classifier(const Batch& batch) const;

  // -- generation (gpt_decode.cpp)
  void check_tokens(std::span<const std::int32_t> tokens) const;
  Tensor upload(MemoryPlan::Slot slot, std::span<const std::int32_t> host, Shape shape) const;
  void run_sequence(std::span<const std::int32_t> tokens, const CachePass* cache);
  Tensor classify(std::int64_t row, std::int64_t count) const;
  std::vector<float> host_logits(const Tensor& logits) const;
  void decode_pass(const Batch& batch, const CachePass& pass);
  KeyValueCache cache_of(int layer) const;
  void append_to_cache(int layer, const CachePass& pass) const;
  void attend_to_cache(int layer, const CachePass& pass) const;

  // -- backward (gpt_backward.cpp)
  void norm_backward(int norm, const Tensor& dy);
  void compute_again(int layer, const Batch& batch);
  void mlp_branch_backward(int layer);
  AttentionBackward attention_backward(int layer, const Batch& batch, const Tensor& d_o, const Tensor& d_qkv) const;
  void run(int layer, const AttentionBackward& a, const Tensor& d_qkv);
  void attention_branch_backward(int layer, const Batch& batch);
  void trunk_backward(const Batch& batch);
  double attention_seconds(const Batch& batch);

  const ModelConfig config;
  Ops& ops;
  MemoryPlan& plan;
  Options options;  // complete: tokens, device and sequence.exchange are set
  const ParameterLayout layout;
  const HostTiles tiles;                          // of whole sequences
  const SequenceSplit split;                      // of a sequence over its ranks
  const std::unique_ptr<SharedAttention> shared;  // null for one rank
  const GptMemory memory;
  AttentionMath math;

  const std::int64_t C = config.width, H = config.heads, D = config.head_size(), hidden = C * config.mlp_ratio;
  const bool unit = config.attention.score != Score::dot;

  std::vector<std::shared_ptr<const DeviceTiles>> device_tiles;  // a layer; empty until bind()
  ModelTensors w, d;                                             // parameters and gradients by name
  Hooks hooks;
  bool bound = false;
  Visit visit = config.attention.visit;
  std::vector<std::int64_t> cached;  // tokens of each sequence in the cache
  struct {
    std::int64_t rows = 0;                   // of the last pass that decoded
    bool records = true;                     // as far as is known
    std::unique_ptr<RecordedWork> recorded;  // such a pass
  } decoding;
  std::int64_t B = 0, T = 0, N = 0;  // of the current batch
};

/// Part 0, 1, 2 (q, k, v) of a packed projection [B, T, 3, H, D].
inline HeadsView packed_heads(const Tensor& qkv, std::int64_t part, std::int64_t T, std::int64_t C, std::int64_t D) {
  return {qkv.slice(part * C, 1).data, qkv.dtype, T * 3 * C, D, 3 * C};
}

/// [B, T, H, D].
inline HeadsView heads_of(const Tensor& t, std::int64_t T, std::int64_t C, std::int64_t D) { return {t.data, t.dtype, T * C, D, C}; }

}  // namespace tessera
