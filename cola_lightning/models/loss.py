"""Cross-entropy of a head whose logits never exist at once.

PyTorch has the like from 2.13 on (``linear_cross_entropy`` with chunks). In bf16 it returns the sum of the losses in
bf16, three digits of it, and adds the weight's gradient up in bf16; so it was left aside.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear, log_softmax, nll_loss


def at_least_float32(x: Tensor) -> Tensor:
    """Widen a tensor of 16 bits to float32; leave float32 and float64 as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def chunked_loss_sum(x: Tensor, weight: Tensor, targets: Tensor, size: int) -> Tensor:
    """Sum of the losses in nats of hidden states x (N, D) under a head's weight (V, D), in float32 or wider.

    Logits exist for ``size`` of the N tokens at a time. The gradients are formed with them, in the forward pass, so
    that no product is made twice; the weight's is added up in float32.

    Args:
        targets: Ids (N,); those that are -100 count for nothing.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x, weight = (tensor.to(torch.get_autocast_dtype(device)) for tensor in (x, weight))
    return _Sum.apply(x, weight, targets, size)


class _Sum(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, size: int) -> Tensor:
        wide = torch.promote_types(weight.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=x.device)
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        for begin in range(0, len(x), size):
            part, wanted = x[begin : begin + size], targets[begin : begin + size]
            scores = log_softmax(at_least_float32(linear(part, weight)), dim=-1)
            total += nll_loss(scores, wanted, reduction="sum")
            if grad_x is None and grad_weight is None:
                continue
            # d loss / d logits: the probabilities, less one at what was wanted; nothing where nothing was.
            slope = scores.exp_()
            slope.scatter_add_(1, wanted.clamp(min=0)[:, None], slope.new_full((len(part), 1), -1.0))
            slope = slope.mul_((wanted != -100)[:, None]).to(x.dtype)
            if grad_x is not None:
                grad_x[begin : begin + size] = slope @ weight
            if grad_weight is not None:
                grad_weight += slope.T @ part
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
