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


def peak_of(device: torch.device, precision: str) -> tuple[float, str]:
    """Return the peak of a device in FLOP/s, and where the number is from: its maker, or a large matrix product."""
    known = peak_flops(device)
    if known:
        return known, "the maker's, dense bf16"
    size = 8192 if device.type == "cuda" else 2048
    dtype = torch.bfloat16 if "bf16" in precision else torch.float32
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    clock = Clock(device)
    clock.mark("")
    for _ in range(7):
        a @ b
        clock.mark("product")
    return 2 * size**3 / min(seconds for _, seconds in clock.read()), f"measured, a product of two {size} x {size}"
