#pragma once
// All memory of a run is reserved here, by name and category, before the first byte is allocated. `tessera plan` prints
// the same plan that a run allocates, so that the prediction cannot drift from the fact.

#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "kernels/tensor.h"

namespace tessera {

class Ops;

enum class MemoryCategory { parameters, gradients, optimizer, activations, workspace, communication };
inline constexpr int kMemoryCategories = 6;
const char* name_of(MemoryCategory c);

class MemoryPlan {
 public:
  /// A reserved block; resolves to a Tensor once the plan is allocated.
  using Slot = int;
  static constexpr std::size_t kAlignment = 256;  // bytes; what TMA, cuBLASLt and AVX-512 all accept

  struct Block {
    std::string name;
    MemoryCategory category;
    DType dtype;
    Shape shape;
    std::size_t offset;  // bytes from the start of the category's arena
  };

  MemoryPlan() = default;
  ~MemoryPlan();
  MemoryPlan(const MemoryPlan&) = delete;
  MemoryPlan& operator=(const MemoryPlan&) = delete;

  /// Reserves memory for a tensor (none for one without elements, whose data is null). Throws std::logic_error after allocate(), and
  /// std::invalid_argument when the bytes cannot be counted in 64 bits.
  Slot reserve(MemoryCategory category, std::string name, DType dtype, Shape shape);

  /// Counts bytes that their user allocates itself (tile lists, a library's workspace), so that totals and the check of what is available
  /// have them. Throws as reserve() does.
  void account(MemoryCategory category, std::string name, std::size_t bytes);

  /// Allocates one arena a category from `ops`, zero-filled; the arenas live as long as the plan, and `ops` must live longer.
  /// Throws std::runtime_error that lists the bytes of every category when they are more than `available`, or memory does not suffice.
  void allocate(Ops& ops, std::size_t available);
  /// The same with all that `ops` has.
  void allocate(Ops& ops);
  bool allocated() const { return ops_ != nullptr; }

  /// The tensor behind a slot. Throws std::logic_error before allocate().
  Tensor operator[](Slot slot) const;

  /// Reserved and accounted.
  std::size_t bytes(MemoryCategory category) const { return arena_bytes_[static_cast<int>(category)] + accounted_bytes_[static_cast<int>(category)]; }
  std::size_t total_bytes() const;
  const std::vector<Block>& blocks() const { return blocks_; }

 private:
  void check_countable(const std::string& name, std::size_t bytes) const;

  std::vector<Block> blocks_;
  std::size_t arena_bytes_[kMemoryCategories] = {}, accounted_bytes_[kMemoryCategories] = {};
  void* arena_[kMemoryCategories] = {};
  Ops* ops_ = nullptr;
};

}  // namespace tessera
