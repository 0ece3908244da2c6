#!/bin/bash
# Measure all tables of recipes/benchmark/README.md in one call: bash recipes/benchmark/measure.sh FOLDER
# Further flags go to every measurement, and --peer module:callable to those of training. By
# environment: SIZE (1b), ROWS of a micro-batch (64), LARGE for a second size (7b; empty for none) and its LARGE_ROWS.
# On a CPU: SIZE=60m ROWS=4 LARGE= bash recipes/benchmark/measure.sh FOLDER --trainer.accelerator cpu \
#   --trainer.precision 32-true
set -euo pipefail
folder=${1:?name a folder for the results}
mkdir -p "$folder"
shift
size=${SIZE:-1b} rows=${ROWS:-64} large=${LARGE-7b} large_rows=${LARGE_ROWS:-16}
here="$(cd "$(dirname "$0")/../.." && pwd)"
configs="$here/configs"
peers=() flags=()
while [ $# -gt 0 ]; do
  if [ "$1" = --peer ]; then peers+=("$1" "$2"); shift 2; else flags+=("$1"); shift; fi
done

measure() {  # NAME, then the command line
  echo "== $1"
  python -m cola_lightning benchmark "${@:2}" "${flags[@]}" --json "$folder/$1.json" | tee "$folder/$1.txt"
}

# One path at a time, compared with the plain run
echo '{model: {fused_projections: true}}' > "$folder/fused.yaml"
echo '{model: {loss_chunk_size: 2048}}' > "$folder/chunks.yaml"
echo '{model: {compile: true}}' > "$folder/compile.yaml"

fast=$configs/fast.yaml
measure training --config "$configs/cola_$size.yaml" --config "$fast" \
  --against "$configs/llama_$size.yaml,$fast" --against "$configs/cola_m_$size.yaml,$fast" "${peers[@]}" \
  --data.batch_size "$rows"
measure paths --config "$configs/cola_$size.yaml" --against "$configs/cola_$size.yaml,$folder/fused.yaml" \
  --against "$configs/cola_$size.yaml,$folder/chunks.yaml" --against "$configs/cola_$size.yaml,$folder/compile.yaml" \
  --against "$configs/cola_$size.yaml,$fast" --data.batch_size "$rows"
measure paths_llama --config "$configs/llama_$size.yaml" --against "$configs/llama_$size.yaml,$folder/fused.yaml" \
  --against "$configs/llama_$size.yaml,$fast" --data.batch_size "$rows"
measure generation --generate 128 --config "$configs/cola_$size.yaml" --against "$configs/llama_$size.yaml" \
  --data.batch_size "$rows"
if [ -n "$large" ]; then
  measure "training_$large" --config "$configs/cola_$large.yaml" --config "$fast" \
    --against "$configs/llama_$large.yaml,$fast" --against "$configs/cola_m_$large.yaml,$fast" \
    --data.batch_size "$large_rows"
fi
