"""Plot a comparison on logarithmic axes: held-out loss by budget, smoothed training loss, and the sweep."""

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from cola_lightning.compare.statistics import Interval, bootstrap_interval, smooth
from cola_lightning.output_files import write_whole

MOST_LINES = 12
"""Largest number of lines with a color and a label. The others are grey."""
SMOOTHED_OVER = 0.04
"""Share of a curve over which its moving mean is taken."""
GREY = "0.8"

Line = tuple[list[float], list[float], list[float], list[float]]
"""Values of x, the mean, and the ends of the interval."""


def write_plots(rows: list[dict[str, Any]], terms: dict[str, Any], baseline: str, folder: Path) -> list[str]:
    """Write the plots.

    Args:
        rows: Rows of the methods, the best first, see ``make_rows``.
        terms: FLOPs and loss at which they were compared.
        baseline: The method that always has a color, and is drawn dashed.
        folder: Folder of the files.

    Returns:
        Names of the files.
    """
    known = [row for row in rows if row["curves"] and all(math.isfinite(value.mean) for value in row["loss"])]
    swept = [row for row in rows if row["rates"]]
    ordered = [*known, *(row for row in swept if row not in known)]
    chosen = [row["method"] for row in ordered if row["method"] != baseline][: MOST_LINES - 1]
    colors = {name: plt.get_cmap("tab20")(2 * n % 20 + n // 10) for n, name in enumerate(chosen)} | {baseline: "black"}
    names = [_save(_draw_sweep(swept, colors, baseline), folder / "sweep.png")] if swept else []
    if not known:
        return names
    counted = [row for row in known if row["mflops_per_token"]]
    if len(known[0]["loss"]) > 1:
        figure, axes = plt.subplots(1, 2, figsize=(13, 5.5), layout="constrained", sharey=True)
        _draw(axes[0], [(row["method"], _budgets(row, "tokens", 1e6)) for row in known], colors, baseline, "o")
        _draw(axes[1], [(row["method"], _budgets(row, "flops", 1e12)) for row in counted], colors, baseline, "o")
        if terms["flops"]:
            axes[1].axvline(terms["flops"] / 1e12, color="0.5", lw=0.8, ls=":")
        axes[0].set(xlabel="tokens, M", ylabel="held-out loss, nats per token")
        axes[1].set(xlabel="TFLOPs (dotted: where methods are compared)")
        names.append(_save(figure, folder / "held_out_loss.png"))
    drawn = [row for row in known if all(row["training_curves"])]
    if missing := [row["method"] for row in known if not all(row["training_curves"])]:
        rank_zero_warn(
            f"the training loss of {', '.join(missing)} is not drawn, because it was not logged; lower "
            f"trainer.log_every_n_steps to see it next time"
        )
    if not drawn:
        return sorted(names)
    figure, panels = plt.subplots(1, 3, figsize=(18, 5.5), layout="constrained", sharey=True)
    per_token: dict[str, Callable[[dict[str, Any]], float | None]] = {
        "tokens, M": lambda row: 1e-6,
        "TFLOPs": lambda row: row["mflops_per_token"] and row["curves"][0]["flops"][-1] / row["tokens"] / 1e12,
        "seconds of training": lambda row: row["seconds"] and row["seconds"] / row["tokens"],
    }
    for axis, (label, scale) in zip(panels, per_token.items(), strict=True):
        lines = [(row["method"], _training(row, factor)) for row in drawn if (factor := scale(row))]
        if lines and axis is panels[0]:
            # Show the part where curves differ, without the fall from the loss of an untrained network.
            early = [np.interp(0.25, np.linspace(0, 1, len(line[1])), line[1]) for _, line in lines]
            axis.set_ylim(min(min(line[1]) for _, line in lines) * 0.985, float(np.median(early)) * 1.1)
        _draw(axis, lines, colors, baseline, "")
        axis.set(xlabel=label)
    panels[0].set(ylabel="training loss, nats per token (moving mean)")
    names.append(_save(figure, folder / "training_loss.png"))
    return sorted(names)


def _draw_sweep(rows: list[dict[str, Any]], colors: dict[str, Any], baseline: str) -> Any:
    """Draw the lowest perplexity at each value of one rate, up to 1.4 times that of the worst method's best."""
    figure, panels = plt.subplots(1, 2, figsize=(13, 5.5), layout="constrained", sharey=True)
    best = [row["at_smallest_budget"] for row in rows]
    panels[0].set_ylim(min(best) * 0.97, max(best) * 1.4)
    for axis, name in zip(panels, ("matrix", "other"), strict=True):
        _draw(axis, [(row["method"], _sweep(row, name)) for row in rows], colors, baseline, "o", axis is panels[1])
        for row in rows:
            color = colors.get(row["method"], GREY)
            axis.plot(getattr(row["rates"], name), row["at_smallest_budget"], "*", ms=11, color=color)
    panels[0].set(xlabel="learning rate of the matrices (star: the best)", ylabel="perplexity, the best of all with it")
    panels[1].set(xlabel="learning rate of the other parameters")
    return figure


def _sweep(row: dict[str, Any], name: str) -> Line:
    """Return the line of the lowest perplexity at each value of one rate, over the values of the others."""
    lowest: dict[float, float] = {}
    for entry in row["sweep"]:
        value = entry["perplexity"]
        if value is not None and math.isfinite(value):
            lowest[entry[name]] = min(value, lowest.get(entry[name], math.inf))
    xs = sorted(lowest)
    ys = [lowest[x] for x in xs]
    return xs, ys, ys, ys


def _budgets(row: dict[str, Any], x: str, unit: float) -> Line:
    """Return the line of the held-out loss at each budget."""
    xs = [value / unit for value in row["curves"][0][x]]
    losses: list[Interval] = row["loss"]
    return xs, [i.mean for i in losses], [i.low for i in losses], [i.high for i in losses]


def _training(row: dict[str, Any], factor: float) -> Line:
    """Return the line of the smoothed training loss at the largest budget, without the first tenth."""
    length = min(len(curve) for curve in row["training_curves"])
    window = max(1, round(SMOOTHED_OVER * length))
    smoothed = [smooth([loss for *_, loss in curve[:length]], window) for curve in row["training_curves"]]
    start = length // 10
    points = range(start, length, max(1, length // 200))
    intervals = [bootstrap_interval([curve[n] for curve in smoothed]) for n in points]
    xs = [row["training_curves"][0][n][1] * factor for n in points]
    return xs, [i.mean for i in intervals], [i.low for i in intervals], [i.high for i in intervals]


def _draw(
    axis: Any, lines: list[tuple[str, Line]], colors: dict[str, Any], baseline: str, mark: str, labels: bool = True
) -> None:
    """Draw lines with shaded intervals, and label each at its right end, or at the upper edge if that is above it."""
    axis.set(xscale="log", yscale="log")
    for method, (x, mean, low, high) in reversed(lines):  # the best on top
        color = colors.get(method, GREY)
        style = "--" if method == baseline else "-"
        axis.plot(x, mean, style, marker=mark, ms=3, color=color, lw=1.4, zorder=2 if method in colors else 1)
        axis.fill_between(x, low, high, color=color, alpha=0.15, lw=0)
    for ticks in (axis.xaxis, axis.yaxis):
        # Axes of less than two decades have few powers of ten.
        low, high = ticks.get_view_interval()
        ticks.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7) if high / low < 7 else (1, 2, 5)))
        ticks.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ticks.set_minor_formatter(NullFormatter())
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    if labels:
        top = axis.get_ylim()[1]
        ends = [(name, x[-1], min(mean[-1], top), colors[name]) for name, (x, mean, *_) in lines if name in colors]
        _label(axis, ends)


def _label(axis: Any, ends: list[tuple[str, float, float, Any]]) -> None:
    """Write names right of the axes, at the heights of the lines' ends, but far enough apart to be read."""
    if not ends:
        return
    heights = [math.log(y) for *_, y, _ in ends]
    bottom, top = (math.log(limit) for limit in axis.get_ylim())
    gap = (top - bottom) / 24
    order = sorted(range(len(ends)), key=lambda n: heights[n])
    placed = [heights[n] for n in order]
    for n in range(1, len(placed)):
        placed[n] = max(placed[n], placed[n - 1] + gap)
    excess = (sum(placed) - sum(heights)) / len(placed)  # upwards; shared between both sides, within the axes
    excess = min(excess, placed[0] - bottom - gap / 2)
    for n, height in zip(order, placed, strict=True):
        method, x, y, color = ends[n]
        axis.annotate(
            method, (x, y), (1.02, math.exp(height - excess)), textcoords=("axes fraction", "data"), fontsize=8,
            color=color, va="center", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": color, "lw": 0.4, "alpha": 0.6},
        )  # fmt: skip


def _save(figure: Any, file: Path) -> str:
    # Without date and version, so that the same numbers give the same bytes.
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110, metadata={"Software": None})
    plt.close(figure)
    write_whole(file, picture.getvalue())
    return file.name
