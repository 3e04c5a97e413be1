#include "model/sequence_bytes.h"

#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <numeric>
#include <stdexcept>

namespace tessera {
namespace {

Traffic nothing(int ranks) {
  const auto n = static_cast<std::size_t>(ranks);
  return Traffic(n, std::vector<std::int64_t>(n));
}

std::int64_t sent(const Traffic& traffic, int rank) {
  const auto& row = traffic.at(static_cast<std::size_t>(rank));
  return std::accumulate(row.begin(), row.end(), std::int64_t{0});
}

std::int64_t received(const Traffic& traffic, int rank) {
  return std::accumulate(traffic.begin(), traffic.end(), std::int64_t{0},
                         [&](std::int64_t sum, const auto& row) { return sum + row.at(static_cast<std::size_t>(rank)); });
}

}  // namespace

std::int64_t ExchangeBytes::forward_sent(int rank) const { return sent(forward, rank); }
std::int64_t ExchangeBytes::forward_received(int rank) const { return received(forward, rank); }
std::int64_t ExchangeBytes::backward_sent(int rank) const { return sent(backward, rank); }
std::int64_t ExchangeBytes::backward_received(int rank) const { return received(backward, rank); }
std::int64_t ExchangeBytes::total() const {
  std::int64_t sum = 0;
  for (int r = 0; r < static_cast<int>(forward.size()); ++r) sum += forward_sent(r) + backward_sent(r);
  return sum;
}

ExchangeBytes bytes_of_needed(const SequenceSplit& split, const std::vector<NeededKeys>& plan, int tile_key, const ExchangeShape& shape) {
  const auto ranks = static_cast<std::size_t>(split.ranks());
  ExchangeBytes bytes{nothing(split.ranks()), nothing(split.ranks())};
  for (std::size_t to = 0; to < ranks; ++to) {
    for (std::size_t from = 0; from < ranks; ++from) {
      std::int64_t keys = 0;  // of all heads
      for (const HeadTile& t : plan.at(to).receive[from]) keys += std::min<std::int64_t>(tile_key, split.tokens - std::int64_t{t.tile} * tile_key);
      const std::int64_t pair = 2 * keys * shape.head_size * shape.element * shape.batch;  // k and v, or dk and dv
      bytes.forward[from][to] += pair;
      bytes.backward[from][to] += pair;
      bytes.backward[to][from] += pair;
    }
  }
  return bytes;
}

ExchangeBytes bytes_of_ring(const SequenceSplit& split, const ExchangeShape& shape) {
  const int ranks = split.ranks();
  ExchangeBytes bytes{nothing(ranks), nothing(ranks)};
  if (ranks == 1) return bytes;
  for (int r = 0; r < ranks; ++r) {
    const auto from = static_cast<std::size_t>(r), to = static_cast<std::size_t>((r + 1) % ranks);
    // Every part passes this hop but the one that begins its way behind it.
    const std::int64_t pair = 2 * shape.batch * shape.heads * shape.head_size;  // numbers a token: k and v, or dk and dv
    const std::int64_t moved = (split.tokens - split.tokens_of((r + 1) % ranks)) * pair * shape.element;
    bytes.forward[from][to] += moved;
    bytes.backward[from][to] += moved + split.tokens * pair * static_cast<std::int64_t>(sizeof(float));
  }
  return bytes;
}

std::string heads_problem(int ranks, const ExchangeShape& shape) {
  if (shape.heads % ranks != 0) return fmt::format("{} ranks do not divide {} heads", ranks, shape.heads);
  return shape.added_edges ? "attention.always.self or attention.always.sinks is set" : "";
}

ExchangeBytes bytes_of_heads(const SequenceSplit& split, const ExchangeShape& shape) {
  const int ranks = split.ranks();
  if (shape.added_edges)
    throw std::invalid_argument(
        "exchange heads does not do attention.always.self or attention.always.sinks: it keeps each query's sum of weights with another rank. "
        "Possible: exchange needed or ring");
  if (shape.heads % ranks != 0) {
    std::string would;
    for (std::int64_t s = 1; s <= shape.heads; ++s)
      if (shape.heads % s == 0) would += fmt::format("{}{}", would.empty() ? "" : ", ", s);
    throw std::invalid_argument(
        fmt::format("exchange heads deals {} heads to {} ranks, which does not come out even. Possible: {} ranks, or exchange needed", shape.heads,
                    ranks, would));
  }
  constexpr std::int64_t kForwardThere = 3, kForwardBack = 1;    // q k v; o
  constexpr std::int64_t kBackwardThere = 5, kBackwardBack = 3;  // q k v o do; dq dk dv
  ExchangeBytes bytes{nothing(ranks), nothing(ranks)};
  for (int from = 0; from < ranks; ++from) {
    for (int to = 0; to < ranks; ++to) {
      if (from == to) continue;
      const auto f = static_cast<std::size_t>(from), t = static_cast<std::size_t>(to);
      const std::int64_t a_token = shape.batch * (shape.heads / ranks) * shape.head_size * shape.element;
      const std::int64_t there = split.tokens_of(from) * a_token, back = split.tokens_of(to) * a_token;
      bytes.forward[f][t] = kForwardThere * there + kForwardBack * back;
      bytes.backward[f][t] = kBackwardThere * there + kBackwardBack * back;
    }
  }
  return bytes;
}

SequenceExchange cheapest_exchange(const SequenceSplit& split, const std::vector<std::shared_ptr<const TileMap>>& layers,
                                   const ExchangeShape& shape) {
  if (!heads_problem(split.ranks(), shape).empty()) return SequenceExchange::needed;
  std::map<const TileMap*, std::int64_t> planned;
  std::int64_t needed = 0;
  for (const auto& map : layers) {
    auto [it, fresh] = planned.try_emplace(map.get(), 0);
    if (fresh) it->second = bytes_of_needed(split, plan_needed(split, *map), map->tile_key, shape).total();
    needed += it->second;
  }
  return static_cast<std::int64_t>(layers.size()) * bytes_of_heads(split, shape).total() < needed ? SequenceExchange::heads
                                                                                                  : SequenceExchange::needed;
}

}  // namespace tessera
