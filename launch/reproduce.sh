#!/usr/bin/env bash
# The release's run from text to a table beside its figures, at three scales: prepare, train, evaluate, the same for the softmax twin, compare. Each
# stage that is done is not done again, and one that was stopped goes on: run the same command again.
#   ./launch/reproduce.sh [--scale full|small|tiny] [--corpus PATH] [--tokenizer SPEC] [--core BUNDLE] [--device cpu|cuda] [--ranks N]
#                         [--output DIR] [--price DOLLARS] [--plan] [--binary PATH] [--set key=value]...
# --scale      full: 354 M parameters, 22,000 steps of 524,288 tokens; hours on GPUs. small: 30 M, 126 M tokens; minutes on one GPU. tiny (default):
#              0.5 M, minutes on two processor cores
# --corpus     files or a folder, as `tessera prepare` takes them. full: FineWeb-Edu's Parquet files (needs Arrow: see README); small: any English text,
#              40 M tokens or more; tiny: default the Perl manual
# --tokenizer  full: gpt2:DIR (GPT-2's vocabulary files); small, tiny: as well, or by default 16,384 or 2,048 tokens learned from the text
# --core       folder of the CORE evaluation bundle (core.yaml, eval_meta_data.csv, eval_data/); without it CORE is left out
# --price      dollars for a GPU hour, for the estimate of full (default 3)
# --plan       print what would be done, with hours and cost for full, and end
# --set        any configuration key, for both runs. --binary: a built tessera instead of building
set -euo pipefail
. "$(dirname "$0")/lib.sh"

scale=tiny corpus='' tokenizer='' core='' device='' ranks='' output='' price=3 plan='' binary='' sets=()
while [ $# -gt 0 ]; do
  case $1 in
    --scale) scale=${2:?"--scale needs full, small or tiny"}; shift 2 ;;
    --corpus) corpus=${2:?"--corpus needs a path"}; shift 2 ;;
    --tokenizer) tokenizer=${2:?"--tokenizer needs gpt2:DIR, bpe:FILE or bytes"}; shift 2 ;;
    --core) core=${2:?"--core needs a folder"}; shift 2 ;;
    --device) device=${2:?"--device needs cpu or cuda"}; shift 2 ;;
    --ranks) ranks=${2:?"--ranks needs a number"}; shift 2 ;;
    --output) output=${2:?"--output needs a folder"}; shift 2 ;;
    --price) price=${2:?"--price needs dollars"}; shift 2 ;;
    --binary) binary=${2:?"--binary needs a path"}; shift 2 ;;
    --plan) plan=1; shift ;;
    --set) sets+=(--set "${2:?"--set needs key=value"}"); shift 2 ;;
    -h|--help) sed -n '2,15s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) die "$1: unknown argument. See --help" 2 ;;
  esac
done
[[ $scale =~ ^(full|small|tiny)$ ]] || die "--scale $scale: expected full, small or tiny" 2
[[ $device =~ ^(cpu|cuda)?$ ]] || die "--device $device: expected cpu or cuda" 2
[[ -z $ranks || $ranks =~ ^[1-9][0-9]*$ ]] || die "--ranks $ranks: expected a number of ranks, 1 or more" 2
[[ $price =~ ^[0-9]+(\.[0-9]+)?$ ]] || die "--price $price: expected dollars, such as 2.50" 2
[ -z "$core" ] || [ -e "$core/core.yaml" ] || die "--core $core: there is no core.yaml in it. Expected the CORE bundle's folder: core.yaml, eval_meta_data.csv, eval_data/" 2
[ -z "$corpus" ] || [ -e "$corpus" ] || die "--corpus $corpus: no such file or folder" 2
output=${output:-$root/runs/reproduce-$scale}
data="$output/data" vocabulary="$output/tokenizer.json" config="$root/configs/reproduce/$scale.yaml"
if [ ! -e "$data/dataset.json" ] && [ -z "$plan" ]; then
  case $scale in
    full) [ -n "$corpus" ] || die "--scale full needs --corpus: the folder of FineWeb-Edu's Parquet files (HuggingFaceFW/fineweb-edu, 12 G tokens or more of it)" 2
          [ -n "$tokenizer" ] || die "--scale full needs --tokenizer gpt2:DIR, a folder with GPT-2's vocab.bpe and encoder.json (or merges.txt and vocab.json)" 2 ;;
    small) [ -n "$corpus" ] || die "--scale small needs --corpus: English text of 40 M tokens or more (about 180 MB), as files or a folder" 2 ;;
  esac
fi
[ -n "$device" ] || { device=cuda; [ "$scale" != tiny ] || device=cpu; }
if [ "$device" = cuda ] && [ -z "$plan" ] && [ "$(gpus)" = 0 ]; then
  die "--scale $scale computes on GPUs, and nvidia-smi shows none here. --plan says how long it takes; --scale tiny needs no GPU"
fi
[ -n "$ranks" ] || { ranks=2; [ "$device" = cpu ] || ranks=$(gpus); }

if [ -z "$binary" ]; then
  install_packages "${tessera_packages[@]}"
  say "Building"
  cuda=OFF
  [ "$device" = cpu ] || [ -n "$plan" ] || cuda=ON
  configure_and_build "$root/build/release" -DCMAKE_BUILD_TYPE=Release -DTESSERA_TESTS=OFF -DTESSERA_CUDA=$cuda \
    -DTESSERA_CUDA_ARCHITECTURES="$(cuda_architecture)" -- tessera
  binary="$root/build/release/tessera"
