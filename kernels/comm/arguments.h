#pragma once
// Checks of collective calls that every implementation makes: wrong shapes or types are bugs of the caller (std::logic_error).

#include <fmt/format.h>

#include <algorithm>
#include <cstdint>
#include <span>
#include <stdexcept>

#include "kernels/comm/communicator.h"
#include "kernels/tensor.h"

namespace tessera::comm {

inline void check_all_reduce(const Tensor& x) {
  if (x.dtype != DType::f32 && x.dtype != DType::f64 && x.dtype != DType::u64) {
    throw std::logic_error(fmt::format("all_reduce_sum: the tensor must be f32, f64 or u64, and is {}", name_of(x.dtype)));
  }
}

inline void check_reduce_scatter(const Tensor& in, const Tensor& out, int size) {
  if (in.dtype != DType::f32 || out.dtype != DType::f32 || in.numel() != size * out.numel()) {
    throw std::logic_error(fmt::format("reduce_scatter_sum: {} {} must be f32 and {} times {} {}", in.shape.str(), name_of(in.dtype), size,
                                       out.shape.str(), name_of(out.dtype)));
  }
}

inline void check_all_gather(const Tensor& in, const Tensor& out, int size) {
  if (in.dtype != out.dtype || out.numel() != size * in.numel()) {
    throw std::logic_error(
        fmt::format("all_gather: {} {} must be {} times {} {}", out.shape.str(), name_of(out.dtype), size, in.shape.str(), name_of(in.dtype)));
  }
}

/// For libraries that read and write as they please: `block` is block `rank` of `whole`, or they have no byte in common.
inline void check_overlap(const char* collective, const Tensor& whole, const Tensor& block, int rank) {
  if (block.bytes() == 0) return;
  const auto first = reinterpret_cast<std::uintptr_t>(whole.data), part = reinterpret_cast<std::uintptr_t>(block.data);
  const bool in_place = part == first + static_cast<std::uintptr_t>(rank) * block.bytes();
  if (!in_place && part < first + whole.bytes() && first < part + block.bytes())
    throw std::logic_error(
        fmt::format("{}: the block must be block {} of {} {} or lie outside it", collective, rank, whole.shape.str(), name_of(whole.dtype)));
}

/// Returns the bytes for other ranks.
inline std::uint64_t check_exchange(const Tensor& in, std::span<const Communicator::Part> send, const Tensor& out,
                                    std::span<const Communicator::Part> receive, int rank, int size) {
  std::int64_t sent = 0, to_self = 0, from_self = 0;
  const auto inside = [&](const Tensor& t, std::span<const Communicator::Part> parts) {
    return std::ranges::all_of(parts, [&](const Communicator::Part& p) {
      return p.rank >= 0 && p.rank < size && p.first >= 0 && p.count >= 0 && p.first + p.count <= t.numel() &&
             std::ranges::count(parts, p.rank, &Communicator::Part::rank) == 1;
    });
  };
  for (const auto& p : send) (p.rank == rank ? to_self : sent) += p.count;
  for (const auto& p : receive) from_self += p.rank == rank ? p.count : 0;
  if (in.dtype != out.dtype || !inside(in, send) || !inside(out, receive) || to_self != from_self)
    throw std::logic_error(
        fmt::format("exchange: {} {} and {} {} must be of one type, and hold the parts for and from some of the {} ranks, one each", in.shape.str(),
                    name_of(in.dtype), out.shape.str(), name_of(out.dtype), size));
  const auto first = reinterpret_cast<std::uintptr_t>(in.data), second = reinterpret_cast<std::uintptr_t>(out.data);
  if (in.bytes() > 0 && out.bytes() > 0 && first < second + out.bytes() && second < first + in.bytes())
    throw std::logic_error("exchange: what is sent and what is received must not overlap");
  return static_cast<std::uint64_t>(sent) * size_of(in.dtype);
}

/// What this rank sends to itself.
inline void copy_own_part(const Tensor& in, std::span<const Communicator::Part> send, const Tensor& out, std::span<const Communicator::Part> receive,
                          int rank, auto&& copy) {
  for (const auto& to : send)
    for (const auto& from : receive)
      if (to.rank == rank && from.rank == rank && to.count > 0) copy(in.slice(to.first, to.count), out.slice(from.first, from.count));
}

inline void check_root(int root, int size) {
  if (root < 0 || root >= size) throw std::logic_error(fmt::format("broadcast: root {} is none of the {} ranks", root, size));
}

inline void check_color(int color) {
  if (color < 0) throw std::logic_error(fmt::format("split: the color must be 0 or more, and is {}", color));
}

}  // namespace tessera::comm
