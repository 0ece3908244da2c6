"""Building a network in pieces, where no process may hold it whole."""

from typing import Any

import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp.wrap import wrap
from torch.distributed.tensor import DTensor, distribute_tensor

from cola_lightning.models import Llama
from cola_lightning.models.block import Block


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
        materialize(network.model.embed_tokens, strategy.root_device)
        for index, layer in enumerate(network.model.layers):
            materialize(layer, strategy.root_device)
            network.model.layers[index] = wrap(layer)
        materialize(network.model.norm, strategy.root_device)
        materialize(network.lm_head, strategy.root_device)
    elif isinstance(strategy, DeepSpeedStrategy) and strategy.zero_stage_3:
        from deepspeed.utils import set_z3_leaf_modules  # takes seconds, and is there on Linux only

        set_z3_leaf_modules(network, [Block])


def materialize(module: nn.Module, device: torch.device) -> None:
    """Give a module that was built on the meta device its memory and its first values."""
    module.to_empty(device=device)
    for part in module.modules():
        fill(part, device)


def fill(module: nn.Module, device: torch.device) -> None:
    """Set the first values of the parameters and buffers that a module owns directly.

    Of a sharded parameter, the whole is drawn on every rank, each keeps its part, and the rest is forgotten.
    """
    own = dict(module.named_parameters(recurse=False))
    if not own and not any(True for _ in module.buffers(recurse=False)):
        return
    sharded = {name: parameter for name, parameter in own.items() if isinstance(parameter, DTensor)}
    for name, parameter in sharded.items():
        whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        module.register_parameter(name, nn.Parameter(whole, parameter.requires_grad))
    reset: Any = module.reset_parameters  # nn.Module knows no such method, and each module here has one
    reset()
    for name, parameter in sharded.items():
        whole = module.get_parameter(name).detach()
        module.register_parameter(name, parameter)
        part = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
        with torch.no_grad():
            parameter.to_local().copy_(part.to_local())


def same_randomness(strategy: Strategy) -> None:
    """Let every rank draw what rank 0 draws, whatever seed it was started with."""
    on_gpu = strategy.root_device.type == "cuda"
    state = torch.cuda.get_rng_state(strategy.root_device) if on_gpu else torch.get_rng_state()
    state = strategy.broadcast(state.cpu())
    torch.cuda.set_rng_state(state, strategy.root_device) if on_gpu else torch.set_rng_state(state)
