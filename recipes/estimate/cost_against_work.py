"""Measure and predict a step's time over tokens a row, layers and vocabulary, on this machine's processor.

python recipes/estimate/cost_against_work.py FOLDER [flags of fit]

Each of the three is varied by itself, from 256 tokens, 4 layers, a vocabulary of 4,096 and a hidden size of 256. Beside
the two times stand the FLOPs of a step. The table is printed, and written with a plot to FOLDER.
Nothing else should run beside it.
"""

import json
import subprocess
import sys
from pathlib import Path

BASE = {"tokens": 256, "layers": 4, "vocabulary": 4096}
VARIED = {
    "tokens": (256, 512, 1024, 2048, 4096, 8192),
    "layers": (2, 4, 8, 16),
    "vocabulary": (4096, 8192, 32768, 131072),
}


def flags_of(work: dict[str, int], more: list[str]) -> list[str]:
    """Return the flags of a run of 8,192 tokens a step."""
    return [
        "--config=configs/cola_60m.yaml",
        "--trainer.accelerator=cpu",
        "--trainer.devices=1",
        "--model.hidden_size=256",
        "--model.intermediate_size=688",
        "--model.num_attention_heads=4",
        "--model.projection.init_args.rank=64",
        f"--model.num_hidden_layers={work['layers']}",
        f"--model.vocab_size={work['vocabulary']}",
        f"--model.max_position_embeddings={work['tokens']}",
        f"--data.sequence_length={work['tokens']}",
        f"--data.batch_size={8192 // work['tokens']}",
        f"--data.global_batch_size={8192 // work['tokens']}",
        *more,
    ]


def run(command: list[str], file: Path) -> dict:
    """Run a command of the package that writes JSON to ``file``, and return that."""
    subprocess.run(
        [sys.executable, "-m", "cola_lightning", *command, f"--json={file}"], check=True, stdout=subprocess.DEVNULL
    )
    return json.loads(file.read_text())


def main(folder: Path, more: list[str]) -> None:
    """Measure, predict, print and draw."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(12, 4), layout="constrained")
    lines = ["| varied | value | GFLOPs of a step | measured, s | predicted, s | error |", "|---|---|---|---|---|---|"]
    for axes, (name, values) in zip(figure.subplots(1, 3), VARIED.items(), strict=True):
        measured, predicted = [], []
        for value in values:
            flags = flags_of(BASE | {name: value}, more)
            subject = run(["benchmark", *flags, "--rounds=3", "--steps=1", "--warmup=1"], folder / "benchmark.json")
            own = subject["subjects"][0]
            measured.append(own["seconds"]["step"])
            plans = run(["estimate", *flags, "--gpu=cpu"], folder / "estimate.json")
            predicted.append(plans[0]["speed"]["step_seconds"])
            error = predicted[-1] / measured[-1] - 1
            figures = f"{own['flops_step'] / 1e9:,.0f} | {measured[-1]:.3f} | {predicted[-1]:.3f} | {error:+.0%}"
            lines.append(f"| {name} | {value:,} | {figures} |")
            print(lines[-1], flush=True)
        axes.plot(values, measured, "o-", label="measured")
        axes.plot(values, predicted, "s--", label="predicted")
        axes.set(xscale="log", yscale="log", xlabel=name, ylabel="seconds of a step of 8,192 tokens")
        axes.legend()
    (folder / "cost_against_work.md").write_text("\n".join(lines) + "\n")
    figure.savefig(folder / "cost_against_work.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
