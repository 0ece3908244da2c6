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

The authors' code was not available, so this follows the paper's description, and the schedule's constants could not be
checked against code. These choices are ours. The optimizer is the run's, also for σ. A decomposition changes the order
of σ, so it resets the optimizer state of σ. σ is float32 even if the rest has 16 bits, because updates of small values
would be lost. The active pairs are parameters of their own, and U and V have zeros in their place, so that optimizers
keep moments for R pairs only.
"""

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.functional import normalize

from cola_lightning.methods.arguments import check_at_least_one, check_rank
from cola_lightning.methods.post_step import PostStepCallback, schedule_cycle
from cola_lightning.models.projection import Projection
from cola_lightning.private_apis import ExactParameters, foreach


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
        self.sigma = nn.Parameter(torch.empty(size, dtype=torch.float32))
        self.u = nn.Parameter(torch.empty(rank, out_features))
        self.v = nn.Parameter(torch.empty(rank, in_features))
        self.register_buffer("active", torch.empty(rank, dtype=torch.int64))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        shape = self.U.shape[1], self.V.shape[1]
        self._decompose(torch.empty(shape, device=self.U.device, dtype=self.sigma.dtype).normal_(std=0.02))
        self._activate(self._sample(torch.rand(self.sigma.shape, device=self.U.device, dtype=self.sigma.dtype)))

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        return _Spectral.apply(x.to(dtype), self.U, self.V, self.sigma, self.u, self.v, self.active)

    def dense(self) -> Tensor:
        """Return ``Σ_i σ_i u_i v_iᵀ`` (out, in) in the dtype of σ."""
        U, V = (rest.index_copy(0, self.active, own) for rest, own in ((self.U, self.u), (self.V, self.v)))  # noqa: N806
        return (U.to(self.sigma.dtype).T * self.sigma) @ V.to(self.sigma.dtype)

    @torch.no_grad()
    def next_iteration(self, draw: torch.Generator, decompose: bool) -> None:
        """Write the active pairs back, decompose the matrix again if asked to, and sample other pairs by ``draw``."""
        if decompose:
            self._decompose(self.dense())
        else:
            self.U.index_copy_(0, self.active, self.u)
            self.V.index_copy_(0, self.active, self.v)
        uniform = torch.rand(self.sigma.shape, generator=draw, dtype=torch.float32)
        self._activate(self._sample(uniform.to(self.sigma.device)))

    def _decompose(self, matrix: Tensor) -> None:
        """Set U, V and σ to the singular value decomposition of a matrix (out, in)."""
        left, sigma, right = torch.linalg.svd(matrix, full_matrices=False)
        self.U.copy_(left.T)
        self.V.copy_(right)
        self.sigma.copy_(sigma)

    def _sample(self, uniform: Tensor) -> Tensor:
        """Sample R different indices with probabilities ½ (1/M + σ_i / Σσ), from ``uniform`` (M,) in [0, 1).

        The R largest of log p plus Gumbel noise are such a sample without replacement (arXiv 1903.06059).
        """
        share = self.sigma / self.sigma.sum().clamp(min=torch.finfo(torch.float32).tiny)
        gumbel = -torch.log(-torch.log(uniform.clamp(1e-9, 1 - 1e-7)))
        keys = torch.log((share + 1 / self.sigma.numel()) / 2) + gumbel
        return keys.topk(self.active.numel()).indices.sort().values

    def _activate(self, indices: Tensor) -> None:
        """Move the vectors of these indices (R,) from U and V to u and v."""
        self.active.copy_(indices)
        for rest, own in ((self.U, self.u), (self.V, self.v)):
            own.copy_(rest[indices])
            rest.index_fill_(0, indices, 0)


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
        InputError: If an argument is below 1; before training starts, under a strategy that shards weights.
    """

    projection_class = SST

    def __init__(
        self, iteration_steps: int | None = None, iterations_per_round: int | None = None, seed: int | None = None
    ) -> None:
        super().__init__(seed)
        check_at_least_one("SSTCallback", iteration_steps=iteration_steps, iterations_per_round=iterations_per_round)
        self.iteration_steps, self.iterations_per_round = iteration_steps, iterations_per_round

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        if self.iteration_steps is None:
            self.iteration_steps = schedule_cycle(trainer, "SSTCallback: iteration_steps")

    def after_step(self, trainer: L.Trainer, step: int) -> None:
        assert self.iteration_steps is not None  # on_fit_start took it from the schedule
        foreach.clamp_min_([projection.sigma for projection in self.projections], 0)
        for projection in self.projections:
            for vectors in (projection.u, projection.v):
                normalize(vectors, dim=-1, out=vectors)
        if step % self.iteration_steps:
            return
        for index, projection in enumerate(self.projections):
            iterations = self.iterations_per_round or max(1, min(projection.V.shape) // projection.u.shape[0])
            decompose = step % (self.iteration_steps * iterations) == 0
            projection.next_iteration(self.draw(step, index), decompose)
            if decompose and trainer.world_size > 1:  # because signs may differ between ranks
                for tensor in (*projection.parameters(), *projection.buffers()):
                    torch.distributed.broadcast(tensor, 0)
            for parameter in (projection.u, projection.v, *((projection.sigma,) if decompose else ())):
                self.optimizer.state.pop(parameter, None)
