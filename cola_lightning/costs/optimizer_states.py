"""Make a run's optimizer step on fake parameters: count its states, and list its operations."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.optim import Optimizer

from cola_lightning.costs.counters import Recorder
from cola_lightning.costs.fake_network import TRACED, Build, build_on_meta, default_dtype, make_fake
from cola_lightning.costs.operations import Operation
from cola_lightning.optim import Parameters
from cola_lightning.private_apis.torch import fake_tensors


@dataclass(frozen=True)
class OptimizerStates:
    """Memory that an optimizer needs.

    Attributes:
        size: Bytes of its states.
        temporary: Copies of the trained parameters that its step makes for a moment: one if it works on all of them at
            once (``foreach``, PyTorch's default on GPUs), none if it is fused or works on one by one.
        traced: Whether a step on fake tensors was possible. An optimizer that depends on the numbers in its tensors
            cannot be traced; two states per parameter are assumed for it, as Adam has.
        operations: What the second step over the traced layers runs; empty if it was not traced. In the first step an
            optimizer also makes its states.
        share: Parameters of the whole network divided by those that were traced.
    """

    size: float
    temporary: int
    traced: bool
    operations: tuple[Operation, ...] = ()
    share: float = 1


@lru_cache(maxsize=16)
def optimizer_states(
    build: Build, layers: int, make_optimizer: Callable[..., Optimizer], dtype: torch.dtype
) -> OptimizerStates:
    """Make an optimizer step on fake parameters of ``dtype``, and count the states that it leaves."""
    network = build_on_meta(build, layers, dtype)
    with fake_tensors(), default_dtype(dtype):
        make_fake(network)
        for parameter in network.parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        optimizer = make_optimizer(Parameters(network))
        settings = optimizer.defaults
        temporary = int("foreach" in settings and settings["foreach"] is not False and not settings.get("fused"))
        try:
            optimizer.step()
            traced = True
            with Recorder() as recorder:
                optimizer.step()
            operations = tuple(recorder.operations)
        except RuntimeError:
            traced, operations = False, ()
        # The states of the last traced layer count once more for each layer that was not traced.
        more = 1 + layers - min(layers, TRACED)
        last = set(network.model.layers[-1].parameters())
        size = 0.0
        all_numbers = traced_numbers = 0
        for parameter in network.parameters():
            if not traced:
                own = 2 * parameter.numel() * parameter.element_size() * parameter.requires_grad
            else:
                states = optimizer.state.get(parameter, {}).values()
                own = sum(state.untyped_storage().nbytes() for state in states if isinstance(state, Tensor))
            times = more if parameter in last else 1
            size += own * times
            traced_numbers += parameter.numel() * parameter.requires_grad
            all_numbers += parameter.numel() * parameter.requires_grad * times
        return OptimizerStates(size, temporary, traced, operations, all_numbers / max(1, traced_numbers))
