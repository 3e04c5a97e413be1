#pragma once
// What the ranks of a job are to each other: parallel.sequence ranks share each sequence, and such groups see different sequences.

#include <string>
#include <vector>

#include "kernels/comm/communicator.h"
#include "model/sequence_plan.h"
#include "trainer/config.h"

namespace tessera {

struct RankLayout {
  int groups = 1, group = 0;    // data parallelism: sequences are dealt to groups
  int place = 0;                // in the group: which part of each sequence
  std::vector<int> members{0};  // ranks of the group in the job, by place
};

/// Ranks that exchange keys with this one, itself among them: of a ring its neighbours, else its group.
std::vector<int> exchange_partners(const RankLayout& layout, SequenceExchange exchange);

/// Bytes that connections take on each rank's device: connection_bytes(kernels/device.h) of a run whose sequences' ranks exchange keys in that way.
/// None where ranks share a GPU, which they do through the host.
std::size_t connection_bytes(const Config& config, int ranks, SequenceExchange exchange);

/// Groups are of `sequence` neighbours, of one machine as far as possible: ranks in the order of the machines, which come in that of their first
/// ranks. `machines`: of each rank, any text that tells them apart. sequence divides the ranks (check_ranks).
RankLayout layout_of(const std::vector<std::string>& machines, int rank, int sequence);

/// The same, after asking every rank for its machine. Collective.
RankLayout lay_out_ranks(Communicator& host, int sequence);

}  // namespace tessera
