"""Print the predicted speed of a run."""

from typing import Any

from rich.table import Table

from cola_lightning.costs.speed import Speed
from cola_lightning.tables import make_table

BOUNDS = {"host": "launches by the processor", "launch": "launches", "memory": "memory bandwidth"}


def speed_figures(speed: Speed) -> dict[str, Any]:
    """Return the figures of a prediction as numbers and words for JSON."""
    return {
        "device": speed.device.name,
        "step_seconds": speed.step_seconds,
        "tokens_per_second": speed.tokens_per_second,
        "tokens_per_second_per_gpu": speed.tokens_per_second / speed.gpus,
        "mfu": speed.mfu,
        "communication": speed.communication.kind,
        "communication_seconds": speed.communication.seconds,
        "parts": [
            {"name": part.name, "seconds": part.seconds, "flops": part.flops, "bounds": part.bounds}
            for part in speed.parts
        ],
        "products": speed.products,
    }


def speed_table(result: dict[str, Any]) -> Table:
    """Make the table of a step's parts: milliseconds, FLOP/s, and what bounds them."""
    speed = result["speed"]
    step = speed["step_seconds"]
    rows = []
    for part in speed["parts"]:
        seconds, bounds = part["seconds"], part["bounds"]
        all_bounds = sum(bounds.values()) or 1
        shares = [
            f"{BOUNDS.get(name, name)} {share / all_bounds:.0%}"
            for name, share in sorted(bounds.items(), key=lambda item: -item[1])
            if share / all_bounds >= 0.05
        ]
        speed_of = f"{part['flops'] / seconds / 1e12:.1f}" if part["flops"] and seconds else ""
        rows.append((part["name"], f"{seconds * 1e3:.2f}", f"{seconds / step:.1%}", speed_of, ", ".join(shares)))
    rows.append(("a step", f"{step * 1e3:.2f}", "", "", f"{speed['tokens_per_second']:,.0f} tokens/s"))
    return make_table("Speed (predicted)", ("part", "ms", "share", "TFLOP/s", "bound by"), rows)
