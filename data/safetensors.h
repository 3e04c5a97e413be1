#pragma once
// Tensors in safetensors files (https://github.com/huggingface/safetensors): eight bytes with the length of a header (u64, little-endian), the header
// (JSON: name -> dtype, shape, data_offsets; __metadata__: texts), then the tensors' bytes without gaps. A model in several such files has an
// index, model.safetensors.index.json, whose weight_map names the file of each tensor.
//
// What a header says is checked against the format and the size of the file before anything of that size is allocated. Every error of a file is a
// std::invalid_argument that names the file and the tensor.

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace tessera {

struct SafetensorsEntry {
  std::string name;
  std::string dtype;                 // as in the file: "F32", "BF16", "BOOL", ...
  std::vector<std::uint64_t> shape;  // outermost first; empty: one element
  std::uint64_t first = 0;           // byte of the file at which it begins
  std::uint64_t bytes = 0;

  std::uint64_t elements() const;
  std::string shape_text() const;  // "[50257, 768]"
};

class SafetensorsFile {
 public:
  /// Reads and checks the header. The file stays open.
  explicit SafetensorsFile(const std::string& path);
  ~SafetensorsFile();
  SafetensorsFile(const SafetensorsFile&) = delete;
  SafetensorsFile& operator=(const SafetensorsFile&) = delete;

  const std::string& path() const { return path_; }
  const std::vector<SafetensorsEntry>& entries() const { return entries_; }         // in the order of their bytes
  const std::map<std::string, std::string>& metadata() const { return metadata_; }  // __metadata__
  const SafetensorsEntry* find(const std::string& name) const;                      // null where there is none
  /// The elements as floats, in pieces of a megabyte: F32 as they are, BF16 and F16 exactly, F64 to nearest. `out` has entry.elements(). Throws
  /// std::invalid_argument for another dtype, std::runtime_error when reading fails.
  void read(const SafetensorsEntry& entry, std::span<float> out) const;
  static bool is_float(const std::string& dtype);  // what read() takes

 private:
  std::string path_;
  int descriptor_ = -1;
  std::vector<SafetensorsEntry> entries_;
  std::map<std::string, std::string> metadata_;
  std::map<std::string, std::size_t> index_of_;
};

/// The tensors of a folder: model.safetensors, or those of model.safetensors.index.json where that is there alone.
class SafetensorsFolder {
 public:
  /// Opens and checks every file. Throws std::invalid_argument when neither is there, when a file of the index is missing, or when index and
  /// files do not name the same tensors in the same files.
  explicit SafetensorsFolder(const std::string& directory);

  struct Place {
    const SafetensorsFile* file;
    const SafetensorsEntry* entry;
  };
  const std::map<std::string, Place>& tensors() const { return tensors_; }

 private:
  std::vector<std::unique_ptr<SafetensorsFile>> files_;
  std::map<std::string, Place> tensors_;
};

/// A tensor to write.
struct SafetensorsTensor {
  std::string name, dtype;  // dtype: F32, BF16, ...
  std::vector<std::uint64_t> shape;
};

/// Writes a file: whole or absent (files.h), the same bytes for the same tensors: larger element types first, then by name, the header padded with
/// blanks to a multiple of eight bytes. bytes_of(i) gives the elements of tensors[i], little-endian, when they are due: one tensor is in memory at
/// a time. Throws std::runtime_error (disk full), std::logic_error for bytes that are not those of the shape.
void write_safetensors(const std::string& path, const std::vector<SafetensorsTensor>& tensors, const std::map<std::string, std::string>& metadata,
                       const std::function<std::string(std::size_t)>& bytes_of);

}  // namespace tessera
