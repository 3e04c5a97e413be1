#pragma once
// Checks of collective calls that every implementation makes: wrong shapes or types are bugs of the caller (std::logic_error).

#include <fmt/format.h>

#include <cstdint>
#include <stdexcept>

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

inline void check_root(int root, int size) {
  if (root < 0 || root >= size) throw std::logic_error(fmt::format("broadcast: root {} is none of the {} ranks", root, size));
}

inline void check_color(int color) {
  if (color < 0) throw std::logic_error(fmt::format("split: the color must be 0 or more, and is {}", color));
}

}  // namespace tessera::comm
