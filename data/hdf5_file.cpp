#include "data/hdf5_file.h"

#include <fcntl.h>
#include <fmt/core.h>
#include <hdf5.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <functional>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <utility>

#include "data/files.h"
#include "data/hdf5_driver.h"

namespace tessera {
namespace {

constexpr std::uint64_t kChunkBytes = 1 << 20;
constexpr std::uint64_t kLockedBytes = 16 << 20;  // a large write lets other threads in after this many bytes

/// Holds the lock on the library. Never destroyed: files may be closed while the process exits.
class Session {
 public:
  Session() : lock_(mutex()) {
    H5Eset_auto2(H5E_DEFAULT, nullptr, nullptr);  // a setting of the thread where the library is thread-safe
    H5Eclear2(H5E_DEFAULT);
  }

 private:
  static std::mutex& mutex() {
    static auto& mutex = *new std::mutex;
    return mutex;
  }
  std::lock_guard<std::mutex> lock_;
};

/// The innermost entry of HDF5's error stack, which says what really happened.
std::string error_text() {
  std::string text;
  const auto take = [](unsigned, const H5E_error2_t* error, void* out) -> herr_t {
    if (error->desc && *error->desc) static_cast<std::string*>(out)->assign(error->desc);
    return 1;  // enough
  };
  H5Ewalk2(H5E_DEFAULT, H5E_WALK_UPWARD, take, &text);
  H5Eclear2(H5E_DEFAULT);
  return text.empty() ? "unknown HDF5 error" : text;
}

class Handle {
 public:
  using Close = herr_t (*)(hid_t);
  Handle() = default;
  Handle(hid_t id, Close close) : id_(id), close_(close) {}
  Handle(Handle&& other) noexcept : id_(std::exchange(other.id_, -1)), close_(other.close_) {}
  Handle& operator=(Handle&& other) noexcept {
    std::swap(id_, other.id_);
    std::swap(close_, other.close_);
    return *this;
  }
  ~Handle() { reset(); }
  void reset() {
    if (id_ >= 0) close_(std::exchange(id_, -1));
  }
  hid_t release() { return std::exchange(id_, -1); }
  bool ok() const { return id_ >= 0; }
  operator hid_t() const { return id_; }

 private:
  hid_t id_ = -1;
  Close close_ = nullptr;
};

hid_t native(Hdf5Type type) {
  switch (type) {
    case Hdf5Type::u8: return H5T_NATIVE_UINT8;
    case Hdf5Type::u16: return H5T_NATIVE_UINT16;
    case Hdf5Type::u32: return H5T_NATIVE_UINT32;
    case Hdf5Type::i32: return H5T_NATIVE_INT32;
    case Hdf5Type::i64: return H5T_NATIVE_INT64;
    case Hdf5Type::u64: return H5T_NATIVE_UINT64;
    case Hdf5Type::f32: return H5T_NATIVE_FLOAT;
    case Hdf5Type::f64: return H5T_NATIVE_DOUBLE;
  }
  throw std::logic_error("native: unknown Hdf5Type");
}

std::uint64_t product(const Hdf5Shape& shape) { return std::accumulate(shape.begin(), shape.end(), std::uint64_t{1}, std::multiplies<>()); }

std::string text(const Hdf5Shape& shape) {
  std::string out = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) out += fmt::format("{}{}", i ? ", " : "", shape[i]);
  return out + "]";
}

/// About kChunkBytes, whole in the trailing dimensions as far as that goes.
Hdf5Shape default_chunk(const Hdf5Shape& shape, std::size_t element) {
  Hdf5Shape chunk(shape.size(), 1);
  std::uint64_t left = kChunkBytes / element;
  for (std::size_t i = shape.size(); i-- > 0 && left > 0;) {
    chunk[i] = std::clamp<std::uint64_t>(shape[i], 1, left);
    left /= chunk[i];
  }
  return chunk;
}

std::vector<hsize_t> dims(const Hdf5Shape& shape) { return {shape.begin(), shape.end()}; }

}  // namespace

