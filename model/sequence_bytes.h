#pragma once
// Bytes that the ranks of a sequence move for one layer of attention and one micro-batch, by exchange: what the ranks' counters must show. Pure
// functions of the split and the plan.
//
// H heads of D, B sequences, elements of e bytes in the compute type; rank r of S holds T_r of T tokens. An element of a message is counted once,
// where it leaves and where it arrives; what a rank keeps for itself is no byte. Not counted: messages that are no part of the attention's tensors
// (counts and sums of a few numbers a head).
//
//   needed  forward   k and v of each tile that `receive` names
//           backward  the same again, which the forward pass does not keep; dk and dv of these tiles return to their owners, in the compute type
//   ring    forward   k and v of every part, S - 1 hops, each to the next rank
//           backward  k and v again, S - 1 hops; fp32 sums of dk and dv accompany them and go one hop more, which is home: S hops
//   heads   forward   q, k, v from all heads of T_r tokens to H / S heads of T, o the other way: all-to-all
//           backward  q, k, v again, o and do the same way; dq, dk, dv the other way. What else the forward pass keeps a row (z) stays as it is
//           sharded

#include <cstdint>
#include <string>
#include <vector>

#include "model/sequence_plan.h"

namespace tessera {

/// Element [from][to]: bytes.
using Traffic = std::vector<std::vector<std::int64_t>>;

struct ExchangeBytes {
  Traffic forward, backward;

  std::int64_t forward_sent(int rank) const;
  std::int64_t forward_received(int rank) const;
  std::int64_t backward_sent(int rank) const;
  std::int64_t backward_received(int rank) const;
  std::int64_t total() const;  // sent by all ranks, both passes
};

/// Sizes of one layer's tensors.
struct ExchangeShape {
  std::int64_t batch = 1;  // B
  std::int64_t heads = 1;  // H
  std::int64_t head_size = 1;
  std::int64_t element = 4;  // bytes of the compute type
  bool added_edges = false;  // attention.always, which exchange heads does not do
};

/// `plan` is plan_needed(split, map)'s.
ExchangeBytes bytes_of_needed(const SequenceSplit& split, const std::vector<NeededKeys>& plan, int tile_key, const ExchangeShape& shape);
ExchangeBytes bytes_of_ring(const SequenceSplit& split, const ExchangeShape& shape);
/// Why exchange heads cannot be, in a few words, or "" where it can: the ranks divide the heads, and there is no attention.always.
std::string heads_problem(int ranks, const ExchangeShape& shape);
/// Throws std::invalid_argument where it cannot be, saying what would do.
ExchangeBytes bytes_of_heads(const SequenceSplit& split, const ExchangeShape& shape);

/// The exchange that moves fewest bytes in all, over all layers: needed, unless heads can be dealt and moves fewer. A ring moves every key to
/// every rank, so it never moves fewer than needed; it is for memory.
SequenceExchange cheapest_exchange(const SequenceSplit& split, const std::vector<std::shared_ptr<const TileMap>>& layers, const ExchangeShape& shape);

}  // namespace tessera
