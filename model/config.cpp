#include "model/config.h"

#include <fmt/format.h>

#include <cmath>
#include <limits>
#include <stdexcept>

namespace tessera {
namespace {

// What the attention kernels of every backend take.
constexpr int kMaxHeadSize = 256;
constexpr int kMinTile = 8, kMaxTile = 128;

template <class... Args>
void require(bool ok, fmt::format_string<Args...> message, Args&&... args) {
  if (!ok) throw std::invalid_argument(fmt::format(message, std::forward<Args>(args)...));
}

}  // namespace

void check_model(const ModelConfig& m) {
  const AttentionConfig& a = m.attention;
  require(m.layers >= 1, "model.layers is {}; it must be at least 1", m.layers);
  require(m.heads >= 1, "model.heads is {}; it must be at least 1", m.heads);
  require(m.width >= 1, "model.width is {}; it must be at least 1", m.width);
  require(m.mlp_ratio >= 1, "model.mlp_ratio is {}; it must be at least 1", m.mlp_ratio);
  require(m.width % m.heads == 0, "model.width {} is no multiple of model.heads {}", m.width, m.heads);
  require(m.head_size() % 8 == 0 && m.head_size() <= kMaxHeadSize,
          "model.width {} / model.heads {} is a head size of {}; it must be a multiple of 8 up to {}", m.width, m.heads, m.head_size(), kMaxHeadSize);
  require(m.context >= 1 && m.context <= std::numeric_limits<std::int32_t>::max(), "model.context is {}; it must be 1 to {}", m.context,
          std::numeric_limits<std::int32_t>::max());
  require(m.vocabulary >= 1, "model.vocabulary is {}; it must be at least 1", m.vocabulary);
  require(m.vocabulary_padded >= m.vocabulary, "the embedding has {} rows for a vocabulary of {}", m.vocabulary_padded, m.vocabulary);
  require(m.positions != Positions::rotary || m.rotary_base > 0, "model.rotary_base is {}; it must be positive", m.rotary_base);
  for (auto [key, tile] : {std::pair{"query", a.tile_query}, std::pair{"key", a.tile_key}}) {
    require(tile >= kMinTile && tile <= kMaxTile && tile % 8 == 0, "attention.tile.{} is {}; it must be a multiple of 8 from {} to {}", key, tile,
            kMinTile, kMaxTile);
  }
  require(a.score == Score::dot || (std::isfinite(a.scale_init) && a.scale_init > 0), "attention.scale_init is {}; it must be positive",
          a.scale_init);
  require(a.normalizer != Normalizer::sum || a.epsilon > 0, "attention.epsilon is {}; it must be positive", a.epsilon);
  require(a.always_sinks >= 0 && a.always_sinks <= kMostSinks, "attention.always.sinks is {}; it must be 0 to {}", a.always_sinks, kMostSinks);
  require(!a.adds_edges() || a.normalizer == Normalizer::sum,
          "attention.always.self or attention.always.sinks is set; it needs attention.normalizer sum");
  if (a.gate != Gate::softmax && a.threshold.mode == ThresholdMode::length) {
    require(a.score == Score::cosine, "attention.threshold.mode length is defined for attention.score cosine, and the score is {}",
            a.score == Score::dot ? "dot" : "fidelity");
    require(a.threshold.beta > 0, "attention.threshold.beta is {}; it must be positive", a.threshold.beta);
  }
  check_pattern(a.pattern.base);
  for (const auto& o : a.pattern.overrides) check_pattern(o.pattern);
}

}  // namespace tessera
