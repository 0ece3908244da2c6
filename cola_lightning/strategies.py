"""Strategies as they have to be for these networks, under the names that ``--trainer.strategy`` takes."""

from pathlib import Path
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
from torch.distributed.fsdp.wrap import wrap
from torch.distributed.tensor import DTensor, distribute_tensor

from cola_lightning.checkpoints import read_state, refuse_code
from cola_lightning.checkpoints.formats import Format, format_of
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

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        refuse_code(Path(checkpoint_path))
        return super().load_checkpoint(checkpoint_path, weights_only=True)


class ZeROStrategy(DeepSpeedStrategy):
    """DeepSpeed, with any optimizer also where its states are kept on the CPU.

    Arguments are those of Lightning's DeepSpeedStrategy.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # Else DeepSpeed insists on an Adam of its own for offloading; --model.optimizer may still name that one.
        self.config.setdefault("zero_force_ds_cpu_optimizer", False)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        refuse_code(Path(checkpoint_path))  # DeepSpeed itself unpickles
        return super().load_checkpoint(checkpoint_path, weights_only=True)


# -- building ---------------------------------------------------------------------------------------------------------


def builds_lazily(strategy: Strategy | None) -> bool:
    """Whether the network is to be built without memory, for ``shard`` to fill it in piece by piece.

    So that no rank ever holds it whole. ZeRO-3 does the same by a way of its own: it shards each module as it is built.
    """
    if isinstance(strategy, FSDPStrategy):
        return "auto_wrap_policy" not in strategy.kwargs  # with a policy of the user's, torch wraps what is whole
    return isinstance(strategy, ModelParallelStrategy)


def shard(network: Llama, strategy: Strategy | None) -> None:
    """Shard a network, a decoder layer as the unit, where that has to happen within ``configure_model``.

    A network that was built on the meta device gets its first values here: those that it would have had whole, from the
    same seed. DDP wraps the module later, by itself.
    """
    if isinstance(strategy, ModelParallelStrategy):
        mesh = strategy.device_mesh["data_parallel"]
        for layer in network.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(network, mesh=mesh)
        same_randomness(strategy)
        network.to_empty(device=strategy.root_device)
        for module in network.modules():
            fill(module, strategy.root_device)
    elif isinstance(strategy, FSDPStrategy) and builds_lazily(strategy):
        same_randomness(strategy)
        materialise(network.model.embed_tokens, strategy.root_device)
        for index, layer in enumerate(network.model.layers):
            materialise(layer, strategy.root_device)
            network.model.layers[index] = wrap(layer)
        materialise(network.model.norm, strategy.root_device)
        materialise(network.lm_head, strategy.root_device)
    elif isinstance(strategy, DeepSpeedStrategy) and strategy.zero_stage_3:
        from deepspeed.utils import set_z3_leaf_modules  # takes seconds, and is there on Linux only

        set_z3_leaf_modules(network, [Block])


def materialise(module: nn.Module, device: torch.device) -> None:
    """Give a module that was built on the meta device its memory and its first values."""
    module.to_empty(device=device)
    for part in module.modules():
        fill(part, device)


def fill(module: nn.Module, device: torch.device) -> None:
    """Set the first values of the parameters and buffers that a module owns directly.

    Of a sharded parameter, the whole is drawn on every rank, each keeps its part, and the rest is forgotten.
    """
    own = {name: parameter for name, parameter in module._parameters.items() if parameter is not None}
    if not own and not any(buffer is not None for buffer in module._buffers.values()):
        return
    sharded = {name: parameter for name, parameter in own.items() if isinstance(parameter, DTensor)}
    for name, parameter in sharded.items():
        whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        module._parameters[name] = nn.Parameter(whole, parameter.requires_grad)
    module.reset_parameters()
    for name, parameter in sharded.items():
        whole = module._parameters[name].detach()
        module._parameters[name] = parameter
        part = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
        with torch.no_grad():
            parameter.to_local().copy_(part.to_local())


def same_randomness(strategy: Strategy) -> None:
    """Let every rank draw what rank 0 draws, whatever seed it was started with."""
    on_gpu = strategy.root_device.type == "cuda"
    state = torch.cuda.get_rng_state(strategy.root_device) if on_gpu else torch.get_rng_state()
    state = strategy.broadcast(state.cpu())
    torch.cuda.set_rng_state(state, strategy.root_device) if on_gpu else torch.set_rng_state(state)


# -- a step -----------------------------------------------------------------------------------------------------------


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


# -- going on ---------------------------------------------------------------------------------------------------------


def refuse_mismatch(strategy: Strategy, path: Path, world_size: int) -> None:
    """Say before anything is built whether a strategy can go on from a checkpoint.

    One file goes with one device, DDP, FSDP and FSDP2 alike, whichever wrote it, on any number of devices. Shards go
    with FSDP and FSDP2. DeepSpeed's folder goes with the stage and the number of devices that wrote it.

    Raises:
        InputError: If it cannot.
    """
    written, deepspeed = format_of(path), isinstance(strategy, DeepSpeedStrategy)
    name = type(strategy).__name__
    hint = "go on under the strategy that wrote it, or take its weights by 'cola_lightning export'"
    if deepspeed != (written is Format.DEEPSPEED):
        raise InputError(f"{path} is {written.value}, which {name} cannot go on from; {hint}")
    if written is Format.SHARDS and not isinstance(strategy, FSDPStrategy | ModelParallelStrategy):
        raise InputError(f"{path} is in {written.value}, which {name} cannot go on from; {hint}")
    if deepspeed:
        state = read_state(path)
        theirs = state["ds_config"]["zero_optimization"]["stage"], state["dp_world_size"]
        ours = strategy.config["zero_optimization"]["stage"], world_size
        if theirs != ours:
            raise InputError(
                f"{path} was written by ZeRO-{theirs[0]} on {theirs[1]} devices, which ZeRO-{ours[0]} on {ours[1]} "
                f"cannot go on from; {hint}"
            )


StrategyRegistry.register("fsdp2", FSDP2Strategy, description="FSDP2, a unit for each decoder layer")
for _stage in (1, 2, 3):
    _offload = {"offload_optimizer": True} | ({"offload_parameters": True} if _stage == 3 else {})
    _name, _register = f"deepspeed_stage_{_stage}", StrategyRegistry.register
    _register(_name, ZeROStrategy, description=f"DeepSpeed ZeRO-{_stage}", override=True, stage=_stage)
    if _stage > 1:
        _about = f"DeepSpeed ZeRO-{_stage}, with the optimizer{' and parameters' * (_stage == 3)} on the CPU"
        _register(f"{_name}_offload", ZeROStrategy, description=_about, override=True, stage=_stage, **_offload)
