#pragma once
// The HDF5 file driver that Hdf5File uses: plain pread and pwrite, without file locks, and one that survives a full disk. The library keeps a
// file half-open when a write fails while it closes, tries again at exit and may crash there. Here a failed write is noted in a WriteFailure
// and its bytes are kept in memory, so that the library sees a file that always works and closes in order; Hdf5File then throws.
// Only for hdf5_file.cpp, under its lock.

#include <hdf5.h>

#include <cstdint>

namespace tessera {

struct WriteFailure {
  int error = 0;  // errno of the first write that failed; 0: none has
  std::uint64_t bytes = 0, offset = 0;
};

/// While `active`, reads of raw data only say where they would read, and deliver nothing. Through 1.10 the library's own functions for finding a
/// chunk in the file go over all of them each time; reading one goes to it at once.
struct ReadProbe {
  bool active = false;
  haddr_t address = HADDR_UNDEF;
  std::uint64_t bytes = 0;
};

/// Makes `access`, a file access property list, use the driver. `failure` and `probe` must outlive the file. Returns < 0 on an HDF5 error.
herr_t use_tessera_driver(hid_t access, WriteFailure* failure, ReadProbe* probe);

}  // namespace tessera
