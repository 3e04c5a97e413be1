#pragma once
// Checks of the arguments of an operation: a wrong shape or element type is a bug of the caller and throws std::logic_error.

#include <fmt/format.h>

#include <stdexcept>

#include "kernels/tensor.h"

namespace tessera::cpu {

/// Throws std::logic_error "<operation>: <what>" unless `ok`.
inline void require(bool ok, const char* operation, const char* what) {
  if (!ok) throw std::logic_error(fmt::format("{}: {}", operation, what));
}

/// The address of a tensor that must hold `count` elements of T.
template <class T>
T* elements(const char* operation, const char* name, const Tensor& t, std::int64_t count) {
  if (t.dtype != dtype_of<T>::value || t.numel() != count || (!t.data && count > 0)) {
    throw std::logic_error(fmt::format("{}: {} must be {} elements of {}, and is {} of {}{}", operation, name, count, name_of(dtype_of<T>::value),
                                       t.shape.str(), name_of(t.dtype), t.data ? "" : " without memory"));
  }
  return static_cast<T*>(t.data);
}

/// As elements(), or nullptr for a tensor that was not given.
template <class T>
T* optional_elements(const char* operation, const char* name, const Tensor& t, std::int64_t count) {
  return t ? elements<T>(operation, name, t, count) : nullptr;
}

}  // namespace tessera::cpu
