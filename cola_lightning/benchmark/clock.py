"""Measure time on a device, and the peak of its matrix products."""

import time
from itertools import pairwise
from typing import Any

import torch

from cola_lightning.callbacks.throughput import peak_flops


class Clock:
    """Seconds between marks, by the device's own clock. It synchronizes with a GPU only when they are read."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks: list[tuple[str, Any]] = []

    def mark(self, name: str) -> None:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append((name, event))
        else:
            self.marks.append((name, time.perf_counter()))

    def read(self) -> list[tuple[str, float]]:
        """Return the name of each mark but the first, with the seconds since the one before it, and start anew."""
        marks, self.marks = self.marks, []
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return [(name, a.elapsed_time(b) / 1000) for (_, a), (name, b) in pairwise(marks)]
        return [(name, b - a) for (_, a), (name, b) in pairwise(marks)]


def count_processor_time() -> None:
    """Use one thread, and let all clocks of this process count its processor time, from now on.

    Other work on the machine then disturbs measurements less. It is for scripts that measure a CPU.
    """
    torch.set_num_threads(1)  # because the times of several threads would be added up
    time.perf_counter = time.process_time  # Clock, measure_generation and measure_processor look it up at each call


def peak_of(device: torch.device, precision: str) -> tuple[float, str]:
    """Return the peak of a device in FLOP/s, and where the number is from: its maker, or a large matrix product."""
    known = peak_flops(device)
    if known:
        return known, "the maker's, dense bf16"
    dtype = torch.bfloat16 if "bf16" in precision else torch.float32
    if device.type == "cuda":
        size = 8192
    else:  # smaller where a processor without vector units would take minutes
        size = 256
        while size < 2048 and _product_seconds(size, dtype, device, times=2) < 0.05:
            size *= 2
    fastest = _product_seconds(size, dtype, device, times=7)
    return 2 * size**3 / fastest, f"measured, a product of two {size} x {size}"


def _product_seconds(size: int, dtype: torch.dtype, device: torch.device, times: int) -> float:
    """Time the product of two square matrices, and return the shortest of several times, in seconds."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    clock = Clock(device)
    clock.mark("")
    for _ in range(times):
        a @ b
        clock.mark("product")
    return min(seconds for _, seconds in clock.read())
