"""SST, sparse spectral training (arXiv 2405.15481): a projection trained as its singular value decomposition.

``y = Σ_i σ_i u_i (v_iᵀ x)`` with i up to M = min(in, out). It starts as the decomposition of a matrix initialized as
in LLaMA. All σ train, and R of the pairs (u_i, v_i) at a time, the active ones. With G the gradient of the dense matrix
(out, in), the gradients are

    ∂σ_i = u_iᵀ G v_i,    ∂u_i = G v_i,    ∂v_i = Gᵀ u_i;

The last two are the paper's enhanced gradients, without the factor σ_i that the chain rule would give. G is never
computed: with g the gradient of the output, they are gᵀ (x v_i) and xᵀ (g u_i).

After each step, :class:`SSTCallback` sets σ <- max(σ, 0) and scales u_i and v_i to unit length. Every
``iteration_steps`` steps it samples R new pairs, without replacement and with probability ½ (1/M + σ_i / Σσ), and
resets their optimizer state; the learning rate restarts with a short warm-up
(:class:`~cola_lightning.optim.WarmupCosineRestarts`). Every round of several iterations it decomposes the matrix again,
so that the vectors are orthogonal.

Under FSDP2 the rows of U, V, u and v and the entries of σ are sharded. A new iteration sends the vectors of the pairs
that were and that will be active. A new round gathers each matrix on one rank, which decomposes it.

The authors' code was not available, so this follows the paper's description, and the schedule's constants could not be
checked against code. These choices are ours. The optimizer is the run's, also for σ. A decomposition changes the order
of σ, so it resets the optimizer state of σ. σ is float32 even if the rest has 16 bits, because updates of small values
would be lost. The active pairs are parameters of their own, and U and V have zeros in their place, so that optimizers
keep moments for R pairs only.
"""

from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.functional import normalize

from cola_lightning.errors import check_at_least
from cola_lightning.methods.arguments import check_rank
from cola_lightning.methods.post_step import PostStepCallback, restart, schedule_cycle
from cola_lightning.models.projection import Projection
from cola_lightning.optim.rows import (
    gather_rows,
    gathered,
    is_dtensor,
    local,
    mesh_of,
    own_rows,
    rows_of,
    set_rows,
    whole,
)
from cola_lightning.optim.sharded import map_whole, replicate, shard_columns
from cola_lightning.private_apis.torch import ExactParameters, foreach


