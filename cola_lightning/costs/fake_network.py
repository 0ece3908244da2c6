"""Build networks on fake tensors, which have a shape, a type and a size, but no content."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from cola_lightning.models import Llama

Build = Callable[..., Llama]
TRACED = 3
"""Largest number of layers that are traced. Of three layers, the middle one has a layer on both sides, as most have."""


def build_on_meta(build: Build, layers: int, dtype: torch.dtype) -> Llama:
    """Build the layers that are traced without memory, and without a draw from the global random numbers.

    On the meta device, and not with fake tensors, because an initialization may read a number that it drew, as that of
    LaX's gates does. A fake tensor has none.
    """
    with torch.random.fork_rng(devices=[]), default_dtype(dtype), torch.device("meta"):
        return build(num_hidden_layers=min(layers, TRACED))


def make_fake(network: nn.Module) -> None:
    """Replace parameters and buffers by fake ones of the CPU; fake tensors are on. Tied parameters stay tied."""
    made: dict[int, Tensor] = {}
    for module in network.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in made:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                made[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
            setattr(module, name, made[id(parameter)])
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))


def fuse_norms(network: nn.Module) -> None:
    """Replace the norms' forward by one kernel, whose saved tensors are a GPU kernel's."""
    for norm in network.modules():
        if isinstance(norm, nn.RMSNorm):
            vars(norm)["forward"] = partial(_fused_norm, norm)


def _fused_norm(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    return _FusedNorm.apply(x, norm.weight)


class _FusedNorm(Function):
    """RMSNorm as a GPU's kernel, in shapes and sizes: it saves its input and one float32 number per token."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32))
        return torch.mul(x, weight)  # one operation that reads and writes what the kernel does

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.add(x, grad, out=torch.empty_like(x)), torch.empty_like(weight)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Give the modules that are made in the context weights of ``dtype``."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
