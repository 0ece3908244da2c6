"""RoPE scaling: rotary frequencies stretched to longer texts, as Hugging Face's LLaMA computes them.

Settings have Hugging Face's names and are plain data, so they go into a config.json and a checkpoint unchanged. The
setting ``rope_type`` is one of:

- ``linear`` divides all frequencies by ``factor`` (kaiokendev).
- ``dynamic`` raises the base once a text is longer than ``original_max_position_embeddings`` (bloc97, emozilla).
- ``yarn`` divides low frequencies, keeps high ones, and scales the attention (arXiv 2309.00071).
- ``llama3`` also divides low and keeps high frequencies, by other bounds, and does not scale the attention (Llama 3.1).
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cola_lightning.errors import InputError

Scaling = Mapping[str, bool | int | float | str | None]
"""Settings by Hugging Face's names; ``rope_type`` decides which of the others are used."""

REQUIRED = {
    "linear": ("factor",),
    "dynamic": ("factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
}
OPTIONAL = {"yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")}


LARGEST = 1e12
"""Upper bound of every setting, because torch does not take integers of any size as Python does."""


def check_scaling(scaling: Scaling, head_dim: int, place: str = "rope_scaling") -> dict[str, Any]:
    """Check the settings, and return those that the ``rope_type`` uses.

    Args:
        scaling: The settings.
        head_dim: Head dimension E.
        place: Name of the settings in messages.

    Raises:
        InputError: If the type is unknown, or a setting is missing or out of range.
    """
    kind = scaling.get("rope_type")
    if kind not in list(REQUIRED):
        raise InputError(f"{place} has rope_type {kind!r}, which is not supported; {', '.join(REQUIRED)} are")
    kept: dict[str, Any] = {"rope_type": kind}
    for name in REQUIRED[kind]:
        value = scaling.get(name)
        if not _is_positive(value):
            raise InputError(f"{place}: {name} is {value!r}; rope_type {kind} needs a number above 0")
        kept[name] = value
    for name in OPTIONAL.get(kind, ()):
        value = scaling.get(name)
        if value is None:
            continue
        if not (isinstance(value, bool) if name == "truncate" else _is_positive(value)):
            wanted = "true or false" if name == "truncate" else "a number above 0, or null"
            raise InputError(f"{place}: {name} is {value!r}; it must be {wanted}")
        kept[name] = value
    if kind == "llama3" and kept["high_freq_factor"] <= kept["low_freq_factor"]:
        raise InputError(
            f"{place}: high_freq_factor is {kept['high_freq_factor']}; it must be above low_freq_factor, "
            f"{kept['low_freq_factor']}"
        )
    if kind == "dynamic" and head_dim < 4:
        raise InputError(f"{place}: rope_type dynamic needs heads of at least 4, not {head_dim}")
    return kept


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < LARGEST


def frequencies(
    head_dim: int, theta: float, scaling: Scaling | None, length: int, device: torch.device
) -> tuple[Tensor, float]:
    """Compute the angle per position of each pair of a head's entries.

    Args:
        head_dim: Head dimension E.
        theta: Base of the frequencies.
        scaling: Settings that :func:`check_scaling` returned; None for unscaled frequencies.
        length: Tokens of the text so far; used by ``dynamic`` only.
        device: Where to compute. Nothing synchronizes with it.

    Returns:
        Frequencies (E / 2,) in radians per position, in float32, and the factor of cosine and sine.
    """
    exponents = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    if scaling is None:
        return 1.0 / theta**exponents, 1.0
    factor: float = scaling["factor"]  # type: ignore[assignment]
    match scaling["rope_type"]:
        case "linear":
            return 1.0 / theta**exponents / factor, 1.0
        case "dynamic":
            original: float = scaling["original_max_position_embeddings"]  # type: ignore[assignment]
            stretch = factor * max(length, original) / original - (factor - 1)
            return 1.0 / (theta * stretch ** (head_dim / (head_dim - 2))) ** exponents, 1.0
        case "yarn":
            return _yarn(1.0 / theta**exponents, theta, scaling), _yarn_attention_factor(scaling)
        case _:
            return _llama3(1.0 / theta**exponents, scaling), 1.0


def _yarn(plain: Tensor, theta: float, scaling: Any) -> Tensor:
    """Divide low frequencies by the factor, keep high ones, and interpolate between the two."""
    dim = 2 * len(plain)

    def index_of(rotations: float) -> float:
        """Find the (fractional) index of the frequency with this many full turns over the original length."""
        turns = scaling["original_max_position_embeddings"] / (rotations * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(theta))

    low, high = index_of(scaling.get("beta_fast") or 32), index_of(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low if high != low else 0.001
    ramp = ((torch.arange(len(plain), device=plain.device, dtype=torch.float32) - low) / width).clamp(0, 1)
    return plain / scaling["factor"] * ramp + plain * (1 - ramp)


def _yarn_attention_factor(scaling: Any) -> float:
    """Compute the factor of cosine and sine, by which YaRN scales the attention's logits."""
    if scaling.get("attention_factor") is not None:
        return scaling["attention_factor"]

    def factor_of(mscale: float) -> float:
        return 1.0 if scaling["factor"] <= 1 else 0.1 * mscale * math.log(scaling["factor"]) + 1.0

    mscale, of_all = scaling.get("mscale"), scaling.get("mscale_all_dim")
    return factor_of(mscale) / factor_of(of_all) if mscale and of_all else factor_of(1.0)


def _llama3(plain: Tensor, scaling: Any) -> Tensor:
    """Keep high frequencies, divide low ones by the factor, and interpolate between the two."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    # Full turns over the original length. A frequency with more than `high` is kept, one with less than `low` divided.
    turns = scaling["original_max_position_embeddings"] / (2 * math.pi / plain)
    share = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - share) * plain / scaling["factor"] + share * plain