class SST(ExactParameters, Projection):
    """``Σ_i σ_i u_i v_iᵀ x``, for use with the callback :class:`SSTCallback`.

    Vectors are rows. U (M, out) and V (M, in) hold the inactive ones, u (R, out) and v (R, in) the active ones, and
    ``active`` (R,) the indices of these.

    Args:
        in_features: Size of the last dimension of the input.
        out_features: Size of the last dimension of the output.
        rank: Number R of pairs of singular vectors that train at a time.

    Raises:
        InputError: If the rank is out of range.
    """

    exact = ("sigma",)  # stays float32 if the rest is cast to 16 bits
    active: Tensor

    def __init__(self, in_features: int, out_features: int, rank: int) -> None:
        super().__init__()
        check_rank(in_features, out_features, rank)
        self.rank = rank
        size = min(in_features, out_features)
        self.U = nn.Parameter(torch.empty(size, out_features), requires_grad=False)
        self.V = nn.Parameter(torch.empty(size, in_features), requires_grad=False)
        self.sigma = nn.Parameter(torch.empty(size, dtype=torch.promote_types(self.U.dtype, torch.float32)))
        self.u = nn.Parameter(torch.empty(rank, out_features))
        self.v = nn.Parameter(torch.empty(rank, in_features))
        self.register_buffer("active", torch.empty(rank, dtype=torch.int64))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        shape = self.U.shape[1], self.V.shape[1]
        matrix = torch.empty(shape, device=self.U.device, dtype=self.sigma.dtype).normal_(std=0.02)
        self.set_decomposition(decomposition(matrix))
        self._activate(self._sample(torch.rand(self.sigma.shape, device=self.U.device, dtype=self.sigma.dtype)))

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        return _Spectral.apply(x.to(dtype), self.U, self.V, gathered(self.sigma), self.u, self.v, self.active)

    def dense(self) -> Tensor:
        """Return ``Σ_i σ_i u_i v_iᵀ`` (out, in) in the dtype of σ."""
        U, V = (rest.index_copy(0, self.active, own) for rest, own in ((self.U, self.u), (self.V, self.v)))  # noqa: N806
        return (U.to(self.sigma.dtype).T * self.sigma) @ V.to(self.sigma.dtype)

    def deactivate(self) -> None:
        """Write the active pairs back into U and V."""
        for rest, own in ((self.U, self.u), (self.V, self.v)):
            set_rows(rows_of(rest), self.active, whole(own))

    def matrix(self) -> Tensor:
        """Return ``Σ_i σ_i u_i v_iᵀ`` (out, in) in the dtype of σ, if no pair is active.

        Under FSDP2 it is sharded by rows: a rank computes its rows from some columns of U, and from the whole of V.
        """
        U, V = (factor.to(self.sigma.dtype) for factor in (self.U, self.V))  # noqa: N806
        return (shard_columns(U).T * replicate(self.sigma)) @ replicate(V)

    def set_decomposition(self, packed: Tensor) -> None:
        """Set U, V and σ to a result of :func:`decomposition`, plain or sharded as they are."""
        left, sigma, right = local(packed).split([self.U.shape[1], 1, self.V.shape[1]], dim=1)
        local(self.U).copy_(left)
        local(self.V).copy_(right)
        local(self.sigma).copy_(sigma.flatten())

    def activate(self, draw: torch.Generator) -> None:
        """Sample pairs by ``draw``, and move them from U and V to u and v."""
        uniform = torch.rand(self.sigma.shape, generator=draw, dtype=torch.float32)
        self._activate(self._sample(uniform.to(self.sigma.device)))

    def _sample(self, uniform: Tensor) -> Tensor:
        """Sample R different indices with probabilities ½ (1/M + σ_i / Σσ), from ``uniform`` (M,) in [0, 1).

        The R largest of log p plus Gumbel noise are such a sample without replacement (arXiv 1903.06059).
        """
        sigma = whole(self.sigma)
        share = sigma / sigma.sum().clamp(min=torch.finfo(torch.float32).tiny)
        gumbel = -torch.log(-torch.log(uniform.clamp(1e-9, 1 - 1e-7)))
        keys = torch.log((share + 1 / sigma.numel()) / 2) + gumbel
        return keys.topk(self.active.numel()).indices.sort().values

    def _activate(self, indices: Tensor) -> None:
        """Move the vectors of these indices (R,) from U and V to u and v."""
        self.active.copy_(indices)
        pairs = (self.U, self.u), (self.V, self.v)
        found = gather_rows([(rows_of(rest), indices) for rest, _ in pairs], mesh_of(self.U), self.U.device)
        for (rest, own), vectors in zip(pairs, found, strict=True):
            local(own).copy_(vectors[own_rows(own)])
            set_rows(rows_of(rest), indices, 0)


def decomposition(matrix: Tensor) -> Tensor:
    """Decompose a matrix (out, in) into M = min(out, in) rows that hold u_i, σ_i and v_i: (M, out + 1 + in)."""
    left, sigma, right = torch.linalg.svd(matrix, full_matrices=False)
    return torch.cat([left.T, sigma[:, None], right], dim=1)


