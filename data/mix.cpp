#include "data/mix.h"

#include <fmt/core.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>
#include <stdexcept>
#include <utility>

#include "data/sampler.h"

namespace tessera {
namespace {

__extension__ using Wide = unsigned __int128;

constexpr std::uint64_t kOne = std::uint64_t{1} << 63;

/// n * share / 2^63, rounded. In integers, so that one more of n is at most one more of the result: no place is dealt twice or not at all.
std::uint64_t part_of(std::uint64_t n, std::uint64_t share) { return static_cast<std::uint64_t>((Wide{n} * share + kOne / 2) >> 63); }

}  // namespace

Mixture::Mixture(std::span<const double> weights, std::uint64_t sequences_per_step, std::uint64_t seed)
    : per_step_(sequences_per_step), seed_(seed), shares_(weights.begin(), weights.end()) {
  if (weights.empty() || sequences_per_step == 0) throw std::invalid_argument("Mixture: at least one dataset and one sequence a step");
  for (const double weight : weights)
    if (!(weight > 0) || !std::isfinite(weight)) throw std::invalid_argument(fmt::format("a weight of {}: expected a positive number", weight));
  const double total = std::accumulate(weights.begin(), weights.end(), 0.0);
  for (double& share : shares_) share /= total;

  // The two lightest become one, until one is left. What rounding at a node is off by is divided on below it, and so near the leaves it is that of
  // a few nodes.
  std::vector<std::pair<double, std::size_t>> open;
  for (std::size_t part = 0; part < shares_.size(); ++part) open.emplace_back(shares_[part], part);
  while (open.size() > 1) {
    std::sort(open.begin(), open.end(), std::greater<>());
    const auto [light, right] = open.back();
    open.pop_back();
    auto& [weight, index] = open.back();
    const double left_share = weight / (weight + light);
    nodes_.push_back({std::min(kOne, static_cast<std::uint64_t>(std::llround(std::ldexp(left_share, 62))) * 2), index, right});
    weight += light;
    index = shares_.size() + nodes_.size() - 1;
  }
}

std::vector<std::uint64_t> Mixture::dealt(std::uint64_t steps) const {
  std::vector<std::uint64_t> had(shares_.size() + nodes_.size());
  had.back() = steps * per_step_;
  for (std::size_t i = nodes_.size(); i-- > 0;) {
    const Node& node = nodes_[i];
    const std::uint64_t all = had[shares_.size() + i];
    had[node.left] = part_of(all, node.left_share);
    had[node.right] = all - had[node.left];
  }
  had.resize(shares_.size());
  return had;
}

Mixture::Turn Mixture::turn(std::uint64_t step, std::uint64_t index) const {
  if (shares_.size() == 1) return {0, step * per_step_ + index};
  const auto before = dealt(step), after = dealt(step + 1);
  std::uint64_t place = Permutation(per_step_, scramble(~seed_) + step)(index);
  for (std::size_t part = 0; part < shares_.size(); ++part) {
    const std::uint64_t here = after[part] - before[part];
    if (place < here) return {part, before[part] + place};
    place -= here;
  }
  throw std::logic_error("Mixture: a step deals out less than its sequences");
}

}  // namespace tessera
