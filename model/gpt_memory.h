#pragma once
// The memory of a GPT: which tensors a step needs, how large they are, and which of them may be the same memory. Internal to the model.

#include <algorithm>
#include <vector>

#include "kernels/memory_plan.h"
#include "model/config.h"
#include "model/gpt.h"
#include "model/parameters.h"

namespace tessera {

/// Parameters of a block, or the gradients of them. Tensors of parameters that the configuration does not have are empty.
struct BlockTensors {
  Tensor ln_1, ln_1_bias;
  Tensor qkv, qkv_bias;    // attn.c_attn
  Tensor gate;             // attn.c_gate
  Tensor head_gain;        // attn.norm
  Tensor proj, proj_bias;  // attn.c_proj
  Tensor scale, threshold, self_bias;
  Tensor sink_keys, sink_values, sink_bias;  // attn.sink_keys ...
  Tensor ln_2, ln_2_bias;
  Tensor fc, fc_bias;    // mlp.c_fc
  Tensor out, out_bias;  // mlp.c_proj
};

struct ModelTensors {
  Tensor wte, wpe;
  std::vector<BlockTensors> blocks;
  Tensor ln_f, ln_f_bias;
};

/// The part of a flat buffer behind the matrices.
Tensor vectors_of(const ParameterLayout& layout, const Tensor& flat);

/// The named slices of a flat buffer. Matrices and the biases of linear layers come from `flat`, everything else from `vectors`.
ModelTensors slice_flat(const ParameterLayout& layout, int layers, const Tensor& flat, const Tensor& vectors);

/// What a norm remembers of the forward pass: its input (the residual stream at that point), its output, its statistics.
struct NormSlots {
  MemoryPlan::Slot stream, y, mean, rstd;
};

/// What the rest of a block remembers.
struct BlockSlots {
  MemoryPlan::Slot qkv;           // [N, 3C], after qk_transform
  MemoryPlan::Slot inverse_norm;  // [N, 2, H], cosine and fidelity
  MemoryPlan::Slot attention;     // [N, C], output of the attention
  MemoryPlan::Slot z;             // [B, H, T], or as SharedAttention has it; decoding [B, H]
  MemoryPlan::Slot active_tiles;  // bitmap
  MemoryPlan::Slot head_norm;     // [N, C], normalizer rms
  MemoryPlan::Slot head_rstd;     // [N, H]
  MemoryPlan::Slot gate;          // [N, C], output gate: its argument, then the gradient of that. What it makes lies in `wide` while c_proj needs it
  MemoryPlan::Slot hidden;        // [N, 4C], argument of the gelu
  MemoryPlan::Slot hidden_gelu;   // [N, 4C]
};

/// Slots of a model of at most B sequences of at most T tokens on this rank, N = B T rows, or one a cached sequence where that is more. -1: not
/// needed. `options` are complete: tokens (of a whole sequence) and device are set. `attention`: what a layer's attention needs.
struct GptMemory {
  GptMemory(const ModelConfig& config, const ParameterLayout& layout, const Gpt::Options& options, std::int64_t tokens,
            const SharedAttention::Sizes& attention, MemoryPlan& plan);

  MemoryPlan::Slot weights;         // flat [padded] of the compute type
  MemoryPlan::Slot vectors = -1;    // f32 [count - decayed_count], where the compute type is another
  MemoryPlan::Slot gradients = -1;  // flat f32 [padded]
  MemoryPlan::Slot thresholds;      // [layers, H]
  MemoryPlan::Slot balances = -1;   // [layers, H], and the gradients of the thresholds, for AttentionConfig::balances()
  MemoryPlan::Slot threshold_gradients = -1;
  MemoryPlan::Slot counters;        // u64 [layers, H, kAttentionCounters]
  MemoryPlan::Slot constant_scale;  // [H], scores without a learned scale
  MemoryPlan::Slot rotary = -1;     // [T, D/2, 2]

  // Norm 2l is ln_1 of block l, 2l + 1 its ln_2, 2 layers is ln_f. What is needed only for a moment is one memory for all of them:
  //   not for training      every norm, every block
  //   Recompute::gelu_norm  outputs of ln_1, ln_2, of the head norm and of the gelu: one buffer, each is read by the very next operation
  //   Recompute::block      all of a block but the stream that ln_1 reads. ln_f has its own: the last block is not computed again
  std::vector<NormSlots> norms;
  std::vector<BlockSlots> blocks;

  MemoryPlan::Slot narrow;     // [N, C]: a branch's output on the way forward, a gradient of that size on the way back
  MemoryPlan::Slot wide = -1;  // [N, max(3, mlp_ratio) C]: output of ln_f until the classifier is done, then gradients of qkv and of the hidden layer
  MemoryPlan::Slot d_stream = -1;  // [N, C]: gradient of the residual stream
  MemoryPlan::Slot d_heads = -1;   // [N, C]: gradient of the attention's output before the head norm
  MemoryPlan::Slot attention_workspace = -1;
  MemoryPlan::Slot logits;  // [rows, vocabulary_padded]: chunks of the classifier
  MemoryPlan::Slot losses, predictions;
  MemoryPlan::Slot prompt_tokens, prompt_positions, prompt_document;  // i32: of a sequence [T], or tokens of each cached one
  MemoryPlan::Slot cache = -1;                                        // [L, S, 2, H, T, D] of the compute type: keys and values of S sequences
  MemoryPlan::Slot cache_sequences = -1, cache_positions = -1;        // [S] i32
  MemoryPlan::Slot decode_workspace = -1;                             // on a GPU
};

}  // namespace tessera
