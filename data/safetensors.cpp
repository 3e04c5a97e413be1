#include "data/safetensors.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <numeric>
#include <optional>
#include <set>
#include <stdexcept>
#include <string_view>

#include "data/files.h"
#include "data/json_file.h"

namespace tessera {
namespace {

using Json = nlohmann::ordered_json;

constexpr std::uint64_t kMostHeader = 100'000'000;  // as in the reference implementation
constexpr const char* kMetadata = "__metadata__";
constexpr const char* kSingle = "model.safetensors";
constexpr const char* kIndex = "model.safetensors.index.json";
static_assert(std::endian::native == std::endian::little, "tensors are read and written as they lie in memory");

[[noreturn]] void fail(const std::string& where, const std::string& what) { throw std::invalid_argument(where + ": " + what); }

/// A text of the file as it is shown in a message.
std::string shown(const std::string& text) {
  const std::string quoted = Json(text).dump(-1, ' ', true, Json::error_handler_t::replace);
  return quoted.size() <= 120 ? quoted : quoted.substr(0, 117) + "...";
}

/// Bytes of an element; 0 for what is no dtype.
std::uint64_t size_of_dtype(std::string_view dtype) {
  for (const char* name : {"F64", "I64", "U64", "C64"})
    if (dtype == name) return 8;
  for (const char* name : {"F32", "I32", "U32"})
    if (dtype == name) return 4;
  for (const char* name : {"F16", "BF16", "I16", "U16"})
    if (dtype == name) return 2;
  for (const char* name : {"BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"})
    if (dtype == name) return 1;
  return 0;
}

/// `dtype`'s size times the extents; nothing when that is no 64-bit number.
std::optional<std::uint64_t> bytes_of_shape(const std::string& dtype, const std::vector<std::uint64_t>& shape) {
  std::uint64_t bytes = size_of_dtype(dtype);
  for (const std::uint64_t extent : shape)
    if (__builtin_mul_overflow(bytes, extent, &bytes)) return {};
  return bytes;
}

/// Reads the header as it is parsed, so that a header of many bytes never becomes a tree of many more. What is not of the format's form, names given
/// twice among it, stops the parser with `problem`.
class HeaderReader : public nlohmann::json_sax<nlohmann::json> {
 public:
  struct Entry {
    std::string name, dtype;
    std::vector<std::uint64_t> shape, offsets;
  };
  std::vector<Entry> entries;
  std::map<std::string, std::string> metadata;
  std::string problem;

