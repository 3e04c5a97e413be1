#!/usr/bin/env bash
# Runs `tessera train` on several ranks with mpirun.
#   ./launch/train.sh [-n RANKS] [--hostfile FILE] [--logs FOLDER] [--binary PATH] CONFIG.yaml [tessera train arguments]
# -n: unless given, with device cuda one a GPU (of this host; with --hostfile one a slot), else 1.
# --hostfile lists "host slots=N" lines (OpenMPI's format); with device cuda N is the number of the host's GPUs.
# --logs: what each rank writes is also kept in FOLDER/1/rank.R/stdout and stderr.
# Ctrl-C or SIGTERM: every rank finishes its step, a checkpoint is written, and the run ends; continue with --resume. A second one ends it at once.
# Variables NCCL_*, OMP_* and TESSERA_* go to every rank on every host. Without OMP_NUM_THREADS each rank takes its share of the host's cores.
set -euo pipefail
. "$(dirname "$0")/lib.sh"

ranks='' hostfile='' logs='' binary=''
while [ $# -gt 0 ]; do
  case $1 in -n | --hostfile | --logs | --binary) [ -n "${2:-}" ] || die "$1 needs a value. See --help" 2 ;; esac
  case $1 in
    -n) ranks=$2; shift 2 ;;
    --hostfile) hostfile=$2; shift 2 ;;
    --logs) logs=$2; shift 2 ;;
    --binary) binary=$2; shift 2 ;;
    -h|--help) sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) break ;;
  esac
done
[[ -z $ranks || $ranks =~ ^[1-9][0-9]*$ ]] || die "-n $ranks: expected a number of ranks, 1 or more" 2
[ $# -ge 1 ] || die "no CONFIG.yaml given. See --help" 2
[ -z "$hostfile" ] || [ -r "$hostfile" ] || die "--hostfile $hostfile: no such file" 2
if [ -z "$binary" ]; then
  for binary in "$root"/build/release/tessera "$root"/build/ci/tessera; do [ -x "$binary" ] && break; done
fi
[ -x "$binary" ] || die "no tessera binary at $binary. Build it: ./launch/quickstart.sh, or cmake --preset release && cmake --build --preset release" 2
command -v mpirun >/dev/null || die "mpirun is not here. apt-get install openmpi-bin" 2

# device_of CONFIG.yaml [tessera train arguments]: "cuda" or "cpu"; nothing for a configuration with mistakes, which the run itself will report.
device_of() {
  local argument arguments=()
  for argument in "$@"; do [ "$argument" = --resume ] || arguments+=("$argument"); done
  "$binary" config "${arguments[@]}" 2>/dev/null | sed -n 's/^device: *//p'
}

# The number of GPUs that a process on this host sees, or 1 where there is none: that one rank will say so.
visible_gpus() {
  local list=''
  if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
    list=${CUDA_VISIBLE_DEVICES//,/$'\n'}
  elif command -v nvidia-smi >/dev/null; then
    list=$(nvidia-smi --list-gpus 2>/dev/null | grep '^GPU') || true
  fi
  wc -l <<<"$list"
}

arguments=(--bind-to none)
if [ -z "$ranks" ]; then
  ranks=1
  if [ "$(device_of "$@" || true)" = cuda ]; then
    if [ -n "$hostfile" ]; then ranks=''; else ranks=$(visible_gpus); fi
  fi
fi
[ -z "$ranks" ] || arguments+=(-n "$ranks")
if [ -n "$hostfile" ]; then arguments+=(--hostfile "$hostfile"); else arguments+=(--oversubscribe); fi
[ -z "$logs" ] || arguments+=(--output-filename "$logs")
for variable in $(compgen -e); do
  case $variable in NCCL_* | OMP_* | TESSERA_*) arguments+=(-x "$variable") ;; esac
done

# mpirun answers Ctrl-C and SIGTERM by killing the ranks a second later. So it runs out of the terminal's reach, and what comes here is passed
# on as SIGUSR1, which mpirun hands to every rank and the ranks take as a request to stop in order.
setsid mpirun "${arguments[@]}" "$binary" train "$@" &
job=$!
# shellcheck disable=SC2317  # the trap calls it
stop() {
  if [ -z "${stopping:-}" ]; then
    stopping=1
    printf '\ntrain.sh: %s: the ranks finish their step and write a checkpoint; once more ends them at once\n' "$1" >&2
    kill -USR1 "$job"
  else
    kill -TERM "$job"
  fi
}
trap 'stop Ctrl-C' INT
trap 'stop SIGTERM' TERM
status=0
while kill -0 "$job" 2>/dev/null; do
  status=0
  wait "$job" || status=$?
done
exit "$status"
