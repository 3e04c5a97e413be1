#include "data/synthetic.h"

#include <fmt/core.h>

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <unordered_set>

#include "data/sampler.h"

namespace tessera {
namespace {

using Kind = SyntheticTask::Kind;

constexpr std::uint64_t kStep = 0x9e3779b97f4a7c15u;  // of SplitMix64
constexpr std::uint64_t kTrainStream = 0x7472'6169'6e00'0001u, kValidationStream = 0x7661'6c69'6400'0002u;
constexpr std::int32_t kPadding = 0, kSeparator = 1;

std::int32_t as_token(std::uint64_t x) { return static_cast<std::int32_t>(x); }

/// The longest distance that a sequence has room for.
std::int64_t farthest(const SyntheticTask& task, std::int64_t context) { return task.kind == Kind::copy ? context / 2 : context - 2; }

}  // namespace

/// The random numbers of one sequence: SplitMix64 from a start of its own.
class SyntheticSource::Draws {
 public:
  explicit Draws(std::uint64_t start) : state_(start) {}

  std::uint64_t next() { return scramble(state_ += kStep); }
  /// Uniform in [low, high).
  std::uint64_t in(std::int64_t low, std::int64_t high) {
    const auto n = static_cast<std::uint64_t>(high - low), surplus = (0 - n) % n;  // 2^64 mod n
    std::uint64_t x = next();
    while (x < surplus) x = next();
    return static_cast<std::uint64_t>(low) + x % n;
  }
  /// Uniform in (0, 1].
  double unit() { return static_cast<double>((next() >> 11) + 1) * 0x1p-53; }
  /// Distinct tokens of [low, high), as many as `out` holds.
  void distinct(std::int64_t low, std::int64_t high, std::vector<std::int32_t>& out) {
    std::unordered_set<std::int32_t> taken;
    for (std::int32_t& token : out) do
        token = as_token(in(low, high));
      while (!taken.insert(token).second);
  }