std::string to_string(Hdf5Type type) {
  constexpr std::array names = {"uint8", "uint16", "uint32", "int32", "int64", "uint64", "float32", "float64"};
  return names.at(static_cast<std::size_t>(type));
}
std::size_t size_of(Hdf5Type type) {
  constexpr std::array<std::size_t, 8> sizes = {1, 2, 4, 4, 8, 8, 4, 8};
  return sizes.at(static_cast<std::size_t>(type));
}
std::uint64_t Hdf5Info::elements() const { return product(shape); }

struct Hdf5File::Impl {
  std::string path;
  bool writable = false;
  WriteFailure failure;
  ReadProbe probe;
  Handle file;
  std::string dataset_name;  // the dataset used last stays open, and with it its cache of chunks
  Handle dataset;

  ~Impl() {
    const Session session;
    dataset.reset();
    file.reset();
  }

  [[noreturn]] void fail(const std::string& name, const std::string& what) const {
    if (failure.error) throw_write_error(path, failure.bytes, failure.offset, failure.error);
    const std::string reason = error_text();
    throw std::runtime_error(fmt::format("{}: {}{}: {}", path, name.empty() ? "" : fmt::format("dataset {}: ", name), what, reason));
  }
  void check(bool good, const std::string& name, const char* what) const {
    if (!good || failure.error) fail(name, what);
  }
  void check_open() const {
    if (!file.ok()) throw std::logic_error(path + ": the file is closed");
  }
  void check_writable() const {
    check_open();
    if (!writable) throw std::logic_error(path + ": was opened for reading");
  }

  bool contains(const std::string& name) const {
    for (std::size_t end = name.find('/'); end != std::string::npos; end = name.find('/', end + 1))
      if (end > 0 && H5Lexists(file, name.substr(0, end).c_str(), H5P_DEFAULT) <= 0) return false;
    return H5Lexists(file, name.c_str(), H5P_DEFAULT) > 0;
  }

  hid_t open(const std::string& name) {
    check_open();
    if (dataset.ok() && dataset_name == name) return dataset;
    if (!contains(name)) throw std::runtime_error(fmt::format("{}: dataset {}: is not in the file", path, name));
    dataset.reset();
    dataset = Handle(H5Dopen2(file, name.c_str(), H5P_DEFAULT), H5Dclose);
    check(dataset.ok(), name, "cannot be opened");
    dataset_name = name;
    return dataset;
  }

  Handle open_object(const std::string& object) const {
    check_open();
    Handle out(H5Oopen(file, object.empty() ? "/" : object.c_str(), H5P_DEFAULT), H5Oclose);
    if (!out.ok()) fail(object, "cannot be opened");
    return out;
  }

  void list(hid_t group, const std::string& prefix, std::vector<std::string>& out) const {
    H5G_info_t group_info;
    check(H5Gget_info(group, &group_info) >= 0, prefix, "group cannot be read");
    for (hsize_t i = 0; i < group_info.nlinks; ++i) {
      const ssize_t length = H5Lget_name_by_idx(group, ".", H5_INDEX_NAME, H5_ITER_INC, i, nullptr, 0, H5P_DEFAULT);
      check(length >= 0, prefix, "group cannot be listed");
      std::string name(static_cast<std::size_t>(length) + 1, '\0');
      H5Lget_name_by_idx(group, ".", H5_INDEX_NAME, H5_ITER_INC, i, name.data(), name.size(), H5P_DEFAULT);
      name.pop_back();
      const Handle object(H5Oopen(group, name.c_str(), H5P_DEFAULT), H5Oclose);
      if (!object.ok()) fail(prefix + name, "cannot be opened");
      if (H5Iget_type(object) == H5I_DATASET) out.push_back(prefix + name);
      if (H5Iget_type(object) == H5I_GROUP) list(object, prefix + name + "/", out);
    }
  }

