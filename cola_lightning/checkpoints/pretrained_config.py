"""Read the sizes and the projection of a network from ``config.json``, as transformers 5 reads it."""

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from cola_lightning.checkpoints.projection_formats import LAYOUTS
from cola_lightning.errors import InputError
from cola_lightning.methods import CoLA
from cola_lightning.models import FullRank, LlamaConfig, MakeProjection
from cola_lightning.models.rope_scaling import REQUIRED, check_scaling

WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", dict: "an object"}
"""Types of values, as messages name them."""

MISSING = object()
LARGEST = 1e9
"""Largest size that is accepted. Products of larger ones would not fit into 64 bits."""


def read_key(config: dict[str, Any], file: Path, key: str, kind: type, default: Any = MISSING) -> Any:
    """Read the value of a key, and check its type.

    Args:
        config: Content of the file.
        file: The file, for the message.
        key: Name of the key.
        kind: Type that the value must have. A whole number may be written as 2.0.
        default: Value to return if the key is missing or null.

    Raises:
        InputError: If the value is of another type, or missing or null without a default.
    """
    value = config.get(key)
    if value is None:
        if default is MISSING:
            problem = f"sets {key} to null" if key in config else f"has no {key}"
            raise InputError(f"{file} {problem}; it must be {WORDS[kind]}")
        return default
    fits = isinstance(value, kind)
    if kind in (int, float):
        fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        fits = fits and abs(value) <= LARGEST and (kind is float or value == int(value))
    if not fits:
        raise InputError(f"{file} sets {key} to {value!r}; it must be {WORDS[kind]}")
    return kind(value)


