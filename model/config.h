#pragma once
// What a model is. Plain data; trainer/config.* binds it to YAML keys, ranges and defaults, checkpoints carry it.

#include <cstdint>
#include <string>

#include "kernels/attention.h"
#include "kernels/ops.h"
#include "model/pattern.h"

namespace tessera {

enum class Positions { learned, rotary };
enum class ThresholdMode {
  fixed,       // tau_h = init
  learned,     // tau_h a parameter, starting at init
  controlled,  // tau_h moved after each step towards target_edge_sparsity (update_thresholds in ops.h)
  length       // tau_i = beta sqrt(2 ln(i+2) / D), cosine scores
};

struct ThresholdConfig {
  ThresholdMode mode = ThresholdMode::controlled;
  float init = 0.0f;
  double target_edge_sparsity = 0.95;
  double anneal = 0.4;       // share of the run over which the wanted density falls geometrically ...
  double anneal_from = 0.5;  // ... from this density to 1 - target_edge_sparsity
  double head_spread = 1.0;  // the first head of a layer ends with this many times the density of the last (head_target in trainer/schedule.h)
  float rate = 0.05f;        // controller gain: tau += rate * clamp(ln(measured/wanted), -1, 1)
  float beta = 0.5f;         // mode length
  /// Mode controlled, but for scores fidelity: how fast m follows, which joins the gradients of a head's active edges near the threshold so that all
  /// sum to zero: a threshold that keeps their number undoes what scores rise together (ThresholdUpdate in kernels/ops.h). Without it scores and
  /// thresholds race each other to the end of the scale, where only edges between equal queries and keys are active. 0: no m.
  float balance = 0.1f;
};

struct AttentionConfig {
  Score score = Score::cosine;
  Gate gate = Gate::relu2;
  Normalizer normalizer = Normalizer::sum;
  float length_alpha = 1.0f;
  /// Normalizer sum: weights that sum to little have gradients of up to 1/epsilon, and a lone edge with a weight well above it gives its value
  /// whatever its score, so that it teaches q and k nothing. Scales of 8 have weights of up to 64.
  float epsilon = 1.0f;
  float scale_init = 8.0f;  // c_h of cosine and fidelity
  bool scale_learned = true;
  bool document_mask = false;
  /// Normalizer sum, a relu gate: beside the gated edges one from each token to itself that no threshold closes, so that no query is without an edge
  /// at high sparsity: s_i = max(0, c_h f(<q_i, k_i>) + b_h)^p, o_i = (sum_j a_ij v_j + s_i v_i) / (epsilon + sum_j a_ij + s_i), b_h learned from
  /// always_bias_init on (SelfEdge in kernels/ops.h). It costs no tile; an open one is an active edge.
  bool always_self = false;
  /// Normalizer sum, a relu gate: so many learned keys and values a head that every query sees, past pattern and documents, each through a bias of
  /// its own: w_s = max(0, c_h f(<q_i, k_hs>) + b_hs)^p joins o and z as s_i does (Sinks in kernels/ops.h). Keys, which are as long as they like, and
  /// values start small and random, biases at always_bias_init; none decays. They are no edges between tokens. On an H200 one costs 3 % of a step of
  /// GPT-2 Medium, four 5 % (tests/bench/RESULTS.md).
  int always_sinks = 0;
  static constexpr float always_bias_init = 0.25f;
  /// Any gate: y = 2 sigmoid(W_g x) * o, element by element, is what c_proj reads in place of o, the output of all heads after self edges, sinks
  /// and the head norm; x is what c_attn reads (OutputGate in kernels/ops.h). W_g [C, C] starts at zero: until it is trained the gate is the
  /// identity.
  bool output_gate = false;
  ThresholdConfig threshold;
  PatternConfig pattern;
  int tile_query = 64;
  int tile_key = 64;
  Visit visit = Visit::active;

  // What has no effect is no part of the model: softmax has neither normalizer nor threshold and sees each token itself, a dot score has no scale of
  // its own.
  bool head_norm() const { return normalizer == Normalizer::rms && gate != Gate::softmax; }
  bool learns_scale() const { return scale_learned && score != Score::dot; }
  bool learns_threshold() const { return threshold.mode == ThresholdMode::learned && gate != Gate::softmax; }
  bool balances() const {
    return gate != Gate::softmax && threshold.mode == ThresholdMode::controlled && score != Score::fidelity && threshold.balance > 0;
  }
  bool self_edge() const { return always_self && gate != Gate::softmax; }
  int sinks() const { return gate != Gate::softmax ? always_sinks : 0; }
  /// What is added to o and z beside the attention.
  bool adds_edges() const { return self_edge() || sinks() > 0; }
};

struct ModelConfig {
  int layers = 8;
  int heads = 8;
  int width = 512;
  std::int64_t context = 1024;
  int mlp_ratio = 4;
  Positions positions = Positions::rotary;
  double rotary_base = 10000.0;
  NormKind norm = NormKind::rmsnorm;
  bool bias = false;
  std::int64_t vocabulary = 0;         // tokens of the tokenizer
  std::int64_t vocabulary_padded = 0;  // rows of the embedding: vocabulary rounded up to vocabulary_multiple
  AttentionConfig attention;

  int head_size() const { return width / heads; }
  /// Elements of a block's matrices: c_attn and c_proj 4 C^2, c_gate C^2, the MLP 2 mlp_ratio C^2.
  std::int64_t block_matrix_elements() const {
    const std::int64_t C = width;
    return (4 + (attention.output_gate ? 1 : 0) + 2 * mlp_ratio) * C * C;
  }
};

/// Throws std::invalid_argument when the configuration makes no model; the message has the numbers that do not fit together.
void check_model(const ModelConfig& config);

}  // namespace tessera
