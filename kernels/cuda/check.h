#pragma once
// Checks that the CUDA operations share: of the arguments (std::logic_error: a bug of the caller) and of what CUDA reports (std::runtime_error).

#include <cuda_runtime_api.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "kernels/attention.h"
#include "kernels/tensor.h"

namespace tessera::cuda {

/// Throws std::runtime_error "CUDA, <what>: <CUDA's text>" unless `e` is success; the error is not left behind for the next call.
inline void check(cudaError_t e, const char* what) {
  if (e == cudaSuccess) return;
  cudaGetLastError();
  std::string message = std::string("CUDA, ") + what + ": " + cudaGetErrorString(e);
  if (e == cudaErrorNoKernelImageForDevice) message += "; build with -DTESSERA_CUDA_ARCHITECTURES=<this GPU's, e.g. 80>";
  throw std::runtime_error(message);
}

/// After a kernel launch.
inline void check_launch(const char* operation) { check(cudaGetLastError(), operation); }

/// Throws std::logic_error "<operation>: <what>" unless `ok`.
inline void require(bool ok, const char* operation, const char* what) {
  if (!ok) throw std::logic_error(std::string(operation) + ": " + what);
}

/// The address of a tensor that must hold `count` elements of `type` on a 16-byte boundary (`alignment` where less is enough).
inline void* elements(const char* operation, const char* name, const Tensor& t, DType type, std::int64_t count, std::size_t alignment = 16) {
  const bool aligned = reinterpret_cast<std::uintptr_t>(t.data) % alignment == 0;
  if (t.dtype != type || t.numel() != count || (!t.data && count > 0) || !aligned) {
    throw std::logic_error(std::string(operation) + ": " + name + " must be " + std::to_string(count) + " elements of " + name_of(type) +
                           ", and is " + t.shape.str() + " of " + name_of(t.dtype) +
                           (!t.data   ? " without memory"
                            : aligned ? ""
                                      : ", not on a boundary of " + std::to_string(alignment) + " bytes"));
  }
  return t.data;
}

inline void* bf16_elements(const char* operation, const char* name, const Tensor& t, std::int64_t count) {
  return elements(operation, name, t, DType::bf16, count);
}

/// A view as kernels read it: bf16, its rows on 16-byte boundaries.
inline void check_heads(const char* operation, const char* name, const HeadsView& v) {
  const bool aligned = reinterpret_cast<std::uintptr_t>(v.data) % 16 == 0 && v.batch % 8 == 0 && v.head % 8 == 0 && v.token % 8 == 0;
  if (v.data && v.dtype == DType::bf16 && aligned) return;
  throw std::logic_error(std::string(operation) + ": " + name +
                         (v.data && v.dtype == DType::bf16 ? ": address and strides must be multiples of 16 bytes" : " must be bf16 device memory"));
}

/// Of float, double and integers.
template <class T>
T* elements(const char* operation, const char* name, const Tensor& t, std::int64_t count, std::size_t alignment = 16) {
  return static_cast<T*>(elements(operation, name, t, dtype_of<T>::value, count, alignment));
}

/// As elements(), or nullptr for a tensor that was not given.
template <class T>
T* optional_elements(const char* operation, const char* name, const Tensor& t, std::int64_t count, std::size_t alignment = 16) {
  return t ? elements<T>(operation, name, t, count, alignment) : nullptr;
}

}  // namespace tessera::cuda
