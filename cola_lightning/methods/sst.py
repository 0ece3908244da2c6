"""SST, sparse spectral training (arXiv 2405.15481): a projection trained as its singular value decomposition.

``y = Σ_i σ_i u_i (v_iᵀ x)``, i up to M = min(in, out), from the decomposition of an ordinary start. All σ train, and R
of the pairs (u_i, v_i); the others rest. With G the gradient of the matrix that is thus made up (out, in),

    ∂σ_i = u_iᵀ G v_i,    ∂u_i = G v_i,    ∂v_i = Gᵀ u_i;

the last two are the paper's enhanced gradients, without the factor σ_i that the chain rule would give. G itself is
never formed: from the gradient g of the output these are gᵀ (x v_i) and xᵀ (g u_i).

In :class:`SSTCallback`, after each step: σ <- max(σ, 0), and u_i, v_i are brought to unit length. Every
``iteration_steps`` steps R pairs are sampled anew, without replacement and with probability ½ (1/M + σ_i / Σσ), and
their optimizer state starts afresh, with a short warm-up of the learning rate
(:class:`~cola_lightning.optim.WarmupCosineRestarts`). Every round, which is some iterations, the matrix is decomposed
again, so that the vectors are orthogonal.

No implementation of the authors was at hand: this follows the paper's description, and its schedule's constants could
not be checked against code. Ours: the optimizer is whatever the run names, for σ as well; a decomposition puts σ in a
new order, so its optimizer state starts afresh then; σ is float32 where the rest has 16 bits, for updates of small
values would be lost. The pairs at work are kept apart from those at rest, which have zeros in their place: optimizers
then keep moments for R pairs only.
"""

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.functional import normalize

from cola_lightning.errors import InputError
from cola_lightning.methods.low_rank import check_rank
from cola_lightning.methods.post_step import PostStepCallback, generator, schedule_cycle
from cola_lightning.models.projection import Projection
from cola_lightning.private_apis import ExactParameters, foreach


class SST(ExactParameters, Projection):
    """``Σ_i σ_i u_i v_iᵀ x``; to be used with the callback :class:`SSTCallback`.

    Vectors are rows: U (M, out) and V (M, in) hold those at rest, u (R, out) and v (R, in) those at work, ``active``
    (R,) says which these are.

    Args:
        in_features: Size of the last dimension of the input.
        out_features: Size of the last dimension of the output.
        rank: How many pairs of singular vectors train at a time (R).

    Raises:
        InputError: If the rank is out of range.
    """

    exact = ("sigma",)  # float32 also where the rest is cast to 16 bits

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
        """``Σ_i σ_i u_i v_iᵀ``, (out, in), in the dtype of σ."""
        U, V = (rest.index_copy(0, self.active, own) for rest, own in ((self.U, self.u), (self.V, self.v)))  # noqa: N806
        return (U.to(self.sigma.dtype).T * self.sigma) @ V.to(self.sigma.dtype)

    @torch.no_grad()
    def next_iteration(self, draw: torch.Generator, decompose: bool) -> None:
        """Put the pairs at work to rest, decompose anew if it is time, and sample others by ``draw`` on the CPU."""
        if decompose:
            self._decompose(self.dense())
        else:
            self.U.index_copy_(0, self.active, self.u)
            self.V.index_copy_(0, self.active, self.v)
        uniform = torch.rand(self.sigma.shape, generator=draw, dtype=torch.float32)
        self._activate(self._sample(uniform.to(self.sigma.device)))

    def _decompose(self, matrix: Tensor) -> None:
        left, sigma, right = torch.linalg.svd(matrix, full_matrices=False)
        self.U.copy_(left.T)
        self.V.copy_(right)
        self.sigma.copy_(sigma)

    def _sample(self, uniform: Tensor) -> Tensor:
        """R different indices, one after another with probabilities ½ (1/M + σ_i / Σσ) among those left: the largest of
        log p plus Gumbel noise (arXiv 1903.06059), from ``uniform`` (M,) in [0, 1)."""
        share = self.sigma / self.sigma.sum().clamp(min=torch.finfo(torch.float32).tiny)
        gumbel = -torch.log(-torch.log(uniform.clamp(1e-9, 1 - 1e-7)))
        keys = torch.log((share + 1 / self.sigma.numel()) / 2) + gumbel
        return keys.topk(self.active.numel()).indices.sort().values

    def _activate(self, indices: Tensor) -> None:
        self.active.copy_(indices)
        for rest, own in ((self.U, self.u), (self.V, self.v)):
            own.copy_(rest[indices])
            rest.index_fill_(0, indices, 0)


class _Spectral(Function):
    """The sum over pairs at rest and at work, with the enhanced gradients."""

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
        # At rest, the places of those at work are zero.
        grad_sigma = (back_rest * rest).flatten(0, -2).sum(0, dtype=sigma.dtype)
        grad_sigma.index_add_(0, active, (back_work * work).flatten(0, -2).sum(0, dtype=sigma.dtype))
        grad_u = grad.flatten(0, -2).T @ work.flatten(0, -2)
        grad_v = x.flatten(0, -2).T @ back_work.flatten(0, -2)
        return grad_x, None, None, grad_sigma, grad_u.T.to(u.dtype), grad_v.T.to(v.dtype), None


class SSTCallback(PostStepCallback):
    """Keeps σ and the vectors in their bounds after each step, and begins iterations and rounds.

    Args:
        iteration_steps: Optimizer steps for which the same pairs train; the schedule's ``cycle_steps`` if not given.
        iterations_per_round: Iterations from one decomposition to the next; if not given, min(in, out) / R,
            in which every pair has its turn once on average.
        seed: Of what is drawn; that of the run if not given.

    Raises:
        InputError: If an argument is below 1; before training starts, under a strategy that shards weights.
    """

    projection_class = SST

    def __init__(
        self, iteration_steps: int | None = None, iterations_per_round: int | None = None, seed: int | None = None
    ) -> None:
        super().__init__(seed)
        for name, value in (("iteration_steps", iteration_steps), ("iterations_per_round", iterations_per_round)):
            if value is not None and value < 1:
                raise InputError(f"SSTCallback: {name} is {value}; it must be at least 1")
        self.iteration_steps, self.iterations_per_round = iteration_steps, iterations_per_round

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        if self.iteration_steps is None:
            self.iteration_steps = schedule_cycle(trainer, "SSTCallback: iteration_steps")

    def after_step(self, trainer: L.Trainer, step: int) -> None:
        every: int = self.iteration_steps  # type: ignore[assignment]  # known since the start
        foreach.clamp_min_([projection.sigma for projection in self.projections], 0)
        for projection in self.projections:
            for vectors in (projection.u, projection.v):
                normalize(vectors, dim=-1, out=vectors)
        if step % every:
            return
        for index, projection in enumerate(self.projections):
            iterations = self.iterations_per_round or max(1, min(projection.V.shape) // projection.u.shape[0])
            decompose = step % (every * iterations) == 0
            projection.next_iteration(generator(self.seed, step, index), decompose)
            if decompose and trainer.world_size > 1:  # the ranks' libraries may differ in a sign
                for tensor in (*projection.parameters(), *projection.buffers()):
                    torch.distributed.broadcast(tensor, 0)
            for parameter in (projection.u, projection.v, *((projection.sigma,) if decompose else ())):
                self.optimizer.state.pop(parameter, None)
