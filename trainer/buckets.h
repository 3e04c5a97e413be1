#pragma once
// The flat buffers cut into buckets: what is reduced over the ranks, and gathered from them, as one. Their borders follow the backward pass, so that
// the gradients of the last blocks are on their way while those of the first are computed.

#include <cstdint>
#include <vector>

#include "model/parameters.h"

namespace tessera {

struct Bucket {
  std::int64_t first = 0, count = 0;  // elements of the flat buffers; multiples of the unit
  /// The lowest block whose matrices it holds: it is complete when the backward pass has left that block. -1: it holds something outside the blocks,
  /// and is complete at the end.
  int block = -1;
};

struct Buckets {
  /// Buckets of at least `elements`, in the order of the flat buffer, which they cover with its padding to a multiple of `unit`:
  ///
  ///   embeddings, first blocks | blocks | ... | last blocks | what does not decay, padding
  ///
  /// A border lies on the first multiple of the unit in a block; what the block has below it belongs to the bucket before. The first bucket and the
  /// last may be smaller.
  Buckets(const ParameterLayout& layout, std::int64_t unit, std::int64_t elements);

  /// Whether bucket i holds parameters that are used when Gpt::Hooks::before_forward(block) is called.
  bool touches(std::size_t i, int block) const;

  std::vector<Bucket> list;
  struct Range {
    std::int64_t first, end;
  };
  std::vector<Range> blocks;  // the matrices of each block in the flat buffer
};

}  // namespace tessera