  bool start_object(std::size_t) override {
    if (place_ == Place::start) return to(Place::header);
    if (place_ == Place::name) {
      if (name_ == kMetadata) return to(Place::metadata);
      entries.push_back({name_, "", {}, {}});
      fields_.clear();
      return to(Place::entry);
    }
    return unexpected("an object");
  }
  bool key(std::string& key) override {
    if (place_ == Place::header) {
      if (!names_.insert(key).second) return refuse(fmt::format("{} is there twice", described(key)));
      name_ = key;
      return to(Place::name);
    }
    field_ = key;
    if (place_ == Place::metadata) {
      if (metadata.contains(key)) return refuse(fmt::format("__metadata__: {} is there twice", shown(key)));
      return to(Place::metadata_value);
    }
    if (key != "dtype" && key != "shape" && key != "data_offsets")
      return refuse(fmt::format("{}: unknown key {}; expected dtype, shape and data_offsets", described(name_), shown(key)));
    if (!fields_.insert(key).second) return refuse(fmt::format("{}: {} is there twice", described(name_), key));
    return to(Place::field);
  }
  bool end_object() override {
    if (place_ == Place::header) return to(Place::end);
    if (place_ == Place::metadata) return to(Place::header);
    for (const char* field : {"dtype", "shape", "data_offsets"})
      if (!fields_.contains(field)) return refuse(fmt::format("{}: {} is missing", described(name_), field));
    if (entries.back().offsets.size() != 2)
      return refuse(fmt::format("{}: data_offsets: expected two numbers, found {}", described(name_), entries.back().offsets.size()));
    return to(Place::header);
  }
  bool start_array(std::size_t) override {
    if (place_ == Place::field && field_ != "dtype") return to(Place::list);
    return unexpected("an array");
  }
  bool end_array() override { return to(Place::entry); }
  bool string(std::string& value) override {
    if (place_ == Place::metadata_value) {
      metadata.emplace(field_, value);
      return to(Place::metadata);
    }
    if (place_ == Place::field && field_ == "dtype") {
      entries.back().dtype = value;
      return to(Place::entry);
    }
    return unexpected("a text");
  }
  bool number_unsigned(std::uint64_t value) override {
    if (place_ != Place::list) return unexpected("a number");
    std::vector<std::uint64_t>& list = field_ == "shape" ? entries.back().shape : entries.back().offsets;
    if (list.size() == kMostExtents) return refuse(fmt::format("{}: {}: more than {} numbers", described(name_), field_, kMostExtents));
    list.push_back(value);
    return true;
  }
  bool number_integer(std::int64_t value) override { return unexpected(std::to_string(value)); }
  bool number_float(double, const std::string& text) override { return unexpected(shown(text)); }
  bool null() override { return unexpected("null"); }
  bool boolean(bool) override { return unexpected("a truth value"); }
  bool binary(nlohmann::json::binary_t&) override { return unexpected("binary data"); }
  bool parse_error(std::size_t byte, const std::string&, const nlohmann::json::exception& e) override {
    const std::string message = e.what();
    return refuse(fmt::format("not valid JSON at byte {} of it: {}", byte, message.substr(message.find("] ") + 2)).substr(0, 400));
  }

 private:
  static constexpr std::size_t kMostExtents = 64;
  enum class Place { start, header, name, entry, field, list, metadata, metadata_value, end };
  Place place_ = Place::start;
  std::string name_, field_;
  std::set<std::string> names_, fields_;

  static std::string described(const std::string& name) { return "tensor " + shown(name); }
  bool to(Place place) {
    place_ = place;
    return true;
  }
  bool refuse(const std::string& what) {
    problem = what;
    return false;
  }
  bool unexpected(const std::string& found) {
    switch (place_) {
      case Place::start: return refuse("expected an object of tensors, found " + found);
      case Place::name: return refuse(fmt::format("{}: expected an object, found {}", described(name_), found));
      case Place::metadata_value: return refuse(fmt::format("__metadata__: {}: expected a text, found {}", shown(field_), found));
      default:
        return refuse(fmt::format("{}: {}: expected {}, found {}", described(name_), field_,
                                  field_ == "dtype" ? "a text" : "an array of integers from 0", found));
    }
  }
};

/// `bytes` at `offset`. Throws std::runtime_error when they cannot be had.
void read_at(int descriptor, std::uint64_t offset, char* to, std::size_t bytes, const std::string& path) {
  for (std::size_t done = 0; done < bytes;) {
    const ssize_t got = ::pread(descriptor, to + done, bytes - done, static_cast<off_t>(offset + done));
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0)
      throw std::runtime_error(
          fmt::format("{}: reading failed at offset {}: {}", path, offset + done, got < 0 ? std::strerror(errno) : "the file has become shorter"));
    done += static_cast<std::size_t>(got);
  }
}

float from_half(std::uint16_t h) {
  const int exponent = (h >> 10) & 31, fraction = h & 1023;
  const float sign = h & 0x8000 ? -1.0f : 1.0f;
  if (exponent == 31)
    return std::bit_cast<float>(static_cast<std::uint32_t>(h & 0x8000) << 16 | 0x7f800000u | static_cast<std::uint32_t>(fraction) << 13);
  return sign * (exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24) : std::ldexp(static_cast<float>(1024 + fraction), exponent - 25));
}

