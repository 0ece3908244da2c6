"""Shard a network while it is built, so that no rank holds all of it."""

from typing import Any

import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from cola_lightning.models import Llama
from cola_lightning.models.block import Block
from cola_lightning.optim.rows import chunk, from_rows, is_dtensor


def builds_lazily(strategy: Strategy | None) -> bool:
    """Whether the network is built on the meta device, and :func:`shard` gives it memory layer by layer.

    No rank then holds all of it at any time. ZeRO-3 does the same itself: it shards each module as it is built.
    """
    if isinstance(strategy, FSDPStrategy):
        return "auto_wrap_policy" not in strategy.kwargs  # by a user's policy, torch wraps a network with memory
    return isinstance(strategy, ModelParallelStrategy)


def shard(network: Llama, strategy: Strategy | None) -> None:
    """Shard a network within ``configure_model``, with each decoder layer as a unit.

    A network on the meta device gets its first values here: those that it would have without sharding, from the same
    seed. Other strategies shard the network later, or not at all.
    """
    if isinstance(strategy, ModelParallelStrategy):
        from torch.distributed.fsdp import fully_shard  # slow to import, as the next one is

        mesh = strategy.device_mesh["data_parallel"]
        apart = shard_wider(network, mesh)
        for layer in network.model.layers:
            fully_shard(layer, mesh=mesh, ignored_params=apart)
        fully_shard(network, mesh=mesh, ignored_params=apart)
        same_randomness(strategy)
        network.to_empty(device=strategy.root_device)
        for module in network.modules():
            fill(module, strategy.root_device)
    elif isinstance(strategy, FSDPStrategy) and builds_lazily(strategy):
        from torch.distributed.fsdp.wrap import wrap

        same_randomness(strategy)
        materialize(network.model.embed_tokens, strategy.root_device)
        for index, layer in enumerate(network.model.layers):
            materialize(layer, strategy.root_device)
            network.model.layers[index] = wrap(layer)
        materialize(network.model.norm, strategy.root_device)
        materialize(network.lm_head, strategy.root_device)
    elif isinstance(strategy, DeepSpeedStrategy) and strategy.zero_stage_3:
        from deepspeed.utils import set_z3_leaf_modules  # slow to import, and installed on Linux only

        set_z3_leaf_modules(network, [Block])


def shard_wider(network: Llama, mesh: DeviceMesh) -> set[nn.Parameter]:
    """Shard trained parameters of more bits than the rest, and return them. A unit of FSDP2 has one dtype.

    Example: σ of SST is float32 in a run of bf16-true. Its module gathers it by
    :func:`~cola_lightning.optim.rows.gathered`.
    """
    usual = network.model.embed_tokens.weight.dtype
    wider: set[nn.Parameter] = set()
    for module in network.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.requires_grad and parameter.dtype.itemsize > usual.itemsize:
                own = chunk(len(parameter), mesh.size(), mesh.get_local_rank())
                part = nn.Parameter(from_rows(parameter.detach()[own], parameter.shape, mesh))
                module.register_parameter(name, part)
                wider.add(part)
    return wider


def materialize(module: nn.Module, device: torch.device) -> None:
    """Give a module on the meta device memory and its first values."""
    module.to_empty(device=device)
    for part in module.modules():
        fill(part, device)


def fill(module: nn.Module, device: torch.device) -> None:
    """Set the first values of the parameters and buffers that a module owns directly.

    Every rank draws the whole of a sharded parameter, and keeps its own part.
    """
    own = dict(module.named_parameters(recurse=False))
    if not own and not any(True for _ in module.buffers(recurse=False)):
        return
    # Put a whole parameter in the place of each sharded one, for reset_parameters to fill.
    sharded = {name: parameter for name, parameter in own.items() if is_dtensor(parameter)}
    for name, parameter in sharded.items():
        whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        module.register_parameter(name, nn.Parameter(whole, parameter.requires_grad))
    reset: Any = module.reset_parameters  # nn.Module knows no such method, and each module here has one
    reset()
    # Put the sharded ones back, and copy this rank's part of the values into them.
    for name, parameter in sharded.items():
        from torch.distributed.tensor import distribute_tensor

        whole = module.get_parameter(name).detach()
        module.register_parameter(name, parameter)
        part = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
        with torch.no_grad():
            parameter.to_local().copy_(part.to_local())


def same_randomness(strategy: Strategy) -> None:
    """Give every rank the random state of rank 0, whatever its own seed was."""
    on_gpu = strategy.root_device.type == "cuda"
    state = torch.cuda.get_rng_state(strategy.root_device) if on_gpu else torch.get_rng_state()
    state = strategy.broadcast(state.cpu())
    torch.cuda.set_rng_state(state, strategy.root_device) if on_gpu else torch.set_rng_state(state)
