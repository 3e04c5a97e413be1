#!/usr/bin/env bash
# From a bare Debian or Ubuntu machine to a trained softmax-free sparse GPT, within ten minutes on two cores, with or without a GPU:
# installs what is missing, builds, takes several MB of English text, trains a tokenizer and a small model, evaluates it, writes text.
#   ./launch/quickstart.sh [--corpus PATH] [--minutes M] [--device cpu|cuda] [--ranks N] [--output DIR] [--set key=value]...
# --corpus   your own text: a file or folder of .txt or .jsonl, plain, .gz or .zst    (default: the Perl manual, from the package perl-doc)
# --minutes  how long to train, about (default 3): the number of steps is set from the measured time of a few. A GPU trains a larger model, and
#            stops after ten passes over the text: a short text takes less than a minute
# --device   default: the GPU where there is one together with the CUDA Toolkit and NCCL, else the processor
# --ranks    MPI ranks: default 2 on the processor, 1 on a GPU (at most one a GPU)
# --output   folder for the tokenizer, the data and the run (default runs/quickstart); a run that was stopped there goes on
# --set      any configuration key, as in `tessera train`
set -euo pipefail
. "$(dirname "$0")/lib.sh"

corpus='' minutes=3 device='' ranks='' output="$root/runs/quickstart" sets=()
while [ $# -gt 0 ]; do
  case $1 in
    --corpus) corpus=${2:?"--corpus needs a path"}; shift 2 ;;
    --minutes) minutes=${2:?"--minutes needs a number"}; shift 2 ;;
    --device) device=${2:?"--device needs cpu or cuda"}; shift 2 ;;
    --ranks) ranks=${2:?"--ranks needs a number"}; shift 2 ;;
    --output) output=${2:?"--output needs a folder"}; shift 2 ;;
    --set) sets+=(--set "${2:?"--set needs key=value"}"); shift 2 ;;
    -h|--help) sed -n '2,12s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) die "$1: unknown argument. See --help" 2 ;;
  esac
done
[[ $minutes =~ ^[1-9][0-9]*$ ]] || die "--minutes $minutes: expected a whole number, 1 or more" 2
[[ $device =~ ^(cpu|cuda)?$ ]] || die "--device $device: expected cpu or cuda" 2
[[ -z $ranks || $ranks =~ ^[1-9][0-9]*$ ]] || die "--ranks $ranks: expected a number of ranks, 1 or more" 2
[ -z "$corpus" ] || [ -e "$corpus" ] || die "--corpus $corpus: no such file or folder" 2

install_packages "${tessera_packages[@]}"

# The GPU unless something is missing; asked for by name, what is missing is an error.
without_gpu() {
  [ "$device" != cuda ] || die "--device cuda: $1"
  say "Computing on the processor: $1"
  device=cpu
}
if [ "$device" != cpu ]; then
  lacking=$(cuda_missing)
  if [ "$(gpus)" = 0 ]; then
    without_gpu "nvidia-smi shows no GPU"
  elif [ "$(cuda_architecture | tr -d a)" -lt 80 ]; then
    without_gpu "the GPU is of compute capability $(cuda_architecture), and 80 (Ampere) or later is needed"
  elif [ -n "$lacking" ]; then
    without_gpu "there is a GPU, but no $lacking to build for it with"
  fi
fi

say "Building"
cuda=OFF
[ "$device" = cpu ] || cuda=ON
configure_and_build "$root/build/release" -DCMAKE_BUILD_TYPE=Release -DTESSERA_TESTS=OFF -DTESSERA_CUDA=$cuda \
  -DTESSERA_CUDA_ARCHITECTURES="$(cuda_architecture)" -- tessera
tessera="$root/build/release/tessera"
device_sets=()
if [ "$device" != cpu ]; then
  if problem=$("$tessera" bench gemm --device cuda --tokens 64 --width 64 --vocabulary 64 --seconds 0.001 2>&1 >/dev/null); then
    device=cuda
    say "Computing on the GPU: $(nvidia-smi -L | head -n 1 | sed 's/ (UUID.*//')"
    # A model that a GPU has something to do with; 30 M parameters. Its kernels compute tiles of 64 x 64 and heads of 64.
    device_sets=(--set device=cuda --set attention.tile.query=64 --set attention.tile.key=64 --set model.layers=8 --set model.heads=8 --set model.width=512
      --set model.context=512 --set train.tokens_per_step=32768 --set train.micro_batch=16 --set optimizer.lr=1.0e-3)
  else
    without_gpu "the GPU does not work: ${problem#tessera: error: }"
  fi
fi
[ "$device" != cpu ] || choose_blas "$tessera"
if [ -z "$ranks" ]; then ranks=2; [ "$device" = cpu ] || ranks=1; fi
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

field() { sed -n "s/^ *\"$1\": \([0-9]*\),\{0,1\}$/\1/p" | head -n 1; }  # of a JSON object, an integer on a line of its own
train() { "$root/launch/train.sh" -n "$ranks" --binary "$tessera" "$root/configs/quickstart.yaml" "${device_sets[@]}" --set "data.path=$data" "$@"; }

if [ ! -e "$run/config.yaml" ]; then
  say "Timing a few steps"
  trial=$(mktemp -d)
  train --set "run.dir=$trial/run" --set train.steps=6 --set optimizer.warmup=1 --set eval.every=0 --set eval.batches=1 "${sets[@]}" >"$trial/log" 2>&1 ||
    { cat "$trial/log" >&2; rm -rf "$trial"; die "the first steps failed (see above)"; }
  milliseconds=$(sed -n 's/.*"step_ms":\([0-9]*\).*/\1/p' "$trial/run/metrics.jsonl" | sort -n | sed -n 3p)
  rm -rf "$trial"
  steps=$((minutes * 60000 / (milliseconds > 0 ? milliseconds : 1)))
  [ "$steps" -ge 100 ] || steps=100
  if [ "$device" = cuda ]; then
    tokens=$("$tessera" plan "$root/configs/quickstart.yaml" "${device_sets[@]}" --set "data.path=$data" "${sets[@]}" --json)
    most=$(($(field data_tokens <<<"$tokens") * 10 / $(field tokens_per_step <<<"$tokens")))
    [ "$most" -ge 100 ] || most=100
    [ "$steps" -le "$most" ] || { steps=$most; say "Ten passes over this text are enough for it: --corpus takes more"; }
  fi
  say "Training on $device: $steps steps of about $milliseconds ms on $ranks rank(s)"
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
  metrics     $run/metrics.jsonl    tensorboard --logdir $output
  checkpoints $run/checkpoints
  binary      $tessera
Its softmax twin:  ./launch/train.sh -n $ranks $run/config.yaml --set attention.gate=softmax --set run.dir=$output/softmax
END
