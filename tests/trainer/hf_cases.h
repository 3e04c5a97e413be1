#pragma once
// Small models that between them have every gate, score, normalizer, threshold mode, pattern, position and norm; their parameters are functions of
// name and index, so that what PyTorch computed from their exports once can be compared with what the CPU backend computes from them anywhere.

#include <fmt/core.h>

#include <cmath>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "data/files.h"
#include "data/tokenizer.h"
#include "model/parameters.h"
#include "trainer/checkpoint.h"
#include "trainer/open_checkpoint.h"

namespace tessera::testing {

struct HfCase {
  std::string name, model_type;
  std::vector<std::string> sets;  // with MASK for the path of a block mask
};

inline constexpr std::int64_t kHfContext = 40;
inline constexpr const char* kHfMask = "block 6\n1000000\n1100000\n0110000\n1011000\n0101100\n1000010\n0010011\n";

inline const std::vector<HfCase>& hf_cases() {
  static const std::vector<HfCase> cases = {
      {"gpt2", "gpt2", {"attention={score: dot, gate: softmax}", "model={positions: learned, norm: layernorm, bias: true}"}},
      {"relu2", "tessera", {"attention={score: cosine, gate: relu2, normalizer: sum, threshold: {mode: controlled}}"}},
      {"relu",
       "tessera",
       {"attention={score: dot, gate: relu, normalizer: none, threshold: {mode: fixed, init: 0.2}, pattern: {window: {size: 11}}}",
        "model={positions: learned, norm: layernorm}"}},
      {"relu4",
       "tessera",
       {"attention={score: fidelity, gate: relu4, normalizer: length, length_alpha: 0.7, threshold: {mode: learned, init: 0.05}, "
        "pattern: {strided: {stride: 7, width: 3}}}",
        "model.bias=true"}},
      {"length",
       "tessera",
       {"attention={score: cosine, gate: relu2, normalizer: rms, scale_learned: false, threshold: {mode: length, beta: 0.3}, "
        "pattern: {dilated: {window: 5, dilation: 3}}}",
        "model={norm: layernorm, bias: true, mlp_ratio: 3}"}},
      {"bigbird",
       "tessera",
       {"attention={score: cosine, gate: relu2, normalizer: sum, threshold: {mode: controlled}, "
        "pattern: {bigbird: {window: 1, global: 1, random: 2, seed: 18446744073709551557, block: 3}}}"}},
      {"blocks",
       "tessera",
       {"attention={score: dot, gate: relu2, normalizer: sum, threshold: {mode: learned}, pattern: {blocks: {file: MASK}}}",
        "model.positions=learned"}},
      {"combined",
       "tessera",
       {"attention={score: cosine, gate: softmax, pattern: {any: [{window: {size: 4}}, {global: {tokens: 2}}, "
        "{all: [{strided: {stride: 5, width: 1}}, {window: {size: 30}}]}]}}"}},
      {"overrides",
       "tessera",
       {"attention={score: fidelity, gate: softmax, pattern: {default: causal, per_head: {1: {window: {size: 9}}}, "
        "per_layer: {0: {global: {tokens: 3}}, 1: {default: {window: {size: 6}}, per_head: {0: {strided: {stride: 4, width: 2}}}}}}}",
        "model={norm: layernorm, bias: true, rotary_base: 500}"}},
      {"documents",
       "tessera",
       {"attention={score: cosine, gate: relu4, normalizer: none, document_mask: true, threshold: {mode: controlled, init: -0.5}}",
        "model.layers=3"}},
      {"self",
       "tessera",
       {"attention={score: cosine, gate: relu2, normalizer: sum, always: {self: true}, threshold: {mode: controlled, init: 1.5}}"}},
      {"self_fidelity",
       "tessera",
       {"attention={score: fidelity, gate: relu, normalizer: sum, always: {self: true}, scale_learned: false, threshold: {mode: learned, init: "
        "0.4}}"}},
      {"sinks", "tessera", {"attention={score: cosine, gate: relu2, normalizer: sum, always: {sinks: 3}, threshold: {mode: controlled, init: 1.5}}"}},
      {"sinks_fidelity",
       "tessera",
       {"attention={score: fidelity, gate: relu, normalizer: sum, always: {self: true, sinks: 1}, scale_learned: false, threshold: {mode: learned, "
        "init: 0.4}}"}},
      {"output_gate",
       "tessera",
       {"attention={score: cosine, gate: relu2, normalizer: sum, output_gate: true, always: {self: true}, threshold: {mode: controlled}}",
        "model={norm: layernorm, bias: true}"}},
      {"output_gate_rms", "tessera", {"attention={score: dot, gate: relu, normalizer: rms, output_gate: true, threshold: {mode: learned}}"}},
      {"output_gate_softmax",
       "tessera",
       {"attention={score: dot, gate: softmax, output_gate: true}", "model={positions: learned, norm: layernorm, bias: true}"}},
  };
  return cases;
}

/// The parameters: normal, large enough that nothing is close to linear, no gain or bias at its first value.
inline std::vector<float> hf_values(const ParameterInfo& p) {
  ParameterInfo wide = p;
  wide.init_std = p.decayed ? 0.3f : 0.2f * (p.init_value != 0 ? std::abs(p.init_value) : 1.0f);
  return initial_values(wide, 3);
}

/// Writes the case's checkpoint, weights alone, as the folder `directory`; its mask beside it.
inline void make_hf_checkpoint(const HfCase& c, const std::string& directory) {
  const std::string mask = directory + ".mask.txt";
  make_folder(folder_of(directory));
  write_file(mask, kHfMask);
  std::vector<std::string> sets = {"model={layers: 2, heads: 2, width: 16, context: 40}", "train={tokens_per_step: 40, micro_batch: 1}",
                                   "attention={scale_init: 3, epsilon: 0.01, tile: {query: 16, key: 16}}"};
  for (std::string set : c.sets) {
    if (const auto at = set.find("MASK"); at != std::string::npos) set.replace(at, 4, mask);
    sets.push_back(set);
  }
  Config config = load_config("", sets);
  const auto tokenizer = load_tokenizer("bytes");
  resolve_vocabulary(config, tokenizer->vocabulary(), "the test");
  CheckpointRequest request;
  request.config = to_yaml(config);
  request.dataset = {"test", tokenizer->name(), tokenizer->hash(), "", tokenizer->vocabulary(), 0, {}};
  tokenizer->save(directory + ".json");
  request.tokenizer = read_file(directory + ".json");
  std::vector<float> thresholds;
  for (int i = 0; i < config.model.layers * config.model.heads; ++i)
    thresholds.push_back(config.model.attention.threshold.init + 0.125f * static_cast<float>(i));
  save_weights(directory, request, config.model, hf_values, thresholds);
}

/// The case's tokens: any bytes, and three documents.
inline std::vector<std::int32_t> hf_tokens() {
  std::vector<std::int32_t> tokens;
  for (std::int32_t i = 0; i < kHfContext; ++i) tokens.push_back(i == 0 || i == 13 || i == 27 ? 256 : (i * i * 37 + i * 11 + 5) % 256);
  return tokens;
}

/// Logits [T, V] of a checkpoint on the CPU, each position's from its prefix alone.
inline std::vector<float> hf_logits(const std::string& checkpoint, const std::vector<std::int32_t>& tokens) {
  const auto alone = make_single_communicator();
  OpenCheckpoint open(checkpoint, OpenCheckpoint::Use::generate, {.threads = 1, .visit = "", .device = "cpu"}, *alone);
  std::vector<float> all;
  for (std::size_t t = 1; t <= tokens.size(); ++t) {
    const auto logits = open.model->next_logits(std::span(tokens).first(t));
    all.insert(all.end(), logits.begin(), logits.end());
  }
  return all;
}

/// Logarithms of probabilities [T, V], documents kept apart as in training: minus the losses with every token of the vocabulary as target in turn.
inline std::vector<float> hf_log_probabilities(const std::string& checkpoint, const std::vector<std::int32_t>& tokens) {
  const auto alone = make_single_communicator();
  OpenCheckpoint open(checkpoint, OpenCheckpoint::Use::evaluate, {.threads = 1, .visit = "", .device = "cpu"}, *alone);
  const std::int64_t T = static_cast<std::int64_t>(tokens.size()), V = open.config.model.vocabulary;
  HostBatch batch{1, T, tokens, {}, {}, {}, 0};
  std::int32_t start = 0;
  for (std::int32_t t = 0; t < T; ++t) {
    if (tokens[static_cast<std::size_t>(t)] == 256) start = t;
    batch.position.push_back(t);
    batch.document_start.push_back(start);
  }
  std::vector<float> all(static_cast<std::size_t>(T * V)), losses(static_cast<std::size_t>(T));
  for (std::int64_t v = 0; v < V; ++v) {
    batch.target.assign(static_cast<std::size_t>(T), static_cast<std::int32_t>(v));
    open.model->forward(open.batch->upload(*open.ops, batch));
    open.ops->download(losses.data(), open.model->losses());
    for (std::int64_t t = 0; t < T; ++t) all[static_cast<std::size_t>(t * V + v)] = -losses[static_cast<std::size_t>(t)];
  }
  return all;
}

/// Greatest relative error of a position's row, with `columns` in a row of `expected` and every `step`-th of `found`'s.
inline double relative_error(const std::vector<float>& found, const std::vector<float>& expected, std::size_t rows, std::size_t step = 1) {
  const std::size_t columns = expected.size() / rows, width = found.size() / rows;
  double worst = 0;
  for (std::size_t r = 0; r < rows; ++r) {
    double difference = 0, norm = 0;
    for (std::size_t c = 0; c < columns; ++c) {
      const double e = expected[r * columns + c], f = found[r * width + c * step];
      difference += (f - e) * (f - e);
      norm += e * e;
    }
    const double error = std::sqrt(difference / norm);
    worst = std::isnan(error) ? 1e9 : std::max(worst, error);
  }
  return worst;
}

}  // namespace tessera::testing
