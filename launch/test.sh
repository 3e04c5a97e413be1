#!/usr/bin/env bash
# Installs what is missing, builds everything with warnings as errors, runs every test. CUDA code is compiled where nvcc is found, for the GPU that
# is there; GPU tests skip, saying so, where there is none. Parquet is tested with pyarrow's libraries, and TensorBoard's events with its own package,
# which are put into build/; where the network has none, those tests skip, saying so.
#   ./launch/test.sh              release build and all tests
#   ./launch/test.sh --sanitize   the same tests under AddressSanitizer and UndefinedBehaviorSanitizer (no CUDA)
#   ./launch/test.sh -R PATTERN   arguments go to ctest
set -euo pipefail
. "$(dirname "$0")/lib.sh"

preset=ci
if [ "${1:-}" = --help ] || [ "${1:-}" = -h ]; then sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 0; fi
if [ "${1:-}" = --sanitize ]; then preset=asan; shift; fi

install_packages "${tessera_packages[@]}" libgtest-dev ccache zstd python3-venv
arrow=$(arrow_root)
[ -n "$arrow" ] || say "NOT TESTED: Parquet, as pyarrow could not be installed (see above); those tests skip"
python=$(tensorboard_python)
if [ -n "$python" ]; then
  export TESSERA_TENSORBOARD_PYTHON=$python
else
  say "NOT TESTED: events read by TensorBoard, as it could not be installed (see above); that test skips"
fi
command -v chromium chromium-browser google-chrome >/dev/null ||
  say "NOT TESTED: the report's page in a browser, as there is no Chromium (apt-get install chromium); that test skips"
say "Building (preset $preset)"
launcher=()
command -v ccache >/dev/null && launcher=(-DCMAKE_CXX_COMPILER_LAUNCHER=ccache -DCMAKE_CUDA_COMPILER_LAUNCHER=ccache)
cd "$root"
cmake --preset "$preset" -DTESSERA_CUDA_ARCHITECTURES="$(cuda_architecture)" -DTESSERA_ARROW_ROOT="$arrow" "${launcher[@]}"
cmake --build --preset "$preset"

if [ "$(gpus)" = 0 ]; then say "Testing (no GPU here: GPU tests skip)"; else say "Testing, on $(gpus) GPU(s) too where CUDA code was built"; fi
export OMPI_MCA_rmaps_base_oversubscribe=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Leaks are not looked for: OpenMPI and HDF5 keep memory until the process ends.
export ASAN_OPTIONS=detect_leaks=0
ctest --preset "$preset" --parallel "$(nproc)" "$@"
