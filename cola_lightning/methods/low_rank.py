"""Plain low rank, ``y = B A x`` (Kamalakara et al., arXiv 2209.13569): what CoLA adds a nonlinearity to."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from cola_lightning.errors import InputError
from cola_lightning.models.layers import NormalLinear
from cola_lightning.models.projection import Projection
from cola_lightning.private_apis import mark_operations

LATENT = {"cola_lightning": "latent"}
"""Mark of the operations that make a latent. Set in eager execution and carried through ``torch.compile``."""


def check_rank(in_features: int, out_features: int, rank: int) -> None:
    """Refuse a rank that is not between 1 and the smaller side of the matrix."""
    smaller = min(in_features, out_features)
    if not 1 <= rank <= smaller:
        raise InputError(
            f"rank {rank} does not fit a projection of {in_features} to {out_features} features; "
            f"choose one from 1 to {smaller} (the papers use about a quarter of hidden_size)"
        )


class LowRank(Projection):
    """``B A x`` with A: in -> R and B: R -> out, both trained, in place of a dense in x out matrix.

    Both factors start as N(0, s²) with s = R^(-1/4) (in + out)^(-1/4), so that an entry of the product ``B A`` has
    variance R s⁴ = 1 / (in + out). This is the reference CoLA's initialization; with it LowRank and CoLA differ by the
    nonlinearity alone.

    Args:
        in_features: Size of the last dimension of the input.
        out_features: Size of the last dimension of the output.
        rank: Width R of the bottleneck, between 1 and the smaller side.

    Raises:
        InputError: If the rank is out of that range.
    """

    def __init__(self, in_features: int, out_features: int, rank: int) -> None:
        super().__init__()
        check_rank(in_features, out_features, rank)
        self.rank = rank
        std = (rank * (in_features + out_features)) ** -0.25
        self.A = NormalLinear(in_features, rank, std)
        self.B = NormalLinear(rank, out_features, std)

    def forward(self, x: Tensor) -> Tensor:
        return self.expand(self.latent(x))

    def latent(self, x: Tensor) -> Tensor:
        """``A x``: (…, in) -> (…, R), before any nonlinearity; marked, so that it can be told from other products."""
        with mark_operations(LATENT):
            return self.A(x)

    @staticmethod
    def activate(z: Tensor) -> Tensor:
        """What stands between the factors: here nothing."""
        return z

    def expand(self, z: Tensor) -> Tensor:
        """From the latent (…, R) to the output (…, out)."""
        return self.B(self.activate(z))

    @classmethod
    def forward_fused(cls, projections: Sequence["LowRank"], x: Tensor) -> Sequence[Tensor]:
        """One down-projection to all their latents, then the up-projection of each."""
        weights = [projection.A.weight for projection in projections]
        stacked = torch.cat(weights)
        with mark_operations(LATENT):
            z = linear(x, stacked)
        parts = cls.activate(z).split([len(weight) for weight in weights], dim=-1)
        return [projection.B(part) for projection, part in zip(projections, parts, strict=True)]

    @torch.no_grad()
    def approximate(self, weight: Tensor) -> None:
        """Begin at the best approximation of rank R of a dense matrix (out, in), which its truncated singular value
        decomposition is (Eckart and Young, 1936), the singular values shared evenly between the factors."""
        exact = weight.to(torch.promote_types(weight.dtype, torch.float32))
        u, s, v = torch.linalg.svd(exact, full_matrices=False)
        root = s[: self.A.out_features].sqrt()
        self.A.weight.copy_(root[:, None] * v[: len(root)])
        self.B.weight.copy_(u[:, : len(root)] * root)

    def dense(self) -> Tensor | None:
        """``B A``, (out, in), multiplied in float32."""
        product = self.B.weight.detach().float() @ self.A.weight.detach().float()
        return product.to(self.B.weight.dtype)
