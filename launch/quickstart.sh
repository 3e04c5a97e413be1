#!/usr/bin/env bash
# From a bare Debian or Ubuntu machine to a trained softmax-free sparse GPT, within ten minutes on two cores, no GPU:
# installs what is missing, builds, takes several MB of English text, trains a tokenizer and a small model on two MPI ranks, evaluates it, writes text.
#   ./launch/quickstart.sh [--corpus PATH] [--minutes M] [--ranks N] [--output DIR] [--set key=value]...
# --corpus   your own text: a file or folder of .txt or .jsonl, plain, .gz or .zst    (default: the Perl manual, from the package perl-doc)
# --minutes  how long to train, about (default 3): the number of steps is set from the measured time of a few
# --output   folder for the tokenizer, the data and the run (default runs/quickstart); a run that was stopped there goes on
# --set      any configuration key, as in `tessera train`
set -euo pipefail
. "$(dirname "$0")/lib.sh"

corpus='' minutes=3 ranks=2 output="$root/runs/quickstart" sets=()
while [ $# -gt 0 ]; do
  case $1 in
    --corpus) corpus=${2:?"--corpus needs a path"}; shift 2 ;;
    --minutes) minutes=${2:?"--minutes needs a number"}; shift 2 ;;
    --ranks) ranks=${2:?"--ranks needs a number"}; shift 2 ;;
    --output) output=${2:?"--output needs a folder"}; shift 2 ;;
    --set) sets+=(--set "${2:?"--set needs key=value"}"); shift 2 ;;
    -h|--help) sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) die "$1: unknown argument. See --help" 2 ;;
  esac
done
[[ $minutes =~ ^[1-9][0-9]*$ ]] || die "--minutes $minutes: expected a whole number, 1 or more" 2
[[ $ranks =~ ^[1-9][0-9]*$ ]] || die "--ranks $ranks: expected a number of ranks, 1 or more" 2
[ -z "$corpus" ] || [ -e "$corpus" ] || die "--corpus $corpus: no such file or folder" 2

install_packages "${tessera_packages[@]}"

say "Building"
configure_and_build "$root/build/release" -DCMAKE_BUILD_TYPE=Release -DTESSERA_TESTS=OFF -DTESSERA_CUDA="${TESSERA_CUDA:-OFF}" -- tessera
tessera="$root/build/release/tessera"
mkdir -p "$output" || die "cannot write --output $output"
run="$output/run" data="$output/data" vocabulary="$output/tokenizer.json"

if [ ! -e "$data/dataset.json" ]; then
  if [ -z "$corpus" ]; then
    say "Text: the Perl manual"
    corpus="$output/corpus"
    fetch_text "$corpus"
  fi
  say "Tokenizer: 4,096 byte-level BPE tokens learned from the text"
  [ -e "$vocabulary" ] || "$tessera" tokenizer train --input "$corpus" --vocabulary 4096 --output "$vocabulary"
  say "Data"
  "$tessera" prepare --input "$corpus" --tokenizer "bpe:$vocabulary" --output "$data" --validation-fraction 0.05
fi

train() { "$root/launch/train.sh" -n "$ranks" --binary "$tessera" "$root/configs/quickstart.yaml" --set "data.path=$data" "$@"; }

if [ ! -e "$run/config.yaml" ]; then
  say "Timing a few steps"
  trial=$(mktemp -d)
  train --set "run.dir=$trial/run" --set train.steps=6 --set optimizer.warmup=1 --set eval.every=0 --set eval.batches=1 "${sets[@]}" >"$trial/log" 2>&1 ||
    { cat "$trial/log" >&2; rm -rf "$trial"; die "the first steps failed (see above)"; }
  milliseconds=$(sed -n 's/.*"step_ms":\([0-9]*\).*/\1/p' "$trial/run/metrics.jsonl" | sort -n | sed -n 3p)
  rm -rf "$trial"
  steps=$((minutes * 60000 / (milliseconds > 0 ? milliseconds : 1)))
  [ "$steps" -ge 100 ] || steps=100
  say "Training: $steps steps of about $milliseconds ms on $ranks ranks"
  train --set "run.dir=$run" --set "train.steps=$steps" "${sets[@]}"
else
  say "Training: going on in $run"
  "$root/launch/train.sh" -n "$ranks" --binary "$tessera" "$run/config.yaml" --resume
fi

say "Evaluation"
"$tessera" eval "$run" --data "$data"

say "Text from the model"
"$tessera" generate "$run" --prompt "The function returns" --tokens 120 --temperature 0.7 --top-k 40 --seed 1

say "Where everything is"
cat <<END
  text        ${corpus:-$output/corpus}
  data        $data           tessera inspect $data
  run         $run            tessera inspect $run
  metrics     $run/metrics.jsonl
  checkpoints $run/checkpoints
  binary      $tessera
Its softmax twin:  ./launch/train.sh -n $ranks $run/config.yaml --set attention.gate=softmax --set run.dir=$output/softmax
END
