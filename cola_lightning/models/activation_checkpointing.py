"""Activation checkpointing: decoder layers that keep little of the forward pass and recompute the rest in backward.

There is no wrapper module. A layer changes its class from :class:`Block` to a subclass of it, so that parameters keep
their names, and a run may begin or stop recomputing when it resumes. The schemes themselves are in
``cola_lightning/methods``: CoLA-M and CR-Net's recompute.
"""

from collections.abc import Callable

import torch
from torch import Tensor

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
