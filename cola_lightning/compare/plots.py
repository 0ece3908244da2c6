"""The pictures of a comparison."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

STYLES = ("-", "--", ":")
MARKS = ("o", "s", "^")


def write_plots(rows: list[dict[str, Any]], folder: Path) -> None:
    """Loss against tokens, loss against FLOPs, perplexity against memory; of each method the best run."""
    known = [row for row in rows if row["curve"]]
    _curves(known, folder / "loss_tokens.png", "tokens, M", lambda row, step, tokens: tokens / 1e6)
    counted = [row for row in known if row["tflops"]]
    per_step = {row["method"]: row["tflops"] / row["curve"][-1][0] for row in counted}
    _curves(counted, folder / "loss_flops.png", "TFLOPs", lambda row, step, tokens: per_step[row["method"]] * step)
    figure, axes = plt.subplots(figsize=(8, 5.5), layout="constrained")
    for number, row in enumerate(counted):
        memory, mark = row["training_mb"], MARKS[number // 10 % len(MARKS)]
        axes.plot(memory, row["perplexity"], mark, color=_color(number), label=row["method"])
        axes.plot([memory, memory], [min(row["perplexities"]), max(row["perplexities"])], color=_color(number), lw=1)
    axes.set_yscale("log")
    for ticks in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        ticks(lambda value, _: f"{value:g}")
    axes.set(
        xlabel="weights, gradients, optimizer state and activations, MB",
        ylabel="perplexity: mean and range over seeds",
    )
    axes.grid(alpha=0.3, which="both")
    if counted:
        axes.legend(fontsize=7, ncols=2)
    _save(figure, folder / "perplexity_memory.png")


def _curves(rows: list[dict[str, Any]], file: Path, label: str, at: Any) -> None:
    figure, axes = plt.subplots(figsize=(8, 5.5), layout="constrained")
    for number, row in enumerate(rows):
        x = [at(row, step, tokens) for step, tokens, _ in row["curve"]]
        style = STYLES[number // 10 % len(STYLES)]
        axes.plot(x, [loss for *_, loss in row["curve"]], style, color=_color(number), label=row["method"], lw=1.2)
    if rows:
        lowest = min(loss for row in rows for *_, loss in row["curve"])
        first = sorted(row["curve"][len(row["curve"]) // 8][2] for row in rows)
        axes.set_ylim(lowest - 0.05, first[len(first) // 2] + 0.3)  # where curves part, not where all begin
        axes.legend(fontsize=7, ncols=2)
    axes.set(xlabel=label, ylabel="training loss, nats a token")
    axes.grid(alpha=0.3)
    _save(figure, file)


def _color(number: int) -> Any:
    return plt.get_cmap("tab10")(number % 10)


def _save(figure: Any, file: Path) -> None:
    figure.savefig(file, dpi=130)
    plt.close(figure)
