"""GaLore, and the projector that Fira shares with it."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cola_lightning.models.loss import at_least_float32
from cola_lightning.optim.gradients import gradient_of
from cola_lightning.optim.projected import ProjectedAdam, columns_of, is_tall
from cola_lightning.optim.rows import is_dtensor
from cola_lightning.optim.sharded import map_whole


class LeadingDirections(ProjectedAdam):
    """Base of GaLore and Fira: P is the leading left singular vectors of the gradient, shorter side first.

    It is renewed every ``update_proj_gap`` steps, the first step included.
    """

    def before_step(self) -> None:
        for group in self.param_groups:
            self._renew(group)

    def _renew(self, group: dict[str, Any]) -> None:
        gap, rank = group["update_proj_gap"], group["rank"]

        def decompose(p: Tensor, grad: Tensor) -> Tensor:
            return leading_directions(grad.T if is_tall(p) else grad, rank)

        def shape(p: Tensor) -> tuple[int, int]:
            return min(p.shape), min(rank, *p.shape)

        due = [p for p in group["params"] if p.grad is not None and self.state[p].get("step", 0) % gap == 0]
        for p, projector in map_whole(due, gradient_of, decompose, shape):
            if dist.is_initialized() and not is_dtensor(projector):
                # Ranks of DDP have the same gradient, but two kinds of device may find two signs for a singular vector.
                dist.broadcast(projector, 0)
            self.state[p]["projector"] = projector

    def projector(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> Tensor:
        return self.state[p]["projector"]


def leading_directions(grad: Tensor, rank: int) -> Tensor:
    """Return the leading left singular vectors (m x rank) of a whole gradient (m x n)."""
    u = torch.linalg.svd(at_least_float32(grad), full_matrices=False).U[:, :rank]
    return u.to(grad.dtype).contiguous()


class GaLore(LeadingDirections):
    """GaLore (arXiv 2403.03507): the update is ``α P N``, within the leading directions of a recent gradient.

    Args:
        params: Matrices.
        lr: Learning rate.
        rank: Number of leading directions; all if a side of the matrix is shorter.
        scale: α, the factor of the update.
        update_proj_gap: Steps between two decompositions of the gradient.
        betas: Decay rates of the two moments.
        eps: Added to the square root of the second moment; 1e-6 in the reference implementation, 1e-8 in the paper.
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
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(
            params, rank, update_proj_gap, lr=lr, scale=scale, betas=betas, eps=eps, weight_decay=weight_decay
        )

    def update(self, grad: Tensor, low: Tensor, normed: Tensor, P: Tensor, state: dict, group: dict) -> Tensor:  # noqa: N803
        return (P @ columns_of(normed, grad)).mul_(group["scale"])
