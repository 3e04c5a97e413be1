#include "kernels/memory_plan.h"

#include <fmt/format.h>

#include <limits>
#include <new>
#include <stdexcept>

#include "kernels/ops.h"

namespace tessera {

namespace {

constexpr double kMiB = 1024.0 * 1024.0;

/// Bytes of a block rounded up to the alignment; throws when they do not fit in 63 bits.
std::size_t padded_bytes(const std::string& name, DType dtype, const Shape& shape) {
  std::int64_t bytes = static_cast<std::int64_t>(size_of(dtype));
  bool fits = true;
  for (int i = 0; i < shape.rank; ++i) {
    if (shape[i] < 0) throw std::logic_error(fmt::format("memory plan: '{}' has a negative extent: {}", name, shape.str()));
    fits = fits && !__builtin_mul_overflow(bytes, shape[i], &bytes);
  }
  constexpr auto alignment = static_cast<std::int64_t>(MemoryPlan::kAlignment);
  if (!fits || bytes > std::numeric_limits<std::int64_t>::max() - alignment) {
    throw std::invalid_argument(
        fmt::format("'{}' of shape {} has more bytes than 64 bits can count; use a smaller model or batch", name, shape.str()));
  }
  return static_cast<std::size_t>((bytes + alignment - 1) / alignment * alignment);
}

}  // namespace

const char* name_of(MemoryCategory c) {
  switch (c) {
    case MemoryCategory::parameters: return "parameters";
    case MemoryCategory::gradients: return "gradients";
    case MemoryCategory::optimizer: return "optimizer";
    case MemoryCategory::activations: return "activations";
    case MemoryCategory::workspace: return "workspace";
    case MemoryCategory::communication: return "communication";
  }
  return "?";
}

MemoryPlan::~MemoryPlan() {
  if (!ops_) return;
  for (void* arena : arena_) {
    if (arena) ops_->deallocate(arena);
  }
}

MemoryPlan::Slot MemoryPlan::reserve(MemoryCategory category, std::string name, DType dtype, Shape shape) {
  if (allocated()) throw std::logic_error(fmt::format("memory plan: '{}' is reserved after allocate()", name));
  const std::size_t bytes = padded_bytes(name, dtype, shape);
  std::size_t& arena = arena_bytes_[static_cast<int>(category)];
  check_countable(name, bytes);
  blocks_.push_back({std::move(name), category, dtype, shape, arena});
  arena += bytes;
  return static_cast<Slot>(blocks_.size()) - 1;
}

void MemoryPlan::account(MemoryCategory category, std::string name, std::size_t bytes) {
  if (allocated()) throw std::logic_error(fmt::format("memory plan: '{}' is accounted after allocate()", name));
  check_countable(name, bytes);
  accounted_bytes_[static_cast<int>(category)] += bytes;
}

void MemoryPlan::check_countable(const std::string& name, std::size_t bytes) const {
  constexpr auto kMost = static_cast<std::size_t>(std::numeric_limits<std::int64_t>::max());
  if (bytes > kMost || total_bytes() > kMost - bytes)
    throw std::invalid_argument(fmt::format("with '{}' the plan has more bytes than 64 bits can count; use a smaller model or batch", name));
}

void MemoryPlan::allocate(Ops& ops) { allocate(ops, ops.memory_available()); }

void MemoryPlan::allocate(Ops& ops, std::size_t available) {
  if (allocated()) throw std::logic_error("memory plan: allocate() is called twice");
  const auto fail = [&] {
    std::string parts;
    for (int c = 0; c < kMemoryCategories; ++c) {
      parts += fmt::format("\n  {:<14}{:>18} bytes {:>14.1f} MiB", name_of(static_cast<MemoryCategory>(c)), bytes(static_cast<MemoryCategory>(c)),
                           bytes(static_cast<MemoryCategory>(c)) / kMiB);
    }
    throw std::runtime_error(
        fmt::format("not enough memory on {}: {} bytes ({:.1f} MiB) are needed, {} bytes ({:.1f} MiB) are available:{}\n"
                    "use a smaller micro-batch, context or model, or more ranks",
                    ops.device_name(), total_bytes(), total_bytes() / kMiB, available, available / kMiB, parts));
  };
  if (total_bytes() > available) fail();

  try {
    for (int c = 0; c < kMemoryCategories; ++c) {
      if (arena_bytes_[c] == 0) continue;
      arena_[c] = ops.allocate(arena_bytes_[c]);
      // The whole arena as 4-byte elements (it is a multiple of kAlignment). Zeroing also touches every page, so that memory
      // which the system promised and does not have is missed here, not in the middle of a step.
      ops.zero(Tensor(arena_[c], DType::u32, {static_cast<std::int64_t>(arena_bytes_[c] / sizeof(std::uint32_t))}));
    }
  } catch (const std::bad_alloc&) {
    for (void*& arena : arena_) {
      if (arena) ops.deallocate(arena);
      arena = nullptr;
    }
    fail();
  }
  ops_ = &ops;
}

Tensor MemoryPlan::operator[](Slot slot) const {
  if (slot < 0 || slot >= static_cast<Slot>(blocks_.size())) throw std::logic_error(fmt::format("memory plan: no slot {}", slot));
  const Block& block = blocks_[slot];
  if (!allocated()) throw std::logic_error(fmt::format("memory plan: '{}' is used before allocate()", block.name));
  auto* arena = static_cast<char*>(arena_[static_cast<int>(block.category)]);
  return {block.shape.numel() == 0 ? nullptr : arena + block.offset, block.dtype, block.shape};
}

std::size_t MemoryPlan::total_bytes() const {
  std::size_t total = 0;
  for (int c = 0; c < kMemoryCategories; ++c) total += bytes(static_cast<MemoryCategory>(c));
  return total;
}

}  // namespace tessera
