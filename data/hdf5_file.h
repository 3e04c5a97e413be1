#pragma once
// HDF5 files through the C API, for everything Tessera keeps on disk. What this adds to the library:
//   - every call runs under one lock, so threads may use different files at once (the library is not thread-safe everywhere);
//   - errors are one exception that names file and dataset, and nothing is printed;
//   - a write that fails (disk full) throws at once, and closing the file afterwards is safe: the library itself leaves such files half-open and
//     may crash at exit. Our file driver (hdf5_driver.cpp) remembers the failure and lets the library close in peace;
//   - no file locking, which network file systems often lack;
//   - the 1.10 file format, in which all metadata carries checksums; datasets are chunked with Fletcher-32.

#include <concepts>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace tessera {

enum class Hdf5Type { u8, u16, u32, i32, i64, u64, f32, f64 };
std::string to_string(Hdf5Type type);  // "uint16", "float32", ...
std::size_t size_of(Hdf5Type type);    // bytes

template <typename T>
constexpr Hdf5Type hdf5_type();
template <>
constexpr Hdf5Type hdf5_type<std::uint8_t>() {
  return Hdf5Type::u8;
}
template <>
constexpr Hdf5Type hdf5_type<std::uint16_t>() {
  return Hdf5Type::u16;
}
template <>
constexpr Hdf5Type hdf5_type<std::uint32_t>() {
  return Hdf5Type::u32;
}
template <>
constexpr Hdf5Type hdf5_type<std::int32_t>() {
  return Hdf5Type::i32;
}
template <>
constexpr Hdf5Type hdf5_type<std::int64_t>() {
  return Hdf5Type::i64;
}
template <>
constexpr Hdf5Type hdf5_type<std::uint64_t>() {
  return Hdf5Type::u64;
}
template <>
constexpr Hdf5Type hdf5_type<float>() {
  return Hdf5Type::f32;
}
template <>
constexpr Hdf5Type hdf5_type<double>() {
  return Hdf5Type::f64;
}

using Hdf5Shape = std::vector<std::uint64_t>;  // its own name: kernels/tensor.h has a Shape, and the trainer includes both

struct Hdf5Info {
  Hdf5Type type = Hdf5Type::f32;  // in memory; the file may hold the other byte order
  Hdf5Shape shape;
  Hdf5Shape chunk;  // empty: not chunked
  bool fletcher32 = false;
  std::uint64_t stored_bytes = 0;
  std::uint64_t elements() const;
};

/// Where the elements of a one-dimensional dataset lie in the file, for reading them without the library: piece i holds elements
/// [i * piece, (i + 1) * piece), as they are in memory, from byte offsets[i] on; with `fletcher32`, fletcher32() of the whole piece follows, 4 bytes.
struct Hdf5Placement {
  Hdf5Type type = Hdf5Type::u16;
  std::uint64_t elements = 0, piece = 0;
  bool fletcher32 = false;
  std::vector<std::uint64_t> offsets;
};

/// One open file. Objects are named by path ("tokens", "optimizer/m"); groups on the way are made as needed. Movable, not copyable.
/// Not for two threads at once; different files may be used by different threads.
/// All functions throw std::runtime_error "FILE: dataset NAME: what failed: why" unless said otherwise.
class Hdf5File {
 public:
  /// A new file; one that stands there is truncated (use AtomicFile in files.h for whole-or-absent files).
  static Hdf5File create(const std::string& path);
  /// Read-only. Throws std::invalid_argument when there is no such file or it is not HDF5, std::runtime_error when it is damaged or truncated.
  static Hdf5File open(const std::string& path);

  Hdf5File(Hdf5File&&) noexcept;
  Hdf5File& operator=(Hdf5File&&) noexcept;
  ~Hdf5File();  // closes; errors are lost, so call close() on files that were written

  const std::string& path() const;
  /// Flushes, fsyncs and closes. Throws std::runtime_error when any write has failed. Calling it again does nothing.
  void close();

