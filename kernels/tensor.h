#pragma once
// A tensor is a view: an address, an element type and a row-major shape. It owns nothing; memory comes from a MemoryPlan
// (memory_plan.h) or, in tests, from a HostBuffer. Whether the address is host or device memory is known to the Ops
// (ops.h) that allocated it, and to nobody else.

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

namespace tessera {

enum class DType : std::uint8_t { f32, f64, bf16, i32, u32, u64 };

/// Bytes of one element.
constexpr std::size_t size_of(DType t) {
  switch (t) {
    case DType::bf16: return 2;
    case DType::f64:
    case DType::u64: return 8;
    default: return 4;
  }
}

constexpr const char* name_of(DType t) {
  switch (t) {
    case DType::f32: return "f32";
    case DType::f64: return "f64";
    case DType::bf16: return "bf16";
    case DType::i32: return "i32";
    case DType::u32: return "u32";
    case DType::u64: return "u64";
  }
  return "?";
}

/// Up to four extents, outermost first. Extents are 64-bit everywhere.
struct Shape {
  std::array<std::int64_t, 4> extent{1, 1, 1, 1};
  int rank = 0;

  Shape() = default;
  Shape(std::initializer_list<std::int64_t> extents) {
    if (extents.size() > 4) throw std::logic_error("Shape: at most four extents");
    for (auto e : extents) extent[rank++] = e;
  }
  std::int64_t operator[](int i) const { return extent[i]; }
  std::int64_t numel() const {
    std::int64_t n = 1;
    for (int i = 0; i < rank; ++i) n *= extent[i];
    return n;
  }
  bool operator==(const Shape&) const = default;
  std::string str() const {
    std::string s = "[";
    for (int i = 0; i < rank; ++i) s.append(i ? "," : "").append(std::to_string(extent[i]));
    return s + "]";
  }
};

template <class T>
struct dtype_of;
template <>
struct dtype_of<float> {
  static constexpr DType value = DType::f32;
};
template <>
struct dtype_of<double> {
  static constexpr DType value = DType::f64;
};
template <>
struct dtype_of<std::int32_t> {
  static constexpr DType value = DType::i32;
};
template <>
struct dtype_of<std::uint32_t> {
  static constexpr DType value = DType::u32;
};
template <>
struct dtype_of<std::uint64_t> {
  static constexpr DType value = DType::u64;
};

struct Tensor {
  void* data = nullptr;
  DType dtype = DType::f32;
  Shape shape;

  Tensor() = default;
  Tensor(void* d, DType t, Shape s) : data(d), dtype(t), shape(s) {}

  explicit operator bool() const { return data != nullptr; }
  std::int64_t numel() const { return shape.numel(); }
  std::size_t bytes() const { return static_cast<std::size_t>(numel()) * size_of(dtype); }

  /// Typed address; throws std::logic_error when T is not the element type.
  template <class T>
  T* as() const {
    if (dtype_of<T>::value != dtype) throw std::logic_error(std::string("tensor of ") + name_of(dtype) + " read as " + name_of(dtype_of<T>::value));
    return static_cast<T*>(data);
  }

  /// The same memory under another shape of at most as many elements.
  Tensor view(Shape s) const {
    if (s.numel() > numel()) throw std::logic_error("view " + s.str() + " of a tensor " + shape.str());
    return {data, dtype, s};
  }
  /// `count` elements from element `first` on, as a vector.
  Tensor slice(std::int64_t first, std::int64_t count) const {
    if (first < 0 || count < 0 || first + count > numel()) throw std::logic_error("slice outside a tensor " + shape.str());
    return {static_cast<char*>(data) + static_cast<std::size_t>(first) * size_of(dtype), dtype, {count}};
  }
};

}  // namespace tessera