/// Elements of type T become floats.
template <class T, class Convert>
void convert(const char* from, std::span<float> to, Convert&& one) {
  for (std::size_t i = 0; i < to.size(); ++i) {
    T element;
    std::memcpy(&element, from + i * sizeof(T), sizeof(T));
    to[i] = one(element);
  }
}

/// {name: file} of an index.
std::map<std::string, std::string> read_weight_map(const std::string& path) {
  const Json root = parse_json<Json>(read_file(path), path, UniqueKeys::yes);
  if (!root.is_object() || !root.contains("weight_map") || !root["weight_map"].is_object())
    fail(path, "expected an object with weight_map, an object of tensors and their files");
  std::map<std::string, std::string> files;
  for (const auto& [name, file] : root["weight_map"].items()) {
    // A file beside the index, and nothing else that a path can lead to.
    const std::string text = file.is_string() ? file.get<std::string>() : "";
    if (text.empty() || text.find('/') != std::string::npos || text == "." || text == "..")
      fail(path, fmt::format("weight_map: tensor {}: expected the name of a file in this folder, found {}", shown(name),
                             file.is_string() ? shown(text) : "no text"));
    files.emplace(name, text);
  }
  if (files.empty()) fail(path, "weight_map names no tensor");
  return files;
}

}  // namespace

std::uint64_t SafetensorsEntry::elements() const { return std::accumulate(shape.begin(), shape.end(), std::uint64_t{1}, std::multiplies<>()); }

std::string SafetensorsEntry::shape_text() const {
  std::string text = "[";
  for (const std::uint64_t extent : shape) text += fmt::format("{}{}", text.size() > 1 ? ", " : "", extent);
  return text + "]";
}

SafetensorsFile::SafetensorsFile(const std::string& path) : path_(path) {
  const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (descriptor < 0) fail(path, fmt::format("cannot be opened: {}", std::strerror(errno)));
  try {
    struct stat status;
    if (::fstat(descriptor, &status) != 0 || !S_ISREG(status.st_mode)) fail(path, "not a regular file; expected a safetensors file");
    const auto size = static_cast<std::uint64_t>(status.st_size);
    if (size < 8) fail(path, fmt::format("{} bytes: expected a safetensors file, which begins with eight bytes for the length of its header", size));
    std::uint64_t length = 0;
    read_at(descriptor, 0, reinterpret_cast<char*>(&length), sizeof length, path);
    if (length > size - 8)
      fail(path, fmt::format("a header of {} bytes in a file of {}: the file is cut short, or no safetensors file", length, size));
    if (length > kMostHeader) fail(path, fmt::format("a header of {} bytes; the format allows {}", length, kMostHeader));
    std::string text(length, '\0');
    read_at(descriptor, 8, text.data(), text.size(), path);

    HeaderReader header;
    if (!nlohmann::json::sax_parse(text, &header)) fail(path, "header: " + header.problem);
    metadata_ = std::move(header.metadata);

    const std::uint64_t data = size - 8 - length;
    for (HeaderReader::Entry& e : header.entries) {
      const auto bad = [&](const std::string& what) { fail(path, fmt::format("tensor {}: {}", shown(e.name), what)); };
      const std::uint64_t element = size_of_dtype(e.dtype), begin = e.offsets[0], end = e.offsets[1];
      if (element == 0) bad(fmt::format("dtype {} is none of the format", shown(e.dtype)));
      SafetensorsEntry entry{std::move(e.name), std::move(e.dtype), std::move(e.shape), 8 + length + begin, end - begin};
      e.name = entry.name;
      if (begin > end || end > data)
        bad(fmt::format("data_offsets [{}, {}] in {} bytes of data: {}", begin, end, data,
                        begin > end ? "the end comes first" : "the file is cut short"));
      if (begin % element != 0) bad(fmt::format("data_offsets begin at {}, which is no multiple of the {} bytes of {}", begin, element, entry.dtype));
      const auto bytes = bytes_of_shape(entry.dtype, entry.shape);
      if (!bytes) bad(fmt::format("the elements of shape {} are too many to count", entry.shape_text()));
      if (*bytes != entry.bytes)
        bad(fmt::format("data_offsets [{}, {}] are {} bytes, and {} of shape {} takes {}", begin, end, entry.bytes, entry.dtype, entry.shape_text(),
                        *bytes));
      entries_.push_back(std::move(entry));
    }
    std::sort(entries_.begin(), entries_.end(), [](const SafetensorsEntry& a, const SafetensorsEntry& b) {
      return std::tie(a.first, a.bytes, a.name) < std::tie(b.first, b.bytes, b.name);
    });
    std::uint64_t at = 8 + length;
    for (std::size_t i = 0; i < entries_.size(); at = entries_[i].first + entries_[i].bytes, ++i) {
      const SafetensorsEntry& e = entries_[i];
      if (e.first < at)
        fail(path, fmt::format("tensors {} and {} overlap: data_offsets {} to {}", shown(entries_[i - 1].name), shown(e.name), e.first - 8 - length,
                               at - 8 - length));
      if (e.first > at) fail(path, fmt::format("tensor {}: {} bytes before it belong to no tensor", shown(e.name), e.first - at));
      index_of_.emplace(e.name, i);
    }
    if (at != size) fail(path, fmt::format("{} bytes after the last tensor belong to none", size - at));
  } catch (...) {
    ::close(descriptor);
    throw;
  }
  descriptor_ = descriptor;
}