def network_arguments(config: dict[str, Any], file: Path) -> tuple[LlamaConfig, MakeProjection]:
    """Read the sizes and the projection of the model that ``config.json`` describes.

    The file may be of Hugging Face's LLaMA, of ``export``, or of the reference implementation's CoLA.

    Args:
        config: Content of the file.
        file: The file, for messages.

    Raises:
        InputError: If it describes another kind of network, or lacks a key.
    """
    get = partial(read_key, config, file)
    kind = config.get("model_type")
    known = list(dict.fromkeys(["llama", "cola", *(layout.model_type for layout in LAYOUTS)]))
    if kind not in known:
        raise InputError(f"{file} describes a {kind!r} model; {', '.join(known)} can be loaded")
    hidden_size, heads = get("hidden_size", int), get("num_attention_heads", int)
    if heads < 1 or hidden_size % heads:
        raise InputError(f"{file} sets num_attention_heads to {heads}, which does not divide hidden_size {hidden_size}")
    # True where the file asks for something that this package's LLaMA does not have. ``export`` writes "linear" for a
    # gate without SiLU; the reference's CoLA says that by only_lr_act instead, so "linear" is not accepted of it.
    different = {
        "hidden_act": get("hidden_act", str, "silu") not in ("silu", "swish", "linear")[: 2 if kind == "cola" else 3],
        "attention_bias": get("attention_bias", bool, False),
        "mlp_bias": get("mlp_bias", bool, False),
        "head_dim": get("head_dim", int, hidden_size // heads) != hidden_size // heads,
        "quantization_config": config.get("quantization_config") is not None,
        "partial_rotary_factor": get("partial_rotary_factor", float, 1.0) != 1.0,
    }
    for key, differs in different.items():
        if differs:
            raise InputError(f"{file} sets {key} to {config[key]}, which is not supported")
    gate_silu = get("hidden_act", str, "silu") != "linear"
    if kind == "cola":  # of the reference implementation
        gate_silu = not get("only_lr_act", bool, True)
    pad_id, epsilon = get("pad_token_id", int, -1), get("rms_norm_eps", float, 1e-6)
    if epsilon < 0:
        raise InputError(f"{file} sets rms_norm_eps to {epsilon}; it must be at least 0")
    arguments = {
        "vocab_size": get("vocab_size", int),
        "hidden_size": hidden_size,
        "intermediate_size": get("intermediate_size", int),
        "num_hidden_layers": get("num_hidden_layers", int),
        "num_attention_heads": heads,
        "num_key_value_heads": get("num_key_value_heads", int, heads),
        "max_position_embeddings": get("max_position_embeddings", int, 2048),
        "rms_norm_eps": epsilon,
        "gate_silu": gate_silu,
        # The configs of CoLA and GaLore write -1 for "no padding id".
        "pad_token_id": None if pad_id == -1 else pad_id,
    }
    arguments |= _rope(config, file, arguments["max_position_embeddings"], hidden_size // heads)
    return LlamaConfig(**arguments), _projection(config, file, hidden_size)


def _projection(config: dict[str, Any], file: Path, hidden_size: int) -> MakeProjection:
    """Read the projection that ``config.json`` describes."""
    kind = config["model_type"]
    if kind == "llama":
        return FullRank
    if kind == "cola":
        return partial(CoLA, rank=read_key(config, file, "rank", int, hidden_size // 4))
    layout = next((layout for layout in LAYOUTS if layout.matches(config)), None)
    if layout is None:
        same = [layout.fixed for layout in LAYOUTS if layout.model_type == kind]
        found = {key: config.get(key) for key in same[0]}
        raise InputError(f"{file} sets {found}, which is not supported; {kind} has {' or '.join(map(str, same))}")
    return layout.make({name: read_key(config, file, name, kind) for name, kind in layout.arguments.items()})


def _rope(config: dict[str, Any], file: Path, longest: int, head_dim: int) -> dict[str, Any]:
    """Read ``rope_theta``, ``rope_scaling`` and, if the scaling changes it, ``max_position_embeddings``.

    Older files have ``rope_scaling``, newer ones ``rope_parameters``. If a file has both, the former counts, as in
    transformers. The key of the type is ``rope_type``, or ``type`` in older files.
    """
    get = partial(read_key, config, file)
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = get(key, dict, {})
    place = Path(f"{file}: {key}")
    theta = read_key(rope, place, "rope_theta", float, get("rope_theta", float, 10000.0))
    if theta <= 1:
        raise InputError(f"{file} sets rope_theta to {theta}; it must be above 1")
    if read_key(rope, place, "partial_rotary_factor", float, 1.0) != 1.0:
        raise InputError(
            f"{place} sets partial_rotary_factor to {rope['partial_rotary_factor']}, which is not supported"
        )
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return {"rope_theta": theta}
    settings = dict(rope) | {"rope_type": kind}
    if kind not in list(REQUIRED):
        raise InputError(f"{place} is of type {kind!r}, which is not supported; {', '.join(REQUIRED)} are")
    outside = get("original_max_position_embeddings", int, None)
    if kind in ("yarn", "llama3"):
        # A value outside of the dictionary counts before one inside. If there is none, nothing was stretched.
        settings["original_max_position_embeddings"] = outside or rope.get("original_max_position_embeddings", longest)
    if kind == "yarn" and "factor" in rope and rope["factor"] is None:
        settings["factor"] = longest / settings["original_max_position_embeddings"]
    if kind == "dynamic":
        # Stretching begins beyond max_position_embeddings, and allows rows that are longer by the factor. Example: 2048
        # in the file and factor 2 are original_max_position_embeddings 2048 and max_position_embeddings 4096 here.
        settings["original_max_position_embeddings"] = longest
    scaling = check_scaling(settings, head_dim, str(place))
    found: dict[str, Any] = {"rope_theta": theta, "rope_scaling": scaling}
    return found | ({"max_position_embeddings": int(longest * scaling["factor"])} if kind == "dynamic" else {})


def rope_keys(theta: float, scaling: Mapping[str, Any] | None, longest: int) -> dict[str, Any]:
    """Make the keys of ``config.json`` for rotary positions; :func:`network_arguments` reads the same from them.

    Args:
        theta: Base of the rotary frequencies.
        scaling: ``rope_scaling`` of :class:`~cola_lightning.models.LlamaConfig`.
        longest: Its ``max_position_embeddings``.
    """
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    # transformers 5 reads rope_parameters. transformers 4 and other programs read rope_theta and rope_scaling.
    found: dict[str, Any] = {"rope_theta": theta, "rope_parameters": parameters, "max_position_embeddings": longest}
    if scaling is None:
        return found
    parameters |= scaling
    if scaling["rope_type"] == "dynamic":
        found["max_position_embeddings"] = parameters.pop("original_max_position_embeddings")
    return found | {"rope_scaling": parameters}
