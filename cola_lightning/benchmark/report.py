"""Print benchmarks as tables, and write them as JSON."""

import os
import platform
import re
import statistics
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from cola_lightning.benchmark.clock import peak_of
from cola_lightning.benchmark.targets import BenchmarkTarget
from cola_lightning.benchmark.training import PARTS
from cola_lightning.output_files import write_json
from cola_lightning.provenance import commit, libraries
from cola_lightning.tables import Line, side_by_side, table_console


def report(results: list[dict[str, Any]], subject: BenchmarkTarget, file: str | None) -> None:
    """Print the tables, with ratios of the first subject to each other one, and write all to ``file`` as JSON."""
    peak, source = peak_of(subject.device, str(subject.trainer.precision))
    setting = {
        "date": date.today().isoformat(),
        "commit": commit(),
        "device": torch.cuda.get_device_name(subject.device) if subject.device.type == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "precision": str(subject.trainer.precision),
        "libraries": libraries(),
        "peak_tflops": peak / 1e12,
        "peak_is": source,
    }
    for result in results:
        if "flops_model" in result:
            for name, flops in (("mfu", "flops_model"), ("hfu", "flops_step")):
                result[name] = result[flops] / result["seconds"]["step"] / peak
    first = results[0]
    ratios = [_ratios(first, other) for other in results[1:]]
    write_json(file, {"setting": setting, "subjects": results, "ratios": ratios})
    console = table_console()
    rows, columns = first["batch"]
    console.print(
        f"{setting['device']}, {setting['threads']} threads, {setting['precision']}, micro-batches of {rows} x "
        f"{columns} tokens; peak {peak / 1e12:.3g} TFLOP/s ({source})"
    )
    console.print(side_by_side("", results, TRAINING if "seconds" in first else GENERATION))
    if ratios:
        console.print(side_by_side("", ratios, RATIOS))


def processor() -> str:
    """Name this machine's processor, and how many cores it has."""
    file = Path("/proc/cpuinfo")
    name = re.search("model name.*: (.*)", file.read_text(encoding="utf-8")) if file.is_file() else None
    return f"{os.cpu_count()} x {name[1] if name else platform.machine()}"


def _ratios(first: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Divide the first subject's numbers by the other's: speeds round by round, the rest once."""
    speeds = [a / b for a, b in zip(first["tokens_per_second"], other["tokens_per_second"], strict=True) if b]
    result: dict[str, Any] = {"name": f"{first['name']} ÷ {other['name']}", "tokens_per_second": speeds}
    for name in ("peak_memory_bytes", "counted_peak_bytes", "flops_step", "parameters"):
        if first.get(name) and other.get(name):
            result[name] = first[name] / other[name]
    return result


def spread(values: Sequence[float], form: str) -> str:
    """Write the median, the least and the greatest of values."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def _plain(name: str, form: str, unit: float = 1.0) -> Line:
    return lambda result: f"{result[name] / unit:{form}}" if result.get(name) else "–"


def _milliseconds(part: str) -> Line:
    return lambda result: f"{1000 * result['seconds'][part]:,.1f}"


def _speed(form: str) -> Line:
    return lambda result: spread(result["tokens_per_second"], form)


SPEED, MILLION = "tokens/s, median (range of rounds)", 1e6
TRAINING = {
    "parameters, M": _plain("parameters", ",.1f", MILLION),
    SPEED: _speed(",.0f"),
    "a step, ms": _milliseconds("step"),
    **{f"  {part}": _milliseconds(part) for part in PARTS},
    "FLOPs of a step, G: model": _plain("flops_model", ",.1f", 1e9),
    "  with recompute": _plain("flops_step", ",.1f", 1e9),
    "MFU": _plain("mfu", ".1%"),
    "HFU": _plain("hfu", ".1%"),
    "peak memory, MB": _plain("peak_memory_bytes", ",.0f", MILLION),
    "  as counted, uncompiled": _plain("counted_peak_bytes", ",.0f", MILLION),
}
GENERATION = {
    "parameters, M": _plain("parameters", ",.1f", MILLION),
    "prepared": lambda result: result["prepared"],
    SPEED: _speed(",.1f"),
    "first token, ms": _plain("first_token_seconds", ",.1f", 1e-3),
    "peak memory, MB": _plain("peak_memory_bytes", ",.0f", MILLION),
    "  as counted, uncompiled": _plain("counted_peak_bytes", ",.0f", MILLION),
}
RATIOS = {
    SPEED: _speed(".3f"),
    "FLOPs of a step": _plain("flops_step", ".3f"),
    "peak memory": _plain("peak_memory_bytes", ".3f"),
    "  as counted": _plain("counted_peak_bytes", ".3f"),
}
