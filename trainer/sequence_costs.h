#pragma once
// What sequence parallelism will compute and move, from the plan that a run follows (model/sequence_plan.h, sequence_bytes.h). Needs no device.

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "model/sequence_bytes.h"
#include "trainer/config.h"

namespace tessera {

/// Of one micro-batch in layers that share their tile lists.
struct LayerCosts {
  struct Rank {
    std::int64_t tiles = 0, lists = 0;                    // visible tiles of its queries over all heads and sequences, and lists that hold any
    std::int64_t keys = 0;                                // rows of the compact buffer of exchange needed
    std::int64_t tiles_of_heads = 0, lists_of_heads = 0;  // with exchange heads: of all queries in its heads
  };
  std::vector<int> layers;
  std::vector<Rank> ranks;
  ExchangeBytes needed, ring;
  std::optional<ExchangeBytes> heads;  // where they can be dealt

  const ExchangeBytes* bytes(SequenceExchange exchange) const;  // null: heads that cannot be dealt
};

struct SequenceCosts {
  SequenceLayout layout;
  SequenceSplit split;
  ExchangeShape shape;
  std::vector<LayerCosts> layers;
};

/// Of a micro-batch of train.micro_batch sequences of `config`, each over so many ranks. `layers`: make_layer_tiles(config.model, context). Throws
/// std::invalid_argument when the sequence cannot be split so (split_sequence).
SequenceCosts sequence_costs(const Config& config, const std::vector<std::shared_ptr<const TileMap>>& layers, int ranks, SequenceLayout layout);

/// "contiguous", "zigzag", "balanced".
std::string name_of(SequenceLayout layout);

/// As `tessera plan --json` prints it under "sequence": "ranks", "layout", "exchange" (auto: the cheapest), "bytes" of each exchange over all layers
/// (with train.recompute block the forward pass of all but the last once more; null: not possible), "heads_problem" (why exchange heads is not, or
/// ""), "layers_computed_again", and "layers": [{"layers": [...], "ranks":
/// [{"rank", "tokens", "visible_tiles", "keys", "needed": {"forward_sent", ...}, "ring", "heads"}]}]. Throws std::invalid_argument when the sequence
/// cannot be split so, or when exchange heads is asked for and the heads cannot be dealt.
nlohmann::ordered_json plan_sequence(const Config& config, int ranks);

}  // namespace tessera
