"""Next-token cross-entropy, plain or in chunks whose logits never exist all at once.

PyTorch has a chunked form from 2.13 on (``linear_cross_entropy``). In bf16 it returns the sum of the losses in bf16,
with three digits, and adds up the weight's gradient in bf16. So it is not used here.
"""

from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy, linear, log_softmax, nll_loss

IGNORED = -100
"""Target of a token without a loss; PyTorch's default."""
BLOCK, GPU_BLOCK = 64, 1024
"""Tokens whose log-probabilities exist in float32 at a time where nothing is compiled: few on a processor, so that they
stay in its cache; more on a GPU, where every block launches kernels."""


def at_least_float32(x: Tensor) -> Tensor:
    """Widen a tensor of 16 bits to float32; leave float32 and float64 as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def token_losses(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    reduction: Literal["none", "sum"] = "none",
    chunk_size: int | None = None,
    compiled: bool = False,
) -> Tensor:
    """Compute the cross-entropy in nats of the tokens that a head predicts.

    Args:
        x: Hidden states (B, T, D).
        weight: The head's weight (V, D).
        targets: Ids (B, T) to predict. A target of -100 has the loss zero.
        reduction: ``none`` for the loss of each token, ``sum`` for their sum.
        chunk_size: Tokens whose logits exist at a time, for ``reduction="sum"``. None for all at once.
        compiled: Compile what is done to the logits of a chunk, by ``torch.compile``.

    Returns:
        Losses (B, T), or their sum (), in float32 or wider.
    """
    x, flat = x.flatten(0, 1), targets.flatten()
    if reduction == "sum" and chunk_size is not None:
        return chunked_loss_sum(x, weight, flat, chunk_size, compiled)
    if reduction == "sum":
        return loss_sum(linear(x, weight), flat)
    losses = cross_entropy(at_least_float32(linear(x, weight)), flat, ignore_index=IGNORED, reduction="none")
    return losses.view_as(targets)


def chunked_loss_sum(x: Tensor, weight: Tensor, targets: Tensor, chunk_size: int, compiled: bool = False) -> Tensor:
    """Compute the sum of the losses in nats with the logits of ``chunk_size`` tokens at a time.

    The gradients are computed in the forward pass, together with the logits, so that no product is computed twice. The
    logits of a chunk are overwritten by their gradient. The weight's gradient is added up in float32.

    Args:
        x: Hidden states (N, D).
        weight: The head's weight (V, D).
        targets: Ids (N,). A target of -100 has the loss zero.
        chunk_size: Most tokens in a chunk. All chunks have the same size, or sizes that differ by one.
        compiled: Compile what is done to the logits of a chunk, by ``torch.compile``.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, weight = x.to(dtype), weight.to(dtype)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _ChunkedLossSum.apply(x, weight, targets, chunk_size, compiled)
    sum_losses = compile_once(loss_sum) if compiled else loss_sum
    chunks = (sum_losses(linear(x[a:b], weight), targets[a:b]) for a, b in chunk_bounds(len(x), chunk_size))
    return torch.stack([*chunks]).sum()


def chunk_bounds(length: int, chunk_size: int) -> list[tuple[int, int]]:
    """Cut ``length`` tokens into the fewest chunks of at most ``chunk_size``; return where each begins and ends.

    Sizes differ by one at most. A much smaller last chunk would be compiled by itself. Example: 10 tokens in chunks of
    4 are (0, 3), (3, 6) and (6, 10).
    """
    chunks = max(1, -(-length // chunk_size))
    return [*pairwise(length * index // chunks for index in range(chunks + 1))]


def loss_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Compute the sum of the losses () of logits (N, V) and targets (N,)."""
    return cross_entropy(at_least_float32(logits), targets, ignore_index=IGNORED, reduction="sum")


def overwrite_by_gradient(logits: Tensor, targets: Tensor) -> Tensor:
    """Overwrite logits (N, V) by the gradient of the sum of the losses, and return the sum () in float32 or wider.

    The gradient is softmax(logits) - one_hot(target), and zero for a target (N,) of -100.
    """
    total = logits.new_zeros((), dtype=torch.promote_types(logits.dtype, torch.float32))
    block = BLOCK if logits.device.type == "cpu" else GPU_BLOCK
    for rows, target in zip(logits.split(block), targets.split(block), strict=True):
        log_probabilities = log_softmax(at_least_float32(rows), dim=-1)
        total += nll_loss(log_probabilities, target, reduction="sum")
        gradient = log_probabilities.exp_()
        gradient[torch.arange(len(rows), device=rows.device), target.clamp(min=0)] -= 1
        rows.copy_(gradient.mul_((target != IGNORED)[:, None]))
    return total


def _overwrite_in_one_kernel(logits: Tensor, targets: Tensor) -> Tensor:
    """Do what :func:`overwrite_by_gradient` does, in a form that ``torch.compile`` makes one kernel of.

    Each logit is read, and its gradient written, without anything of the size (N, V) in between.
    """
    if not torch.compiler.is_compiling():  # under torch.compiler.set_stance("force_eager")
        return overwrite_by_gradient(logits, targets)
    wide = at_least_float32(logits)
    greatest = wide.amax(-1, keepdim=True)
    log_sum = greatest + (wide - greatest).exp().sum(-1, keepdim=True).log()  # logsumexp
    learnt = (targets != IGNORED)[:, None]
    losses = torch.where(learnt, log_sum - wide.gather(1, targets.clamp(min=0)[:, None]), 0)
    # A comparison for one_hot, because a scatter would be a kernel of its own.
    one_hot = torch.arange(logits.shape[1], device=logits.device) == targets[:, None]
    logits.copy_(torch.where(learnt, (wide - log_sum).exp() - one_hot.to(wide.dtype), 0))
    return losses.sum()


@cache
def compile_once(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Compile a function; all networks of this process share it."""
    return torch.compile(function)


class _ChunkedLossSum(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, chunk_size: int, compiled: bool) -> Tensor:
        overwrite = compile_once(_overwrite_in_one_kernel) if compiled else overwrite_by_gradient
        wide = torch.promote_types(weight.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=x.device)
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        grad_weight: Tensor | None = None
        bounds = chunk_bounds(len(x), chunk_size)
        largest = max(end - begin for begin, end in bounds)
        buffer = torch.empty(largest, len(weight), dtype=weight.dtype, device=weight.device)
        for begin, end in bounds:
            chunk, logits = x[begin:end], buffer[: end - begin]
            torch.mm(chunk, weight.T, out=logits)
            total += overwrite(logits, targets[begin:end])  # the buffer holds the gradient of the logits from here on
            if grad_x is not None:
                torch.mm(logits, weight, out=grad_x[begin:end])
            if not ctx.needs_input_grad[1]:
                continue
            if grad_weight is None:
                grad_weight = logits.T @ chunk
            elif weight.dtype == wide:
                torch.addmm(grad_weight, logits.T, chunk, out=grad_weight)
            else:
                grad_weight = grad_weight.to(wide).add_(logits.T @ chunk)
        ctx.save_for_backward(grad_x, grad_weight)
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        grad_x, grad_weight = ctx.saved_tensors
        return (
            None if grad_x is None else grad_x * grad,  # grad is a number, so that grad_x keeps its type
            None if grad_weight is None else (grad_weight * grad).to(ctx.dtype),
            None,
            None,
            None,
        )
