"""Measure this machine's processor for some seconds, so that the roofline can predict steps on it."""

import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from cola_lightning.costs.counters import count_flops
from cola_lightning.costs.devices import ATTENTION_BLOCK, Device
from cola_lightning.costs.gpus import Gpu
from cola_lightning.costs.run_costs import Run
from cola_lightning.host_memory import memory_of_machine

SECONDS = 0.8
"""Seconds of each measurement; there are about a dozen."""


def measure_processor(dtype: torch.dtype, tokens: int, head_size: int) -> Device:
    """Measure the processor.

    The speed of a product follows from two sizes: a large one, and a thin one that gives the size at which half of the
    speed is left. Each is measured in the three forms that a projection has in a step, because a processor's library
    computes them at different speeds: forward, gradient of the input, gradient of the weight.

    Args:
        dtype: Type of the products.
        tokens: Tokens of a row, for attention.
        head_size: Numbers of a head, for attention.
    """
    large, thin = _products(1024, 1024, 1024, dtype), _products(2048, 64, 512, dtype)
    mean, peak = 3 / sum(1 / speed for speed in large), max(large)
    thin_mean = 3 / sum(1 / speed for speed in thin)
    x, y = (torch.randn(2**23).to(dtype) for _ in range(2))
    out = torch.empty_like(x)
    moved = 3 * x.nbytes / _fastest(lambda: torch.add(x, y, out=out))
    exponential = 2 * x.numel() / _fastest(lambda: torch.nn.functional.silu(x))
    small = torch.randn(8).to(dtype)
    forward, backward = _attention(dtype, tokens, head_size)
    return Device(
        "cpu",
        dict.fromkeys((2, 4), peak),  # all products have the one type
        mean / peak,
        moved,
        0,
        (forward, backward),
        launch=_fastest(lambda: small + small),
        host_eager=0,
        host_compiled=0,
        host_graph=0,
        thin=dict.fromkeys((2, 4, 8), 64 * max(0.0, mean / thin_mean - 1)),
        slow={"exp": exponential},
    )


def on_processor(run: Run) -> Run:
    """Return the run as a processor computes it: RMSNorm is several kernels there, where nothing compiles it."""
    return replace(run, fused_norm=False)


def as_gpu(device: Device) -> Gpu:
    """Return the processor's entry in the table of GPUs: its memory in GiB, and the measured peak in TFLOP/s."""
    peak = max(device.peak.values()) / 1e12
    memory = memory_of_machine() / 2**30
    return Gpu("cpu", memory, peak, peak, device.bandwidth / 1e9, 0, 0, "cpu", ())


def _products(m: int, k: int, n: int, dtype: torch.dtype) -> list[float]:
    """Measure the FLOP/s of a projection (m, k) by (n, k): forward, gradient of the input, gradient of the weight."""
    x, weight, gradient = (torch.randn(*size).to(dtype) for size in ((m, k), (n, k), (m, n)))
    forms = (lambda: torch.nn.functional.linear(x, weight), lambda: gradient @ weight, lambda: gradient.T @ x)
    return [2 * m * k * n / _fastest(form) for form in forms]


def _attention(dtype: torch.dtype, tokens: int, head_size: int) -> tuple[float, float]:
    """Measure the FLOP/s of causal attention as the roofline counts it, in the forward and the backward pass."""
    q, k, v = (torch.randn(1, 8, tokens, head_size).to(dtype).requires_grad_() for _ in range(3))

    def forward() -> Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=True)

    def both() -> None:
        forward().sum().backward()

    first = _fastest(forward)
    second = max(1e-9, _fastest(both) - first)
    counted = count_flops(forward)
    # Roofline counts the blocks that a causal mask leaves, so that the measured speed is that of these.
    share = (1 + min(1.0, ATTENTION_BLOCK / tokens)) / 2
    return share * counted / first, share * (count_flops(both) - counted) / second


def _fastest(run: Callable[[], object]) -> float:
    """Return the shortest time of a call in seconds, out of the calls of ``SECONDS``."""
    run()
    best, end = float("inf"), time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        begin = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - begin)
    return best
