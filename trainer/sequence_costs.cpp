#include "trainer/sequence_costs.h"

#include <algorithm>
#include <map>
#include <utility>

#include "model/gpt.h"
#include "trainer/device.h"
#include "trainer/schema.h"

namespace tessera {

namespace {

using Json = nlohmann::ordered_json;
constexpr SequenceExchange kExchanges[] = {SequenceExchange::needed, SequenceExchange::ring, SequenceExchange::heads};

/// Of a number in the type that the device computes in: fp32 on the cpu, bf16 on a GPU.
int compute_bytes(const Config& config) { return config.device == "cuda" ? 2 : 4; }

/// Adds the lists of a head to a rank's counts.
void count_lists(const TileGroup& g, std::int64_t batch, std::int64_t& tiles, std::int64_t& lists) {
  tiles += batch * static_cast<std::int64_t>(g.query_entries.size());
  for (std::size_t a = 0; a + 1 < g.query_offsets.size(); ++a) lists += g.query_offsets[a + 1] > g.query_offsets[a] ? batch : 0;
}

LayerCosts layer_costs(const SequenceSplit& split, const TileMap& map, const ExchangeShape& shape) {
  LayerCosts costs;
  const auto plan = plan_needed(split, map);
  const auto ranks = static_cast<std::size_t>(split.ranks());
  const bool dealt = heads_problem(split.ranks(), shape).empty();
  for (std::size_t r = 0; r < ranks; ++r) {
    LayerCosts::Rank rank;
    rank.keys = plan[r].keys;
    for (auto group : map.group_of_head) count_lists(plan[r].lists->groups[static_cast<std::size_t>(group)], shape.batch, rank.tiles, rank.lists);
    const std::size_t mine = map.group_of_head.size() / ranks;
    for (std::size_t h = r * mine; dealt && h < (r + 1) * mine; ++h)
      count_lists(map.groups[static_cast<std::size_t>(map.group_of_head[h])], shape.batch, rank.tiles_of_heads, rank.lists_of_heads);
    costs.ranks.push_back(rank);
  }
  costs.needed = bytes_of_needed(split, plan, map.tile_key, shape);
  costs.ring = bytes_of_ring(split, shape);
  if (dealt) costs.heads = bytes_of_heads(split, shape);
  return costs;
}

std::int64_t forward_total(const ExchangeBytes& bytes, int ranks) {
  std::int64_t total = 0;
  for (int r = 0; r < ranks; ++r) total += bytes.forward_sent(r);
  return total;
}

Json json_of(const ExchangeBytes& bytes, int rank) {
  return {{"forward_sent", bytes.forward_sent(rank)},
          {"forward_received", bytes.forward_received(rank)},
          {"backward_sent", bytes.backward_sent(rank)},
          {"backward_received", bytes.backward_received(rank)}};
}

}  // namespace

const ExchangeBytes* LayerCosts::bytes(SequenceExchange exchange) const {
  if (exchange == SequenceExchange::ring) return &ring;
  if (exchange == SequenceExchange::heads) return heads ? &*heads : nullptr;
  return &needed;
}

SequenceCosts sequence_costs(const Config& config, const std::vector<std::shared_ptr<const TileMap>>& layers, int ranks, SequenceLayout layout) {
  const ExchangeShape shape{config.train.micro_batch, config.model.heads, config.model.head_size(), compute_bytes(config),
                            config.model.attention.adds_edges()};
  SequenceCosts costs{layout, split_sequence(layout, config.model.context, ranks, layers, device_kind(config.device)), shape, {}};
  std::map<const TileMap*, std::size_t> place;
  for (std::size_t l = 0; l < layers.size(); ++l) {
    const auto [it, fresh] = place.try_emplace(layers[l].get(), costs.layers.size());
    if (fresh) costs.layers.push_back(layer_costs(costs.split, *layers[l], shape));
    costs.layers[it->second].layers.push_back(static_cast<int>(l));
  }
  return costs;
}

std::string name_of(SequenceLayout layout) {
  Config c;
  c.parallel.layout = layout;
  return find_key("parallel.layout")->write(c).get<std::string>();
}

Json plan_sequence(const Config& config, int ranks) {
  const auto maps = make_layer_tiles(config.model, config.model.context);
  const SequenceCosts costs = sequence_costs(config, maps, ranks, config.parallel.layout);
  SequenceExchange exchange = config.parallel.exchange;
  if (exchange == SequenceExchange::heads) bytes_of_heads(costs.split, costs.shape);  // throws where it cannot be
  if (exchange == SequenceExchange::automatic) exchange = cheapest_exchange(costs.split, maps, costs.shape);

  // A block that is computed again fetches again. The last one is not.
  const auto computed_again = [&](int layer) { return config.train.recompute == Recompute::block && layer + 1 < config.model.layers; };
  Json totals = Json::object(), layers = Json::array();
  for (const LayerCosts& layer : costs.layers) {
    Json rows = Json::array();
    for (int r = 0; r < ranks; ++r) {
      const LayerCosts::Rank& rank = layer.ranks[static_cast<std::size_t>(r)];
      Json row = {{"rank", r}, {"tokens", costs.split.tokens_of(r)}, {"visible_tiles", rank.tiles}, {"keys", rank.keys}};
      for (auto e : kExchanges)
        if (const ExchangeBytes* bytes = layer.bytes(e)) row[name_of(e)] = json_of(*bytes, r);
      rows.push_back(std::move(row));
    }
    for (auto e : kExchanges) {
      Json& total = totals[name_of(e)];
      if (const ExchangeBytes* bytes = layer.bytes(e))
        total = (total.is_null() ? 0 : total.get<std::int64_t>()) + bytes->total() * static_cast<std::int64_t>(layer.layers.size()) +
                forward_total(*bytes, ranks) * std::ranges::count_if(layer.layers, computed_again);
    }
    layers.push_back({{"layers", layer.layers}, {"ranks", std::move(rows)}});
  }
  return {{"ranks", ranks},
          {"layout", name_of(config.parallel.layout)},
          {"exchange", name_of(exchange)},
          {"exchange_asked", name_of(config.parallel.exchange)},
          {"context", config.model.context},
          {"micro_batch", config.train.micro_batch},
          {"element_bytes", costs.shape.element},
          {"block_tokens", costs.split.block},
          {"layers_computed_again", config.train.recompute == Recompute::block ? config.model.layers - 1 : 0},
          {"bytes", std::move(totals)},
          {"heads_problem", heads_problem(ranks, costs.shape)},
          {"layers", std::move(layers)}};
}

}  // namespace tessera
