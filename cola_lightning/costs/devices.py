"""Describe devices and networks by what bounds the speed of a training step on them, and list the model's constants.

All constants of the prediction are in this file; collectives.py has those of NCCL. A constant has its source beside it.
"Not checked" marks those that have none. "This package's H100" is recipes/benchmark/results/products_h100.json.
"""

from dataclasses import dataclass, field

from cola_lightning.costs.gpus import Gpu
from cola_lightning.errors import InputError

TILES = ((256, 128, 1.0), (128, 128, 0.95), (128, 64, 0.8), (64, 64, 0.6))
"""Rows and columns of the result that a GPU's multiprocessor computes at once, and the speed of such a kernel as a
share of the largest's. The sizes and their order are those of NVIDIA's "Matrix Multiplication Background User's Guide",
section 2.3. The shares are not checked one by one. With them, aligned products of 1,024 to 16,384 tokens of this
package's H100 are predicted at 0.8 to 1.3 times the measured time."""
TILE_START = 128
"""Steps along K that a tile's start and end take: filling the pipeline and writing the result. Not checked alone."""
SPLITS = (1, 2, 4, 8, 16)
"""Parts into which a library cuts K where a result has too few tiles. The parts are added up in float32."""
SUSTAINED = {"ampere": 0.83, "ada": 0.80, "hopper": 0.70, "blackwell": 0.70}
"""Share of the datasheet's peak that large products of random numbers reach, which is limited by power. A100: 257 of
312 TFLOP/s (H. He, thonking.ai, "Strangely, Matrix Multiplications on GPUs Run Faster When Given 'Predictable' Data!").
H100: 713 of 989 for 16,384 x 2,048 x 5,472 on this package's H100. Ada and Blackwell are not checked."""
ATTENTION = {"ampere": (0.60, 0.50), "ada": (0.60, 0.50), "hopper": (0.40, 0.35), "blackwell": (0.40, 0.35)}
"""Share of the peak that the attention kernel of PyTorch, FlashAttention-2, reaches in the forward and the backward
pass at long rows: 50 to 73 % on A100 (arXiv 2307.08691), 35 % on H100 (arXiv 2407.08608). Ada and Blackwell are not
checked."""
ATTENTION_BLOCK = 128
"""Tokens of a block of the attention kernel. A causal mask saves whole blocks only."""
BANDWIDTH = 0.90
"""Share of the datasheet's memory bandwidth that a kernel reaches: a copy moved 3.00 of 3.35 TB/s on this package's
H100. Other GPUs are not checked."""
MISALIGNED = {
    "ampere": {8: 0.75, 4: 0.6, 2: 0.4},
    "ada": {8: 0.75, 4: 0.6, 2: 0.4},
    "hopper": {8: 0.6, 4: 0.4, 2: 0.24},
    "blackwell": {8: 0.6, 4: 0.4, 2: 0.24},
}
"""Speed of a product whose rows begin at multiples of so many bytes only. Hopper's 2 bytes: 0.20 to 0.31, median 0.24,
for 24 products of 1,024 to 16,384 tokens with d_ff 5,461, as shares of the predicted time of aligned ones, on this
package's H100. Ampere's: with 0.4 this model predicts that GPT-2 of 124M, compiled without padding, takes 25 % longer
with a vocabulary of 50,257 than with 50,304, as nanoGPT did (A. Karpathy, 2023-02-03). 4 and 8 bytes, Ada and Blackwell
are not checked."""
MISALIGNED_RESULT = 0.16
"""The same on Hopper where the result alone has such rows: 0.15 to 0.17 for six products of the same measurement."""
LAUNCH = 2.5e-6
"""Seconds that a GPU takes at least for a kernel, between the end of the one before and its own. Not checked."""
HOST_EAGER = 8e-6
"""Seconds of the processor for an operation in eager mode with autograd, its views included. Not checked."""
HOST_COMPILED = 4e-6
"""Seconds of the processor to launch a kernel from code that ``torch.compile`` made: 4 to 6 us (susun-blog.com,
"pegainfer (3): From Launch Overhead to CUDA Graph")."""
HOST_GRAPH = 80e-6
"""Seconds of the processor to enter one compiled graph: guards, and autograd's wrapper around it. Not checked."""
NVLINK_SHARE = 0.80
"""Share of a link that NCCL reaches for large buffers, by nccl-tests: 235.6 of 300 GB/s on 8 A100 (tutorials of Oracle
Cloud; NCCL's src/graph/tuning.cc takes 235, too) and 367.6 of 450 on 8 H100 (DigitalOcean's NCCL tutorial)."""
NODE_GPUS = 8
"""GPUs of a node."""


@dataclass(frozen=True)
class Network:
    """Network between nodes.

    Attributes:
        name: Value of ``--network``.
        bandwidth: Bytes per second of a node in one direction.
        ring: Seconds that a step of a ring from node to node takes at least.
        tree: Seconds that a level of a tree of nodes takes at least.
    """

    name: str
    bandwidth: float
    ring: float
    tree: float


# Latencies of InfiniBand are those of NCCL's own model (src/graph/tuning.cc, protocol LL128). Ethernet's, by TCP, are
# not checked.
NETWORKS = (
    Network("infiniband", 8 * 50e9, 4.0e-6, 8.5e-6),  # NDR: 400 Gbit/s for each of 8 GPUs, as in a DGX H100
    Network("infiniband-hdr", 8 * 25e9, 4.0e-6, 8.5e-6),  # HDR: 200 Gbit/s each, as in a DGX A100
    Network("ethernet", 12.5e9, 40e-6, 40e-6),  # one port of 100 Gbit/s for the node
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
        misaligned: Speed of a product as a share of an aligned one's, by the bytes to which its rows are aligned.
        misaligned_result: The same with 2 bytes, where the result alone is misaligned.
        link: Bytes per second between GPUs of a node in one direction, as NCCL reaches them.
        launch: Seconds that a kernel takes at least.
        host_eager, host_compiled, host_graph: Seconds of the processor for an operation, a compiled kernel, and a
            compiled graph. 0 on a processor, where the kernels' own time is all there is.
        thin: Size at which a product of a processor has half its speed, by the bytes of a number.
        slow: Numbers that operations bound by arithmetic read and write in a second, by part of their names. A
            processor's exponentials take longer than its memory.
    """

    name: str
    peak: dict[int, float]
    sustained: float
    bandwidth: float
    multiprocessors: int
    attention: tuple[float, float]
    link: float = 0
    misaligned: dict[int, float] = field(default_factory=dict)
    misaligned_result: float = 1.0
    launch: float = LAUNCH
    host_eager: float = HOST_EAGER
    host_compiled: float = HOST_COMPILED
    host_graph: float = HOST_GRAPH
    thin: dict[int, float] = field(default_factory=dict)
    slow: dict[str, float] = field(default_factory=dict)


def device_of(gpu: Gpu) -> Device:
    """Describe a GPU by its datasheet and the constants above."""
    forward, backward = ATTENTION[gpu.generation]
    misaligned = MISALIGNED[gpu.generation]
    peak = gpu.peak * 1e12
    return Device(
        gpu.name,
        {2: peak, 4: gpu.peak32 * 1e12},
        SUSTAINED[gpu.generation],
        gpu.bandwidth * 1e9 * BANDWIDTH,
        gpu.multiprocessors,
        (forward * peak, backward * peak),
        gpu.link * 1e9 * NVLINK_SHARE,
        misaligned,
        min(misaligned[2], MISALIGNED_RESULT) if gpu.generation in ("hopper", "blackwell") else misaligned[2],
    )