class _Spectral(Function):
    """The sum over inactive (rest) and active (work) pairs, with the enhanced gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        U: Tensor,  # noqa: N803
        V: Tensor,  # noqa: N803
        sigma: Tensor,
        u: Tensor,
        v: Tensor,
        active: Tensor,
    ) -> Tensor:
        rest, work = x @ V.to(x.dtype).T, x @ v.to(x.dtype).T
        ctx.save_for_backward(x, U, V, sigma, u, v, active, rest, work)
        s = sigma.to(x.dtype)
        return (rest * s) @ U.to(x.dtype) + (work * s[active]) @ u.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, U, V, sigma, u, v, active, rest, work = ctx.saved_tensors  # noqa: N806
        s = sigma.to(x.dtype)
        back_rest, back_work = grad @ U.to(x.dtype).T, grad @ u.to(x.dtype).T
        grad_x = (back_rest * s) @ V.to(x.dtype) + (back_work * s[active]) @ v.to(x.dtype)
        # In U and V the rows of the active pairs are zero, so the first sum leaves their places for the second.
        grad_sigma = (back_rest * rest).flatten(0, -2).sum(0, dtype=sigma.dtype)
        grad_sigma.index_add_(0, active, (back_work * work).flatten(0, -2).sum(0, dtype=sigma.dtype))
        grad_u = grad.flatten(0, -2).T @ work.flatten(0, -2)
        grad_v = x.flatten(0, -2).T @ back_work.flatten(0, -2)
        return grad_x, None, None, grad_sigma, grad_u.T.to(u.dtype), grad_v.T.to(v.dtype), None


class SSTCallback(PostStepCallback[SST]):
    """Keep σ and the vectors in bounds after each step, and begin iterations and rounds.

    Args:
        iteration_steps: Optimizer steps for which the same pairs train; the schedule's ``cycle_steps`` if not given.
        iterations_per_round: Iterations from one decomposition to the next; if not given, min(in, out) / R, in which
            every pair is active once on average.
        seed: Seed of the random choices; the seed of the run if not given.

    Raises:
        InputError: If an argument is below 1; before training starts, under a strategy that flattens weights.
    """

    projection_class = SST

    def __init__(
        self, iteration_steps: int | None = None, iterations_per_round: int | None = None, seed: int | None = None
    ) -> None:
        super().__init__(seed)
        check_at_least(1, "SSTCallback: ", iteration_steps=iteration_steps, iterations_per_round=iterations_per_round)
        self.iteration_steps, self.iterations_per_round = iteration_steps, iterations_per_round

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        if self.iteration_steps is None:
            self.iteration_steps = schedule_cycle(trainer, "SSTCallback: iteration_steps")

    def after_step(self, trainer: L.Trainer, step: int) -> None:
        assert self.iteration_steps is not None  # on_fit_start took it from the schedule
        foreach.clamp_min_([local(projection.sigma) for projection in self.projections], 0)
        for projection in self.projections:
            for vectors in (local(projection.u), local(projection.v)):
                normalize(vectors, dim=-1, out=vectors)
        if step % self.iteration_steps:
            return
        due = []
        for projection in self.projections:
            projection.deactivate()
            iterations = self.iterations_per_round or max(1, min(projection.V.shape) // projection.u.shape[0])
            if step % (self.iteration_steps * iterations) == 0:
                due.append(projection)
        self._decompose(due)
        for index, projection in enumerate(self.projections):
            projection.activate(self.draw(step, index))
            for parameter in (projection.u, projection.v):
                restart(self.optimizer, parameter)
        for projection in due:
            restart(self.optimizer, projection.sigma)

    def _decompose(self, due: list[SST]) -> None:
        """Decompose matrices again. Under FSDP2 each is gathered and decomposed on one rank only."""
        owners: dict[Tensor, SST] = {projection.U: projection for projection in due}

        def size(p: Tensor) -> tuple[int, int]:
            return p.shape[0], p.shape[1] + 1 + owners[p].V.shape[1]

        for p, packed in map_whole(list(owners), lambda p: owners[p].matrix(), lambda _, m: decomposition(m), size):
            if dist.is_initialized() and not is_dtensor(packed):  # because signs may differ between ranks
                dist.broadcast(packed, 0)
            owners[p].set_decomposition(packed)
