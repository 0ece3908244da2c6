"""APOLLO and APOLLO-Mini."""

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from cola_lightning.optim.projected import TINY, ProjectedAdam, channel_ratio, columns_of, limit_growth
from cola_lightning.optim.sharded import distribute_like, to_scalar


class APOLLO(ProjectedAdam):
    """APOLLO (arXiv 2412.05270): the update is the gradient itself with scaled columns.

    Each column is scaled as Adam scales the same column of a random projection ``R = Pᵀ G``, P ~ N(0, 1/rank). The
    growth of the update's norm is limited as in Fira. APOLLO-Mini is ``rank: 1``, ``scaling: tensor``, ``scale: 128``.

    P is not kept: each step draws it again from its seed. The reference can apply ``scale`` before the limiter instead
    of after; because the limiter compares norms, that makes no difference.

    Args:
        params: Matrices.
        lr: Learning rate.
        rank: Width of the random projection.
        scale: Its square root multiplies the update, as in the reference implementation.
        scaling: One factor for each column (``channel``), or one for the matrix (``tensor``).
        update_proj_gap: Steps between two seeds.
        growth: The largest ratio of the update's norm to that of the step before.
        seed: Seed of the projections; the same on all ranks.
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
        scale: float = 1.0,
        scaling: Literal["channel", "tensor"] = "channel",
        update_proj_gap: int = 200,
        growth: float = 1.01,
        seed: int = 0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        self.scaling, self.seed = scaling, seed
        super().__init__(
            params, rank, update_proj_gap, lr=lr, scale=scale, growth=growth, betas=betas, eps=eps,
            weight_decay=weight_decay,
        )  # fmt: skip
        self.numbers = {p: n for n, p in enumerate(p for group in self.param_groups for p in group["params"])}

    def projector(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> Tensor:
        round_ = self.state[p]["step"] // group["update_proj_gap"]
        # A seed of its own for each matrix and round, up to a million of either
        seed = ((self.seed << 40) + (self.numbers[p] << 20) + round_) % 2**63
        generator = torch.Generator(p.device).manual_seed(seed)
        dtype = torch.promote_types(grad.dtype, torch.float32)
        drawn = torch.randn(len(grad), group["rank"], dtype=dtype, device=p.device, generator=generator)
        return distribute_like((drawn / math.sqrt(group["rank"])).to(grad.dtype), grad)

    def update(self, grad: Tensor, low: Tensor, normed: Tensor, P: Tensor, state: dict, group: dict) -> Tensor:  # noqa: N803
        if self.scaling == "channel":
            ratio = columns_of(channel_ratio(normed, low), grad)
        else:
            ratio = to_scalar(normed.norm()) / (to_scalar(low.norm()) + TINY)
        return limit_growth(grad * ratio, group["growth"], state).mul_(math.sqrt(group["scale"]))
