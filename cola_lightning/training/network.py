"""Steps of ``LanguageModel.configure_model``: allocate the network, apply transforms, compile."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import rank_zero_info

from cola_lightning.distributed.sharding import builds_lazily
from cola_lightning.errors import InputError
from cola_lightning.host_memory import check_memory
from cola_lightning.models import Llama
from cola_lightning.private_apis.torch import allow_compilations

Transform = Callable[[Llama], None]
"""Changes a network in place, such as turning on activation checkpointing."""


def allocate_network(build: Callable[[], Llama], parameter_count: int, strategy: Strategy | None) -> Llama:
    """Build the network; without memory where the strategy shards it first and allocates the shards afterwards.

    Raises:
        InputError: If the weights do not fit into the memory of this machine.
    """
    rank_zero_info(f"Building a network of {parameter_count:,} parameters")
    lazily = builds_lazily(strategy)
    if strategy and not lazily and strategy.root_device.type == "cpu":
        check_memory(4 * parameter_count, "its weights", "lower --model.hidden_size or another of its sizes")
    with torch.device("meta") if lazily else nullcontext():
        return build()


def apply_transforms(network: Llama, transforms: Sequence[Transform], is_finished: bool) -> None:
    """Apply transforms that the network does not have yet.

    Raises:
        InputError: If there is one and the network is compiled or sharded already.
    """
    for transform in transforms:
        if is_finished:
            owner = type(getattr(transform, "__self__", transform)).__name__
            raise InputError(
                f"{owner} has to change the network before it is compiled and sharded, but a stage before this one "
                f"did that; give that stage's Trainer the same callbacks, or make a new LanguageModel"
            )
        transform(network)


def compile_network(network: Llama) -> None:
    """Compile each decoder layer, and head and loss, with ``torch.compile``."""
    allow_compilations()
    for layer in network.model.layers:
        layer.compile()
    network.lm_head.compile()
