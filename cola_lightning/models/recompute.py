"""Decoder layers that keep little of a training step's forward pass and compute the rest again in the backward pass.

No wrapper module: a layer changes its class, from :class:`Block` to a subclass of it, so that parameters keep their
names and a run may begin or stop recomputing when it resumes.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from cola_lightning.models.block import Block
from cola_lightning.models.cross_layer import CrossLayerBlock
from cola_lightning.models.rotary import Rotary

Scheme = Callable[..., Tensor | tuple[Tensor, ...]]
"""``f(block, x, rotary, *received)`` returns what the layer's plain forward pass returns, x (B, T, D) or x and the
tensors for the next layer. It decides what is kept until the backward pass."""


class RecomputedBlock(Block):
    """A decoder layer that runs through ``recompute`` where gradients are wanted, and plainly in validation."""

    recompute: Scheme

    def forward(self, x: Tensor, rotary: Rotary, *received: Tensor) -> Tensor | tuple[Tensor, ...]:  # type: ignore[override]
        if torch.is_grad_enabled():
            return self.recompute(self, x, rotary, *received)
        return self.plain_forward(x, rotary, *received)

    def plain_forward(self, x: Tensor, rotary: Rotary, *received: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Run the layer as without recomputing."""
        return super().forward(x, rotary, *received)


class RecomputedCrossLayerBlock(RecomputedBlock, CrossLayerBlock):
    """The same over a layer that takes and passes on tensors; ``super()`` above is then CrossLayerBlock."""


def set_recompute(block: Block, scheme: Scheme) -> None:
    """Make a decoder layer run through ``scheme`` in training; called before it is compiled and sharded."""
    if not isinstance(block, RecomputedBlock):
        block.__class__ = RecomputedCrossLayerBlock if isinstance(block, CrossLayerBlock) else RecomputedBlock
    block.recompute = scheme
