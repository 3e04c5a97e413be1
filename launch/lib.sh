# Shared by the launch scripts: packages, build, text. Sourced, not run.
# shellcheck shell=bash

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

say() { printf '\n== %s\n' "$*"; }
die() { printf '%s: error: %s\n' "${0##*/}" "$1" >&2; exit "${2:-1}"; }  # die MESSAGE [EXIT-CODE]

# What a fresh Debian or Ubuntu machine needs to build and run Tessera. A package a line, with what it is for.
tessera_packages=(
  g++ cmake ninja-build pkg-config                      # the build
  libopenmpi-dev openmpi-bin libopenblas-dev libhdf5-dev # ranks, matrix products, files
  libyaml-cpp-dev libcli11-dev libspdlog-dev libfmt-dev nlohmann-json3-dev
  libpcre2-dev libzstd-dev zlib1g-dev libssl-dev        # tokenizer's pattern, compressed text, SHA-256
  libprotobuf-dev protobuf-compiler libisal-dev libpng-dev # TensorBoard's events: messages, CRC-32C, images
)

# install_packages PACKAGE...: installs those that are missing, with sudo only where needed.
install_packages() {
  command -v apt-get >/dev/null || die "this script installs packages with apt-get, which is not here. Install the equivalents of: $*"
  local missing=() p
  for p in "$@"; do
    [ "$(dpkg-query -W -f='${Status}' "$p" 2>/dev/null)" = "install ok installed" ] || missing+=("$p")
  done
  [ ${#missing[@]} -eq 0 ] && return 0
  say "Installing ${missing[*]}"
  local sudo=()
  if [ "$(id -u)" -ne 0 ]; then
    command -v sudo >/dev/null || die "not root, and sudo is not here. As root: apt-get install ${missing[*]}"
    sudo=(sudo)
  fi
  "${sudo[@]}" apt-get -qq update || die "apt-get update failed: is the network there?"
  "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "${missing[@]}" >/dev/null ||
    die "apt-get install failed. Missing: ${missing[*]}"
}

# configure_and_build FOLDER CMAKE-ARGUMENT... -- TARGET...
configure_and_build() {
  local folder=$1 arguments=()
  shift
  while [ $# -gt 0 ] && [ "$1" != -- ]; do arguments+=("$1"); shift; done
  shift
  command -v ccache >/dev/null && arguments+=(-DCMAKE_CXX_COMPILER_LAUNCHER=ccache -DCMAKE_CUDA_COMPILER_LAUNCHER=ccache)
  cmake -S "$root" -B "$folder" -G Ninja "${arguments[@]}" || die "cmake failed (see above)"
  cmake --build "$folder" --target "$@" || die "the build failed (see above)"
}

# python_environment NAME PACKAGE...: makes the virtual environment build/NAME with these packages, unless it has them. Where that fails (no network), what
# was there stays.
python_environment() {
  local environment="$root/build/$1" made="$root/build/$1.new"
  shift
  [ "$(cat "$environment/.packages" 2>/dev/null)" != "$*" ] || return 0
  say "Installing $* into build/" >&2
  rm -rf "$made"
  if { python3 -m venv "$made" &&
    timeout 300 "$made/bin/python" -m pip -q --disable-pip-version-check install --only-binary :all: --retries 1 "$@"; } >&2; then
    echo "$*" > "$made/.packages"
    rm -rf "$environment"
    mv "$made" "$environment"
  else
    rm -rf "$made"
  fi
}

# arrow_root: the folder of a pyarrow package, with Arrow's headers and libraries, in a virtual environment under build/, where it is installed first
# when it is not there; nothing printed where that fails (no network).
arrow_root() {
  python_environment pyarrow pyarrow==26.0.1
  find "$root/build/pyarrow" -path '*/pyarrow/include/parquet/file_reader.h' 2>/dev/null | sed 's|/include/parquet/file_reader.h$||' || true
}

# tensorboard_python: a Python that has TensorBoard and Pillow, likewise.
tensorboard_python() {
  python_environment tensorboard tensorboard==2.21.0 pillow
  ls "$root/build/tensorboard/bin/python" 2>/dev/null || true
}

# gpus: how many GPUs the driver shows.
gpus() {
  local n=0
  if command -v nvidia-smi >/dev/null; then n=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ') || true; fi
  echo "${n:-0}"
}

# cuda_architecture: of the GPU here, as CMAKE_CUDA_ARCHITECTURES takes it; where there is none, Hopper's. 90a: with the instructions that only Hopper has.
cuda_architecture() {
  local capability=''
  [ "$(gpus)" = 0 ] || capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sort -V | head -n 1 | tr -d '. ') || true
  case $capability in ''|90) echo 90a ;; *) echo "$capability" ;; esac
}