SafetensorsFile::~SafetensorsFile() { ::close(descriptor_); }

const SafetensorsEntry* SafetensorsFile::find(const std::string& name) const {
  const auto found = index_of_.find(name);
  return found == index_of_.end() ? nullptr : &entries_[found->second];
}

bool SafetensorsFile::is_float(const std::string& dtype) { return dtype == "F32" || dtype == "BF16" || dtype == "F16" || dtype == "F64"; }

void SafetensorsFile::read(const SafetensorsEntry& entry, std::span<float> out) const {
  if (out.size() != entry.elements()) throw std::logic_error(fmt::format("{}: {} floats for {} elements", path_, out.size(), entry.elements()));
  if (entry.dtype == "F32") return read_at(descriptor_, entry.first, reinterpret_cast<char*>(out.data()), entry.bytes, path_);
  if (!is_float(entry.dtype)) fail(path_, fmt::format("tensor {}: expected F32, BF16, F16 or F64, found {}", shown(entry.name), entry.dtype));
  constexpr std::size_t kPiece = 1 << 20;
  const std::uint64_t element = size_of_dtype(entry.dtype);
  std::vector<char> piece(std::min<std::uint64_t>(kPiece, entry.bytes));
  for (std::uint64_t at = 0; at < entry.bytes; at += piece.size()) {
    const std::size_t bytes = std::min<std::uint64_t>(piece.size(), entry.bytes - at);
    read_at(descriptor_, entry.first + at, piece.data(), bytes, path_);
    const auto to = out.subspan(at / element, bytes / element);
    if (entry.dtype == "BF16")
      convert<std::uint16_t>(piece.data(), to, [](std::uint16_t x) { return std::bit_cast<float>(static_cast<std::uint32_t>(x) << 16); });
    else if (entry.dtype == "F16")
      convert<std::uint16_t>(piece.data(), to, from_half);
    else
      convert<double>(piece.data(), to, [](double x) { return static_cast<float>(x); });
  }
}

