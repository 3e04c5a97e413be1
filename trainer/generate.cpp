#include "trainer/generate.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace tessera {
namespace {

/// SplitMix64 (Steele, Lea & Flood, 2014) of the n-th counter: uniform in [0, 1).
double uniform(std::uint64_t seed, std::uint64_t n) {
  std::uint64_t z = seed * 0xd1342543de82ef95ull + (n + 1) * 0x9e3779b97f4a7c15ull;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return static_cast<double>((z ^ (z >> 31)) >> 11) * 0x1.0p-53;
}

}  // namespace

std::uint32_t choose_token(const std::vector<float>& logits, const GenerateOptions& o, double random) {
  if (o.temperature <= 0) return static_cast<std::uint32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
  std::vector<std::uint32_t> order(logits.size());
  std::iota(order.begin(), order.end(), 0u);
  const auto likelier = [&](std::uint32_t a, std::uint32_t b) { return logits[a] != logits[b] ? logits[a] > logits[b] : a < b; };
  if (o.top_k > 0 && static_cast<std::size_t>(o.top_k) < order.size()) {
    std::partial_sort(order.begin(), order.begin() + o.top_k, order.end(), likelier);
    order.resize(static_cast<std::size_t>(o.top_k));
  }
  const double top = logits[*std::min_element(order.begin(), order.end(), likelier)];
  std::vector<double> cumulative;
  double sum = 0;
  for (const std::uint32_t t : order) cumulative.push_back(sum += std::exp((logits[t] - top) / o.temperature));
  const auto drawn = std::upper_bound(cumulative.begin(), cumulative.end(), random * sum) - cumulative.begin();
  return order[std::min<std::size_t>(static_cast<std::size_t>(drawn), order.size() - 1)];
}

std::vector<std::uint32_t> generate(Gpt& model, const Tokenizer& tokenizer, const std::string& prompt, const GenerateOptions& o,
                                    const std::function<void(std::uint32_t)>& on_token) {
  std::vector<std::int32_t> seen{static_cast<std::int32_t>(tokenizer.end_of_text())};
  for (const std::uint32_t t : tokenizer.encode(prompt)) seen.push_back(static_cast<std::int32_t>(t));
  const auto context = static_cast<std::size_t>(model.config().context);
  std::vector<std::uint32_t> made;
  for (std::int64_t n = 0; n < o.tokens; ++n) {
    const std::size_t length = std::min(seen.size(), context);
    const std::uint32_t token = choose_token(model.next_logits(std::span(seen).last(length)), o, uniform(o.seed, static_cast<std::uint64_t>(n)));
    if (o.stop_at_end && token == tokenizer.end_of_text()) break;
    made.push_back(token);
    // With a mask, the document that begins here sees nothing of those before it, in training as here.
    if (token == tokenizer.end_of_text() && model.config().attention.document_mask) seen.clear();
    seen.push_back(static_cast<std::int32_t>(token));
    on_token(token);
  }
  return made;
}

}  // namespace tessera
