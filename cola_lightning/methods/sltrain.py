"""SLTrain: sparse plus low-rank (arXiv 2406.02214), ``W = (α / R) B A + S``, S sparse on a fixed random support.

A, B and the values of S train, with any optimizer; nothing is frozen, merged or reset. W is computed from them in the
forward pass and again in the backward pass, so that a projection keeps only its input in between.
With g the gradient of the output and G = gᵀ x (out, in), the gradients are

    dx = g W    dA = (α / R) Bᵀ G    dB = (α / R) G Aᵀ    dS = G on the support

Initialization, scale and support are those of the reference implementation (andyjm3/SLTrain). Differences: the support
is int32, which takes half the bytes; the reference's dropout, which it does not use, and its trained scale, which its
scripts leave off, are left out. ``torch.compile`` may keep W, if it finds that both passes compute the same matrix.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from cola_lightning.errors import InputError
from cola_lightning.methods.arguments import check_rank
from cola_lightning.models.projection import Projection


class SLTrain(Projection):
    """``((α / R) B A + S) x`` with A: in -> R, B: R -> out, and S of ``floor(sparsity * in * out)`` trained entries.

    A and the values of S are initialized as U(±1/√in), B with zero. The support is drawn uniformly without replacement
    from the global generator and is saved with the weights. It is the same on all ranks, because they have one seed and
    rank 0 broadcasts it when training starts.

    Args:
        in_features: Size of the last dimension of the input.
        out_features: Size of the last dimension of the output.
        rank: Width R of the low-rank part.
        sparsity: Share of the entries of W that S has, above 0 and up to 1. The paper: 0.03, and 0.05 at 7B.
        alpha: The low-rank part is scaled by alpha / R. The reference: 32 at 60M, 16 at 130M and 350M, 8 from 1B up.

    Raises:
        InputError: If the rank or the sparsity is out of range.
    """

    support: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        sparsity: float = 0.03,
        alpha: float = 32.0,
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
        self.scale = alpha / rank
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = self.A.shape[1] ** -0.5
        nn.init.uniform_(self.A, -bound, bound)
        nn.init.zeros_(self.B)
        nn.init.uniform_(self.values, -bound, bound)
        entries = self.A.shape[1] * self.B.shape[0]
        drawn = torch.randperm(entries, device=self.support.device)[: self.support.numel()]
        self.support.copy_(drawn.sort().values)

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        return _SparsePlusLowRank.apply(x.to(dtype), self.A, self.B, self.values, self.scale, self.support)

    def dense(self) -> Tensor:
        """Return ``(α / R) B A + S`` (out, in)."""
        return _dense(self.A, self.B, self.values, self.scale, self.support)


def _dense(A: Tensor, B: Tensor, values: Tensor, scale: float, support: Tensor) -> Tensor:  # noqa: N803
    """Compute W (out, in). ``support`` holds indices into the flattened matrix: entry (o, i) is o * in + i."""
    product = (B * scale) @ A
    return product.view(-1).index_add(0, support, values).view_as(product)


class _SparsePlusLowRank(Function):
    """``x Wᵀ`` in the dtype of x with ``W = scale B A + S``, which each pass computes and none keeps."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        A: Tensor,  # noqa: N803
        B: Tensor,  # noqa: N803
        values: Tensor,
        scale: float,
        support: Tensor,
    ) -> Tensor:
        # Keep the parameters, which exist anyway, and not their casts.
        ctx.save_for_backward(x, A, B, values, support)
        ctx.scale = scale
        return x @ _dense(A.to(x.dtype), B.to(x.dtype), values.to(x.dtype), scale, support).T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *kept, support = ctx.saved_tensors
        A, B, values = (parameter.to(x.dtype) for parameter in kept)  # noqa: N806
        grad_x = grad @ _dense(A, B, values, ctx.scale, support)
        G = grad.flatten(0, -2).T @ x.flatten(0, -2)  # noqa: N806
        grads = [(B * ctx.scale).T @ G, G @ A.T * ctx.scale, G.view(-1).index_select(0, support)]
        return grad_x, *(g.to(parameter.dtype) for g, parameter in zip(grads, kept, strict=True)), None, None