  Hdf5Type type_of(hid_t stored, const std::string& name) const {
    const H5T_class_t kind = H5Tget_class(stored);
    const std::size_t size = H5Tget_size(stored);
    if (kind == H5T_FLOAT && size == 4) return Hdf5Type::f32;
    if (kind == H5T_FLOAT && size == 8) return Hdf5Type::f64;
    if (kind == H5T_INTEGER) {
      const bool is_signed = H5Tget_sign(stored) != H5T_SGN_NONE;
      if (size == 8) return is_signed ? Hdf5Type::i64 : Hdf5Type::u64;
      if (size == 4) return is_signed ? Hdf5Type::i32 : Hdf5Type::u32;
      if (size == 2 && !is_signed) return Hdf5Type::u16;
      if (size == 1 && !is_signed) return Hdf5Type::u8;
    }
    throw std::runtime_error(fmt::format(
        "{}: dataset {}: holds a type that is not supported; expected uint8, uint16, uint32, uint64, int32, int64, float32 or float64", path, name));
  }

  Hdf5Shape shape_of(hid_t id, const std::string& name) const {
    const Handle space(H5Dget_space(id), H5Sclose);
    const int rank = space.ok() ? H5Sget_simple_extent_ndims(space) : -1;
    check(rank >= 0, name, "shape cannot be read");
    std::vector<hsize_t> extent(static_cast<std::size_t>(rank));
    H5Sget_simple_extent_dims(space, extent.data(), nullptr);
    return {extent.begin(), extent.end()};
  }

  /// Checks the block against the dataset and returns (selection in the file, memory space).
  std::pair<Handle, Handle> select(hid_t id, const std::string& name, const Hdf5Shape& offset, const Hdf5Shape& count, std::size_t elements) const {
    const Hdf5Shape shape = shape_of(id, name);
    bool inside = offset.size() == shape.size() && count.size() == shape.size() && product(count) == elements;
    for (std::size_t i = 0; inside && i < shape.size(); ++i) inside = offset[i] <= shape[i] && count[i] <= shape[i] - offset[i];
    if (!inside)
      throw std::invalid_argument(fmt::format("{}: dataset {}: a block of shape {} at {} with {} elements of memory does not fit in shape {}", path,
                                              name, text(count), text(offset), elements, text(shape)));
    Handle space(H5Dget_space(id), H5Sclose);
    Handle memory(shape.empty() ? H5Screate(H5S_SCALAR) : H5Screate_simple(static_cast<int>(count.size()), dims(count).data(), nullptr), H5Sclose);
    check(space.ok() && memory.ok(), name, "selection");
    if (!shape.empty())
      check(H5Sselect_hyperslab(space, H5S_SELECT_SET, dims(offset).data(), nullptr, dims(count).data(), nullptr) >= 0, name, "selection");
    return {std::move(space), std::move(memory)};
  }

  void set_attribute(const std::string& object, const std::string& name, hid_t type, const void* value) {
    check_writable();
    const Handle owner = open_object(object);
    const Handle space(H5Screate(H5S_SCALAR), H5Sclose);
    if (H5Aexists(owner, name.c_str()) > 0) H5Adelete(owner, name.c_str());
    const Handle attribute(H5Acreate2(owner, name.c_str(), type, space, H5P_DEFAULT, H5P_DEFAULT), H5Aclose);
    check(attribute.ok() && H5Awrite(attribute, type, value) >= 0, object, fmt::format("attribute {} cannot be written", name).c_str());
  }

  /// Opens an attribute of one value of this class; `what` names the class for the message.
  Handle attribute(const std::string& object, const std::string& name, H5T_class_t kind, const char* what) const {
    const Handle owner = open_object(object);
    const std::string where = fmt::format("{}{}", path, object.empty() ? "" : ": " + object);
    if (H5Aexists(owner, name.c_str()) <= 0) throw std::runtime_error(fmt::format("{}: attribute {} is missing", where, name));
    Handle out(H5Aopen(owner, name.c_str(), H5P_DEFAULT), H5Aclose);
    check(out.ok(), object, fmt::format("attribute {} cannot be opened", name).c_str());
    const Handle type(H5Aget_type(out), H5Tclose);
    const Handle space(H5Aget_space(out), H5Sclose);
    if (H5Tget_class(type) != kind || H5Sget_simple_extent_npoints(space) != 1)
      throw std::runtime_error(fmt::format("{}: attribute {} is not {}", where, name, what));
    return out;
  }
};

