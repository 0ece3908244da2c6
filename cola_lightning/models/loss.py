"""Next-token cross-entropy, plain or in chunks whose logits never exist all at once.

PyTorch has a chunked form from 2.13 on (``linear_cross_entropy``). In bf16 it returns the sum of the losses in bf16,
with three digits, and adds up the weight's gradient in bf16. So it is not used here.
"""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy, linear, log_softmax, nll_loss

IGNORED = -100
"""Target of a token without a loss; PyTorch's default."""


def at_least_float32(x: Tensor) -> Tensor:
    """Widen a tensor of 16 bits to float32; leave float32 and float64 as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def token_losses(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    reduction: Literal["none", "sum"] = "none",
    chunk_size: int | None = None,
) -> Tensor:
    """Compute the cross-entropy in nats of the tokens that a head predicts.

    Args:
        x: Hidden states (B, T, D).
        weight: The head's weight (V, D).
        targets: Ids (B, T) to predict. A target of -100 has the loss zero.
        reduction: ``none`` for the loss of each token, ``sum`` for their sum.
        chunk_size: Tokens whose logits exist at a time, for ``reduction="sum"``. None for all at once.

    Returns:
        Losses (B, T), or their sum (), in float32 or wider.
    """
    x, flat = x.flatten(0, 1), targets.flatten()
    if reduction == "sum" and chunk_size is not None:
        return chunked_loss_sum(x, weight, flat, chunk_size)
    losses = cross_entropy(at_least_float32(linear(x, weight)), flat, ignore_index=IGNORED, reduction=reduction)
    return losses if reduction == "sum" else losses.view_as(targets)


def chunked_loss_sum(x: Tensor, weight: Tensor, targets: Tensor, chunk_size: int) -> Tensor:
    """Compute the sum of the losses in nats with the logits of ``chunk_size`` tokens at a time.

    The gradients are computed in the forward pass, together with the logits, so that no product is computed twice. The
    weight's gradient is added up in float32.

    Args:
        x: Hidden states (N, D).
        weight: The head's weight (V, D).
        targets: Ids (N,). A target of -100 has the loss zero.
        chunk_size: Tokens in a chunk.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, weight = x.to(dtype), weight.to(dtype)
    return _ChunkedLossSum.apply(x, weight, targets, chunk_size)


class _ChunkedLossSum(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, chunk_size: int) -> Tensor:
        wide = torch.promote_types(weight.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=x.device)
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        for begin in range(0, len(x), chunk_size):
            chunk, target = x[begin : begin + chunk_size], targets[begin : begin + chunk_size]
            log_probabilities = log_softmax(at_least_float32(linear(chunk, weight)), dim=-1)
            total += nll_loss(log_probabilities, target, reduction="sum")
            if grad_x is None and grad_weight is None:
                continue
            # d loss / d logits is softmax(logits) - one_hot(target), and zero for an ignored target.
            grad_logits = log_probabilities.exp_()
            minus_one = grad_logits.new_full((len(chunk), 1), -1.0)
            grad_logits.scatter_add_(1, target.clamp(min=0)[:, None], minus_one)
            grad_logits = grad_logits.mul_((target != IGNORED)[:, None]).to(x.dtype)
            if grad_x is not None:
                grad_x[begin : begin + chunk_size] = grad_logits @ weight
            if grad_weight is not None:
                grad_weight += grad_logits.T @ chunk
        ctx.save_for_backward(grad_x, grad_weight)
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_x, grad_weight = ctx.saved_tensors
        return (
            None if grad_x is None else grad_x * grad.to(grad_x.dtype),
            None if grad_weight is None else (grad_weight * grad).to(ctx.dtype),
            None,
            None,
        )
