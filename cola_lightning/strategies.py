"""Strategies as they have to be for these networks, under the names that ``--trainer.strategy`` takes."""

from typing import Any

import torch
from lightning.pytorch.strategies import (
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    Strategy,
    StrategyRegistry,
)
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from cola_lightning.errors import InputError
from cola_lightning.models import Llama
from cola_lightning.models.llama import Block


class FSDP2Strategy(ModelParallelStrategy):
    """Fully sharded data parallel, second generation, over all devices; ``shard`` says what a unit is.

    Args:
        save_distributed_checkpoint: Each rank writes its shard, into a folder; else rank 0 writes one file.
    """

    def __init__(self, save_distributed_checkpoint: bool = False) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=save_distributed_checkpoint)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes  # Lightning's "auto" is one per node
        super().setup_environment()


def shard(network: Llama, strategy: Strategy | None) -> None:
    """Tell a strategy that shards within ``configure_model`` that a layer's weights are gathered together.

    DDP and FSDP wrap the module later, by themselves.
    """
    if isinstance(strategy, ModelParallelStrategy):
        mesh = strategy.device_mesh["data_parallel"]
        for layer in network.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(network, mesh=mesh)
    elif isinstance(strategy, DeepSpeedStrategy) and strategy.zero_stage_3:
        from deepspeed.utils import set_z3_leaf_modules  # takes seconds, and is there on Linux only

        set_z3_leaf_modules(network, [Block])


def check_optimizer(strategy: Strategy, optimizer: Optimizer) -> None:
    """Refuse an optimizer that needs whole matrices where a rank holds but a piece of each."""
    if getattr(optimizer, "whole_matrices", False) and isinstance(
        strategy, FSDPStrategy | ModelParallelStrategy | DeepSpeedStrategy
    ):
        raise InputError(
            f"{type(optimizer).__name__} works on whole matrices, which {type(strategy).__name__} cuts into pieces; "
            f"set --trainer.strategy ddp, or name another --model.optimizer"
        )


def clip_gradients(strategy: Strategy, parameters: list[nn.Parameter], limit: float | None) -> Tensor | None:
    """Clip by the global norm over all ranks' shards, and return the norm as it was before.

    DeepSpeed clips by itself in its own step, from ``gradient_clip_val``; its norm is known only after that.
    """
    if isinstance(strategy, DeepSpeedStrategy):
        return None
    maximum = float("inf") if limit is None else limit
    root: Any = strategy.model
    if isinstance(root, FullyShardedDataParallel):
        return root.clip_grad_norm_(maximum)  # Lightning refuses clip-by-norm here, FSDP itself does not
    norm = torch.nn.utils.clip_grad_norm_(parameters, maximum)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


StrategyRegistry.register("fsdp2", FSDP2Strategy, description="FSDP2, a unit for each decoder layer")
StrategyRegistry.register(
    "fsdp",
    FSDPStrategy,
    description="FSDP, a unit for each decoder layer",
    override=True,
    auto_wrap_policy={Block},
)
