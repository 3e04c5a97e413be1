#pragma once
// What an exported model's tensors are called and how they lie, for export and import alike.

#include <string>
#include <vector>

#include "model/parameters.h"

namespace tessera {

inline constexpr double kHfNormEpsilon = 1e-5;  // of every norm (NormForward::epsilon)
inline constexpr const char* kHfPrefix = "transformer.";

struct HfTensor {
  enum class Source {
    parameter,       // of the model
    thresholds,      // a layer's row of them, modes fixed and controlled
    constant_scale,  // scale_init for each head, where the scale is not learned
  };
  Source source = Source::parameter;
  std::string name;       // "transformer.h.0.attn.c_attn.weight"
  std::string parameter;  // "h.0.attn.c_attn.weight"
  Shape stored;           // of the parameter
  Shape shape;            // in the file: without the embedding's padding, [in, out] where `transposed`
  bool matrix = false;
  bool transposed = false;
  int layer = 0;  // of thresholds and constant_scale
};

/// Every tensor of the file of a model, as GPT-2 (linear weights [in, out]) or with our own code.
std::vector<HfTensor> hf_tensors(const ModelConfig& model, bool gpt2);

/// A row-major matrix [rows, columns] as [columns, rows].
std::vector<float> transposed(const std::vector<float>& values, std::int64_t rows, std::int64_t columns);

}  // namespace tessera
