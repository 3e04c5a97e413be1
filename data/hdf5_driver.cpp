#include "data/hdf5_driver.h"

#if H5_VERSION_GE(1, 13, 0)
#include <H5FDdevelop.h>
#endif
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <functional>
#include <new>
#include <utility>
#include <vector>

namespace tessera {
namespace {

constexpr haddr_t kMaxAddress = static_cast<haddr_t>(INT64_MAX);

struct DriverInfo {
  WriteFailure* failure;
  ReadProbe* probe;
};

struct File {
  H5FD_t base;  // first: the library sees a File as this
  int descriptor;
  WriteFailure* failure;
  ReadProbe* probe;
  haddr_t end_of_allocation, end_of_file;
  std::vector<std::pair<haddr_t, std::vector<char>>> kept;  // writes since the failure, oldest first
};

File* self(H5FD_t* file) { return reinterpret_cast<File*>(file); }
const File* self(const H5FD_t* file) { return reinterpret_cast<const File*>(file); }

herr_t fail(const char* what) {
  H5Epush2(H5E_DEFAULT, __FILE__, "tessera driver", __LINE__, H5E_ERR_CLS, H5E_VFL, H5E_CANTOPENFILE, "%s: %s", what, std::strerror(errno));
  return -1;
}

void note_failure(File& file, int error, std::size_t bytes, haddr_t offset) {
  if (file.failure->error == 0) *file.failure = {error, bytes, offset};
}

H5FD_t* open_file(const char* name, unsigned flags, hid_t access, haddr_t) {
  const auto* info = static_cast<const DriverInfo*>(H5Pget_driver_info(access));
  if (!info) return nullptr;
  int mode = O_CLOEXEC | (flags & H5F_ACC_RDWR ? O_RDWR : O_RDONLY);
  if (flags & H5F_ACC_TRUNC) mode |= O_TRUNC;
  if (flags & H5F_ACC_CREAT) mode |= O_CREAT;
  if (flags & H5F_ACC_EXCL) mode |= O_EXCL;
  const int descriptor = ::open(name, mode, 0666);
  struct stat status;
  if (descriptor < 0 || ::fstat(descriptor, &status) != 0) {
    fail("cannot be opened");
    if (descriptor >= 0) ::close(descriptor);
    return nullptr;
  }
  auto* file = new (std::nothrow) File{};
  if (!file) {
    ::close(descriptor);
    return nullptr;
  }
  file->descriptor = descriptor;
  file->failure = info->failure;
  file->probe = info->probe;
  file->end_of_file = static_cast<haddr_t>(status.st_size);
  return &file->base;
}

herr_t close_file(H5FD_t* base) {
  File* file = self(base);
  if (::close(file->descriptor) != 0) note_failure(*file, errno, 0, file->end_of_file);
  delete file;
  return 0;
}

/// No two are the same: the library would let both use the one that was opened first, whose WriteFailure and ReadProbe go with its owner.
int compare(const H5FD_t* a, const H5FD_t* b) { return std::less<>()(a, b) ? -1 : std::less<>()(b, a) ? 1 : 0; }

herr_t query(const H5FD_t*, unsigned long* flags) {
  if (flags)
    *flags = H5FD_FEAT_AGGREGATE_METADATA | H5FD_FEAT_ACCUMULATE_METADATA | H5FD_FEAT_DATA_SIEVE | H5FD_FEAT_AGGREGATE_SMALLDATA |
             H5FD_FEAT_DEFAULT_VFD_COMPATIBLE;
  return 0;
}

haddr_t get_eoa(const H5FD_t* file, H5FD_mem_t) { return self(file)->end_of_allocation; }
herr_t set_eoa(H5FD_t* file, H5FD_mem_t, haddr_t address) {
  self(file)->end_of_allocation = address;
  return 0;
}
haddr_t get_eof(const H5FD_t* file, H5FD_mem_t) { return self(file)->end_of_file; }

herr_t read_bytes(H5FD_t* base, H5FD_mem_t type, hid_t, haddr_t address, std::size_t size, void* out) {
  File* file = self(base);
  if (file->probe->active && type == H5FD_MEM_DRAW) {
    file->probe->address = address;
    file->probe->bytes = size;
    return 0;
  }
  auto* to = static_cast<char*>(out);
  std::size_t done = 0;
  while (done < size) {
    const ssize_t got = ::pread(file->descriptor, to + done, size - done, static_cast<off_t>(address + done));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return fail("reading failed");
    if (got == 0) break;
    done += static_cast<std::size_t>(got);
  }
  std::memset(to + done, 0, size - done);  // the format defines what was allocated and never written as zeros
  for (const auto& [start, bytes] : file->kept) {
    const haddr_t first = std::max(start, address), last = std::min<haddr_t>(start + bytes.size(), address + size);
    if (first < last) std::memcpy(to + (first - address), bytes.data() + (first - start), last - first);
  }
  return 0;
}

herr_t write_bytes(H5FD_t* base, H5FD_mem_t, hid_t, haddr_t address, std::size_t size, const void* data) {
  File* file = self(base);
  const auto* from = static_cast<const char*>(data);
  std::size_t done = 0;
  while (done < size && file->failure->error == 0) {
    const ssize_t wrote = ::pwrite(file->descriptor, from + done, size - done, static_cast<off_t>(address + done));
    if (wrote < 0 && errno == EINTR) continue;
    if (wrote < 0) {
      note_failure(*file, errno, size - done, address + done);
      break;
    }
    done += static_cast<std::size_t>(wrote);
  }
  try {  // no exception may cross the library
    if (done < size) file->kept.emplace_back(address + done, std::vector<char>(from + done, from + size));
  } catch (const std::bad_alloc&) {
    return -1;
  }
  file->end_of_file = std::max<haddr_t>(file->end_of_file, address + size);
  return 0;
}

herr_t truncate_file(H5FD_t* base, hid_t, hbool_t) {
  File* file = self(base);
  if (file->end_of_allocation == file->end_of_file) return 0;
  if (file->failure->error == 0 && ::ftruncate(file->descriptor, static_cast<off_t>(file->end_of_allocation)) != 0)
    note_failure(*file, errno, file->end_of_allocation > file->end_of_file ? file->end_of_allocation - file->end_of_file : 0, file->end_of_file);
  file->end_of_file = file->end_of_allocation;
  return 0;
}

hid_t driver() {
  static const hid_t id = [] {
    H5FD_class_t driver_class{};
#if H5_VERSION_GE(1, 13, 2)
    driver_class.version = H5FD_CLASS_VERSION;
#endif
#if H5_VERSION_GE(1, 13, 0)
    driver_class.value = static_cast<H5FD_class_value_t>(H5_VFD_MAX);  // in the range left to other people's drivers
#endif
    driver_class.name = "tessera";
    driver_class.maxaddr = kMaxAddress;
    driver_class.fc_degree = H5F_CLOSE_STRONG;
    driver_class.fapl_size = sizeof(DriverInfo);
    driver_class.open = open_file;
    driver_class.close = close_file;
    driver_class.cmp = compare;
    driver_class.query = query;
    driver_class.get_eoa = get_eoa;
    driver_class.set_eoa = set_eoa;
    driver_class.get_eof = get_eof;
    driver_class.read = read_bytes;
    driver_class.write = write_bytes;
    driver_class.truncate = truncate_file;
    const H5FD_mem_t map[] = H5FD_FLMAP_SINGLE;
    std::copy(std::begin(map), std::end(map), driver_class.fl_map);
    return H5FDregister(&driver_class);
  }();
  return id;
}

}  // namespace

herr_t use_tessera_driver(hid_t access, WriteFailure* failure, ReadProbe* probe) {
  const DriverInfo info{failure, probe};
  return driver() < 0 ? -1 : H5Pset_driver(access, driver(), &info);
}

}  // namespace tessera