fi
[ -x "$binary" ] || die "--binary $binary: no such program" 2
[ "$device" != cpu ] || [ -n "$plan" ] || choose_blas "$binary"
sets=(--set "device=$device" --set "data.path=$data" "${sets[@]}")

# estimate: hours and dollars of both runs on 1, 4 and 8 GPUs. Tokens a second: measured now on the GPU that is there, else what one H200 was measured to
# do (tests/bench/RESULTS.md: 354 M sparse 231 k while every tile is active, softmax 220 k; 30 M 2.18 M and 1.98 M; the slower of the two for both).
estimate() {
  local planned tokens speed=220000 source='one H200, as in tests/bench/RESULTS.md' measured
  [ "$scale" = full ] || speed=1980000
  planned=$("$binary" plan "$config" "${sets[@]}" --set data.path= --set model.vocabulary=50257 --json) || exit $?
  tokens=$(sed -n 's/^ *"tokens": \([0-9]*\).*/\1/p' <<<"$planned")
  if [ "$(gpus)" != 0 ]; then
    measured=$("$binary" bench step --config "$config" "${sets[@]}" --set data.path= --set model.vocabulary=50257 --set attention.gate=softmax --seconds 3 --json 2>/dev/null |
      sed -n 's/^ *"tokens_per_s": \([0-9]*\).*/\1/p' | head -n 1) || true
    [ -z "$measured" ] || { speed=$measured; source='measured now, on this GPU'; }
  fi
  say "Prediction: $tokens tokens for each of two runs (sparse, softmax twin) at $speed tokens/s a GPU ($source)"
  awk -v tokens="$tokens" -v speed="$speed" -v price="$price" 'BEGIN {
    for (n = 1; n <= 8; n = n == 1 ? 4 : n + 4) {
      h = 1.03 * tokens / speed / n / 3600
      printf "  %d GPU%s  %6.1f hours a run, %6.1f for both, %7.0f dollars at %.2f a GPU hour\n", n, n == 1 ? " " : "s", h, 2 * h, 2 * h * n * price, price
    }
    print "  Assumed: speed grows with the GPUs (gradients are exchanged beside the backward pass), 3 % for evaluation and checkpoints; preparation comes on top."
  }'
}
[ "$scale" = tiny ] || estimate
if [ -n "$plan" ]; then
  say "Stages"
  on="$ranks rank(s), $device"
  [ "$ranks" != 0 ] || on="a rank a GPU (none is here)"
  printf '  %s\n' "prepare   ${corpus:-(--corpus)} -> $data" "train     $config -> $output/sparse, $on" "train     its softmax twin -> $output/softmax" \
    "evaluate  both on the whole validation split$( [ -z "$core" ] || echo ', and CORE')" "compare   both and the release's figures"
  exit 0
fi
mkdir -p "$output" || die "cannot write --output $output"

if [ ! -e "$data/dataset.json" ]; then
  if [ -z "$corpus" ]; then
    say "Text: the Perl manual"
    corpus="$output/corpus"
    fetch_text "$corpus"
  fi
  if [ -z "$tokenizer" ]; then
    tokenizer="bpe:$vocabulary"
    tokens=2048
    [ "$scale" = tiny ] || tokens=16384
    say "Tokenizer: $tokens byte-level BPE tokens learned from the text"
    [ -e "$vocabulary" ] || "$binary" tokenizer train --input "$corpus" --vocabulary "$tokens" --output "$vocabulary"
  fi
  say "Data"
  resume=()
  [ ! -e "$data/.prepare/journal.json" ] || resume=(--resume)
  fraction=0.01
  [ "$scale" != full ] || fraction=0.001
  [ "$scale" != tiny ] || fraction=0.05
  "$binary" prepare --input "$corpus" --tokenizer "$tokenizer" --output "$data" --validation-fraction "$fraction" "${resume[@]}"
fi

# run NAME CONFIG [--set key=value]...: trains, unless it is done, and evaluates the newest checkpoint, unless that is done.
run() {
  local name=$1 from=$2 folder="$output/$1" before
  shift 2
  say "Training: $name"
  before=$(ls "$folder/checkpoints" 2>/dev/null || true)
  if [ -e "$folder/config.yaml" ]; then
    "$root/launch/train.sh" -n "$ranks" --binary "$binary" "$folder/config.yaml" --resume
  else
    "$root/launch/train.sh" -n "$ranks" --binary "$binary" "$from" "$@" --set "run.dir=$folder"
  fi
  "$binary" compare "$folder" --no-release --json | grep -q '"finished": true' || die "training of $name was stopped. The same command again goes on"
  # Results of an earlier checkpoint do not stand for this one.
  [ "$before" = "$(ls "$folder/checkpoints")" ] || rm -f "$folder/eval.json" "$folder/core.json"
  if [ ! -e "$folder/eval.json" ]; then
    say "Evaluation: $name"
    on_ranks eval "$folder" --data "$data" --output "$folder/eval.json"
  fi
  if [ -n "$core" ] && [ ! -e "$folder/core.json" ]; then
    say "CORE: $name"
    on_ranks eval "$folder" --core "$core" --output "$folder/core.json"
  fi
}
on_ranks() { mpirun --bind-to none --oversubscribe -n "$ranks" "$binary" "$@"; }
run sparse "$config" "${sets[@]}"
# From the configuration that the sparse run has, whatever this release's says by now.
run softmax "$output/sparse/config.yaml" --set attention.gate=softmax

say "Beside the release"
"$binary" compare "$output/sparse" "$output/softmax" | tee "$output/compare.txt"
[ -n "$core" ] || echo "CORE was left out: --core BUNDLE evaluates it (a folder with core.yaml, eval_meta_data.csv and eval_data/)."