Hdf5File::Hdf5File(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Hdf5File::Hdf5File(Hdf5File&&) noexcept = default;
Hdf5File& Hdf5File::operator=(Hdf5File&&) noexcept = default;
Hdf5File::~Hdf5File() = default;
const std::string& Hdf5File::path() const { return impl_->path; }

Hdf5File Hdf5File::create(const std::string& path) {
  auto impl = std::make_unique<Impl>();
  impl->path = path;
  impl->writable = true;
  const Session session;
  const Handle access(H5Pcreate(H5P_FILE_ACCESS), H5Pclose);
  const bool ready = access.ok() && use_tessera_driver(access, &impl->failure, &impl->probe) >= 0 &&
                     H5Pset_libver_bounds(access, H5F_LIBVER_V110, H5F_LIBVER_V110) >= 0 && H5Pset_fclose_degree(access, H5F_CLOSE_STRONG) >= 0;
  const Handle creation(H5Pcreate(H5P_FILE_CREATE), H5Pclose);
  H5Pset_obj_track_times(creation, false);  // equal contents, equal bytes
  if (ready) impl->file = Handle(H5Fcreate(path.c_str(), H5F_ACC_TRUNC, creation, access), H5Fclose);
  if (!impl->file.ok() || impl->failure.error) {
    impl->fail("", "cannot be created");
  }
  return Hdf5File(std::move(impl));
}

Hdf5File Hdf5File::open(const std::string& path) {
  if (const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC); fd < 0)
    throw std::invalid_argument(fmt::format("{}: cannot be opened: {}", path, std::strerror(errno)));
  else
    ::close(fd);
  if (std::filesystem::is_directory(path)) throw std::invalid_argument(fmt::format("{}: is a folder, expected an HDF5 file", path));
  auto impl = std::make_unique<Impl>();
  impl->path = path;
  const Session session;
  const Handle access(H5Pcreate(H5P_FILE_ACCESS), H5Pclose);
  if (access.ok() && use_tessera_driver(access, &impl->failure, &impl->probe) >= 0 && H5Pset_fclose_degree(access, H5F_CLOSE_STRONG) >= 0)
    impl->file = Handle(H5Fopen(path.c_str(), H5F_ACC_RDONLY, access), H5Fclose);
  if (!impl->file.ok()) {
    const std::string reason = error_text();
    if (reason.find("signature") != std::string::npos)
      throw std::invalid_argument(fmt::format("{}: is not an HDF5 file, or its first bytes are damaged ({})", path, reason));
    throw std::runtime_error(fmt::format("{}: is damaged and cannot be opened: {}", path, reason));
  }
  return Hdf5File(std::move(impl));
}

void Hdf5File::close() {
  {
    const Session session;
    if (!impl_->file.ok()) return;
    impl_->dataset.reset();
    const bool good = H5Fclose(impl_->file.release()) >= 0;
    impl_->check(good, "", "cannot be closed");
  }
  if (impl_->writable) sync_file(impl_->path);
}

// -- Datasets -----------------------------------------------------------------------------------------------------------

bool Hdf5File::contains(const std::string& name) const {
  const Session session;
  impl_->check_open();
  return impl_->contains(name);
}

std::vector<std::string> Hdf5File::datasets() const {
  const Session session;
  std::vector<std::string> out;
  const Handle root = impl_->open_object("");
  impl_->list(root, "", out);
  std::sort(out.begin(), out.end());
  return out;
}

Hdf5Info Hdf5File::info(const std::string& name) const {
  const Session session;
  const hid_t id = impl_->open(name);
  Hdf5Info out;
  const Handle type(H5Dget_type(id), H5Tclose);
  out.type = impl_->type_of(type, name);
  out.shape = impl_->shape_of(id, name);
  out.stored_bytes = H5Dget_storage_size(id);
  const Handle properties(H5Dget_create_plist(id), H5Pclose);
  impl_->check(properties.ok(), name, "properties cannot be read");
  if (H5Pget_layout(properties) == H5D_CHUNKED) {
    std::vector<hsize_t> chunk(out.shape.size());
    H5Pget_chunk(properties, static_cast<int>(chunk.size()), chunk.data());
    out.chunk.assign(chunk.begin(), chunk.end());
  }
  for (int i = 0; i < H5Pget_nfilters(properties); ++i)
    out.fletcher32 |= H5Pget_filter2(properties, static_cast<unsigned>(i), nullptr, nullptr, nullptr, 0, nullptr, nullptr) == H5Z_FILTER_FLETCHER32;
  return out;
}

