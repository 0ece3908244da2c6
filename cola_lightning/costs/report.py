"""Print the tables of the command ``estimate``."""

from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cola_lightning.costs.gpus import Gpu, gpu_named
from cola_lightning.costs.plan import Plan, beside
from cola_lightning.costs.run_costs import Run
from cola_lightning.output_files import write_json

GIB = 2**30
MEMORY = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer states",
    "buffers": "buckets and gathered weights",
    "activations": "activations",
    "logits": "logits and loss",
    "backward": "more in a layer's backward pass",
    "step": "more in the optimizer's step",
}


def summary(plan: Plan, gpu: Gpu, mfu: float) -> dict[str, Any]:
    """Compute all figures of a run: FLOPs per token, memory in bytes, days."""
    run = plan.run
    rows = run.rows_that_fit(gpu)
    return {
        "name": plan.name,
        "checkpointing": plan.checkpointing,
        "parameters": {name: part.parameters for name, part in run.parameters.parts.items()}
        | {"total": run.parameters.total.parameters, "trained": run.parameters.total.trained},
        "flops_per_token": {
            name: getattr(run.flops, name) / run.micro_batch_tokens
            for name in ("forward", "backward", "recomputed", "model", "hardware")
        },
        "flops_of_the_run": run.flops.model / run.micro_batch_tokens * run.tokens,
        "tokens": run.tokens,
        "memory": asdict(run.memory) | {"total": run.memory.total},
        "fits": run.memory.total <= gpu.usable,
        "rows_that_fit": rows,
        "largest_micro_batch": run.micro_batch_for(rows),
        "days_at_mfu": run.days(gpu, mfu),
        "days_at_hfu": run.days(gpu, mfu, of="hardware"),
    }


def report(plans: list[Plan], models: list[str], gpu_name: str, mfu: float, json: str | None) -> None:
    """Print the tables, and write the figures to a file as JSON if one is named.

    Args:
        plans: One for each of ``models``, or a single one, which is compared with full rank, CoLA and CoLA-M.
        models: Configs of the plans; empty for a single plan.
        gpu_name: Kind of GPU.
        mfu: Share of the GPUs' peak that is reached.
        json: File to write; None for none.
    """
    gpu = gpu_named(gpu_name)
    if models:
        named = [replace(plan, name=Path(file).stem) for plan, file in zip(plans, models, strict=True)]
    else:
        named = [plans[0], *beside(plans[0])]
    results = [summary(each, gpu, mfu) for each in named]
    write_json(json, results)  # first, because the reader of the output may close it early
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 140
    console.print(_title(plans[0].run, gpu, mfu, several=len(plans) > 1))
    if not models:
        for table in (_parameters(results[0]), _flops(results[0]), _memory(results[0], gpu)):
            console.print(table)
    console.print(_side_by_side(results, mfu, transposed=bool(models)))
    if not all(result["fits"] for result in results):
        console.print(f"! does not fit in {gpu.usable / GIB:.1f} GiB, 92 % of a {gpu.name}'s memory")


def _title(run: Run, gpu: Gpu, mfu: float, several: bool) -> str:
    batch = "" if several else f", micro-batches of {run.batch_size} x {run.sequence_length} tokens"
    return (
        f"{run.gpus} x {gpu.name} ({gpu.memory:g} GiB, {gpu.peak:g} TFLOP/s dense bf16), {run.layout.strategy}, "
        f"{run.precision}{batch}"
    )


def _parameters(result: dict[str, Any]) -> Table:
    counts = result["parameters"]
    rows = [(name, f"{counts[name]:,}", f"{counts[name] / counts['total']:.1%}") for name in list(counts)[:-2]]
    rows.append(("all", f"{counts['total']:,}", ""))
    if counts["trained"] != counts["total"]:
        rows.append(("of which trained", f"{counts['trained']:,}", f"{counts['trained'] / counts['total']:.1%}"))
    return _table("Parameters", ("part", "number", "share"), rows)


def _flops(result: dict[str, Any]) -> Table:
    per_token = result["flops_per_token"]
    names = {"recomputed": "recomputed in backward", "model": "model (for MFU)", "hardware": "hardware (for HFU)"}
    rows = [
        (names.get(name, name), f"{value / 1e9:.3f}", f"{value * result['tokens']:.3g}")
        for name, value in per_token.items()
    ]
    return _table("FLOPs", ("", "of a token, G", f"of {result['tokens'] / 1e9:.2f}B tokens"), rows)


def _memory(result: dict[str, Any], gpu: Gpu) -> Table:
    sizes = result["memory"]
    rows = [(label, f"{sizes[name] / GIB:.2f}") for name, label in MEMORY.items() if sizes[name]]
    rows.append((f"all, of {gpu.memory:g}", f"{sizes['total'] / GIB:.2f}"))
    return _table(f"Memory of a GPU ({result['checkpointing']})", ("part", "GiB"), rows)


def _side_by_side(results: list[dict[str, Any]], mfu: float, transposed: bool) -> Table:
    lines = {
        "parameters": lambda r: f"{r['parameters']['total'] / 1e6:,.1f}M",
        "GFLOPs a token": lambda r: f"{r['flops_per_token']['model'] / 1e9:.3f}",
        "recomputed": lambda r: f"{r['flops_per_token']['recomputed'] / 1e9:.3f}",
        "activations, GiB": lambda r: f"{r['memory']['activations'] / GIB:.2f}",
        "memory, GiB": lambda r: f"{r['memory']['total'] / GIB:.2f}" + ("" if r["fits"] else " !"),
        "rows that fit": lambda r: str(r["rows_that_fit"]),
        "largest micro-batch": lambda r: str(r["largest_micro_batch"]),
        f"days at MFU {mfu:g}": lambda r: f"{r['days_at_mfu']:.2f}",
        f"days at HFU {mfu:g}": lambda r: f"{r['days_at_hfu']:.2f}",
    }
    names = [result["name"] for result in results]
    if transposed:
        rows = [(name, *(line(result) for line in lines.values())) for name, result in zip(names, results, strict=True)]
        return _table("Side by side", ("", *lines), rows)
    rows = [(label, *(line(result) for result in results)) for label, line in lines.items()]
    return _table("Side by side", ("", *names), rows)


def _table(title: str, columns: Iterable[str], rows: Iterable[tuple[str, ...]]) -> Table:
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=not index)
    for row in rows:
        table.add_row(*row)
    return table
