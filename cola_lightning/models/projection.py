"""The projection: what a method puts in the place of a decoder layer's dense matrices."""

from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from cola_lightning.models.layers import NormalLinear


class Projection(nn.Module):
    """Base class of the seven projections of a layer: (…, in_features) -> (…, out_features), without bias.

    The constructor of a subclass takes the two sizes first, then arguments of its own.

    Attributes:
        rank: Width R of the bottleneck or of the trained branch; None for a projection that has neither.
    """

    rank: int | None = None

    def in_first_layer(self) -> "Projection":
        """Return the projection to use in the first layer: this one, unless it needs the layer before."""
        return self

    @classmethod
    def forward_fused(cls, projections: Sequence[Self], x: Tensor) -> Sequence[Tensor]:
        """Call projections of this class that share the input ``x``.

        A subclass may join their matrices into one product. The input is then read once, and the backward pass need not
        add up one gradient for each projection.
        """
        return [projection(x) for projection in projections]

    def dense(self) -> Tensor | None:
        """Return the equivalent matrix (out_features, in_features); None if the projection is not a linear map."""
        return None


class CrossLayer(Projection):
    """A projection that also takes a tensor from its counterpart in the layer before, and gives one to the next.

    ``forward(x, received)`` returns the output (…, out_features) and the tensor for the next layer. In the first layer
    ``received`` is None. See :mod:`cola_lightning.models.cross_layer`.
    """


MakeProjection = Callable[[int, int], Projection]
"""``f(in_features, out_features)`` makes a projection."""


class FullRank(NormalLinear, Projection):
    """The projection of an ordinary LLaMA: one dense matrix, initialized as N(0, 0.02²)."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)

    def dense(self) -> Tensor:
        return self.weight.detach()

    @classmethod
    def forward_fused(cls, projections: Sequence[Self], x: Tensor) -> Sequence[Tensor]:
        weights = [projection.weight for projection in projections]
        return linear(x, torch.cat(weights)).split([len(weight) for weight in weights], dim=-1)