std::optional<Hdf5Placement> Hdf5File::placement(const std::string& name) const {
  constexpr std::uint64_t kPiece = 16 << 10;      // elements, of a dataset that lies in one
  constexpr std::uint64_t kMostPiece = 64 << 20;  // bytes; larger ones are not for reading at random
  const Session session;
  const hid_t id = impl_->open(name);
  const Handle type(H5Dget_type(id), H5Tclose), properties(H5Dget_create_plist(id), H5Pclose);
  impl_->check(type.ok() && properties.ok(), name, "properties cannot be read");
  Hdf5Placement out;
  out.type = impl_->type_of(type, name);
  const Hdf5Shape shape = impl_->shape_of(id, name);
  const int filters = H5Pget_nfilters(properties);
  if (shape.size() != 1 || H5Tequal(type, native(out.type)) <= 0 || filters > 1) return {};
  out.elements = shape[0];
  const std::uint64_t size = size_of(out.type);
  if (H5Pget_layout(properties) == H5D_CONTIGUOUS && filters == 0 && H5Pget_external_count(properties) == 0) {
    const haddr_t address = H5Dget_offset(id);
    if (address == HADDR_UNDEF) return {};
    out.piece = kPiece;
    for (std::uint64_t i = 0; i < out.elements; i += kPiece) out.offsets.push_back(address + i * size);
    return out;
  }
  if (H5Pget_layout(properties) != H5D_CHUNKED) return {};
  hsize_t chunk = 0;
  impl_->check(H5Pget_chunk(properties, 1, &chunk) == 1 && chunk > 0, name, "chunk size cannot be read");
  if (filters == 1) {
    out.fletcher32 = H5Pget_filter2(properties, 0, nullptr, nullptr, nullptr, 0, nullptr, nullptr) == H5Z_FILTER_FLETCHER32;
    if (!out.fletcher32) return {};
  }
  out.piece = chunk;
  const std::uint64_t bytes = chunk * size + (out.fletcher32 ? 4 : 0);
  if (bytes > kMostPiece) return {};
  std::vector<std::byte> unused(bytes);
  ReadProbe& probe = impl_->probe;
  for (hsize_t first = 0; first < out.elements; first += chunk) {
    hsize_t stored = 0;
    impl_->check(H5Dget_chunk_storage_size(id, &first, &stored) >= 0, name, "chunks cannot be found");
    if (stored != bytes) return {};  // 0: never written
    std::uint32_t filters_left_out = 0;
    probe = {true, HADDR_UNDEF, 0};
    const bool good = H5Dread_chunk(id, H5P_DEFAULT, &first, &filters_left_out, unused.data()) >= 0;
    probe.active = false;
    impl_->check(good, name, "chunks cannot be found");
    if (probe.address == HADDR_UNDEF || probe.bytes != bytes || filters_left_out != 0) return {};
    out.offsets.push_back(probe.address);
  }
  return out;
}

