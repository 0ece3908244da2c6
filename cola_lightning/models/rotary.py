"""Rotary position embedding (RoPE), and the mask that keeps attention within a document."""

from typing import NamedTuple

import torch
from torch import Tensor

from cola_lightning.models.kv_cache import KeyValueStore
from cola_lightning.models.rope_scaling import Scaling, frequencies


class Rotary(NamedTuple):
    """Positions of the tokens, as attention needs them.

    Attributes:
        cos: Cosine of the rotary angles (T, E).
        sin: Sine of the rotary angles (T, E).
        mask: True where a token may attend (B or 1, 1, T, tokens so far); None for causal attention.
        cache: Keys and values of one layer, in generation.
    """

    cos: Tensor
    sin: Tensor
    mask: Tensor | None = None
    cache: KeyValueStore | None = None


def rotary_table(
    length: int, head_dim: int, theta: float, *, like: Tensor, start: int = 0, scaling: Scaling | None = None
) -> Rotary:
    """Compute cosine and sine (T, E) of the rotary angles (RoFormer, arXiv 2104.09864).

    They are computed in float32 at each call and not kept in a buffer. A buffer would be rounded together with the
    weights under pure bf16, and would have to be filled after a start on the meta device.

    Args:
        length: Number of positions T.
        head_dim: Head dimension E.
        theta: Base of the frequencies.
        like: The result has its dtype and device.
        start: The first position.
        scaling: How the frequencies are stretched, see :mod:`cola_lightning.models.rope_scaling`.
    """
    per_position, attention_factor = frequencies(head_dim, theta, scaling, start + length, like.device)
    positions = torch.arange(start, start + length, device=like.device, dtype=torch.float32)
    angles = torch.outer(positions, per_position)
    angles = torch.cat((angles, angles), dim=-1)
    cos, sin = angles.cos(), angles.sin()
    if attention_factor != 1.0:
        cos, sin = cos * attention_factor, sin * attention_factor
    return Rotary(cos.to(like.dtype), sin.to(like.dtype))


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotate (B, H, T, E) by the rotary angles, in the half-split layout of Hugging Face's LLaMA."""
    left, right = x.chunk(2, dim=-1)
    return x * rotary.cos + torch.cat((-right, left), dim=-1) * rotary.sin


def document_mask(document_ids: Tensor, seen: int = 0) -> Tensor:
    """Make the mask (B, 1, T, seen + T), bool, by which a token attends to earlier tokens of its own document only.

    Rotary positions need no restart at a document's beginning, because only distances count.

    Args:
        document_ids: Number of each token's document (B, seen + T).
        seen: Tokens that are in the KV cache already. Example: with document ids 1 1 2 2 and ``seen`` 2, the rows of
            the third and fourth token are returned: 0 0 1 0 and 0 0 1 1.
    """
    same = document_ids[:, None, seen:, None] == document_ids[:, None, None, :]
    return same.tril(seen)
