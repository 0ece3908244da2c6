"""Describe devices and networks by what bounds the speed of a training step on them, and list the model's constants.

All constants of the prediction are in this file. Figures of nccl-tests, BabelStream, FlashAttention and of launches,
and the bandwidths of networks, were written from memory and not looked up again. No run of ours checked them singly.
"""

from dataclasses import dataclass, field, replace

from cola_lightning.costs.gpus import Gpu
from cola_lightning.errors import InputError

TILES = ((256, 128, 1.0), (128, 128, 0.95), (128, 64, 0.8), (64, 64, 0.6))
"""Rows and columns of the result that a GPU's multiprocessor computes at once, and the speed of such a kernel as a
share of the largest's. The sizes are CUTLASS's; a smaller tile reads more bytes from shared memory for each FLOP."""
TILE_START = 128
"""Steps along K that a tile's start and end take: filling the pipeline and writing the result. Seen as the shortfall of
products with K of 256 to 1,024 in NVIDIA's "Matrix Multiplication Background User's Guide"."""
SPLITS = (1, 2, 4, 8, 16)
"""Parts into which a library cuts K where a result has too few tiles. The parts are added up in float32."""
SUSTAINED = {"ampere": 0.84, "ada": 0.80, "hopper": 0.70, "blackwell": 0.70}
"""Share of the datasheet's peak that large products of random numbers reach, which is limited by power: 258 of 312
TFLOP/s on A100 and about 700 of 989 on H100 (H. He, "Strangely, Matrix Multiplications on GPUs Run Faster When Given
'Predictable' Data!", 2024)."""
ATTENTION = {"ampere": (0.60, 0.50), "ada": (0.60, 0.50), "hopper": (0.40, 0.35), "blackwell": (0.40, 0.35)}
"""Share of the peak that the attention kernel of PyTorch reaches in the forward and the backward pass at long rows:
FlashAttention-2 (arXiv 2307.08691, figures 4 to 6) on Ampere; the same kernel uses 35 to 40 % of Hopper's peak (arXiv
2407.08608)."""
ATTENTION_BLOCK = 128
"""Tokens of a block of the attention kernel. A causal mask saves whole blocks only."""
BANDWIDTH = 0.88
"""Share of the datasheet's memory bandwidth that a kernel reaches (BabelStream on A100 and H100: 0.86 to 0.92)."""
MISALIGNED = {16: 1.0, 8: 0.75, 4: 0.5, 2: 0.3}
"""Speed of a product whose rows begin at multiples of so many bytes only. nanoGPT's step became 25 % shorter when the
vocabulary grew from 50,257 to 50,304, so that the head's rows of 2-byte alignment took three to four times as long."""
LAUNCH = 2.5e-6
"""Seconds that a GPU takes at least for a kernel, between the end of the one before and its own."""
HOST_EAGER = 8e-6
"""Seconds of the processor for an operation in eager mode with autograd, its views included (5 to 10 us, by PyTorch's
profiler)."""
HOST_COMPILED = 4e-6
"""Seconds of the processor to launch a kernel from code that ``torch.compile`` made."""
HOST_GRAPH = 80e-6
"""Seconds of the processor to enter one compiled graph: guards, and autograd's wrapper around it."""
NVLINK_SHARE = 0.80
"""Share of a link that NCCL reaches for large buffers: nccl-tests shows a bus bandwidth of 235 of 300 GB/s on A100 and
365 of 450 on H100."""
NODE_GPUS = 8
"""GPUs of a node."""
HOP = {"intra": 6e-6, "infiniband": 12e-6, "ethernet": 40e-6}
"""Seconds of latency of a doubling of the number of ranks, within a node and between nodes (nccl-tests, small buffers).
"""


@dataclass(frozen=True)
class Network:
    """Network between nodes.

    Attributes:
        name: Value of ``--network``.
        bandwidth: Bytes per second of a node in one direction.
        latency: Seconds of a doubling of the nodes.
    """

    name: str
    bandwidth: float
    latency: float


NETWORKS = (
    Network("infiniband", 8 * 50e9, HOP["infiniband"]),  # NDR: 400 Gbit/s for each of 8 GPUs, as in a DGX H100
    Network("infiniband-hdr", 8 * 25e9, HOP["infiniband"]),  # HDR: 200 Gbit/s each, as in a DGX A100
    Network("ethernet", 12.5e9, HOP["ethernet"]),  # one port of 100 Gbit/s for the node
)


def network_named(name: str) -> Network:
    """Return the network with this name.

    Raises:
        InputError: If it is not in the table.
    """
    for network in NETWORKS:
        if network.name == name:
            return network
    raise InputError(f"--network {name} is not known; choose one of {', '.join(each.name for each in NETWORKS)}")


@dataclass(frozen=True)
class Device:
    """A device as the roofline sees it.

    Attributes:
        name: What to print.
        peak: FLOP/s of dense products, by the bytes of a number (2 or 4), by datasheet or by the largest measured.
        sustained: Share of ``peak`` that large products reach.
        bandwidth: Bytes per second of the memory that a kernel reaches.
        multiprocessors: Number of units that compute a tile each; 0 for a processor, whose products follow
            ``thin``.
        attention: FLOP/s of attention in the forward and in the backward pass.
        link: Bytes per second between GPUs of a node in one direction, as NCCL reaches them.
        launch: Seconds that a kernel takes at least.
        host_eager, host_compiled, host_graph: Seconds of the processor for an operation, a compiled kernel, and a
            compiled graph. 0 on a processor, where the kernels' own time is all there is.
        thin: Size at which a product of a processor has half its speed, by the bytes of a number.
        slow: Bytes per second of operations that are bound by arithmetic, by part of their names. A processor's
            exponentials take longer than its memory.
    """

    name: str
    peak: dict[int, float]
    sustained: float
    bandwidth: float
    multiprocessors: int
    attention: tuple[float, float]
    link: float = 0
    launch: float = LAUNCH
    host_eager: float = HOST_EAGER
    host_compiled: float = HOST_COMPILED
    host_graph: float = HOST_GRAPH
    thin: dict[int, float] = field(default_factory=dict)
    slow: dict[str, float] = field(default_factory=dict)

    def with_changes(self, **changes: object) -> "Device":
        return replace(self, **changes)  # type: ignore[arg-type]


def device_of(gpu: Gpu) -> Device:
    """Describe a GPU by its datasheet and the constants above."""
    forward, backward = ATTENTION[gpu.generation]
    peak = gpu.peak * 1e12
    return Device(
        gpu.name,
        {2: peak, 4: gpu.peak32 * 1e12},
        SUSTAINED[gpu.generation],
        gpu.bandwidth * 1e9 * BANDWIDTH,
        gpu.multiprocessors,
        (forward * peak, backward * peak),
        gpu.link * 1e9 * NVLINK_SHARE,
    )