void Hdf5File::create_dataset(const std::string& name, Hdf5Type type, const Hdf5Shape& shape, const Hdf5Shape& chunk, bool extendible) {
  const Session session;
  impl_->check_writable();
  Hdf5Shape blocks = chunk.empty() ? default_chunk(shape, size_of(type)) : chunk;
  if (blocks.size() != shape.size() || (extendible && shape.empty()))
    throw std::invalid_argument(fmt::format("{}: dataset {}: chunk {} does not fit shape {}", impl_->path, name, text(blocks), text(shape)));
  auto most = dims(shape);
  if (extendible) most[0] = H5S_UNLIMITED;
  for (std::size_t i = extendible ? 1 : 0; i < shape.size(); ++i) blocks[i] = std::min(blocks[i], shape[i]);

  const Handle space(shape.empty() ? H5Screate(H5S_SCALAR) : H5Screate_simple(static_cast<int>(shape.size()), dims(shape).data(), most.data()),
                     H5Sclose);
  const Handle links(H5Pcreate(H5P_LINK_CREATE), H5Pclose);
  const Handle properties(H5Pcreate(H5P_DATASET_CREATE), H5Pclose);
  H5Pset_create_intermediate_group(links, 1);
  H5Pset_obj_track_times(properties, false);
  // A scalar lies in the object header, which has a checksum of its own. An empty dataset has no data to check, and no chunk fits it.
  if (shape.empty()) {
    H5Pset_layout(properties, H5D_COMPACT);
  } else if (product(blocks) > 0) {
    impl_->check(H5Pset_chunk(properties, static_cast<int>(blocks.size()), dims(blocks).data()) >= 0, name, "chunk");
    impl_->check(H5Pset_fletcher32(properties) >= 0, name, "Fletcher-32");
  }
  impl_->dataset.reset();
  impl_->dataset = Handle(H5Dcreate2(impl_->file, name.c_str(), native(type), space, links, properties, H5P_DEFAULT), H5Dclose);
  impl_->dataset_name = name;
  impl_->check(impl_->dataset.ok(), name, "cannot be created");
}

void Hdf5File::write_new(const std::string& name, Hdf5Type type, const Hdf5Shape& shape, const void* data, std::size_t elements) {
  if (product(shape) != elements)
    throw std::invalid_argument(
        fmt::format("{}: dataset {}: shape {} wants {} elements, got {}", path(), name, text(shape), product(shape), elements));
  create_dataset(name, type, shape);
  if (elements == 0) return;
  if (shape.empty()) return write_block(name, type, {}, {}, data, elements);
  // Whole rows of chunks at a time, so that no chunk is written twice.
  const std::uint64_t row = product(shape) / shape[0];
  const std::uint64_t unit = default_chunk(shape, size_of(type))[0];
  const std::uint64_t step = std::max<std::uint64_t>(1, kLockedBytes / (unit * row * size_of(type))) * unit;
  Hdf5Shape offset(shape.size(), 0), count = shape;
  for (; offset[0] < shape[0]; offset[0] += step) {
    count[0] = std::min(step, shape[0] - offset[0]);
    write_block(name, type, offset, count, static_cast<const char*>(data) + offset[0] * row * size_of(type), count[0] * row);
  }
}

void Hdf5File::write_block(const std::string& name, Hdf5Type type, const Hdf5Shape& offset, const Hdf5Shape& count, const void* data,
                           std::size_t elements) {
  const Session session;
  impl_->check_writable();
  const hid_t id = impl_->open(name);
  const auto [space, memory] = impl_->select(id, name, offset, count, elements);
  impl_->check(H5Dwrite(id, native(type), memory, space, H5P_DEFAULT, data) >= 0, name, "cannot be written");
}

void Hdf5File::append_values(const std::string& name, Hdf5Type type, const void* data, std::size_t elements) {
  if (elements == 0) return;
  Hdf5Shape offset;
  {
    const Session session;
    impl_->check_writable();
    const hid_t id = impl_->open(name);
    offset = impl_->shape_of(id, name);
    if (offset.size() != 1)
      throw std::invalid_argument(fmt::format("{}: dataset {}: append wants one dimension, shape is {}", impl_->path, name, text(offset)));
    const hsize_t extent = offset[0] + elements;
    impl_->check(H5Dset_extent(id, &extent) >= 0, name, "cannot be lengthened");
  }
  write_block(name, type, offset, {elements}, data, elements);
}

void Hdf5File::read_block(const std::string& name, Hdf5Type type, const Hdf5Shape& offset, const Hdf5Shape& count, void* out,
                          std::size_t elements) const {
  const Session session;
  const hid_t id = impl_->open(name);
  const Handle stored(H5Dget_type(id), H5Tclose);
  const bool wants_float = type == Hdf5Type::f32 || type == Hdf5Type::f64;
  if (H5Tget_class(stored) != (wants_float ? H5T_FLOAT : H5T_INTEGER))
    throw std::runtime_error(
        fmt::format("{}: dataset {}: holds values of another kind; expected {}", impl_->path, name, wants_float ? "floating point" : "integers"));
  const auto [space, memory] = impl_->select(id, name, offset, count, elements);
  impl_->check(H5Dread(id, native(type), memory, space, H5P_DEFAULT, out) >= 0, name,
               fmt::format("block {} at {} cannot be read", text(count), text(offset)).c_str());
}

