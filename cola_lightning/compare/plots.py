"""The pictures of a comparison."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

STYLES = ("-", "--", ":")


def write_plots(rows: list[dict[str, Any]], folder: Path) -> None:
    """Loss against tokens, loss against FLOPs, perplexity against memory; of each method the best run."""
    known = [row for row in rows if row["curve"]]
    _curves(known, folder / "loss_tokens.png", "tokens, M", lambda row, step, tokens: tokens / 1e6)
    counted = [row for row in known if row["tflops"]]
    per_step = {row["method"]: row["tflops"] / row["curve"][-1][0] for row in counted}
    _curves(counted, folder / "loss_flops.png", "TFLOPs", lambda row, step, tokens: per_step[row["method"]] * step)
    figure, axes = plt.subplots(figsize=(8, 5.5), layout="constrained")
    for number, row in enumerate(counted):
        axes.plot(row["training_mb"], row["perplexity"], "o", color=_color(number))
        axes.annotate(row["method"], (row["training_mb"], row["perplexity"]), (4, 3), textcoords="offset points",
                      fontsize=8)  # fmt: skip
    axes.set(xlabel="weights, gradients, optimizer state and activations, MB", ylabel="perplexity")
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
