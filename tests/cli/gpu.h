#pragma once
// Whether the binary under test should be able to compute on a GPU here. Found out without it: a binary that cannot, on a machine where it should,
// fails its tests instead of skipping them.

#include <filesystem>
#include <string>

namespace tessera {

/// "" when it should, else why not.
inline std::string no_gpu() {
#ifdef TESSERA_HAS_CUDA
  return std::filesystem::exists("/dev/nvidiactl") ? "" : "no GPU: there is no /dev/nvidiactl";
#else
  return "no GPU: this build has no CUDA backend";
#endif
}

#define TESSERA_NEEDS_GPU() \
  if (!no_gpu().empty()) GTEST_SKIP() << no_gpu()

}  // namespace tessera