SafetensorsFolder::SafetensorsFolder(const std::string& directory) {
  const std::string single = directory + "/" + kSingle, index = directory + "/" + kIndex;
  const auto open = [&](const std::string& path) { return files_.emplace_back(std::make_unique<SafetensorsFile>(path)).get(); };
  if (std::filesystem::exists(single) || !std::filesystem::exists(index)) {
    if (!std::filesystem::exists(single)) fail(directory, fmt::format("no {} and no {} in this folder", kSingle, kIndex));
    const SafetensorsFile* file = open(single);
    for (const SafetensorsEntry& e : file->entries()) tensors_.emplace(e.name, Place{file, &e});
    return;
  }
  const auto weight_map = read_weight_map(index);
  std::map<std::string, const SafetensorsFile*> opened;
  for (const auto& [name, file] : weight_map) {
    if (opened.contains(file)) continue;
    const std::string path = directory + "/" + file;
    if (!std::filesystem::exists(path)) fail(path, fmt::format("the file is missing: {} names it for tensor {}", kIndex, shown(name)));
    opened[file] = open(path);
  }
  for (const auto& [file_name, file] : opened) {
    for (const SafetensorsEntry& e : file->entries()) {
      const auto wanted = weight_map.find(e.name);
      if (wanted == weight_map.end()) fail(file->path(), fmt::format("tensor {} is not in the weight_map of {}", shown(e.name), kIndex));
      if (wanted->second != file_name)
        fail(file->path(), fmt::format("tensor {} belongs in {}, says the weight_map of {}", shown(e.name), shown(wanted->second), kIndex));
      tensors_.emplace(e.name, Place{file, &e});
    }
  }
  for (const auto& [name, file] : weight_map)
    if (!tensors_.contains(name))
      fail(directory + "/" + file, fmt::format("tensor {} is missing: the weight_map of {} says that it is here", shown(name), kIndex));
}

void write_safetensors(const std::string& path, const std::vector<SafetensorsTensor>& tensors, const std::map<std::string, std::string>& metadata,
                       const std::function<std::string(std::size_t)>& bytes_of) {
  std::vector<std::size_t> order(tensors.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
    const std::uint64_t x = size_of_dtype(tensors[a].dtype), y = size_of_dtype(tensors[b].dtype);
    return x != y ? x > y : tensors[a].name < tensors[b].name;
  });

  Json header = Json::object();
  if (!metadata.empty()) header[kMetadata] = metadata;
  std::uint64_t end = 0;
  std::vector<std::uint64_t> sizes(tensors.size());
  for (const std::size_t i : order) {
    const SafetensorsTensor& t = tensors[i];
    const auto bytes = bytes_of_shape(t.dtype, t.shape);
    if (size_of_dtype(t.dtype) == 0 || !bytes || header.contains(t.name))
      throw std::logic_error("write_safetensors: tensor " + t.name + " of no dtype, of no size or twice");
    sizes[i] = *bytes;
    header[t.name] = {{"dtype", t.dtype}, {"shape", t.shape}, {"data_offsets", {end, end + *bytes}}};
    end += *bytes;
  }
  std::string text = header.dump();
  text.resize((text.size() + 7) / 8 * 8, ' ');
  const std::uint64_t length = text.size();

  AtomicFile target(path);
  const int descriptor = ::open(target.temporary().c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
  if (descriptor < 0) throw std::runtime_error(fmt::format("{}: cannot be created: {}", target.temporary(), std::strerror(errno)));
  try {
    write_all(descriptor, {reinterpret_cast<const char*>(&length), sizeof length}, path);
    write_all(descriptor, text, path);
    for (const std::size_t i : order) {
      const std::string bytes = bytes_of(i);
      if (bytes.size() != sizes[i])
        throw std::logic_error(fmt::format("write_safetensors: {} bytes for tensor {} of {}", bytes.size(), tensors[i].name, sizes[i]));
      write_all(descriptor, bytes, path);
    }
  } catch (...) {
    ::close(descriptor);
    throw;
  }
  if (::close(descriptor) != 0) throw_write_error(path, 8 + length + end, 0, errno);
  target.commit();
}

}  // namespace tessera
