"""Weight-only int8: matrices in one byte per entry, with one factor per row."""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from cola_lightning.models import Llama
from cola_lightning.models.layers import NormalLinear, TokenEmbedding
from cola_lightning.private_apis.torch import int8_product_of_bfloat16

CHUNK = 2**20
"""Entries of a matrix that are converted at a time."""


MOST_ROWS = 16
"""Rows up to which PyTorch's kernel for int8 is faster than converting the matrix and multiplying."""


def quantize_int8(network: Llama) -> None:
    """Round the matrices of a network, embedding and head included, to int8. It cannot be trained afterwards.

    An entry becomes the nearest multiple of its row's factor, which is the row's largest absolute value / 127. Norms,
    scalars and activations keep their dtype.
    """
    for module in network.modules():
        if isinstance(module, NormalLinear | TokenEmbedding) and module.scale is None:
            weight, module.scale = round_rows(module.weight.detach())
            module.weight = nn.Parameter(weight, requires_grad=False)
            if isinstance(module, NormalLinear):
                module.product = int8_product


def round_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a matrix (rows, columns); return it as int8, and the factors (rows,) in its dtype.

    The factors are rounded to that dtype before the division, so that their own rounding adds no error. A row of zeros
    gets the factor 1.
    """
    rounded = torch.empty_like(weight, dtype=torch.int8)
    scale = (weight.abs().amax(1).float() / 127).to(weight.dtype)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    step = max(1, CHUNK // weight.shape[1])
    for begin in range(0, len(weight), step):  # in pieces, because the quotients are float32
        part = slice(begin, begin + step)
        rounded[part] = (weight[part].float() / scale[part, None].float()).round().clamp(-127, 127)
    return rounded, scale


def suits_kernel(x: Tensor) -> bool:
    """Say whether PyTorch's kernel for int8 is right and quick for an input (…, in).

    It reads 16 entries of a row at a time, also beyond the end of one that is no multiple of 16.
    """
    return x.shape[:-1].numel() <= MOST_ROWS and x.shape[-1] % 32 == 0


def int8_product(x: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
    """Multiply (…, in) by a matrix (out, in) in int8 whose rows have the factors ``scale`` (out,); -> (…, out)."""
    assert scale is not None
    if (x.dtype, x.device.type) == (torch.bfloat16, "cpu") and suits_kernel(x):
        return int8_product_of_bfloat16(x.flatten(0, -2), weight, scale).view(*x.shape[:-1], -1)
    y = x.new_empty(*x.shape[:-1], len(weight))
    step = max(1, CHUNK // weight.shape[1])
    for begin in range(0, len(weight), step):  # in pieces, so that the matrix never exists in the dtype of x
        part = slice(begin, begin + step)
        y[..., part] = linear(x, weight[part].to(x.dtype)) * scale[part]
    return y
