"""Adam on a projection of each gradient: the base of GaLore, Fira and APOLLO.

All three keep Adam's moments of ``R``, the projection of the gradient ``G`` (m x n) by a matrix ``P``, and differ in
how they make the update of the whole matrix from it. The shorter side is projected: with m < n, ``R = Pᵀ G``
(rank x n), else ``R = G P`` (m x rank). The formulas of these files are written for m < n.

Library versions exist (pytorch-optimizer 4.1.0). They keep a Python object in the optimizer's state, which a checkpoint
of plain data cannot hold, and their APOLLO scales the projected gradient where the paper scales the gradient itself.

Under FSDP2 a rank has some rows of W and G, and computes the update of these rows. P, the moments, R and N are sharded
too: P by rows, the others, which are rank x n, by columns. For each matrix, all ranks together need these exchanges at
a step, in which each of k ranks sends (k - 1) / k of the numbers:

- m < n: each rank's product ``Pᵀ G`` is one term of a sum, so a reduce-scatter of rank n numbers makes R. ``P N``
  needs the whole of N: GaLore gathers rank n numbers, Fira 2 rank n + n (R too, and the ratios), APOLLO n (the ratios).
- m >= n: the transposed G is sharded by the columns that Adam works on. GaLore and Fira gather P, here n rank numbers,
  and APOLLO draws it. Nothing else is sent.

Fira and APOLLO also sum one number for each norm over the ranks. To renew P, a matrix is gathered on one rank, see
:func:`~cola_lightning.optim.sharded.map_whole`.
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from cola_lightning.errors import InputError, check_at_least
from cola_lightning.models.loss import at_least_float32
from cola_lightning.optim.gradients import gradient_of
from cola_lightning.optim.sharded import is_sharded_by_rows, replicate, shard_columns, shard_like, to_scalar
from cola_lightning.optim.transformers_adamw import StepEachParameter, advance_moments, decay_weights

TINY = 1e-8  # keeps a ratio of norms finite, as in the three reference implementations


class ProjectedAdam(StepEachParameter):
    """Base of the three: project the gradient, and advance Adam's moments of the projection.

    As in the reference implementations, moments, eps and weight decay are those of
    :class:`~cola_lightning.optim.TransformersAdamW`, and the moments are kept when the projector changes.
    """

    takes_sharded_matrices = True  # see cola_lightning.distributed.strategies.check_optimizer
    needs_matrices = True

    def __init__(self, params: Iterable, rank: int, update_proj_gap: int, **defaults: Any) -> None:
        name = type(self).__name__
        check_at_least(1, f"{name}: ", rank=rank, update_proj_gap=update_proj_gap)
        super().__init__(params, {"rank": rank, "update_proj_gap": update_proj_gap, **defaults})
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim != 2:
                    raise InputError(
                        f"{name} is for matrices, but was given a parameter of shape {tuple(p.shape)}; name it as "
                        f"matrices of cola_lightning.optim.HybridOptimizer"
                    )

    def projector(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> Tensor:
        """Return ``P`` (shorter side x rank) for a gradient with its shorter side first."""
        raise NotImplementedError

    def update(self, grad: Tensor, low: Tensor, normed: Tensor, P: Tensor, state: dict, group: dict) -> Tensor:  # noqa: N803
        """Return the update (m x n), m <= n, without the learning rate.

        Args:
            grad: The gradient G (m x n), sharded by rows, or by columns if its parameter is tall.
            low: Its projection R (rank x n), sharded by columns.
            normed: Adam's normalized moment N of the projection, like ``low``.
            P: The projector (m x rank), sharded by rows, or whole if the parameter is tall.
            state: Of the parameter.
            group: The options of its group.
        """
        raise NotImplementedError

    def step_parameter(self, p: Tensor, group: dict[str, Any]) -> None:
        tall = is_tall(p)
        grad = gradient_of(p).T if tall else gradient_of(p)
        state = self.state[p]
        state.setdefault("step", 0)
        projector = self.projector(p, grad, group)
        if tall:
            projector = replicate(projector)  # a rank has some columns of G, each of which needs the whole of P
        low = shard_columns(projector.T @ grad)
        normed, size = advance_moments(state, low, group)
        direction = self.update(grad, low, normed, projector, state, group)
        p.add_(shard_like(direction.T if tall else direction, p), alpha=-size)
        decay_weights(p, group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, with the limiter's norm in its own dtype.

        torch casts all state to the parameter's dtype, and a norm rounded to bf16 would not continue the run exactly.
        """
        super().load_state_dict(state_dict)
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for p, number in zip(group["params"], saved["params"], strict=True):
                norm = state_dict["state"].get(number, {}).get("norm")
                if norm is not None:
                    self.state[p]["norm"] = norm.to(p.device, copy=True)


def is_tall(p: Tensor) -> bool:
    """Whether a matrix is transposed to have its shorter side first. As in the references, a square matrix is."""
    return p.shape[0] >= p.shape[1]


def columns_of(x: Tensor, grad: Tensor) -> Tensor:
    """Return the columns of ``x``, or its entries for columns, that a rank needs for its part of ``grad``: all if
    ``grad`` is sharded by rows; if by columns, those that it has."""
    return replicate(x) if is_sharded_by_rows(grad) else x


def limit_growth(x: Tensor, growth: float, state: dict) -> Tensor:
    """Scale ``x`` in place to a norm of at most ``growth`` times that of the last result: Fira's limiter."""
    norm = to_scalar(at_least_float32(x).norm())
    if "norm" in state:
        excess = (norm / (state["norm"] + TINY)).clamp(min=growth) / growth
        x.div_(excess.to(x.dtype))
        norm = norm / excess
    state["norm"] = norm
    return x


def channel_ratio(normed: Tensor, low: Tensor) -> Tensor:
    """Return ``‖N_:,i‖ / ‖R_:,i‖`` of each column i, (n,)."""
    return normed.norm(dim=0) / (low.norm(dim=0) + TINY)
