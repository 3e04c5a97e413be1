#pragma once
// OpenBLAS, loaded at run time with one thread a call and the fastest kernels that this processor runs.

#include <cblas.h>

#include <string>

namespace tessera::cpu {

struct Blas {
  decltype(&cblas_sgemm) sgemm;
  std::string name;  // "OpenBLAS 0.3.21 Haswell": version and the kernels in use
};

/// Loads OpenBLAS on the first call. Throws std::runtime_error, naming the package, when it is not installed.
const Blas& blas();

}  // namespace tessera::cpu
