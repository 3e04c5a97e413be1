#include "model/shared_attention.h"

#include <stdexcept>

#include "model/shared_attention_parts.h"

namespace tessera {

std::shared_ptr<const TileMap> HeadLists::of(const std::shared_ptr<const TileMap>& map, Stretch heads) {
  const auto first = map->group_of_head.begin() + heads.first;
  std::vector<std::int32_t> groups(first, first + heads.count);
  auto& lists = made_[{map, groups}];
  if (lists) return lists;
  if (groups == map->group_of_head) return lists = map;
  auto part = std::make_shared<TileMap>(*map);
  part->groups.clear();
  std::map<std::int32_t, std::int32_t> number;  // of a group among those that are used
  for (auto& g : groups) {
    const auto [at, is_new] = number.try_emplace(g, static_cast<std::int32_t>(part->groups.size()));
    if (is_new) part->groups.push_back(map->groups[static_cast<std::size_t>(g)]);
    g = at->second;
  }
  part->group_of_head = std::move(groups);
  return lists = std::move(part);
}

void HeadLists::account(DeviceKind device, MemoryPlan& plan) const {
  for (const auto& [key, lists] : made_) plan.account(MemoryCategory::workspace, "tile lists", tiles_bytes(device, *lists));
}

void HeadLists::upload(Ops& ops) {
  device_.clear();
  for (const auto& [key, lists] : made_) device_[lists.get()] = ops.upload_tiles(lists);
}

std::unique_ptr<SharedAttention> make_shared_attention(const SequencePart& part, const SequenceSplit& split,
                                                       const std::vector<std::shared_ptr<const TileMap>>& layers, const SharedAttention::Shape& shape,
                                                       MemoryPlan& plan) {
  if (part.ranks != split.ranks() || part.rank < 0 || part.rank >= part.ranks || part.stages < 1 || layers.empty())
    throw std::logic_error("shared attention: the part does not fit the split");
  switch (part.exchange) {
    case SequenceExchange::needed: return make_needed_attention(part, split, layers, shape, plan);
    case SequenceExchange::heads: return make_heads_attention(part, split, layers, shape, plan);
    case SequenceExchange::ring: return make_ring_attention(part, split, layers, shape, plan);
    case SequenceExchange::automatic: break;
  }
  throw std::logic_error("shared attention: which exchange it is must be decided before");
}

}  // namespace tessera
