#pragma once
// A GPT in double precision, written from the definition alone: no tiles, no fusion, every edge in a T x T loop. It shares with the model
// under test nothing but the configuration, the names of parameters and PatternConfig::visible.

#include <cstdint>
#include <vector>

#include "model/config.h"
#include "model/parameters.h"

namespace tessera::test {

/// B sequences of T tokens, row-major [B, T].
struct Sequences {
  std::int64_t B = 0, T = 0;
  std::vector<std::int32_t> tokens, targets, document_start;
};

class GptReference {
 public:
  GptReference(const ModelConfig& config, const ParameterLayout& layout) : config_(config), layout_(layout) {}

  struct Result {
    std::vector<double> losses;        // [B, T]
    std::vector<double> last_logits;   // [vocabulary] of the last token of the last sequence
    std::vector<double> active_edges;  // [layers, heads], all sequences together
    std::vector<double> score_sums;    // [layers, heads]: the sum of min(x, kBalanceReach) over active edges, without self edges
  };
  /// `parameters`: flat as in the layout; `thresholds`: [layers, heads] for modes fixed and controlled.
  Result run(const std::vector<double>& parameters, const std::vector<double>& thresholds, const Sequences& batch) const;

 private:
  const ModelConfig config_;
  const ParameterLayout layout_;
};

}  // namespace tessera::test
