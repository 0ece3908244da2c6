"""Adam in a few dimensions of each gradient: GaLore, Fira and APOLLO.

All three hold Adam's moments for ``R``, a narrow image of the gradient ``G`` (m x n), and differ in how an update of
the whole matrix is made of it. The shorter side is the one that shrinks: with m < n, ``R = Pᵀ G`` (R x n), else
``R = G P`` (m x R). The formulas below are written for m < n.

The gradients must be whole matrices, the same on all ranks: for one device, and DDP. Library versions exist
(pytorch-optimizer 4.1.0): they keep a Python object in the optimizer's state, which a checkpoint of plain data cannot
hold, and their APOLLO scales the projected gradient where the paper scales the gradient itself.
"""

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from cola_lightning.errors import InputError
from cola_lightning.optim.transformers_adamw import StepEachParameter, advance_moments, decay_weights

TINY = 1e-8  # keeps a ratio of norms finite, as in the three reference implementations


class ProjectedAdam(StepEachParameter):
    """Base of the three: the projection, and what they do with moments.

    As in their reference implementations, moments, eps and decay are those of
    :class:`~cola_lightning.optim.TransformersAdamW`. Moments stay as they are when the projector changes.
    """

    whole_matrices = True  # sharded strategies are refused, see cola_lightning.distributed.strategies

    def __init__(self, params: Iterable, rank: int, update_proj_gap: int, **defaults: Any) -> None:
        name = type(self).__name__
        if rank < 1:
            raise InputError(f"{name}: rank is {rank}; it must be at least 1")
        if update_proj_gap < 1:
            raise InputError(f"{name}: update_proj_gap is {update_proj_gap}; it must be at least 1 step")
        super().__init__(params, {"rank": rank, "update_proj_gap": update_proj_gap, **defaults})
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim != 2:
                    raise InputError(
                        f"{name} is for matrices, but was given a parameter of shape {tuple(p.shape)}; name it as "
                        f"matrices of cola_lightning.optim.HybridOptimizer"
                    )

    def projector(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> Tensor:
        """``P``, (shorter side, R); made of the gradient (shorter side first), or remembered."""
        raise NotImplementedError

    def update(self, grad: Tensor, low: Tensor, normed: Tensor, P: Tensor, state: dict, group: dict) -> Tensor:  # noqa: N803
        """The direction (m x n), m < n, from the gradient G, its image R and the normalized image N (both R x n)."""
        raise NotImplementedError

    def step_parameter(self, p: Tensor, group: dict[str, Any]) -> None:
        tall = p.shape[0] >= p.shape[1]
        grad = p.grad.T if tall else p.grad  # type: ignore[union-attr]
        state = self.state[p]
        state.setdefault("step", 0)
        projector = self.projector(p, grad, group)
        low = projector.T @ grad
        normed, size = advance_moments(state, low, group)
        direction = self.update(grad, low, normed, projector, state, group)
        p.add_(direction.T if tall else direction, alpha=-size)
        decay_weights(p, group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As ever, but for the limiter's norm: torch casts all state to the parameter's dtype, and a norm rounded to
        bf16 would not be the one that the run had."""
        super().load_state_dict(state_dict)
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for p, number in zip(group["params"], saved["params"], strict=True):
                norm = state_dict["state"].get(number, {}).get("norm")
                if norm is not None:
                    self.state[p]["norm"] = norm.to(p.device, copy=True)


def leading_directions(state: dict, grad: Tensor, group: dict[str, Any]) -> Tensor:
    """The leading left singular vectors of the gradient, renewed every ``update_proj_gap`` steps from the first on."""
    if state["step"] % group["update_proj_gap"] == 0:
        u = torch.linalg.svd(grad.float(), full_matrices=False).U[:, : group["rank"]]
        state["projector"] = u.to(grad.dtype).contiguous()
        if dist.is_initialized():
            # Ranks hold the same gradient, but two kinds of device may give two signs for one singular vector.
            dist.broadcast(state["projector"], 0)
    return state["projector"]


def limit_growth(x: Tensor, growth: float, state: dict) -> Tensor:
    """Fira's norm-growth limiter: ``x`` with a norm of at most ``growth`` times that of the last result. In place."""
    norm = x.float().norm()
    if "norm" in state:
        excess = (norm / (state["norm"] + TINY)).clamp(min=growth) / growth
        x.div_(excess.to(x.dtype))
        norm = norm / excess
    state["norm"] = norm
    return x


def channel_ratio(normed: Tensor, low: Tensor) -> Tensor:
    """``‖N_:,i‖ / ‖R_:,i‖`` of each column i, (n,)."""
    return normed.norm(dim=0) / (low.norm(dim=0) + TINY)


class GaLore(ProjectedAdam):
    """GaLore (arXiv 2403.03507): the update is ``α P N``, all within the leading directions of a recent gradient.

    Args:
        params: Matrices.
        lr: Learning rate.
        rank: Directions that are kept; all of them where a side is shorter.
        scale: α.
        update_proj_gap: Steps between two decompositions of the gradient.
        betas: Decay of the two moments.
        eps: Added to the root of the second moment; 1e-6 in the reference implementation, 1e-8 in the paper.
        weight_decay: Decoupled.

    Raises:
        InputError: If a number is out of range, or a parameter is no matrix.
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

    def projector(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> Tensor:
        return leading_directions(self.state[p], grad, group)

    def update(self, grad: Tensor, low: Tensor, normed: Tensor, P: Tensor, state: dict, group: dict) -> Tensor:  # noqa: N803
        return (P @ normed).mul_(group["scale"])


class Fira(ProjectedAdam):
    """Fira (arXiv 2410.01623): GaLore's update, and beside it what of the gradient lies outside the leading directions,
    each of its columns scaled as Adam scales the same column inside, its growth limited.

    Args:
        params: Matrices.
        lr: Learning rate.
        rank: Directions that are kept; all of them where a side is shorter.
        scale: α.
        update_proj_gap: Steps between two decompositions of the gradient.
        growth: γ, how much larger the outside part may be than at the step before.
        form: ``code``, with which the published numbers were made: the update is ``α P N + S``, and the outside part
            ``S`` is made of ``G - α P R``. ``paper``: ``α (P N + S)`` and ``G - P R``.
        betas: Decay of the two moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled.

    Raises:
        InputError: If a number is out of range, or a parameter is no matrix.
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

    def projector(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> Tensor:
        return leading_directions(self.state[p], grad, group)

    def update(self, grad: Tensor, low: Tensor, normed: Tensor, P: Tensor, state: dict, group: dict) -> Tensor:  # noqa: N803
        inside, outside = (1.0, group["scale"]) if self.form == "paper" else (group["scale"], 1.0)
        rest = (grad - inside * (P @ low)) * channel_ratio(normed, low)
        return group["scale"] * (P @ normed) + outside * limit_growth(rest, group["growth"], state)


class APOLLO(ProjectedAdam):
    """APOLLO (arXiv 2412.05270): the update is the gradient itself, each of its columns scaled as Adam scales the same
    column of a random image ``R = Pᵀ G``, P ~ N(0, 1/R); its growth limited as in Fira. APOLLO-Mini is ``rank: 1``,
    ``scaling: tensor``, ``scale: 128``.

    P is drawn anew from its seed at each step, so that none of it is kept. The reference can apply ``scale`` before the
    limiter instead of after; as the limiter compares norms, that makes no difference.

    Args:
        params: Matrices.
        lr: Learning rate.
        rank: Width of the random image.
        scale: Its root multiplies the update, as in the reference implementation.
        scaling: One factor for each column (``channel``), or for the matrix (``tensor``).
        update_proj_gap: Steps between two seeds.
        growth: How much larger the update may be than at the step before.
        seed: Of the projections; the same on all ranks.
        betas: Decay of the two moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled.

    Raises:
        InputError: If a number is out of range, or a parameter is no matrix.
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
        drawn = torch.randn(len(grad), group["rank"], device=p.device, generator=generator)
        return (drawn / math.sqrt(group["rank"])).to(grad.dtype)

    def update(self, grad: Tensor, low: Tensor, normed: Tensor, P: Tensor, state: dict, group: dict) -> Tensor:  # noqa: N803
        ratio = channel_ratio(normed, low) if self.scaling == "channel" else normed.norm() / (low.norm() + TINY)
        return limit_growth(grad * ratio, group["growth"], state).mul_(math.sqrt(group["scale"]))
