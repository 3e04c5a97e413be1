#pragma once
// The flat parameter buffer: every parameter of the model, its name, shape and place. One buffer serves the optimizer, the
// reduce-scatter, the all-gather and the checkpoint; the model sees named slices of it.

#include <cstdint>
#include <string>
#include <vector>

#include "kernels/tensor.h"
#include "model/config.h"

namespace tessera {

struct ParameterInfo {
  std::string name;     // GPT-2's: "wte.weight", "h.3.attn.c_attn.weight", "h.3.mlp.c_fc.bias", "ln_f.weight"; ours: "h.3.attn.scale"
  Shape shape;          // linear weights are [out, in]
  std::int64_t offset;  // elements from the start of the flat buffer
  bool decayed;         // matrices decay, vectors (and the head norm's [H, D] gain) do not
  float init_std;       // normal(0, std); 0: constant
  float init_value;     // the constant
};

struct ParameterLayout {
  std::vector<ParameterInfo> parameters;  // decayed ones first, contiguous in this order
  std::int64_t count = 0;                 // all elements, without padding
  std::int64_t decayed_count = 0;

  const ParameterInfo& find(const std::string& name) const;  // throws std::out_of_range
};

/// Pure function of the configuration. Initialisation follows GPT-2: std 0.02, residual projections 0.02/sqrt(2 layers). The output gate's matrix is
/// 0.
ParameterLayout make_parameter_layout(const ModelConfig& config);

/// First values of a parameter: a pure function of (seed, name, index), by a counter-based generator and Box & Muller.
std::vector<float> initial_values(const ParameterInfo& parameter, std::uint64_t seed);

}  // namespace tessera
