// Why OpenBLAS is loaded and not linked: it chooses its kernels and starts its threads when it is loaded, from environment variables, and
// offers no call to choose again. Releases before 0.3.22 take AMD processors with AVX-512 for older ones and choose AVX2 kernels, which
// are half as fast (measured: 120 against 235 GFLOP/s on one core). What the user has set is left alone.

#include "kernels/cpu/blas.h"

#include <dlfcn.h>
#include <fmt/format.h>
#include <omp.h>

#include <cstdlib>
#include <stdexcept>
#include <string_view>

namespace tessera::cpu {

namespace {

/// An environment variable that is set for the life of this object, unless it was set already.
class TemporaryVariable {
 public:
  TemporaryVariable(const char* name, const char* value) : name_(std::getenv(name) || !value ? nullptr : name) {
    if (name_) setenv(name_, value, 0);
  }
  ~TemporaryVariable() {
    if (name_) unsetenv(name_);
  }
  TemporaryVariable(const TemporaryVariable&) = delete;
  TemporaryVariable& operator=(const TemporaryVariable&) = delete;

 private:
  const char* name_;
};

/// The kernels to ask for, or null for OpenBLAS' own choice.
const char* wanted_kernels() {
#ifdef __x86_64__
  __builtin_cpu_init();
  if (__builtin_cpu_is("amd") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return "SkylakeX";
  }
#endif
  return nullptr;
}

template <class Function>
Function* find(void* library, const char* name) {
  void* address = dlsym(library, name);
  if (!address) throw std::runtime_error(fmt::format("the installed OpenBLAS has no function {}", name));
  return reinterpret_cast<Function*>(address);
}

Blas load() {
  void* library = nullptr;
  {
    const TemporaryVariable kernels("OPENBLAS_CORETYPE", wanted_kernels());
    const TemporaryVariable threads("OPENBLAS_NUM_THREADS", "1");
    for (const char* file : {"libopenblas.so.0", TESSERA_OPENBLAS_LIBRARY}) {
      if (!library) library = dlopen(file, RTLD_NOW | RTLD_LOCAL);
    }
  }
  if (!library) throw std::runtime_error(fmt::format("OpenBLAS cannot be loaded ({}). On Debian or Ubuntu: apt-get install libopenblas0", dlerror()));

  const int openmp_threads = omp_get_max_threads();
  find<decltype(openblas_set_num_threads)>(library, "openblas_set_num_threads")(1);
  omp_set_num_threads(openmp_threads);  // OpenBLAS' openmp build sets OpenMP's number as well

  // The configuration is "OpenBLAS 0.3.21 NO_LAPACKE DYNAMIC_ARCH ...": its first two words name the version.
  const std::string_view config = find<decltype(openblas_get_config)>(library, "openblas_get_config")();
  const std::string_view version = config.substr(0, config.find(' ', config.find(' ') + 1));
  return {find<decltype(cblas_sgemm)>(library, "cblas_sgemm"),
          fmt::format("{} {}", version, find<decltype(openblas_get_corename)>(library, "openblas_get_corename")())};
}

}  // namespace

const Blas& blas() {
  static const Blas loaded = load();
  return loaded;
}

}  // namespace tessera::cpu