void Hdf5File::check_shape(const std::string& name, const Hdf5Shape& shape) const {
  const Hdf5Info found = info(name);
  if (found.shape != shape)
    throw std::runtime_error(fmt::format("{}: dataset {}: has shape {}, expected {}", path(), name, text(found.shape), text(shape)));
}

// -- Attributes ---------------------------------------------------------------------------------------------------------

void Hdf5File::set_attribute(const std::string& name, const std::string& value, const std::string& object) {
  const Session session;
  // Of fixed length: text of variable length would lie in a heap without checksums.
  const Handle type(H5Tcopy(H5T_C_S1), H5Tclose);
  H5Tset_size(type, std::max<std::size_t>(value.size(), 1));
  H5Tset_strpad(type, H5T_STR_NULLPAD);
  H5Tset_cset(type, H5T_CSET_UTF8);
  impl_->set_attribute(object, name, type, value.c_str());
}
void Hdf5File::set_attribute(const std::string& name, const char* value, const std::string& object) {
  set_attribute(name, std::string(value), object);
}
void Hdf5File::set_integer_attribute(const std::string& name, std::int64_t value, const std::string& object) {
  const Session session;
  impl_->set_attribute(object, name, H5T_NATIVE_INT64, &value);
}
void Hdf5File::set_attribute(const std::string& name, double value, const std::string& object) {
  const Session session;
  impl_->set_attribute(object, name, H5T_NATIVE_DOUBLE, &value);
}

bool Hdf5File::has_attribute(const std::string& name, const std::string& object) const {
  const Session session;
  return H5Aexists(impl_->open_object(object), name.c_str()) > 0;
}

std::vector<std::string> Hdf5File::attributes(const std::string& object) const {
  const Session session;
  std::vector<std::string> out;
  const auto take = [](hid_t, const char* name, const H5A_info_t*, void* names) -> herr_t {
    static_cast<std::vector<std::string>*>(names)->emplace_back(name);
    return 0;
  };
  const Handle owner = impl_->open_object(object);
  impl_->check(H5Aiterate2(owner, H5_INDEX_NAME, H5_ITER_INC, nullptr, take, &out) >= 0, object, "attributes cannot be listed");
  std::sort(out.begin(), out.end());
  return out;
}

std::string Hdf5File::string_attribute(const std::string& name, const std::string& object) const {
  const Session session;
  const Handle attribute = impl_->attribute(object, name, H5T_STRING, "text");
  const Handle type(H5Aget_type(attribute), H5Tclose);
  const std::string problem = fmt::format("attribute {} cannot be read", name);
  if (H5Tis_variable_str(type) > 0) {  // as other programs write it
    char* value = nullptr;
    impl_->check(H5Aread(attribute, type, &value) >= 0, object, problem.c_str());
    std::string out = value ? value : "";
    H5free_memory(value);
    return out;
  }
  std::string out(H5Tget_size(type), '\0');
  impl_->check(H5Aread(attribute, type, out.data()) >= 0, object, problem.c_str());
  out.resize(std::min(out.find('\0'), out.size()));
  return out;
}

std::int64_t Hdf5File::integer_attribute(const std::string& name, const std::string& object) const {
  const Session session;
  std::int64_t value = 0;
  const Handle attribute = impl_->attribute(object, name, H5T_INTEGER, "an integer");
  impl_->check(H5Aread(attribute, H5T_NATIVE_INT64, &value) >= 0, object, fmt::format("attribute {} cannot be read", name).c_str());
  return value;
}

double Hdf5File::real_attribute(const std::string& name, const std::string& object) const {
  const Session session;
  double value = 0;
  const Handle attribute = impl_->attribute(object, name, H5T_FLOAT, "a number");
  impl_->check(H5Aread(attribute, H5T_NATIVE_DOUBLE, &value) >= 0, object, fmt::format("attribute {} cannot be read", name).c_str());
  return value;
}

}  // namespace tessera
