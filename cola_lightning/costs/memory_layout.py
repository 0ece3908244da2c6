"""Shares of weights, gradients and optimizer states on a GPU, under each strategy and precision.

P is the number of trained parameters, N of GPUs, w the bytes of a weight, S the bytes of the optimizer's states: 2 w P
for Adam.

================  =======  =========  =============  =================================================================
strategy          weights  gradients  optimizer      buffers
================  =======  =========  =============  =================================================================
one device        w P      w P        S              none
DDP               w P      w P        S              w P, its buckets (none if they are views of the gradients)
FSDP, FSDP2       w P / N  w P / N    S / N          gathered: what is in no layer, and a layer with its gradients
DeepSpeed ZeRO-1  w P      w P        (4 P + S) / N  two buckets of ``reduce_bucket_size`` numbers
DeepSpeed ZeRO-2  w P      w P / N    (4 P + S) / N  the same
DeepSpeed ZeRO-3  w P / N  w P / N    (4 P + S) / N  gathered: head, or a layer and gradients; prefetch; a bucket
================  =======  =========  =============  =================================================================

If weights have 16 bits, DeepSpeed keeps a float32 copy of them (the 4 P), and its states in float32. In mixed precision
its weights have 16 bits, too (ZeRO, arXiv 1910.02054). What is offloaded takes no memory of the GPU.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
    StrategyRegistry,
)

import cola_lightning.distributed.strategies  # noqa: F401  (registers fsdp2)
from cola_lightning.costs.parameters import Parameters
from cola_lightning.errors import InputError
from cola_lightning.private_apis.lightning import ddp_options

PRECISIONS: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "64-true": (torch.float64, None),
    "32-true": (torch.float32, None),
    "bf16-true": (torch.bfloat16, None),
    "16-true": (torch.float16, None),
    "bf16-mixed": (torch.float32, torch.bfloat16),
    "16-mixed": (torch.float32, torch.float16),
}
"""Types of the weights and of autocast."""
ALIASES = {"None": "32-true", "64": "64-true", "32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}


@dataclass(frozen=True)
class MemoryLayout:
    """Share of a run's memory on one GPU.

    Attributes:
        strategy: Name of the strategy.
        dtype: Type of the stored weights and gradients.
        computed: Type of the weights that a layer computes with.
        autocast: Type of the matrix products under mixed precision.
        weights, gradients, optimizer: Share of each on one GPU, from 0 to 1.
        master: Whether the optimizer keeps a float32 copy of the weights. Its states are then float32, too.
        buffers: Function from a network's parameters to further bytes: while head and loss run, and while the backward
            pass of a layer runs.
    """

    strategy: str
    dtype: torch.dtype
    computed: torch.dtype
    autocast: torch.dtype | None
    weights: float = 1
    gradients: float = 1
    optimizer: float = 1
    master: bool = False
    buffers: Callable[[Parameters], tuple[float, float]] = lambda parameters: (0, 0)


def memory_layout(strategy: str | Strategy, precision: str | int | None, gpus: int) -> MemoryLayout:
    """Return the layout of a run.

    Args:
        strategy: Value of ``--trainer.strategy``.
        precision: Value of ``--trainer.precision``.
        gpus: Number of GPUs.

    Raises:
        InputError: If the strategy or the precision is not one that can be estimated.
    """
    name = ALIASES.get(str(precision), str(precision))
    if name not in PRECISIONS:
        raise InputError(f"--trainer.precision {precision} is not estimated; choose one of {', '.join(PRECISIONS)}")
    dtype, autocast = PRECISIONS[name]
    kind, options, label = _strategy(strategy, gpus)
    width = dtype.itemsize
    if issubclass(kind, SingleDeviceStrategy):
        return MemoryLayout(label, dtype, dtype, autocast)
    if issubclass(kind, FSDPStrategy | ModelParallelStrategy):
        # The first FSDP casts the weights that it gathers; FSDP2 leaves them to autocast.
        computed = autocast if autocast and issubclass(kind, FSDPStrategy) else dtype
        return _fully_sharded(label, dtype, computed, autocast, gpus, options)
    if issubclass(kind, DeepSpeedStrategy):
        return _deepspeed(label, autocast or dtype, gpus, options)
    if issubclass(kind, DDPStrategy):  # DeepSpeed's is one too, by inheritance
        views = options.get("gradient_as_bucket_view", False)
        buckets = 0 if views else width
        return MemoryLayout(label, dtype, dtype, autocast, buffers=lambda p: (buckets * p.total.trained,) * 2)
    raise InputError(f"--trainer.strategy {label} is not estimated; choose ddp, fsdp, fsdp2 or deepspeed_stage_1, 2, 3")


def _strategy(strategy: str | Strategy, gpus: int) -> tuple[type, dict[str, Any], str]:
    """Return a strategy's class, options and name. A named one is not made, because DeepSpeed's needs DeepSpeed."""
    if isinstance(strategy, Strategy):
        options = {**ddp_options(strategy), **getattr(strategy, "kwargs", {})}
        for attribute in ("cpu_offload", "sharding_strategy", "config"):
            options[attribute] = getattr(strategy, attribute, None)
        return type(strategy), options, type(strategy).__name__
    if strategy == "auto":
        return (SingleDeviceStrategy, {}, "one device") if gpus == 1 else (DDPStrategy, {}, "ddp")
    if strategy not in StrategyRegistry:
        raise InputError(f"--trainer.strategy {strategy} is not known; {', '.join(StrategyRegistry)} are")
    entry = StrategyRegistry[strategy]
    return entry["strategy"], entry["init_params"], strategy


def _fully_sharded(
    name: str,
    dtype: torch.dtype,
    computed: torch.dtype,
    autocast: torch.dtype | None,
    gpus: int,
    options: dict[str, Any],
) -> MemoryLayout:
    sharding = options.get("sharding_strategy") or "FULL_SHARD"
    sharding = sharding if isinstance(sharding, str) else sharding.name
    if sharding not in ("FULL_SHARD", "SHARD_GRAD_OP"):
        raise InputError(f"FSDP's sharding_strategy {sharding} is not estimated; choose FULL_SHARD or SHARD_GRAD_OP")
    offload = options.get("cpu_offload")
    on_gpu = 0 if getattr(offload, "offload_params", offload) else 1 / gpus

    def gathered(p: Parameters) -> tuple[float, float]:
        # Embedding and head stay gathered, and their gradients until the last of them, the embedding's, is there. While
        # one layer computes, the next is gathered.
        beside, everything = p.outside_layers.parameters, p.total.parameters
        at_head, in_layers = beside, beside + 2 * p.layer.parameters
        if sharding == "SHARD_GRAD_OP":
            at_head = in_layers = everything
        gradients = p.parts["head"].trained + p.layer.trained
        return computed.itemsize * at_head, computed.itemsize * (in_layers + gradients)

    return MemoryLayout(name, dtype, computed, autocast, on_gpu, on_gpu, on_gpu, False, gathered)


def _deepspeed(name: str, dtype: torch.dtype, gpus: int, options: dict[str, Any]) -> MemoryLayout:
    zero = (options.get("config") or {}).get("zero_optimization", options)
    stage = zero.get("stage", 2)
    bucket = zero.get("reduce_bucket_size", 200_000_000)  # Lightning's default
    prefetched = zero.get("stage3_prefetch_bucket_size", 50_000_000)  # DeepSpeed's default
    offload_optimizer = bool(zero.get("offload_optimizer"))
    offload_weights = bool(zero.get("offload_param") or zero.get("offload_parameters"))
    share = 1 / gpus

    def buffers(p: Parameters) -> tuple[float, float]:
        if stage < 3:
            return (dtype.itemsize * 2 * bucket,) * 2
        ahead = min(prefetched, p.layer.parameters)
        at_head = p.parts["head"].parameters + ahead + bucket
        in_layers = p.layer.parameters + p.layer.trained + ahead + bucket
        return dtype.itemsize * at_head, dtype.itemsize * in_layers

    return MemoryLayout(
        name,
        dtype,
        dtype,
        None,
        weights=0 if offload_weights else share if stage == 3 else 1,
        gradients=0 if offload_optimizer and stage > 1 else share if stage > 1 else 1,
        optimizer=0 if offload_optimizer else share if stage > 0 else 1,
        master=dtype.itemsize == 2,
        buffers=buffers,
    )
