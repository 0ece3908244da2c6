#!/bin/bash
# Tokens per second and peak memory under each strategy, at 1B on this node's GPUs: bash recipes/cluster/measure.sh FOLDER
# Further flags are those of fit, for instance where data and tokenizer lie. By environment: RUN, a config of configs
# (cola_1b), and STRATEGIES.
# On a CPU: RUN=quickstart STRATEGIES='ddp fsdp2' bash recipes/cluster/measure.sh FOLDER --trainer.devices 2
set -uo pipefail
folder=${1:?name a folder for the results}
shift
mkdir -p "$folder"
here="$(cd "$(dirname "$0")/../.." && pwd)"
all="ddp fsdp fsdp2 deepspeed_stage_1 deepspeed_stage_2 deepspeed_stage_3 deepspeed_stage_2_offload deepspeed_stage_3_offload"
for strategy in ${STRATEGIES:-$all}; do
  echo "== $strategy"
  python -m cola_lightning fit --config "$here/configs/${RUN:-cola_1b}.yaml" --run_dir "$folder/$strategy" \
    --trainer.strategy "$strategy" --trainer.max_steps 30 --trainer.log_every_n_steps 5 --trainer.limit_val_batches 0 \
    --trainer.enable_progress_bar false "$@" > "$folder/$strategy.log" 2>&1 || tail -n 1 "$folder/$strategy.log"
  rm -rf "$folder/$strategy/checkpoints" # gigabytes that nobody asked for
done
python - "$folder" <<'PYTHON'
import statistics, sys
from pathlib import Path
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

print("| | tokens/s, median after the first log | memory, GiB, the most |\n|---|---|---|")
for run in sorted(path for path in Path(sys.argv[1]).iterdir() if path.is_dir()):
    events = EventAccumulator(str(run)).Reload()
    tags = events.Tags()["scalars"]
    values = lambda tag: [event.value for event in events.Scalars(tag)] if tag in tags else []
    speeds, memory = values("train/tokens_per_second")[1:], values("memory/peak") or values("memory/host")
    if speeds and memory:
        print(f"| {run.name} | {statistics.median(speeds):,.0f} | {max(memory):.2f} |")
PYTHON
