#include "trainer/hf_names.h"

#include <fmt/core.h>

namespace tessera {

std::vector<HfTensor> hf_tensors(const ModelConfig& m, bool gpt2) {
  const AttentionConfig& a = m.attention;
  std::vector<HfTensor> tensors;
  const auto add = [&](HfTensor t) {
    t.name = kHfPrefix + t.parameter;
    tensors.push_back(std::move(t));
  };
  for (const ParameterInfo& p : make_parameter_layout(m).parameters) {
    HfTensor t{HfTensor::Source::parameter, "", p.name, p.shape, p.shape, p.decayed, false, 0};
    const bool embedding = p.name == "wte.weight" || p.name == "wpe.weight";
    if (p.name == "wte.weight") t.shape = {m.vocabulary, m.width};
    if (gpt2 && p.decayed && !embedding) {
      t.transposed = true;
      t.shape = {p.shape[1], p.shape[0]};
    }
    add(std::move(t));
  }
  const bool constant_scale = a.score != Score::dot && !a.learns_scale();
  const bool thresholds = a.gate != Gate::softmax && (a.threshold.mode == ThresholdMode::fixed || a.threshold.mode == ThresholdMode::controlled);
  const Shape heads{m.heads};
  for (int l = 0; l < m.layers; ++l) {
    if (constant_scale) add({HfTensor::Source::constant_scale, "", fmt::format("h.{}.attn.scale", l), heads, heads, false, false, l});
    if (thresholds) add({HfTensor::Source::thresholds, "", fmt::format("h.{}.attn.threshold", l), heads, heads, false, false, l});
  }
  return tensors;
}

std::vector<float> transposed(const std::vector<float>& values, std::int64_t rows, std::int64_t columns) {
  constexpr std::int64_t kBlock = 64;  // a block's rows and columns stay in the cache
  std::vector<float> out(values.size());
  for (std::int64_t r0 = 0; r0 < rows; r0 += kBlock)
    for (std::int64_t c0 = 0; c0 < columns; c0 += kBlock)
      for (std::int64_t r = r0; r < std::min(rows, r0 + kBlock); ++r)
        for (std::int64_t c = c0; c < std::min(columns, c0 + kBlock); ++c)
          out[static_cast<std::size_t>(c * rows + r)] = values[static_cast<std::size_t>(r * columns + c)];
  return out;
}

}  // namespace tessera
