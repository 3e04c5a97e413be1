// Memory of the CPU backend: allocation, copies, and how much there is to have.

#include <cstdlib>
#include <cstring>
#include <fstream>
#include <limits>
#include <new>
#include <optional>
#include <sstream>
#include <string>

#include "kernels/bf16.h"
#include "kernels/cpu/check.h"
#include "kernels/cpu/ops.h"
#include "kernels/cpu/parallel.h"
#include "kernels/memory_plan.h"

namespace tessera::cpu {

namespace {

namespace fs = std::filesystem;

constexpr std::int64_t kCopyGrain = 1 << 20;
constexpr std::size_t kUnlimited = std::numeric_limits<std::size_t>::max();

/// The number that a file starts with; nothing where there is no file or no number ("max").
std::optional<std::size_t> read_number(const fs::path& file) {
  std::ifstream in(file);
  std::size_t value = 0;
  if (in >> value) return value;
  return std::nullopt;
}

/// The number after `key` in a file of lines "key number".
std::size_t read_entry(const fs::path& file, const std::string& key) {
  std::ifstream in(file);
  for (std::string line; std::getline(in, line);) {
    std::istringstream words(line);
    std::string name;
    std::size_t value = 0;
    if (words >> name >> value && name == key) return value;
  }
  return 0;
}

struct GroupFiles {
  const char *limit, *usage, *reclaimable;
};

/// What a control group and its parents up to `mount` leave. File cache that the kernel gives up first does not count as used.
std::size_t left_in_group(const fs::path& mount, fs::path group, const GroupFiles& files) {
  std::size_t left = kUnlimited;
  for (;; group = group.parent_path()) {
    const fs::path folder = mount / group.relative_path();
    const auto limit = read_number(folder / files.limit);
    const auto usage = read_number(folder / files.usage);
    if (limit && usage) {
      const std::size_t used = *usage - std::min(*usage, read_entry(folder / "memory.stat", files.reclaimable));
      left = std::min(left, *limit - std::min(*limit, used));
    }
    if (!group.has_relative_path()) return left;
  }
}

}  // namespace

void* allocate(std::size_t bytes) {
  constexpr std::size_t kAlignment = MemoryPlan::kAlignment;
  if (bytes > kUnlimited - kAlignment) throw std::bad_alloc();
  void* p = std::aligned_alloc(kAlignment, std::max(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment));
  if (!p) throw std::bad_alloc();
  return p;
}

void deallocate(void* p) noexcept { std::free(p); }

void copy(const Tensor& to, const Tensor& from) {
  require(to.numel() == from.numel(), "copy", "the tensors must have the same number of elements");
  const std::int64_t count = to.numel();
  if (to.dtype == from.dtype) {
    if (count > 0) std::memmove(to.data, from.data, to.bytes());
  } else if (to.dtype == DType::bf16 && from.dtype == DType::f32) {
    const auto* in = static_cast<const float*>(from.data);
    auto* out = static_cast<std::uint16_t*>(to.data);
    parallel_ranges(count, kCopyGrain, [&](std::int64_t first, std::int64_t last) { std::transform(in + first, in + last, out + first, to_bf16); });
  } else if (to.dtype == DType::f32 && from.dtype == DType::bf16) {
    const auto* in = static_cast<const std::uint16_t*>(from.data);
    auto* out = static_cast<float*>(to.data);
    parallel_ranges(count, kCopyGrain, [&](std::int64_t first, std::int64_t last) { std::transform(in + first, in + last, out + first, from_bf16); });
  } else {
    throw std::logic_error(fmt::format("copy: no conversion from {} to {}", name_of(from.dtype), name_of(to.dtype)));
  }
}

void zero(const Tensor& t) {
  auto* bytes = static_cast<char*>(t.data);
  parallel_ranges(static_cast<std::int64_t>(t.bytes()), kCopyGrain,
                  [&](std::int64_t first, std::int64_t last) { std::memset(bytes + first, 0, static_cast<std::size_t>(last - first)); });
}

std::size_t memory_available(const fs::path& root) {
  std::size_t available = kUnlimited;
  if (const std::size_t kib = read_entry(root / "proc/meminfo", "MemAvailable:")) available = kib * 1024;
  const fs::path groups = root / "sys/fs/cgroup";
  std::ifstream in(root / "proc/self/cgroup");
  for (std::string line; std::getline(in, line);) {  // "0::/path" (v2), "9:memory:/path" (v1)
    const std::size_t first = line.find(':');
    const std::size_t second = first == std::string::npos ? first : line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = fmt::format(",{},", line.substr(first + 1, second - first - 1)), path = line.substr(second + 1);
    if (controllers == ",,") {
      available = std::min(available, left_in_group(groups, path, {"memory.max", "memory.current", "inactive_file"}));
    } else if (controllers.find(",memory,") != std::string::npos) {
      available =
          std::min(available, left_in_group(groups / "memory", path, {"memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"}));
    }
  }
  return available;
}

}  // namespace tessera::cpu
