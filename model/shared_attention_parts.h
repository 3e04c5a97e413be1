#pragma once
// What the exchanges have in common. Internal to the model.

#include <algorithm>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "model/shared_attention.h"

namespace tessera {

/// A table of Ops::move_rows, made on the host and uploaded once.
class PieceTable {
 public:
  void add(std::int64_t left, std::int64_t right, std::int64_t rows) {
    for (const std::int64_t n : {left, right, rows}) host_.push_back(static_cast<std::uint64_t>(n));
  }
  std::int64_t count() const { return std::ssize(host_) / 3; }
  void reserve(MemoryPlan& plan, const std::string& name) { slot_ = plan.reserve(MemoryCategory::communication, name, DType::u64, {count(), 3}); }
  void upload(Ops& ops, const MemoryPlan& plan) const {
    if (count() > 0) ops.upload(plan[slot_], host_.data());
  }
  Tensor operator()(const MemoryPlan& plan, Stretch s) const { return plan[slot_].slice(3 * s.first, 3 * s.count).view({s.count, 3}); }

 private:
  std::vector<std::uint64_t> host_;
  MemoryPlan::Slot slot_ = -1;
};

/// The heads in turns of nearly equal size.
inline std::vector<Stretch> head_stages(std::int64_t heads, int stages) {
  const std::int64_t turns = std::clamp<std::int64_t>(stages, 1, heads), size = (heads + turns - 1) / turns;
  std::vector<Stretch> result;
  for (std::int64_t first = 0; first < heads; first += size) result.push_back({first, std::min(size, heads - first)});
  return result;
}

/// Lists of some of the heads of a map, each made, accounted for and uploaded once.
class HeadLists {
 public:
  std::shared_ptr<const TileMap> of(const std::shared_ptr<const TileMap>& map, Stretch heads);
  void account(DeviceKind device, MemoryPlan& plan) const;
  void upload(Ops& ops);
  const DeviceTiles* on_device(const TileMap* lists) const { return device_.at(lists).get(); }

 private:
  std::map<std::pair<std::shared_ptr<const TileMap>, std::vector<std::int32_t>>, std::shared_ptr<const TileMap>> made_;
  std::map<const TileMap*, std::unique_ptr<DeviceTiles>> device_;
};

inline HeadsView from_head(HeadsView v, std::int64_t head) {
  v.data = static_cast<char*>(v.data) + head * v.head * static_cast<std::int64_t>(size_of(v.dtype));
  return v;
}
/// Of [H, ...].
inline Tensor heads_slice(const Tensor& per_head, Stretch heads) {
  if (!per_head) return per_head;
  Shape shape = per_head.shape;
  const std::int64_t each = shape.numel() / shape[0];
  shape.extent[0] = heads.count;
  return per_head.slice(heads.first * each, heads.count * each).view(shape);
}
inline Tensor counters_slice(const Tensor& counters, Stretch heads) {
  if (!counters) return counters;
  return counters.slice(heads.first * kAttentionCounters, heads.count * kAttentionCounters).view({heads.count, kAttentionCounters});
}

/// Rows of D of a head-major tensor, starting at multiples of D: of a packed projection, or of a compact [B, H, rows, D].
inline RowsView rows_of(const HeadsView& v, std::int64_t size) { return {v.data, v.dtype, size, v.batch, v.token}; }

/// Element `offset` of a buffer on.
inline void* element(const Tensor& t, std::int64_t offset) {
  return static_cast<char*>(t.data) + offset * static_cast<std::int64_t>(size_of(t.dtype));
}

/// Rows one after another, each with `parts` parts (k and v) of all sequences: [row, B, parts, D]. What one rank gets of a layer lies together.
inline RowsView packed_rows(const Tensor& buffer, std::int64_t part, std::int64_t parts, std::int64_t sequences, std::int64_t size) {
  return {element(buffer, part * size), buffer.dtype, sequences * parts * size, parts * size, sequences * parts * size};
}

/// Parts for, or from, the members of a group: rows[r] rows of `width` elements, one after another.
inline std::vector<Communicator::Part> parts_of(const SequenceGroup& group, const std::vector<std::int64_t>& rows, std::int64_t width) {
  std::vector<Communicator::Part> parts;
  std::int64_t first = 0;
  for (std::size_t r = 0; r < rows.size(); ++r) {
    if (rows[r] > 0) parts.push_back({group.members[r], first * width, rows[r] * width});
    first += rows[r];
  }
  return parts;
}

/// Throws std::logic_error unless the group is that of the part.
inline void check_group(const SequencePart& part, const SequenceGroup& group) {
  if (!group.comm || std::ssize(group.members) != part.ranks || group.members[static_cast<std::size_t>(part.rank)] != group.comm->rank())
    throw std::logic_error("shared attention: rank " + std::to_string(part.rank) + " of " + std::to_string(part.ranks) + " and a group of " +
                           std::to_string(group.members.size()));
}

/// Throws std::logic_error unless the exchange is bound and the call is of the planned heads and tokens, k and v parts of a packed projection.
inline void check_call(bool bound, const AttentionForward& own, const SharedAttention::Shape& shape, std::int64_t tokens) {
  const std::int64_t D = shape.head_size;
  const bool packed = own.k.token == 3 * shape.heads * D && own.k.head == D && own.v.token == own.k.token && own.v.head == D;
  if (!bound || own.shape.heads != shape.heads || own.shape.tokens != tokens || own.shape.batch > shape.sequences || !packed)
    throw std::logic_error("shared attention: not bound, or a call of another shape than planned");
}

std::unique_ptr<SharedAttention> make_heads_attention(const SequencePart& part, const SequenceSplit& split,
                                                      const std::vector<std::shared_ptr<const TileMap>>& layers, const SharedAttention::Shape& shape,
                                                      MemoryPlan& plan);
std::unique_ptr<SharedAttention> make_needed_attention(const SequencePart& part, const SequenceSplit& split,
                                                       const std::vector<std::shared_ptr<const TileMap>>& layers, const SharedAttention::Shape& shape,
                                                       MemoryPlan& plan);

std::unique_ptr<SharedAttention> make_ring_attention(const SequencePart& part, const SequenceSplit& split,
                                                     const std::vector<std::shared_ptr<const TileMap>>& layers, const SharedAttention::Shape& shape,
                                                     MemoryPlan& plan);

}  // namespace tessera
