"""Measure and predict a step's time over tokens a row, layers and vocabulary, on this machine's processor.

python recipes/estimate/cost_against_work.py FOLDER [--rounds 3] [--tokens 8192] [--busy] [flags of fit]

Each of the three is varied by itself, from 256 tokens a row, 4 layers and a vocabulary of 4,096; CoLA, hidden size 256,
a step of 8,192 tokens, uncompiled. All networks take turns in every round. A step's time should be a + b x in each: of
a row's tokens b is attention's, since the tokens of a step stay; of layers and vocabulary it is theirs. The table
compares the measured times with the line that fits them best. The products are in bf16 where the processor multiplies
it, else in float32. The table is printed, and written with a plot and all figures as JSON to FOLDER.
Nothing else should run beside it; it then takes about four minutes on two cores.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
from predicted_and_measured import CONFIGS, step_seconds

from cola_lightning.benchmark import PackageModel
from cola_lightning.benchmark.clock import count_processor_time
from cola_lightning.benchmark.report import processor
from cola_lightning.benchmark.training import turns
from cola_lightning.cli.commands.benchmark import ONE_DEVICE
from cola_lightning.cli.lightning_cli import CLI, Settings
from cola_lightning.costs.plan import plan
from cola_lightning.costs.processor import measure_processor, on_processor
from cola_lightning.costs.run_costs import Run
from cola_lightning.costs.speed import predict
from cola_lightning.distributed.precision import multiplies_bf16
from cola_lightning.provenance import commit

BASE = {"tokens a row": 256, "layers": 4, "vocabulary": 4096}
VARIED = {
    "tokens a row": (256, 512, 1024, 2048, 4096, 8192),
    "layers": (2, 4, 8, 16),
    "vocabulary": (4096, 8192, 32768, 131072),
}


def flags_of(work: dict[str, int], tokens: int, more: list[str]) -> list[str]:
    """Return the flags of a run of ``tokens`` tokens a step."""
    length, rows = work["tokens a row"], max(1, tokens // work["tokens a row"])
    return [
        f"--config={CONFIGS / 'cola_60m.yaml'}",
        "--trainer.accelerator=cpu",
        f"--trainer.precision={'bf16-true' if multiplies_bf16() else '32-true'}",
        "--model.hidden_size=256",
        "--model.intermediate_size=688",
        "--model.num_attention_heads=4",
        "--model.projection.init_args.rank=64",
        "--model.loss_chunk_size=1024",  # logits of 131,072 ids for all tokens would take gigabytes
        f"--model.num_hidden_layers={work['layers']}",
        f"--model.vocab_size={work['vocabulary']}",
        f"--model.max_position_embeddings={length}",
        f"--data.sequence_length={length}",
        f"--data.batch_size={rows}",
        f"--data.global_batch_size={rows}",
        *more,
        *ONE_DEVICE,
    ]


def name_of(work: dict[str, int]) -> str:
    """Name an amount of work."""
    return ", ".join(f"{amount:,} {kind}" for kind, amount in work.items())


def networks(tokens: int, more: list[str]) -> tuple[list[PackageModel], list[Run]]:
    """Make the network of every amount of work, named by its three sizes, to be measured; and its run."""
    subjects: dict[str, PackageModel] = {}
    runs = []
    for varied, values in VARIED.items():
        for value in values:
            work = BASE | {varied: value}
            name = name_of(work)
            if name in subjects:  # the base
                continue
            flags = flags_of(work, tokens, more)
            cli, planned = CLI(flags, run=False), Settings(flags, run=False)
            subjects[name] = PackageModel(name, cli.trainer, cli.model, cli.datamodule)
            runs.append(on_processor(plan(planned.model, planned.datamodule, planned.trainer, 1).run))
    return list(subjects.values()), runs


def measure(subjects: list[PackageModel], runs: list[Run], rounds: int) -> dict[str, dict[str, Any]]:
    """Measure every network by turns, and predict it from a measurement of the processor at its tokens a row.

    Returns:
        By name: seconds of each round, their median, the predicted seconds, and the FLOPs of a step.
    """
    run_of = dict(zip((subject.name for subject in subjects), runs, strict=True))
    results: dict[str, dict[str, Any]] = {name: {"rounds": []} for name in run_of}
    devices: dict[int, Any] = {}
    for number, subject in turns(subjects, rounds):
        run, result = run_of[subject.name], results[subject.name]
        if not number:
            length = run.sequence_length
            if length not in devices:
                dtype = run.layout.autocast or run.layout.computed
                devices[length] = measure_processor(dtype, length, run.config.head_dim)
            result["predicted"] = predict(run, devices[length]).step_seconds
            result["flops"] = run.flops.hardware
            subject.step()  # not timed
        result["rounds"].append(step_seconds(subject))
    for result in results.values():
        result["seconds"] = statistics.median(result["rounds"])
    return results


def line_through(values: tuple[int, ...], seconds: list[float]) -> list[float]:
    """Return a + b x at every value, for the line whose largest relative errors are least in the mean square."""
    x, y = np.array(values, float), np.array(seconds)
    # Dividing both sides by y makes every error relative.
    factors, *_ = np.linalg.lstsq(np.stack([1 / y, x / y], axis=1), np.ones_like(y), rcond=None)
    return [float(factors[0] + factors[1] * value) for value in x]


def write(results: dict[str, dict[str, Any]], tokens: int, heading: str, folder: Path) -> None:
    """Print and write the table, and draw the plot."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    lines = [
        heading,
        "",
        "| varied | value | GFLOPs of a step | measured, s (range) | a line | deviation | predicted, s | error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    worst = {}
    for axes, (varied, values) in zip(figure.subplots(1, 3), VARIED.items(), strict=True):
        found = [results[name_of(BASE | {varied: value})] for value in values]
        line = line_through(values, [each["seconds"] for each in found])
        deviations = [each["seconds"] / straight - 1 for each, straight in zip(found, line, strict=True)]
        worst[varied] = max(deviations, key=abs)
        for value, each, straight, deviation in zip(values, found, line, deviations, strict=True):
            seconds = f"{each['seconds']:.3f} ({min(each['rounds']):.3f} to {max(each['rounds']):.3f})"
            error = each["predicted"] / each["seconds"] - 1
            lines.append(
                f"| {varied} | {value:,} | {each['flops'] / 1e9:,.0f} | {seconds} | {straight:.3f} | {deviation:+.0%} "
                f"| {each['predicted']:.3f} | {error:+.0%} |"
            )
        axes.plot(values, [each["seconds"] for each in found], "o", label="measured")
        axes.plot(values, line, "-", label=f"a + b x, at most {max(map(abs, deviations)):.0%} off")
        axes.plot(values, [each["predicted"] for each in found], "s--", alpha=0.6, label="predicted")
        axes.set(xlabel=varied, ylabel=f"seconds of a step of {tokens:,} tokens", xlim=(0, None), ylim=(0, None))
        axes.locator_params("x", nbins=5)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.legend()
    lines += ["", "Largest deviation from a line: " + ", ".join(f"{k} {v:+.0%}" for k, v in worst.items())]
    (folder / "cost_against_work.md").write_text("\n".join(lines) + "\n")
    figure.savefig(folder / "cost_against_work.png", dpi=100)
    print("\n".join(lines))


def main() -> None:
    """Measure, predict, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of a step")
    parser.add_argument("--busy", action="store_true", help="one thread, processor time, as predicted_and_measured.py")
    options, more = parser.parse_known_args()
    if options.busy:
        count_processor_time()
    options.folder.mkdir(parents=True, exist_ok=True)
    subjects, runs = networks(options.tokens, more)
    heading = (
        f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}, commit {commit()}, "
        f"{subjects[0].trainer.precision}, {options.tokens:,} tokens a step, {options.rounds} rounds"
        + ("; processor time, other work ran beside" if options.busy else "")
    )
    results = measure(subjects, runs, options.rounds)
    (options.folder / "cost_against_work.json").write_text(json.dumps(results, indent=2))
    write(results, options.tokens, heading, options.folder)


if __name__ == "__main__":
    main()
