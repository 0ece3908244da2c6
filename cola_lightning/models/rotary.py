"""Rotary position embedding, and the mask that keeps attention within a document.

Shapes by the legend of :mod:`cola_lightning.models.block`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from cola_lightning.models.kv_cache import LayerCache
from cola_lightning.models.rope_scaling import Scaling, frequencies


class Rotary(NamedTuple):
    """Where the tokens stand: cosine and sine of the rotary angles, each (T, E); who attends to whom, where causality
    alone does not say it, as the mask (B or 1, 1, T, tokens so far); and in generation what a layer has seen."""

    cos: Tensor
    sin: Tensor
    mask: Tensor | None = None
    cache: LayerCache | None = None


def rotary_table(
    length: int, head_dim: int, theta: float, *, like: Tensor, start: int = 0, scaling: Scaling | None = None
) -> Rotary:
    """Cosine and sine (T, E) of the rotary angles (RoFormer, arXiv 2104.09864) of positions ``start``, ``start + 1``, …
    in dtype and on device of ``like``; ``scaling`` stretches them, see :mod:`cola_lightning.models.rope_scaling`.

    Angles are formed in float32 at each call rather than kept in a buffer: a buffer would be rounded together with the
    weights under a pure bf16 precision, and would need filling after a start on the meta device.
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
    """Turn (B, H, T, E) by the rotary angles, in the half-split layout of Hugging Face's LLaMA."""
    left, right = x.chunk(2, dim=-1)
    return x * rotary.cos + torch.cat((-right, left), dim=-1) * rotary.sin


def document_mask(document_ids: Tensor, seen: int = 0) -> Tensor:
    """Which token may attend to which, (B, 1, T, seen + T) bool, where each attends to its own document alone: to those
    before it with the same number in ``document_ids`` (B, seen + T). Rotary positions need no restart, for only
    distances count."""
    same = document_ids[:, None, seen:, None] == document_ids[:, None, None, :]
    return same.tril(seen)
