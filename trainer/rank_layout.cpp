#include "trainer/rank_layout.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>

#include "trainer/collective.h"
#include "trainer/device.h"
#include "trainer/preflight.h"

namespace tessera {

RankLayout layout_of(const std::vector<std::string>& machines, int rank, int sequence) {
  const int ranks = static_cast<int>(machines.size());
  if (sequence < 1 || ranks % sequence != 0 || rank < 0 || rank >= ranks) throw std::logic_error("ranks that do not make groups of a sequence");
  std::vector<int> order(machines.size());
  std::iota(order.begin(), order.end(), 0);
  std::ranges::stable_sort(order, {}, [&](int r) { return std::ranges::find(machines, machines[static_cast<std::size_t>(r)]) - machines.begin(); });
  const int at = static_cast<int>(std::ranges::find(order, rank) - order.begin());
  RankLayout layout;
  layout.groups = ranks / sequence;
  layout.group = at / sequence;
  layout.place = at % sequence;
  layout.members.assign(order.begin() + layout.group * sequence, order.begin() + (layout.group + 1) * sequence);
  return layout;
}

std::vector<int> exchange_partners(const RankLayout& layout, SequenceExchange exchange) {
  const int ranks = static_cast<int>(layout.members.size());
  if (exchange != SequenceExchange::ring || ranks <= 3) return layout.members;
  std::vector<int> partners;
  for (const int place : {layout.place + ranks - 1, layout.place, layout.place + 1})
    partners.push_back(layout.members[static_cast<std::size_t>(place % ranks)]);
  return partners;
}

std::size_t connection_bytes(const Config& config, int ranks, SequenceExchange exchange) {
  if (config.parallel.share_gpu) return 0;
  const RankLayout first = layout_of(std::vector<std::string>(static_cast<std::size_t>(ranks)), 0, config.parallel.sequence);
  return connection_bytes(device_kind(config.device), ranks, static_cast<int>(exchange_partners(first, exchange).size()) - 1);
}

RankLayout lay_out_ranks(Communicator& host, int sequence) {
  return layout_of(all_gather(host, host_name() + " " + machine()), host.rank(), sequence);
}

}  // namespace tessera
