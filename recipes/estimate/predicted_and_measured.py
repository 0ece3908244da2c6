"""Predict the steps of three sizes on this machine's processor, and measure them.

python recipes/estimate/predicted_and_measured.py FOLDER [--rounds 5] [--rows 8] [--busy] [flags of fit]

In every round the processor is measured first, as ``estimate --gpu cpu`` does, and then every network makes a step. So
other work on the machine disturbs predictions and steps alike. Shapes are those of 20M, 60M and 130M networks; the
largest has three layers. The products are in bf16 where the processor multiplies it, else in float32. Flags hold for
all networks: ``--config configs/fast.yaml`` compiles them. The table is printed, and written to FOLDER with all figures
as JSON. On a machine that does other work too, ``--busy`` uses one thread and counts its processor time.
"""

import argparse
import json
import statistics
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from cola_lightning.benchmark import PackageModel
from cola_lightning.benchmark.clock import Clock, count_processor_time
from cola_lightning.benchmark.report import processor, spread
from cola_lightning.benchmark.training import turns
from cola_lightning.cli.commands.benchmark import ONE_DEVICE
from cola_lightning.cli.lightning_cli import CLI, Settings
from cola_lightning.costs.plan import plan
from cola_lightning.costs.processor import measure_processor, on_processor
from cola_lightning.costs.run_costs import Run
from cola_lightning.costs.speed import predict
from cola_lightning.distributed.precision import multiplies_bf16
from cola_lightning.provenance import commit

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SIZES = {
    "20M": ("60m", ["--model.hidden_size=256", "--model.intermediate_size=688", "--model.num_attention_heads=4"]),
    "60M": ("60m", []),
    "130M, 3 layers": ("130m", ["--model.num_hidden_layers=3"]),
}
RANKS = {"20M": ["--model.projection.init_args.rank=64"]}
METHODS = {"full rank": "llama", "CoLA": "cola", "CoLA-M": "cola_m"}


def networks(flags: list[str]) -> tuple[list[PackageModel], dict[str, Run]]:
    """Make the network of each size and method, to be measured, and its run, to be predicted."""
    subjects, runs = [], {}
    for size, (config, shapes) in SIZES.items():
        for method, prefix in METHODS.items():
            ranks = RANKS.get(size, []) if prefix != "llama" else []
            settings = [f"--config={CONFIGS / f'{prefix}_{config}.yaml'}", *shapes, *ranks, *flags, *ONE_DEVICE]
            name = f"{size}: {method}"
            cli = CLI(settings, run=False)
            subjects.append(PackageModel(name, cli.trainer, cli.model, cli.datamodule))
            planned = Settings(settings, run=False)
            runs[name] = on_processor(plan(planned.model, planned.datamodule, planned.trainer, 1).run)
    return subjects, runs


def step_seconds(subject: PackageModel) -> float:
    """Time a step."""
    clock = Clock(subject.device)
    clock.mark("begin")
    subject.step()
    clock.mark("step")
    return clock.read()[0][1]


def measure(subjects: list[PackageModel], runs: dict[str, Run], rounds: int) -> list[dict[str, Any]]:
    """Measure the processor and all networks by turns.

    Returns:
        For each network its name, and the predicted and the measured tokens per second of each round.
    """
    results: dict[str, dict[str, Any]] = {
        name: {"name": name, "predicted": [], "measured": [], "parts": []} for name in runs
    }
    for number, subject in turns(subjects, rounds):
        run, result = runs[subject.name], results[subject.name]
        tokens = run.micro_batch_tokens
        if not number:
            subject.step()  # not timed: it compiles, and makes the optimizer's states
            subject.step()
        if subject is subjects[0]:
            dtype = run.layout.autocast or run.layout.computed
            device = measure_processor(dtype, run.sequence_length, run.config.head_dim)
        speed = predict(run, device)
        result["predicted"].append(tokens / speed.step_seconds)
        result["measured"].append(tokens / step_seconds(subject))
        result["parts"].append({part.name: part.seconds for part in speed.parts})
    return list(results.values())


def table(results: list[dict[str, Any]]) -> list[str]:
    """Make the lines of the table in Markdown: tokens per second, and the ratios of each size."""
    lines = ["| tokens/s | measured | predicted | predicted ÷ measured |", "|---|---|---|---|"]
    ratios = ["", "| ratio | measured | predicted | predicted ÷ measured |", "|---|---|---|---|"]

    def line(name: str, measured: list[float], predicted: list[float], form: str) -> str:
        errors = spread([p / m for p, m in zip(predicted, measured, strict=True)], ".2f")
        return f"| {name} | {spread(measured, form)} | {statistics.median(predicted):{form}} | {errors} |"

    def quotients(above: dict[str, Any], below: dict[str, Any], kind: str) -> list[float]:
        return [a / b for a, b in zip(above[kind], below[kind], strict=True)]

    for size, group in groupby(results, key=lambda each: each["name"].split(":")[0]):
        full, cola, cola_m = group
        lines += [line(each["name"], each["measured"], each["predicted"], ",.0f") for each in (full, cola, cola_m)]
        for name, above, below in (("CoLA ÷ full rank", cola, full), ("CoLA-M ÷ CoLA", cola_m, cola)):
            both = [quotients(above, below, kind) for kind in ("measured", "predicted")]
            ratios.append(line(f"{size}: {name}", *both, ".2f"))
    return lines + ratios


def main() -> None:
    """Measure, predict, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--busy", action="store_true", help="one thread, processor time")
    options, flags = parser.parse_known_args()
    if options.busy:
        count_processor_time()
    options.folder.mkdir(parents=True, exist_ok=True)
    precision = "bf16-true" if multiplies_bf16() else "32-true"
    rows = [f"--data.batch_size={options.rows}", f"--data.global_batch_size={options.rows}"]
    own = ["--trainer.accelerator=cpu", f"--trainer.precision={precision}", "--trainer.gradient_clip_val=0.5", *rows]
    subjects, runs = networks([*own, *flags])
    results = measure(subjects, runs, options.rounds)
    lines = [
        f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}, commit {commit()}, {precision}, "
        f"{options.rows} x {subjects[0].shape[1]} tokens, {' '.join(flags) or 'uncompiled'}; {options.rounds} rounds"
        + ("; processor time, other work ran beside" if options.busy else ""),
        "",
        *table(results),
    ]
    (options.folder / "predicted_and_measured.md").write_text("\n".join(lines) + "\n")
    (options.folder / "predicted_and_measured.json").write_text(json.dumps(results, indent=2))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
