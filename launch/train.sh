#!/usr/bin/env bash
# Runs `tessera train` on several ranks with mpirun.
#   ./launch/train.sh [-n RANKS] [--hostfile FILE] [--binary PATH] CONFIG.yaml [tessera train arguments]
# -n: 1 unless given. A hostfile lists "host slots=N" lines (OpenMPI's format).
# Ctrl-C or SIGTERM: every rank finishes its step, a checkpoint is written, and the run ends; continue with --resume. A second one ends it at once.
# OMP_NUM_THREADS, if set, is passed on; else each rank takes its share of the host's cores.
set -euo pipefail
. "$(dirname "$0")/lib.sh"

ranks=1 hostfile='' binary=''
while [ $# -gt 0 ]; do
  case $1 in
    -n) ranks=${2:?"-n needs a number"}; shift 2 ;;
    --hostfile) hostfile=${2:?"--hostfile needs a file"}; shift 2 ;;
    --binary) binary=${2:?"--binary needs a path"}; shift 2 ;;
    -h|--help) sed -n '2,6s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) break ;;
  esac
done
[[ $ranks =~ ^[1-9][0-9]*$ ]] || die "-n $ranks: expected a number of ranks, 1 or more" 2
[ $# -ge 1 ] || die "no CONFIG.yaml given. See --help" 2
[ -z "$hostfile" ] || [ -r "$hostfile" ] || die "--hostfile $hostfile: no such file" 2
if [ -z "$binary" ]; then
  for binary in "$root"/build/release/tessera "$root"/build/ci/tessera; do [ -x "$binary" ] && break; done
fi
[ -x "$binary" ] || die "no tessera binary at $binary. Build it: ./launch/quickstart.sh, or cmake --preset release && cmake --build --preset release" 2
command -v mpirun >/dev/null || die "mpirun is not here. apt-get install openmpi-bin" 2

arguments=(-n "$ranks" --bind-to none)
if [ -n "$hostfile" ]; then arguments+=(--hostfile "$hostfile"); else arguments+=(--oversubscribe); fi
[ -z "${OMP_NUM_THREADS:-}" ] || arguments+=(-x OMP_NUM_THREADS)

# mpirun answers Ctrl-C and SIGTERM by killing the ranks a second later. So it runs out of the terminal's reach, and what comes here is passed
# on as SIGUSR1, which mpirun hands to every rank and the ranks take as a request to stop in order.
setsid mpirun "${arguments[@]}" "$binary" train "$@" &
job=$!
stop() {
  if [ -z "${stopping:-}" ]; then stopping=1; kill -USR1 "$job"; else kill -TERM "$job"; fi
}
trap stop INT TERM
status=0
while kill -0 "$job" 2>/dev/null; do
  status=0
  wait "$job" || status=$?
done
exit "$status"
