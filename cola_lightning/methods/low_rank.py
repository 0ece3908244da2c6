"""Plain low rank, ``y = B A x`` (Kamalakara et al., arXiv 2209.13569), to which CoLA adds a nonlinearity."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import linear

from cola_lightning.methods.arguments import check_rank
from cola_lightning.models.initialization import low_rank_std
from cola_lightning.models.layers import NormalLinear
from cola_lightning.models.loss import at_least_float32
from cola_lightning.models.projection import Projection
from cola_lightning.private_apis.torch import mark_operations

LATENT = {"cola_lightning": "latent"}
"""Mark of the operations that compute a latent. ``torch.compile`` carries it through to the compiled graph."""


class LowRank(Projection):
    """``B A x`` with A: in -> R and B: R -> out, both trained, in place of a dense in x out matrix.

    Both factors are initialized as N(0, s²) with s of :func:`~cola_lightning.models.initialization.low_rank_std`, as in
    the CoLA reference implementation. LowRank and CoLA differ by the nonlinearity alone.

    Args:
        in_features: Size of the last dimension of the input.
        out_features: Size of the last dimension of the output.
        rank: Width R of the bottleneck, between 1 and the smaller side.

    Raises:
        InputError: If the rank is out of that range.
    """

    rank: int
    keeps_latent = True
    """Whether CoLA-M keeps the latent for the backward pass; the callback sets it."""

    def __init__(self, in_features: int, out_features: int, rank: int) -> None:
        super().__init__()
        check_rank(in_features, out_features, rank)
        self.rank = rank
        std = low_rank_std(in_features, out_features, rank)
        self.A = NormalLinear(in_features, rank, std)
        self.B = NormalLinear(rank, out_features, std)

    def forward(self, x: Tensor) -> Tensor:
        return self.expand(self.latent(x))

    def latent(self, x: Tensor) -> Tensor:
        """Compute ``A x``, (…, in) -> (…, R), before any nonlinearity, and mark what CoLA-M keeps."""
        # Without gradients there is no backward pass to keep it for.
        with mark_operations(LATENT) if self.keeps_latent and torch.is_grad_enabled() else nullcontext():
            return self.A(x)

    @staticmethod
    def activate(z: Tensor) -> Tensor:
        """Apply the nonlinearity between the factors: here none."""
        return z

    def expand(self, z: Tensor) -> Tensor:
        """Compute the output (…, out) from the latent (…, R)."""
        return self.B(self.activate(z))

    @classmethod
    def forward_fused(cls, projections: Sequence[Self], x: Tensor) -> Sequence[Tensor]:
        """Compute all latents by one down-projection, then each output by its own up-projection."""
        weights = [projection.A.weight for projection in projections]
        stacked = torch.cat(weights)
        with mark_operations(LATENT) if projections[0].keeps_latent else nullcontext():
            z = linear(x, stacked)
        parts = cls.activate(z).split([len(weight) for weight in weights], dim=-1)
        return [projection.B(part) for projection, part in zip(projections, parts, strict=True)]

    @torch.no_grad()
    def approximate(self, weight: Tensor) -> None:
        """Set the factors so that ``B A`` is the best approximation of rank R of a dense matrix (out, in).

        That is its truncated singular value decomposition (Eckart and Young, 1936). Each factor gets the roots of the
        singular values.
        """
        u, s, v = torch.linalg.svd(at_least_float32(weight), full_matrices=False)
        root = s[: self.A.out_features].sqrt()
        self.A.weight.copy_(root[:, None] * v[: len(root)])
        self.B.weight.copy_(u[:, : len(root)] * root)

    def dense(self) -> Tensor | None:
        """Return ``B A`` (out, in), multiplied in at least float32."""
        product = at_least_float32(self.B.weight.detach()) @ at_least_float32(self.A.weight.detach())
        return product.to(self.B.weight.dtype)
