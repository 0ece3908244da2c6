"""Measure this machine's processor for some seconds, so that the roofline can predict steps on it.

Products go through more memory than caches hold, and every measurement takes the median of its calls, because in a
training step an operation seldom finds its operands in a cache.
"""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention, silu

from cola_lightning.costs.counters import count_flops
from cola_lightning.costs.devices import ATTENTION_BLOCK, Device
from cola_lightning.costs.gpus import Gpu
from cola_lightning.costs.run_costs import Run
from cola_lightning.host_memory import GIB, memory_of_machine
from cola_lightning.training.allocator import keep_freed_memory

SECONDS = 0.8
"""Seconds of each measurement; there are eleven."""
BEYOND_CACHES = 2**26
"""Bytes that the operands of a measurement take together."""
CHAIN = 50
"""Operations of the chain whose time per operation is measured."""


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
    keep_freed_memory()  # as in training, so that no measurement waits for pages of the kernel
    large, thin = _products(1024, 1024, 1024, dtype), _products(2048, 64, 512, dtype)
    mean, peak = 3 / sum(1 / speed for speed in large), max(large)
    thin_mean = 3 / sum(1 / speed for speed in thin)
    x, y = (torch.randn(BEYOND_CACHES // 4).to(dtype) for _ in range(2))
    out = torch.empty_like(x)
    moved = 3 * x.nbytes / _typical([lambda: torch.add(x, y, out=out)])
    exponential = 2 * x.numel() / _typical([lambda: silu(x)])
    forward, backward = _attention(dtype, tokens, head_size)
    return Device(
        "cpu",
        dict.fromkeys((2, 4), peak),  # all products have the one type
        mean / peak,
        moved,
        0,
        (forward, backward),
        launch=_typical([_chain(dtype)]) / (2 * CHAIN),
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
    memory = memory_of_machine() / GIB
    return Gpu("cpu", memory, peak, peak, device.bandwidth / 1e9, 0, 0, "cpu", ())


def _products(m: int, k: int, n: int, dtype: torch.dtype) -> list[float]:
    """Measure the FLOP/s of a projection (m, k) by (n, k): forward, gradient of the input, gradient of the weight."""
    width = torch.empty(0, dtype=dtype).element_size()
    number = math.ceil(BEYOND_CACHES / (width * (m * k + n * k + m * n)))
    operands = [[torch.randn(*size).to(dtype) for size in ((m, k), (n, k), (m, n))] for _ in range(number)]

    def calls(form: Callable[[Tensor, Tensor, Tensor], Tensor]) -> list[Callable[[], object]]:
        return [lambda each=each: form(*each) for each in operands]  # type: ignore[misc]

    forms = (
        calls(lambda x, weight, gradient: linear(x, weight)),
        calls(lambda x, weight, gradient: gradient @ weight),
        calls(lambda x, weight, gradient: gradient.T @ x),
    )
    return [2 * m * k * n / _typical(form) for form in forms]


def _chain(dtype: torch.dtype) -> Callable[[], object]:
    """Return a call that runs a chain of tiny operations, forward and backward: 2 ``CHAIN`` operations."""
    start = torch.ones(8, dtype=dtype, requires_grad=True)

    def run() -> None:
        x = start
        for _ in range(CHAIN):
            x = x * 1.0
        x.sum().backward()

    return run


def _attention(dtype: torch.dtype, tokens: int, head_size: int) -> tuple[float, float]:
    """Measure the FLOP/s of causal attention as the roofline counts it, in the forward and the backward pass."""
    q, k, v = (torch.randn(1, 8, tokens, head_size).to(dtype).requires_grad_() for _ in range(3))

    def forward() -> Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=True)

    def both() -> None:
        forward().sum().backward()

    first = _typical([forward])
    second = max(1e-9, _typical([both]) - first)
    counted = count_flops(forward)
    # Roofline counts the blocks that a causal mask leaves, so that the measured speed is that of these.
    share = (1 + min(1.0, ATTENTION_BLOCK / tokens)) / 2
    return share * counted / first, share * (count_flops(both) - counted) / second


def _typical(calls: list[Callable[[], object]]) -> float:
    """Make the calls one after another for ``SECONDS``, and return the median time of one in seconds."""
    calls[0]()
    times: list[float] = []
    end = time.perf_counter() + SECONDS
    while not times or time.perf_counter() < end:
        begin = time.perf_counter()
        calls[len(times) % len(calls)]()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)
