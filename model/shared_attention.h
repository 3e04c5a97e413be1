#pragma once
// Attention over sequences whose tokens several ranks share (sequence_plan.h). Each rank calls it with the rows of its own tokens; keys and values of
// other ranks' come over a communicator, and their gradients go back.
//
// Heads are taken in turns (stages): while the attention of one turn is computed, what the next one needs is on its way.

#include <cstdint>
#include <memory>
#include <vector>

#include "kernels/comm/communicator.h"
#include "kernels/memory_plan.h"
#include "kernels/ops.h"
#include "model/sequence_plan.h"

namespace tessera {

/// One of the ranks that share sequences.
struct SequencePart {
  int ranks = 1, rank = 0;
  SequenceLayout layout = SequenceLayout::balanced;
  SequenceExchange exchange = SequenceExchange::automatic;
  int stages = 4;  // turns in which the heads are taken, at most: more of them are better hidden and need smaller buffers, fewer are larger messages
};

/// The ranks of a sequence in a communicator, which may have others too: those never notice.
struct SequenceGroup {
  Communicator* comm = nullptr;  // for memory of the model's Ops
  std::vector<int> members;      // rank in `comm` of each rank of the sequence
};

/// Consecutive rows or heads.
struct Stretch {
  std::int64_t first = 0, count = 0;
};

class SharedAttention {
 public:
  /// What is to be computed: of at most so many sequences, H heads of D.
  struct Shape {
    std::int64_t sequences = 1, heads = 1, head_size = 1;
    DeviceKind device = DeviceKind::cpu;
    bool training = true;
    bool document_mask = false;
    bool positions = false;    // thresholds depend on the query's position (AttentionMath::length_beta)
    bool added_edges = false;  // the caller adds to o and z (SelfEdge, Sinks): not with exchange heads, whose z is not of this rank's tokens
  };
  /// Elements that a layer's call needs, whatever the layer.
  struct Sizes {
    std::int64_t z = 0, active_tiles = 0, workspace = 0;
  };

  virtual ~SharedAttention() = default;
  virtual Sizes sizes() const = 0;
  /// The heads in stretches, in which z has them: [B, count, T] from element B first T on. Throws std::logic_error for exchange heads.
  virtual std::vector<Stretch> z_heads() const = 0;
  /// After the plan's allocate(): lists and tables go to the device. Both must live longer. Throws std::logic_error when the group is of another
  /// size.
  virtual void bind(Ops& ops, const SequenceGroup& group) = 0;

  // Collective over the group. T: this rank's tokens.
  /// Before the first layer of a pass; document_start [B, T]: first token of the document, by its index in the whole sequence (document_mask only).
  virtual void begin(const Tensor& document_start) = 0;
  /// The attention of this rank's queries: q, k, v in a packed projection [B, T, 3, H, D], o [B, T, H, D]. `own` is as for a sequence of T tokens,
  /// without tiles, document_start and positions; z and active_tiles are of sizes(), in an order of this object's own; counters count this rank's
  /// queries or heads. o and z are the bits that one rank would have got; with exchange ring, sums in another order.
  virtual void forward(int layer, const AttentionForward& own) = 0;
  /// Gradients, after forward() or one with the same inputs; dq, dk, dv in one packed [B, T, 3, H, D] that is zero before. dscale and dthreshold get
  /// what this rank's edges add. dq is the bits that one rank would have got (ring: a sum over parts); dk and dv are sums over ranks in a fixed
  /// order. All such sums are in fp32, of terms in the compute type, and rounded to it once.
  virtual void backward(int layer, const AttentionBackward& own) = 0;
};

/// Reserves its memory in `plan`, category communication, and accounts for the lists. `layers`: the tile maps over the whole sequence. Throws
/// std::invalid_argument for an exchange that the split or the heads do not allow.
std::unique_ptr<SharedAttention> make_shared_attention(const SequencePart& part, const SequenceSplit& split,
                                                       const std::vector<std::shared_ptr<const TileMap>>& layers, const SharedAttention::Shape& shape,
                                                       MemoryPlan& plan);

}  // namespace tessera