  // -- Datasets -------------------------------------------------------------------------------------------------------
  bool contains(const std::string& name) const;
  std::vector<std::string> datasets() const;  // paths of all datasets, sorted
  Hdf5Info info(const std::string& name) const;
  /// Nothing when the bytes in the file are not the elements (compressed, other byte order, never written) or the dataset has other dimensions.
  std::optional<Hdf5Placement> placement(const std::string& name) const;

  /// Chunk: empty lets the wrapper choose about 1 MiB; the shape {} makes a scalar. extendible: append() may lengthen dimension 0.
  void create_dataset(const std::string& name, Hdf5Type type, const Hdf5Shape& shape, const Hdf5Shape& chunk = {}, bool extendible = false);

  /// Creates the dataset and writes all of it. data.size() is the product of shape, else std::invalid_argument.
  template <typename T>
  void write(const std::string& name, const Hdf5Shape& shape, std::span<const T> data) {
    write_new(name, hdf5_type<T>(), shape, data.data(), data.size());
  }
  /// Writes the block [offset, offset + count) of an existing dataset; values are converted when the types differ.
  template <typename T>
  void write_part(const std::string& name, const Hdf5Shape& offset, const Hdf5Shape& count, std::span<const T> data) {
    write_block(name, hdf5_type<T>(), offset, count, data.data(), data.size());
  }
  /// Adds data at the end of a one-dimensional extendible dataset.
  template <typename T>
  void append(const std::string& name, std::span<const T> data) {
    append_values(name, hdf5_type<T>(), data.data(), data.size());
  }

  /// Reads a whole dataset. Integers convert to integers and floats to floats (out-of-range values saturate); anything else is an error.
  template <typename T>
  std::vector<T> read(const std::string& name) const {
    const Hdf5Info what = info(name);
    std::vector<T> out(what.elements());
    read_block(name, hdf5_type<T>(), Hdf5Shape(what.shape.size(), 0), what.shape, out.data(), out.size());
    return out;
  }
  /// As read(), but the dataset must have this shape.
  template <typename T>
  void read(const std::string& name, const Hdf5Shape& shape, std::span<T> out) const {
    check_shape(name, shape);
    read_block(name, hdf5_type<T>(), Hdf5Shape(shape.size(), 0), shape, out.data(), out.size());
  }
  /// Reads the block [offset, offset + count).
  template <typename T>
  void read_part(const std::string& name, const Hdf5Shape& offset, const Hdf5Shape& count, std::span<T> out) const {
    read_block(name, hdf5_type<T>(), offset, count, out.data(), out.size());
  }

  // -- Attributes: of the file ("") or of a dataset or group ---------------------------------------------------------------
  void set_attribute(const std::string& name, const std::string& value, const std::string& object = "");
  void set_attribute(const std::string& name, const char* value, const std::string& object = "");
  template <std::integral T>
  void set_attribute(const std::string& name, T value, const std::string& object = "") {
    set_integer_attribute(name, static_cast<std::int64_t>(value), object);
  }
  void set_attribute(const std::string& name, double value, const std::string& object = "");
  bool has_attribute(const std::string& name, const std::string& object = "") const;
  std::vector<std::string> attributes(const std::string& object = "") const;  // names, sorted
  std::string string_attribute(const std::string& name, const std::string& object = "") const;
  std::int64_t integer_attribute(const std::string& name, const std::string& object = "") const;
  double real_attribute(const std::string& name, const std::string& object = "") const;

 private:
  struct Impl;
  explicit Hdf5File(std::unique_ptr<Impl> impl);
  void write_new(const std::string& name, Hdf5Type type, const Hdf5Shape& shape, const void* data, std::size_t elements);
  void write_block(const std::string& name, Hdf5Type type, const Hdf5Shape& offset, const Hdf5Shape& count, const void* data, std::size_t elements);
  void append_values(const std::string& name, Hdf5Type type, const void* data, std::size_t elements);
  void read_block(const std::string& name, Hdf5Type type, const Hdf5Shape& offset, const Hdf5Shape& count, void* out, std::size_t elements) const;
  void check_shape(const std::string& name, const Hdf5Shape& shape) const;
  void set_integer_attribute(const std::string& name, std::int64_t value, const std::string& object);
  std::unique_ptr<Impl> impl_;
};

}  // namespace tessera