# Objects are cached by what they are made of, wherever the tree lies.
export CCACHE_BASEDIR="$root" CCACHE_NOHASHDIR=true

# cuda_missing: what a build with CUDA lacks here; nothing printed when it lacks nothing. Needs g++.
cuda_missing() {
  local nvcc toolkit
  nvcc=$(command -v nvcc || ls /usr/local/cuda/bin/nvcc 2>/dev/null) || { echo "nvcc (the CUDA Toolkit)"; return; }
  toolkit=$(dirname "$(dirname "$(readlink -f "$nvcc")")")
  echo '#include <cublasLt.h>' | g++ -E -x c++ -I"$toolkit/include" - >/dev/null 2>&1 || { echo "cuBLASLt (apt-get install libcublas-dev-MAJOR-MINOR)"; return; }
  echo '#include <nccl.h>' | g++ -E -x c++ -I"$toolkit/include" - >/dev/null 2>&1 || echo "NCCL (apt-get install libnccl-dev)"
}

# OpenMPI refuses to run as root unless told twice that this is meant; containers are root.
if [ "$(id -u)" -eq 0 ]; then export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1; fi

# choose_blas TESSERA: on a processor younger than itself OpenBLAS takes kernels that run anywhere, several times slower than those it has for its nearest
# kin. Asks for these, which `tessera` names, unless OPENBLAS_CORETYPE says what is wanted.
choose_blas() {
  [ -z "${OPENBLAS_CORETYPE:-}" ] || return 0
  local core
  core=$("$1" bench gemm --device cpu --tokens 64 --width 32 --vocabulary 64 --seconds 0.001 2>/dev/null |
    sed -n 's/.*OPENBLAS_CORETYPE=\([A-Za-z0-9]*\).*/\1/p') || true
  [ -n "$core" ] || return 0
  say "OpenBLAS does not know this processor: OPENBLAS_CORETYPE=$core from here on"
  export OPENBLAS_CORETYPE=$core
}

# fetch_text FOLDER: several MB of real English prose, the Perl manual, as plain text files. From the distribution's perl-doc package, unpacked
# into FOLDER without installing it (slim images drop /usr/share, and no root is needed).
fetch_text() {
  local folder=$1 scratch
  [ -e "$folder/.complete" ] && return 0
  scratch=$(mktemp -d)
  chmod 755 "$scratch"
  if ! (cd "$scratch" && apt-get -qq download perl-doc >log 2>&1); then  # perhaps no package lists yet
    [ "$(id -u)" -ne 0 ] || apt-get -qq update || true
    (cd "$scratch" && apt-get -qq download perl-doc >log 2>&1) ||
      { cat "$scratch/log" >&2; rm -rf "$scratch"; die "could not download the package perl-doc. Use your own text: --corpus PATH"; }
  fi
  dpkg -x "$scratch"/perl-doc_*.deb "$scratch" || die "could not unpack perl-doc. Use your own text: --corpus PATH"
  rm -rf "$folder"
  mkdir -p "$folder" || die "cannot write $folder"
  local pod
  # Indented lines are code; "=head" lines keep their text, other commands go; X<text> becomes text. perltoc repeats all the headings.
  find "$scratch" -name '*.pod' ! -name perltoc.pod | sort | while read -r pod; do
    sed -E -e '/^[ \t]/d' -e '/^=(begin|end|over|back|cut|for|encoding|pod)/d' -e 's/^=(head[1-6]|item) *//' \
      -e ':a;s/[A-Z]<<+ ([^<>]*) >>+/\1/g;s/[A-Z]<([^<>|]*\|)?([^<>]*)>/\2/g;ta' "$pod" | cat -s >"$folder/$(basename "$pod" .pod).txt"
  done
  rm -rf "$scratch"
  touch "$folder/.complete"
}