 private:
  std::uint64_t state_;
};

const char* name_of(Kind kind) {
  switch (kind) {
    case Kind::mqar: return "mqar";
    case Kind::copy: return "copy";
    case Kind::needle: return "needle";
  }
  return "";
}

std::int64_t possible_answers(const SyntheticTask& task) {
  return task.kind == Kind::copy ? task.vocabulary - 2 : task.vocabulary - task.vocabulary / 2;
}

std::string synthetic_problem(const SyntheticTask& t, std::int64_t context) {
  if (t.vocabulary < 4) return fmt::format("a vocabulary of {}; expected at least 4", t.vocabulary);
  if (t.kind == Kind::mqar) {
    if (t.pairs < 1 || !(t.power_a > 0)) return "pairs must be at least 1, and power_a above 0";
    if (4 * t.pairs > context)
      return fmt::format("{} pair{} and {} take {} tokens, and a sequence has {}; expected {}a longer context", t.pairs, t.pairs == 1 ? "" : "s",
                         t.pairs == 1 ? "its query" : "their queries", 4 * t.pairs, context,
                         context < 4 ? "" : fmt::format("at most {} pairs, or ", context / 4));
    if (t.pairs > t.vocabulary / 2 - 1)
      return fmt::format("{} pairs want as many keys, and a vocabulary of {} has {}; expected a vocabulary of at least {}", t.pairs, t.vocabulary,
                         t.vocabulary / 2 - 1, 2 * (t.pairs + 1));
    return "";
  }
  const bool copy = t.kind == Kind::copy;
  const char* what = copy ? "length" : "distance";
  const std::int64_t most = farthest(t, context);
  if (most < 1) return fmt::format("a sequence of {} tokens is too short; expected a context of at least {}", context, copy ? 2 : 3);
  const auto too_far = [&](std::int64_t distance) {
    return fmt::format("a {} of {} takes {} tokens, and a sequence has {}; expected at most {}, or a longer context", what, distance,
                       copy ? 2 * distance : distance + 2, context, most);
  };
  for (const std::int64_t distance : t.distances) {
    if (distance < 1) return fmt::format("a {} of {}; expected at least 1", what, distance);
    if (distance > most) return too_far(distance);
  }
  if (!t.distances.empty()) return "";
  if (t.longest > most) return too_far(t.longest);
  const std::int64_t longest = t.longest > 0 ? t.longest : most;
  if (t.shortest < 1 || t.shortest > longest)
    return fmt::format("shortest {} and longest {}{}; expected 1 <= shortest <= longest", t.shortest, longest,
                       t.longest > 0 ? "" : " (as far as the sequence goes)");
  return "";
}

SyntheticSource::SyntheticSource(const SyntheticTask& task, std::int64_t context, Split split, std::uint64_t seed)
    : task_(task), context_(context), key_(split == Split::validation ? scramble(kValidationStream) : scramble(scramble(seed) + kTrainStream)) {
  if (const std::string problem = synthetic_problem(task, context); !problem.empty())
    throw std::invalid_argument(fmt::format("{} at context {}: {}", name_of(task.kind), context, problem));
  if (task.longest == 0) task_.longest = farthest(task, context);
  if (task.kind == Kind::mqar)
    for (std::int64_t g = 1; g <= (context - 2 * task.pairs) / 2; ++g) gap_weight_.push_back(std::pow(static_cast<double>(g), task.power_a - 1));
}

void SyntheticSource::make(std::uint64_t number, SyntheticSequence& out) const {
  const auto n = static_cast<std::size_t>(context_);
  out.token.assign(n, kPadding);
  out.target.assign(n, -1);
  out.distance.assign(n, 0);
  Draws draws(scramble(key_ + scramble(number + kStep)));
  switch (task_.kind) {
    case Kind::mqar: return make_mqar(draws, out);
    case Kind::copy: return make_copy(draws, out);
    case Kind::needle: return make_needle(draws, out);
  }
}

void SyntheticSource::make_mqar(Draws& draws, SyntheticSequence& out) const {
  const auto pairs = static_cast<std::size_t>(task_.pairs);
  std::vector<std::int32_t> keys(pairs), values(pairs);
  draws.distinct(1, task_.vocabulary / 2, keys);
  draws.distinct(task_.vocabulary / 2, task_.vocabulary, values);
  if (task_.filler == SyntheticTask::Filler::random)
    for (std::size_t t = 2 * pairs; t < out.token.size(); ++t) out.token[t] = as_token(draws.in(0, task_.vocabulary));
  // Drawing one gap after another by weight, each once, is the order in which clocks of these rates ring: of exponential times, the shortest first.
  std::vector<std::pair<double, std::size_t>> gaps(gap_weight_.size());
  for (std::size_t g = 0; g < gaps.size(); ++g) gaps[g] = {-std::log(draws.unit()) / gap_weight_[g], g};
  std::partial_sort(gaps.begin(), gaps.begin() + static_cast<std::ptrdiff_t>(pairs), gaps.end());
  for (std::size_t i = 0; i < pairs; ++i) {
    out.token[2 * i] = keys[i];
    out.token[2 * i + 1] = values[i];
    const std::size_t query = 2 * pairs + 2 * gaps[i].second;
    out.token[query] = keys[i];
    out.target[query] = values[i];
    out.distance[query] = static_cast<std::int32_t>(query - (2 * i + 1));
  }
}

void SyntheticSource::make_copy(Draws& draws, SyntheticSequence& out) const {
  const auto length = static_cast<std::size_t>(draw_distance(draws));
  out.token[length] = kSeparator;
  for (std::size_t i = 0; i < length; ++i) {
    const std::int32_t token = as_token(draws.in(2, task_.vocabulary));
    out.token[i] = token;
    if (const std::size_t again = length + 1 + i; again < out.token.size()) out.token[again] = token;
    out.target[length + i] = token;
    out.distance[length + i] = static_cast<std::int32_t>(length);
  }
}

void SyntheticSource::make_needle(Draws& draws, SyntheticSequence& out) const {
  const auto distance = static_cast<std::size_t>(draw_distance(draws)), query = out.token.size() - 1;
  const auto key = as_token(draws.in(1, task_.vocabulary / 2)), value = as_token(draws.in(task_.vocabulary / 2, task_.vocabulary));
  for (std::int32_t& token : out.token) {
    token = as_token(draws.in(0, task_.vocabulary - 1));
    token += token >= key;
  }
  out.token[query] = out.token[query - distance - 1] = key;
  out.token[query - distance] = value;
  out.target[query] = value;
  out.distance[query] = static_cast<std::int32_t>(distance);
}

std::int64_t SyntheticSource::draw_distance(Draws& draws) const {
  if (!task_.distances.empty()) return task_.distances[draws.in(0, std::ssize(task_.distances))];
  const double low = static_cast<double>(task_.shortest), high = static_cast<double>(task_.longest + 1);
  return std::clamp(static_cast<std::int64_t>(low * std::pow(high / low, draws.unit())), task_.shortest, task_.longest);
}

}  // namespace tessera
