"""Sampling: draw the next token from logits, by temperature, top-k and top-p."""

import math

import torch
from torch import Tensor

from cola_lightning.errors import InputError, UnusableModelError


def check_sampling(
    max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None, seed: int, prefix: str = "--"
) -> None:
    """Check the settings of :func:`~cola_lightning.models.generation.stream`.

    Args:
        max_new_tokens, temperature, top_k, top_p: As for ``stream``.
        seed: Seed of the generator.
        prefix: Text before a setting's name in the message.

    Raises:
        InputError: If a setting is out of range.
    """
    least: dict[str, tuple[float, float]] = {"max_new_tokens": (max_new_tokens, 1), "temperature": (temperature, 0)}
    if top_k is not None:
        least["top_k"] = (top_k, 1)
    for name, (value, minimum) in least.items():
        if value < minimum:
            raise InputError(f"{prefix}{name} is {value}; it must be at least {minimum}")
    if not math.isfinite(temperature):
        raise InputError(f"{prefix}temperature is {temperature}; it must be a number of at least 0")
    if not -(2**63) <= seed < 2**64:
        raise InputError(f"{prefix}seed is {seed}; it must lie between -2^63 and 2^64 - 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise InputError(f"{prefix}top_p is {top_p}; it must lie above 0 and not above 1")


def sample(
    logits: Tensor,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one id for each row of logits.

    Args:
        logits: Logits (B, V) of the next token.
        temperature: Divides the logits; 0 takes the likeliest token.
        top_k: Sample among the k likeliest only.
        top_p: Sample among the likeliest that together have this probability (nucleus sampling, arXiv 1904.09751).
        generator: Source of randomness.

    Returns:
        Ids (B, 1).

    Raises:
        UnusableModelError: If a logit is NaN.
    """
    if bool(logits.isnan().any()):
        raise UnusableModelError("the logits are NaN: the network overflows in its dtype; take an earlier checkpoint")
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    # Subtract the largest logit, and bound the divisor by what float32 can divide by. A tiny temperature then makes the
    # likeliest token certain instead of overflowing.
    logits = (logits - logits.amax(-1, keepdim=True)) / max(temperature, 1e-30)
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], float("-inf"))
    if top_p is not None and top_p < 1:
        # A token is dropped if those before it already reach top_p, so the one that reaches it is kept. Example for
        # top_p 0.8: probabilities .5 .3 .2 have the sums before them 0 .5 .8, so the third token is dropped.
        ordered, ids = logits.softmax(-1).sort(-1, descending=True)
        dropped = ordered.cumsum(-1) - ordered >= top_p
        logits = logits.masked_fill(dropped.scatter(-1, ids, dropped), float("-inf"))
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)
