"""Predict how a run's speed grows with the number of GPUs, and what a misaligned size costs."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from rich.table import Table

from cola_lightning.costs.devices import Device, Network, device_of, network_named
from cola_lightning.costs.gpus import gpu_named
from cola_lightning.costs.run_costs import Run
from cola_lightning.costs.speed import Speed, predict
from cola_lightning.errors import InputError
from cola_lightning.tables import make_table, table_console

GOOD_ALIGNMENT = 16
"""Bytes to which the rows of a matrix are aligned where products are fast: CUTLASS loads 16 bytes at once, and NVIDIA's
"Matrix Multiplication Background User's Guide" advises multiples of 8 numbers in 16 bits for tensor cores."""
BETTER_MULTIPLE = 16
"""Numbers of which the proposed size is a multiple. Products in float8 need 16."""


@dataclass(frozen=True)
class Scaling:
    """Speed on some number of GPUs.

    Attributes:
        gpus: Number of GPUs.
        weak: Speed with the same micro-batches on each GPU, so that the batch grows.
        strong: Speed with the same rows of a step over all GPUs; None if they cannot be divided.
    """

    gpus: int
    weak: Speed
    strong: Speed | None


def scale(run: Run, device: Device, network: Network, numbers: Iterable[int]) -> list[Scaling]:
    """Predict a run on several numbers of GPUs.

    Strong scaling keeps the rows of a step. With fewer rows than a micro-batch for each GPU, the micro-batch shrinks.
    """
    rows = run.global_batch_size or run.batch_size * run.accumulate * run.gpus
    found = []
    for gpus in numbers:
        weak = replace(run, gpus=gpus, global_batch_size=None, accumulate=max(1, rows // (run.batch_size * run.gpus)))
        strong = None
        if rows % gpus == 0:
            size = max(n for n in range(1, min(run.batch_size, rows // gpus) + 1) if rows // gpus % n == 0)
            part = replace(run, gpus=gpus, global_batch_size=None, batch_size=size, accumulate=rows // gpus // size)
            strong = predict(part, device, network)
        found.append(Scaling(gpus, predict(weak, device, network), strong))
    return found


def scaling_table(scaled: list[Scaling]) -> Table:
    """Make a table of weak and strong scaling. Efficiency is the speed of a GPU as a share of that on the fewest."""
    weak_of_one, strong_of_one = (
        next((s.tokens_per_second / s.gpus for s in speeds if s is not None), 0)
        for speeds in ((each.weak for each in scaled), (each.strong for each in scaled))
    )
    rows = []
    for each in scaled:
        strong = each.strong
        weak_rate = each.weak.tokens_per_second
        rows.append(
            (
                f"{each.gpus:,}",
                f"{each.weak.step_seconds * 1e3:,.1f}",
                f"{weak_rate:,.0f}",
                f"{weak_rate / each.gpus / weak_of_one:.0%}",
                f"{each.weak.mfu:.1%}",
                f"{strong.step_seconds * 1e3:,.1f}" if strong else "-",
                f"{strong.tokens_per_second:,.0f}" if strong else "-",
                f"{strong.tokens_per_second / each.gpus / strong_of_one:.0%}" if strong else "-",
            )
        )
    columns = ("GPUs", "weak: ms", "tokens/s", "efficiency", "MFU", "strong: ms", "tokens/s", "efficiency")
    return make_table("Scaling: weak (batch grows with the GPUs) and strong (batch of the run)", columns, rows)


def plot_scaling(scaled: list[Scaling], file: str) -> None:
    """Draw tokens per second over GPUs, weak and strong, beside a straight line.

    Raises:
        InputError: If matplotlib is not installed, or cannot write the file.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("--plot needs matplotlib; install it with: pip install 'cola-lightning[plots]'") from None
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    gpus = [each.gpus for each in scaled]
    first = scaled[0].weak.tokens_per_second / gpus[0]
    axes.plot(gpus, [first * number for number in gpus], ":", color="gray", label="linear")
    axes.plot(gpus, [each.weak.tokens_per_second for each in scaled], "o-", label="weak scaling")
    strong = [(each.gpus, each.strong.tokens_per_second) for each in scaled if each.strong]
    axes.plot(*zip(*strong, strict=True), "s-", label="strong scaling")
    axes.set(xscale="log", yscale="log", xlabel="GPUs", ylabel="tokens per second (predicted)")
    axes.legend()
    try:
        figure.savefig(file)
    except (OSError, ValueError) as error:
        raise InputError(f"--plot {Path(file)}: {error}") from None


def misalignment(run: Run, device: Device, network: Network, step_seconds: float) -> str | None:
    """Describe a misaligned intermediate size, its price and the nearest better one; None if it is aligned.

    Args:
        run: The run.
        device, network: Where it runs.
        step_seconds: Predicted seconds of its step.
    """
    width = (run.layout.autocast or run.layout.computed).itemsize
    size = run.config.intermediate_size
    if not device.multiprocessors or width > 2 or size * width % GOOD_ALIGNMENT == 0:
        return None
    better = math.ceil(size / BETTER_MULTIPLE) * BETTER_MULTIPLE
    build = partial(run.build, intermediate_size=better)
    other = predict(replace(run, build=build), device, network)
    return (
        f"! intermediate_size {size}: its rows begin at multiples of {(size * width) & -(size * width)} bytes, where "
        f"products are slow. A step is predicted to take {step_seconds * 1e3:.1f} ms; with the nearest good size, "
        f"--model.intermediate_size {better}, {other.step_seconds * 1e3:.1f} ms"
    )


def report_scaling(run: Run, gpu_name: str, network_name: str, numbers: list[int], file: str | None) -> None:
    """Print the table of scaling, and draw it to a file if one is named."""
    scaled = scale(run, device_of(gpu_named(gpu_name)), network_named(network_name), numbers)
    table_console().print(scaling_table(scaled))
    if file:
        plot_scaling(scaled, file)
