"""Fira."""

from collections.abc import Iterable
from typing import Literal

from torch import Tensor

from cola_lightning.optim.galore import LeadingDirections
from cola_lightning.optim.projected import channel_ratio, columns_of, limit_growth


class Fira(LeadingDirections):
    """Fira (arXiv 2410.01623): GaLore's update plus the part of the gradient outside the leading directions.

    Each column of the outside part is scaled as Adam scales the same column of the projection, and the growth of its
    norm is limited.

    Args:
        params: Matrices.
        lr: Learning rate.
        rank: Number of leading directions; all if a side of the matrix is shorter.
        scale: α, the factor of the update.
        update_proj_gap: Steps between two decompositions of the gradient.
        growth: γ, the largest ratio of the outside part's norm to that of the step before.
        form: ``code``, the authors' code, which gave the published numbers: the update is ``α P N + S``, and the
            outside part ``S`` is ``G - α P R`` with scaled columns. ``paper``: ``α (P N + S)``, and ``G - P R``.
        betas: Decay rates of the two moments.
        eps: Added to the square root of the second moment.
        weight_decay: Decoupled weight decay.

    Raises:
        InputError: If ``rank`` or ``update_proj_gap`` is below 1, or a parameter is not a matrix.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 0.01,
        rank: int = 128,
        scale: float = 0.25,
        update_proj_gap: int = 200,
        growth: float = 1.01,
        form: Literal["code", "paper"] = "code",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        self.form = form
        super().__init__(
            params, rank, update_proj_gap, lr=lr, scale=scale, growth=growth, betas=betas, eps=eps,
            weight_decay=weight_decay,
        )  # fmt: skip

    def update(self, grad: Tensor, low: Tensor, normed: Tensor, P: Tensor, state: dict, group: dict) -> Tensor:  # noqa: N803
        inside, outside = (1.0, group["scale"]) if self.form == "paper" else (group["scale"], 1.0)
        ratio = columns_of(channel_ratio(normed, low), grad)
        rest = (grad - inside * (P @ columns_of(low, grad))) * ratio
        return group["scale"] * (P @ columns_of(normed, grad)) + outside * limit_growth(rest, group["growth"], state)
