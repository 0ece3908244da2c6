"""Print the tables of the command ``estimate``."""

from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from cola_lightning.costs.devices import Device, device_of, network_named
from cola_lightning.costs.gpus import Gpu, gpu_named
from cola_lightning.costs.plan import Plan, beside
from cola_lightning.costs.processor import as_gpu, measure_processor, on_processor
from cola_lightning.costs.run_costs import Run
from cola_lightning.costs.scaling import misalignment
from cola_lightning.costs.speed import predict
from cola_lightning.costs.speed_report import speed_figures, speed_table
from cola_lightning.errors import InputError
from cola_lightning.host_memory import GIB
from cola_lightning.output_files import write_json
from cola_lightning.tables import Line, make_table, side_by_side, table_console

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


def target_of(name: str, run: Run) -> tuple[Gpu, Device]:
    """Return a kind of GPU by its name; or, for ``cpu``, this machine's processor, which is measured for ten seconds.

    Raises:
        InputError: If the name is not known, or a run on several processors is to be predicted.
    """
    if name != "cpu":
        gpu = gpu_named(name)
        return gpu, device_of(gpu)
    if run.gpus > 1:
        raise InputError(f"--gpu cpu predicts one process, and the run has {run.gpus}; add --gpus 1")
    dtype = run.layout.autocast or run.layout.computed
    head_size = run.config.hidden_size // run.config.num_attention_heads
    device = measure_processor(dtype, run.sequence_length, head_size)
    return as_gpu(device), device


def summary(plan: Plan, gpu: Gpu, device: Device, mfu: float | None, network: str) -> dict[str, Any]:
    """Compute all figures of a run: FLOPs per token, memory in bytes, speed, days."""
    run = plan.run
    rows = run.rows_that_fit(gpu)
    speed = predict(run, device, network_named(network))
    if mfu is None:
        days = {"days": run.tokens / speed.tokens_per_second / 86_400}
    else:
        days = {"days_at_mfu": run.days(gpu, mfu), "days_at_hfu": run.days(gpu, mfu, of="hardware")}
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
        "speed": speed_figures(speed),
        **days,
    }


def report(
    plans: list[Plan],
    models: list[str],
    gpu_name: str,
    mfu: float | None,
    json: str | None,
    network: str = "infiniband",
) -> None:
    """Print the tables, and write the figures to a file as JSON if one is named.

    Args:
        plans: One for each of ``models``, or a single one, which is compared with full rank, CoLA and CoLA-M.
        models: Configs of the plans; empty for a single plan.
        gpu_name: Kind of GPU, or ``cpu``.
        mfu: Share of the GPUs' peak that is reached, for the days; None for the predicted one.
        json: File to write; None for none.
        network: Name of the network between nodes.
    """
    gpu, device = target_of(gpu_name, plans[0].run)
    if gpu_name == "cpu":
        plans = [replace(plan, run=on_processor(plan.run)) for plan in plans]
    if models:
        named = [replace(plan, name=Path(file).stem) for plan, file in zip(plans, models, strict=True)]
    else:
        named = [plans[0], *beside(plans[0])]
    results = [summary(each, gpu, device, mfu, network) for each in named]
    write_json(json, results)  # first, because the reader of the output may close it early
    console = table_console()
    console.print(_title(plans[0].run, gpu, several=len(plans) > 1))
    if not models:
        for each in (_parameters, _flops, partial(_memory, gpu=gpu), speed_table):
            console.print(each(results[0]))
    console.print(_side_by_side(results, mfu, transposed=bool(models)))
    if not models:
        run, network_of = plans[0].run, network_named(network)
        line = misalignment(run, device, network_of, results[0]["speed"]["step_seconds"])
        if line:
            console.print(line, soft_wrap=True)
    if not all(result["fits"] for result in results):
        console.print(f"! does not fit in {gpu.usable / GIB:.1f} GiB, 92 % of a {gpu.name}'s memory")


def _title(run: Run, gpu: Gpu, several: bool) -> str:
    batch = "" if several else f", micro-batches of {run.batch_size} x {run.sequence_length} tokens"
    if gpu.name == "cpu":
        peak = f"{gpu.peak:.2f} TFLOP/s and {gpu.bandwidth:.1f} GB/s measured"
        return f"cpu ({gpu.memory:.1f} GiB, {peak}), {run.precision}{batch}"
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
    return make_table("Parameters", ("part", "number", "share"), rows)


def _flops(result: dict[str, Any]) -> Table:
    per_token = result["flops_per_token"]
    names = {"recomputed": "recomputed in backward", "model": "model (for MFU)", "hardware": "hardware (for HFU)"}
    rows = [
        (names.get(name, name), f"{value / 1e9:.3f}", f"{value * result['tokens']:.3g}")
        for name, value in per_token.items()
    ]
    return make_table("FLOPs", ("", "of a token, G", f"of {result['tokens'] / 1e9:.2f}B tokens"), rows)


def _memory(result: dict[str, Any], gpu: Gpu) -> Table:
    sizes = result["memory"]
    rows = [(label, f"{sizes[name] / GIB:.2f}") for name, label in MEMORY.items() if sizes[name]]
    rows.append((f"all, of {gpu.memory:g}", f"{sizes['total'] / GIB:.2f}"))
    return make_table(f"Memory of a GPU ({result['checkpointing']})", ("part", "GiB"), rows)


def _side_by_side(results: list[dict[str, Any]], mfu: float | None, transposed: bool) -> Table:
    lines: dict[str, Line] = {
        "parameters": lambda r: f"{r['parameters']['total'] / 1e6:,.1f}M",
        "GFLOPs a token": lambda r: f"{r['flops_per_token']['model'] / 1e9:.3f}",
        "recomputed": lambda r: f"{r['flops_per_token']['recomputed'] / 1e9:.3f}",
        "activations, GiB": lambda r: f"{r['memory']['activations'] / GIB:.2f}",
        "memory, GiB": lambda r: f"{r['memory']['total'] / GIB:.2f}" + ("" if r["fits"] else " !"),
        "rows that fit": lambda r: str(r["rows_that_fit"]),
        "largest micro-batch": lambda r: str(r["largest_micro_batch"]),
        "step, ms": lambda r: f"{r['speed']['step_seconds'] * 1e3:,.1f}",
        "tokens/s": lambda r: f"{r['speed']['tokens_per_second']:,.0f}",
        "MFU": lambda r: f"{r['speed']['mfu']:.1%}",
    }
    if mfu is None:
        lines["days"] = lambda r: f"{r['days']:.2f}"
    else:
        lines[f"days at MFU {mfu:g}"] = lambda r: f"{r['days_at_mfu']:.2f}"
        lines[f"days at HFU {mfu:g}"] = lambda r: f"{r['days_at_hfu']:.2f}"
    if not transposed:
        return side_by_side("Side by side", results, lines)
    rows = [(result["name"], *(line(result) for line in lines.values())) for result in results]
    return make_table("Side by side", ("", *lines), rows)
