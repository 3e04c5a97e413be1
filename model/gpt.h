#pragma once
// The GPT: embedding, blocks of (norm, attention, norm, MLP) on a residual stream, final norm, tied classifier. Forward and backward
// are written once against Ops.

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "kernels/memory_plan.h"
#include "kernels/ops.h"
#include "model/config.h"
#include "model/parameters.h"
#include "model/shared_attention.h"

namespace tessera {

/// One micro-batch, device tensors, each [B, T] i32. Where ranks share sequences, T are this rank's tokens of each, in ascending order, all of them;
/// indices are those of the whole sequence.
struct Batch {
  Tensor tokens;
  Tensor targets;         // -1: counts for nothing
  Tensor positions;       // index within the sequence
  Tensor document_start;  // with attention.document_mask: index of the first token of the token's document
};

/// What is not kept from the forward pass and computed again, to the same bits, in the backward pass (Chen et al., arXiv 1604.06174).
enum class Recompute {
  none,
  gelu_norm,  // outputs of norms and of the gelu
  block       // everything inside a block: only its input is kept
};

/// The tile lists of every layer over a sequence of so many tokens; layers with equal patterns share them.
std::vector<std::shared_ptr<const TileMap>> make_layer_tiles(const ModelConfig& config, std::int64_t tokens);

class Gpt {
 public:
  struct Options {
    std::int64_t micro_batch = 1;  // sequences a forward pass, at most
    std::int64_t tokens = 0;       // tokens a sequence, at most; 0: config.context
    bool training = true;          // false: no gradients, activations of one layer only
    int shard_multiple = 1;        // the flat buffers are padded to a multiple of this (ranks)
    Recompute recompute = Recompute::none;
    std::int64_t cache = 0;              // sequences of at most `tokens` whose keys and values are kept, for prefill() and decode()
    SequencePart sequence{};             // whether, and how, ranks share sequences; `tokens` are those of a whole one. Then no cache, no generation
    std::optional<DeviceKind> device{};  // whose memory is planned; the Ops' own unless set (a plan without that device)
  };

  /// Called while a pass is put together, for communication beside it. `block` is -1 for what is outside the blocks (embeddings, last norm,
  /// every parameter that is no matrix).
  struct Hooks {
    std::function<void(int block)> before_forward;  // parameters of the block are about to be used: -1 first, then 0, 1, ...
    std::function<void(int block)> after_backward;  // the gradients of the block's matrices are complete: the last block first, then -1: all are
  };

  /// Reserves everything in `plan`; nothing is allocated. Throws std::invalid_argument when the configuration makes no model.
  Gpt(const ModelConfig& config, Ops& ops, MemoryPlan& plan, const Options& options);
  ~Gpt();

  /// After plan.allocate(): tile lists go to the device, tables are filled, gradients and thresholds get their first values. `group` are the ranks
  /// that share sequences with this one; none needed where Options::sequence is one rank. Passes are then collective over the group.
  void bind(const SequenceGroup& group = {});

  const ModelConfig& config() const;
  const Options& options() const;  // complete: tokens, device and sequence.exchange are set
  /// Index in the sequence of each of this rank's tokens, ascending: 0, 1, ... unless ranks share sequences.
  std::vector<std::int32_t> positions() const;
  const SequenceSplit& split() const;  // of a sequence over its ranks
  const ParameterLayout& layout() const;
  Tensor weights() const;    // flat [padded] of the compute type: every parameter, as matrix products read it
  Tensor vectors() const;    // f32 [count - decayed_count]: the parameters behind the matrices, as everything else reads them. A part of weights()
                             // where the compute type is f32
  Tensor gradients() const;  // flat f32 [padded]
  /// A matrix as weights() has it (the compute type), any other parameter as vectors() does (f32).
  Tensor parameter(const std::string& name) const;
  /// Elements [first, first + values.size()) of the flat parameters, from the host: rounded to nearest even in weights(), exact in vectors().
  void set_parameters(std::int64_t first, std::span<const float> values);
  Tensor thresholds() const;  // f32 [layers, heads]: tau of modes fixed and controlled (unused zeros otherwise)
  /// Of a model for training with AttentionConfig::balances(), else without data: f32 [layers, heads], AttentionBackward::balance, zero at first; and
  /// -sum dx, added to by backward passes, zeroed by zero_gradients().
  Tensor balances() const;
  Tensor threshold_gradients() const;
  Tensor counters() const;  // u64 [layers, heads, kAttentionCounters], added to by forward passes

  /// Fills the parameters with initial_values(): set_parameters() of each.
  void initialize(std::uint64_t seed);
  void zero_gradients();
  void zero_counters();

  /// Runs the model; per-token losses (nats) into losses() [B*T]. B <= micro_batch and T <= tokens come from the batch's shape.
  void forward(const Batch& batch, bool predictions = false);
  /// As forward, and adds gradient_scale * d(sum of losses)/d(parameters) to gradients(). Needs training.
  void forward_backward(const Batch& batch, float gradient_scale);
  /// Seconds that the attention of all layers takes in forward_backward(batch), which must have been the last pass: done again on what that left in
  /// memory, layer by layer, waiting for the device around each. Changes no parameter, gradient, loss or counter. Collective where ranks share
  /// sequences.
  double attention_seconds(const Batch& batch);
  void set_hooks(Hooks hooks);  // empty functions: none
  void set_visit(Visit visit);  // of the passes from here on, instead of attention.visit: the same bits
  Tensor losses() const;
  Tensor predictions() const;  // i32 [B*T], after forward(batch, true)

  /// Next-token logits of the last token of a sequence of T = tokens.size() tokens, after recomputing all of it. [vocabulary] on the host.
  std::vector<float> next_logits(std::span<const std::int32_t> tokens);

  // Generation with the keys and values of Options::cache sequences. Sequence s of them holds the tokens of its last prefill() and of every decode()
  // since, as one document from position 0; other passes leave it alone.

  /// Starts a sequence with 1 to Options::tokens tokens. Next-token logits of the last one, [vocabulary] on the host: those of next_logits(tokens).
  /// A sequence at a time: no row of a shorter prompt is computed for nothing, and what others hold changes no bit.
  std::vector<float> prefill(std::int64_t sequence, std::span<const std::int32_t> tokens);

  struct NextToken {
    std::int64_t sequence;
    std::int32_t token;
  };
  /// Adds a token to each of these sequences (started, each named once, not full). Next-token logits of each, [next.size(), vocabulary] on the host:
  /// those of next_logits() of the whole sequence, to the bit with batch-invariant operations (make_cuda_ops), else but for the order of sums (on a
  /// GPU: and the rounding of bf16). The bits are the same in any company on such a GPU, and on the CPU in one of up to kFewRows.
  std::vector<float> decode(std::span<const NextToken> next);
  std::int64_t cached_tokens(std::int64_t sequence) const;

  /// Dense-equivalent and attention FLOPs of one token at full context: forward + backward = 3 x forward.
  struct Flops {
    double dense = 0;              // 6 x matrix parameters used in matrix products
    double attention_visible = 0;  // 12 x width x visible keys (mean over queries), all layers
    double attention_causal = 0;   // the same for the causal pattern
  };
  Flops flops_per_token() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace tessera
