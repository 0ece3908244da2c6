"""Activation checkpointing: decoder layers that keep little of the forward pass and recompute the rest in backward.

There is no wrapper module. A layer changes its class from :class:`Block` to a subclass of it, so that parameters keep
their names, and a run may begin or stop recomputing when it resumes. The schemes themselves are in
``cola_lightning/methods``: CoLA-M and CR-Net's recompute.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from cola_lightning.models.block import Block
from cola_lightning.models.cross_layer import CrossLayerBlock
from cola_lightning.models.rotary import Rotary

Scheme = Callable[..., Tensor | tuple[Tensor, ...]]
"""``f(block, x, rotary, *received)`` returns what the layer's plain forward pass returns: x (B, T, D), or x and the
tensors for the next layer. It decides what is kept until the backward pass."""


class RecomputedBlock(Block):
    """A decoder layer that calls ``recompute`` when gradients are enabled, and runs plainly in validation."""

    recompute: Scheme

    def forward(self, x: Tensor, rotary: Rotary, *received: Tensor) -> Tensor | tuple[Tensor, ...]:  # type: ignore[override]
        if torch.is_grad_enabled():
            return self.recompute(self, x, rotary, *received)
        return self.plain_forward(x, rotary, *received)

    def plain_forward(self, x: Tensor, rotary: Rotary, *received: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Run the layer without recomputing."""
        return super().forward(x, rotary, *received)


class RecomputedCrossLayerBlock(RecomputedBlock, CrossLayerBlock):  # type: ignore[misc]  # forward returns one of both
    """A recomputed layer that takes and passes on tensors; ``super()`` in RecomputedBlock is then CrossLayerBlock."""


def set_recompute(block: Block, scheme: Scheme) -> None:
    """Make a decoder layer recompute by ``scheme`` in training. Call this before it is compiled and sharded."""
    if not isinstance(block, RecomputedBlock):
        block.__class__ = RecomputedCrossLayerBlock if isinstance(block, CrossLayerBlock) else RecomputedBlock
        assert isinstance(block, RecomputedBlock)
    block.recompute = scheme


# -- parts of schemes that have a backward pass of their own -----------------------------------------------------------


def autocast_settings(device_type: str) -> dict[str, Any]:
    """Read the arguments with which ``torch.autocast`` repeats the current setting in the backward pass."""
    return {
        "device_type": device_type,
        "enabled": torch.is_autocast_enabled(device_type),
        "dtype": torch.get_autocast_dtype(device_type),
    }


def weights_of(module: nn.Module) -> list[Tensor]:
    """List the weights that the leaves compute with. While FSDP computes, these are views and not parameters."""
    weights = (getattr(leaf, "weight", None) for leaf in module.modules())
    return [weight for weight in weights if isinstance(weight, Tensor)]


class LinearWithKnownOutput(Function):
    """A linear map whose output is known: no product in the forward pass, the usual gradients in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, output: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return output.view_as(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        grad_x = (grad @ weight.to(grad.dtype)).to(x.dtype)
        grad_weight = grad.flatten(0, -2).T @ x.flatten(0, -2).to(grad.dtype)
        return grad_x, grad_weight.to(weight.dtype), None
