"""What a run will cost, told before it starts: the command ``estimate``. See cola_lightning.costs for how."""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from cola_lightning.cli.parser import OptionParser
from cola_lightning.costs import Gpu, Run, gpu_named
from cola_lightning.errors import InputError
from cola_lightning.methods import CoLA, CoLAM
from cola_lightning.methods.low_rank import LowRank
from cola_lightning.models import FullRank
from cola_lightning.output_files import check_output_file, write_json
from cola_lightning.training.gradient_accumulation import count_micro_batches
from cola_lightning.training.module import LanguageModel

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


@dataclass(frozen=True)
class Plan:
    """A run and what it is called; ``checkpointing`` says what a layer keeps."""

    name: str
    run: Run
    checkpointing: str


def parser() -> ArgumentParser:
    """The command's own options; the rest are those of ``fit``."""
    options = OptionParser(
        "cola_lightning estimate",
        allow_abbrev=False,
        description="Tell what a run will cost. Besides these options it takes those of fit, --config above all; it "
        "needs neither the data nor the devices.",
    )
    options.add_argument("--gpus", type=int, help="number of GPUs; else --trainer.devices times num_nodes, or 1")
    options.add_argument("--gpu", default="h100", help="kind of GPU: a100-80, h100, h200, b200, l40s, rtx4090, …")
    options.add_argument("--mfu", type=float, default=0.4, help="share of the GPUs' peak that is reached, 0 to 1")
    options.add_argument("--json", metavar="FILE", help="write the result there too")
    options.add_argument("--models", nargs="+", default=[], metavar="FILE", help="several configs, in one table")
    return options


def check(options: Namespace) -> None:
    """Look at the options before anything is computed.

    Raises:
        InputError: If one is out of range, or the file cannot be written.
    """
    if options.gpus is not None and options.gpus < 1:
        raise InputError(f"--gpus is {options.gpus}; it must be at least 1")
    if not 0 < options.mfu <= 1:
        raise InputError(f"--mfu is {options.mfu}; it must be above 0 and at most 1")
    check_output_file(options.json)


def plan(model: LanguageModel, data: Any, trainer: Any, gpus: int | None) -> Plan:
    """The run of a configuration.

    Args:
        trainer: The trainer's settings: ``callbacks``, ``strategy``, ``precision``, ``devices`` and so on.
        gpus: In place of the settings' devices.
    """
    gpus = gpus or _devices(trainer.devices) * trainer.num_nodes
    callbacks = [callback for callback in trainer.callbacks or [] if isinstance(callback, CoLAM)]
    for callback in callbacks:  # refuses what the run would refuse
        callback.setup(SimpleNamespace(callbacks=callbacks, strategy=trainer.strategy), model, "fit")
    run = Run.of(
        model,
        data,
        transforms=tuple(model.transforms),
        strategy=trainer.strategy,
        precision=trainer.precision,
        gpus=gpus,
        accumulate=trainer.accumulate_grad_batches,
        max_steps=max(trainer.max_steps, 0),
    )
    if run.global_batch_size:
        count_micro_batches(run.global_batch_size, run.batch_size, run.gpus)
    return Plan("this run", run, _describe(callbacks[0]) if callbacks else "nothing recomputed")


def _devices(devices: int | str | list) -> int:
    """How many devices a setting names; one where that depends on the machine."""
    if isinstance(devices, str):
        devices = [each for each in devices.split(",") if each.strip()] if "," in devices else devices
    if isinstance(devices, list):
        return len(devices)
    try:
        return 1 if devices == "auto" or int(devices) < 1 else int(devices)
    except ValueError:
        raise InputError(f"--trainer.devices is {devices}; it must be a number, a list of numbers, or auto") from None


def _describe(callback: CoLAM) -> str:
    extra = [callback.latents_dtype, "attention" if callback.keep_attention else None]
    return ", ".join(["keep: " + callback.keep, *filter(None, extra)])


def beside(this: Plan) -> list[Plan]:
    """The same model as full rank, CoLA and CoLA-M, at the rank that it has or else a quarter of its width."""
    run = this.run
    with torch.device("meta"):
        layer = run.build(num_hidden_layers=1).model.layers[0]
    projection = layer.self_attn.q_proj
    rank = projection.A.out_features if isinstance(projection, LowRank) else run.config.hidden_size // 4
    plain, cola_m = "nothing recomputed", CoLAM()
    # What the run has already is taken from it, and not traced a second time.
    full = cola = run.build
    if not (isinstance(projection, FullRank) and layer.mlp.gate_silu):
        full = partial(run.build, projection=FullRank, gate_silu=True)
    if not isinstance(projection, CoLA):
        cola = partial(run.build, projection=partial(CoLA, rank=rank))
    is_it = cola is run.build and this.checkpointing == _describe(cola_m)
    transforms = run.transforms if is_it else (cola_m.apply,)
    return [
        Plan("full rank", replace(run, build=full, transforms=()), plain),
        Plan(f"CoLA, rank {rank}", replace(run, build=cola, transforms=()), plain),
        Plan(f"CoLA-M, rank {rank}", replace(run, build=cola, transforms=transforms), _describe(cola_m)),
    ]


def summary(plan: Plan, gpu: Gpu, mfu: float) -> dict[str, Any]:
    """All figures of a run: FLOPs of a token, memory in bytes, days."""
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


def report(plans: list[Plan], options: Namespace) -> None:
    """Print the tables, and write the figures to a file as JSON if one is named."""
    gpu = gpu_named(options.gpu)
    if options.models:
        names = [Path(file).stem for file in options.models]
        results = [summary(replace(plan, name=name), gpu, options.mfu) for plan, name in zip(plans, names, strict=True)]
    else:
        results = [summary(each, gpu, options.mfu) for each in (plans[0], *beside(plans[0]))]
    write_json(options.json, results)  # first, because nobody may read what is printed to the end
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 140
    console.print(_title(plans[0].run, gpu, options.mfu, several=len(plans) > 1))
    if not options.models:
        for table in (_parameters(results[0]), _flops(results[0]), _memory(results[0], gpu)):
            console.print(table)
    console.print(_side_by_side(results, options.mfu, transposed=bool(options.models)))
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
