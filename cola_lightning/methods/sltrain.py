"""SLTrain: sparse plus low-rank (arXiv 2406.02214), ``W = (α / R) B A + S``, S sparse on a fixed random support.

All of A, B and the values of S train under any optimizer; nothing is frozen, merged or reset. W is formed from them in
the forward pass, not kept, and formed again in the backward pass: besides its input, a projection keeps nothing.
With g the gradient of the output and G = gᵀ x (out, in), the gradients are

    dx = g W    dA = (α / R) Bᵀ G    dB = (α / R) G Aᵀ    dS = G on the support

Initialization, scale and support are those of the reference implementation (andyjm3/SLTrain). Different here: the
support is kept as int32, half the bytes; the dropout that the reference takes and does not use is left out.
``torch.compile`` may keep W after all, where it finds that both passes form the same matrix.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from cola_lightning.errors import InputError
from cola_lightning.methods.low_rank import check_rank
from cola_lightning.models.projection import Projection


class SLTrain(Projection):
    """``((α / R) B A + S) x`` with A: in -> R, B: R -> out, and S of ``floor(sparsity * in * out)`` trained entries.

    A and the values of S start as U(±1/√in), B at zero. The support is drawn uniformly without replacement from the
    global generator, is the same on all ranks (they are seeded alike, and rank 0's is sent round when training starts)
    and is saved with the weights.

    Args:
        in_features: Size of the last dimension of the input.
        out_features: Size of the last dimension of the output.
        rank: Width R of the low-rank part.
        sparsity: Share of the entries of W that S has, above 0 and up to 1. The paper: 0.03, and 0.05 at 7B.
        alpha: The low-rank part is scaled by alpha / R. The reference: 32 at 60M, 16 at 130M and 350M, 8 from 1B up.
        trainable_scale: Train the scale instead: tanh(t) with one t for each matrix, which starts at 1; ``alpha`` does
            nothing then. An option of the reference, off in its scripts.

    Raises:
        InputError: If the rank or the sparsity is out of range.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        sparsity: float = 0.03,
        alpha: float = 32.0,
        trainable_scale: bool = False,
    ) -> None:
        super().__init__()
        check_rank(in_features, out_features, rank)
        self.rank = rank
        entries = in_features * out_features
        count = math.floor(sparsity * entries)
        if not 1 <= count <= entries:
            raise InputError(
                f"sparsity {sparsity} keeps {count} entries of a {out_features} x {in_features} matrix; "
                f"choose a share above 0 and up to 1 (the paper: 0.03)"
            )
        self.A = nn.Parameter(torch.empty(rank, in_features))
        self.B = nn.Parameter(torch.empty(out_features, rank))
        self.values = nn.Parameter(torch.empty(count))
        dtype = torch.int32 if entries < 2**31 else torch.int64
        self.register_buffer("support", torch.empty(count, dtype=dtype))
        self.fixed_scale = alpha / rank
        self.trained_scale = nn.Parameter(torch.empty(1)) if trainable_scale else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = self.A.shape[1] ** -0.5
        nn.init.uniform_(self.A, -bound, bound)
        nn.init.zeros_(self.B)
        nn.init.uniform_(self.values, -bound, bound)
        if self.trained_scale is not None:
            nn.init.ones_(self.trained_scale)
        entries = self.A.shape[1] * self.B.shape[0]
        drawn = torch.randperm(entries, device=self.support.device)[: self.support.numel()]
        self.support.copy_(drawn.sort().values)

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        return _SparsePlusLowRank.apply(x.to(dtype), self.A, self.B, self.values, self.scale(), self.support)

    def dense(self) -> Tensor:
        """``(α / R) B A + S``, (out, in)."""
        return _form(self.A, self.B, self.values, self.scale(), self.support)

    def scale(self) -> float | Tensor:
        """What the low-rank part is multiplied by."""
        return self.fixed_scale if self.trained_scale is None else self.trained_scale.tanh()


def _form(A: Tensor, B: Tensor, values: Tensor, scale: float | Tensor, support: Tensor) -> Tensor:  # noqa: N803
    product = (B * scale) @ A
    return product.view(-1).index_add(0, support, values).view_as(product)


class _SparsePlusLowRank(Function):
    """``x Wᵀ`` in the dtype of x with ``W = scale B A + S``, which is formed in either pass and never kept."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        A: Tensor,  # noqa: N803
        B: Tensor,  # noqa: N803
        values: Tensor,
        scale: float | Tensor,
        support: Tensor,
    ) -> Tensor:
        # The parameters themselves are kept and not what autocast makes of them.
        ctx.save_for_backward(x, A, B, values, support, scale if isinstance(scale, Tensor) else None)
        ctx.fixed_scale = scale
        return x @ _form(*_cast(x.dtype, A, B, values, scale), support).T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *kept, support, scale = ctx.saved_tensors
        scale = ctx.fixed_scale if scale is None else scale
        A, B, values, scale = _cast(x.dtype, *kept, scale)  # noqa: N806
        grad_x = grad @ _form(A, B, values, scale, support)
        G = grad.flatten(0, -2).T @ x.flatten(0, -2)  # noqa: N806
        of_B = G @ A.T  # noqa: N806
        grads = [(B * scale).T @ G, of_B * scale, G.view(-1).index_select(0, support)]
        grads = [g.to(parameter.dtype) for g, parameter in zip(grads, kept, strict=True)]
        grad_scale = (of_B * B).sum().view(1).to(scale.dtype) if ctx.needs_input_grad[4] else None
        return grad_x, *grads, grad_scale, None


def _cast(dtype: torch.dtype, *values: float | Tensor) -> list[Any]:
    return [value.to(dtype) if isinstance(value, Tensor) else value for value in values]
