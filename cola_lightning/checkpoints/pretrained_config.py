"""Read the network's settings from a folder's ``config.json`` as transformers 5 does, or refuse in one line."""

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

from cola_lightning.checkpoints.projection_formats import LAYOUTS
from cola_lightning.errors import InputError
from cola_lightning.methods import CoLA
from cola_lightning.models import FullRank, LlamaConfig, MakeProjection
from cola_lightning.models.rope_scaling import REQUIRED, check_scaling

WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", dict: "an object"}
MISSING = object()
LARGEST = 1e9
"""Sizes above it are none, and their products would be beyond what torch can count."""


def read_json(file: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        InputError: If there is no such file, or it holds no JSON object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{file} does not exist; name a folder with {file.name} and model.safetensors") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} holds a JSON {type(content).__name__}, not an object; is it another file?")
    return content


def read_key(config: dict[str, Any], file: Path, key: str, kind: type, default: Any = MISSING) -> Any:
    """The value of a key, of the kind that it must have; ``default`` where it is missing or null.

    Raises:
        InputError: If it is of another kind, or missing or null and without a default.
    """
    value = config.get(key)
    if value is None:
        if default is MISSING:
            raise InputError(
                f"{file} {'has no' if key not in config else 'sets to null'} {key}; it must be {WORDS[kind]}"
            )
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

    Understands Hugging Face's LLaMA, what ``export`` writes, and the reference implementation's CoLA.

    Args:
        config: Content of the file.
        file: The file, for messages.

    Raises:
        InputError: If it describes a network that is not one of these, or lacks a key.
    """
    get = partial(read_key, config, file)
    kind = config.get("model_type")
    known = list(dict.fromkeys(["llama", "cola", *(layout.model_type for layout in LAYOUTS)]))
    if kind not in known:
        raise InputError(f"{file} describes a {kind!r} model; {', '.join(known)} can be loaded")
    hidden_size, heads = get("hidden_size", int), get("num_attention_heads", int)
    if heads < 1 or hidden_size % heads:
        raise InputError(f"{file} sets num_attention_heads to {heads}, which does not divide hidden_size {hidden_size}")
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
    if kind == "cola":  # the reference's
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
        # The configurations of this lineage write -1 for none.
        "pad_token_id": None if pad_id == -1 else pad_id,
    }
    arguments |= _rope(config, file, arguments["max_position_embeddings"], hidden_size // heads)
    return LlamaConfig(**arguments), _projection(config, file, hidden_size)


def _projection(config: dict[str, Any], file: Path, hidden_size: int) -> MakeProjection:
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
    """``rope_theta``, ``rope_scaling`` and, where they change it, ``max_position_embeddings``.

    Older configurations have ``rope_scaling``, newer ones ``rope_parameters``, and some both: then the former counts,
    as in transformers. In either the type is called ``rope_type`` or, before that, ``type``.
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
        # Where it stands beside the dictionary it counts; where it is nowhere, nothing was stretched.
        settings["original_max_position_embeddings"] = outside or rope.get("original_max_position_embeddings", longest)
    if kind == "yarn" and "factor" in rope and rope["factor"] is None:
        settings["factor"] = longest / settings["original_max_position_embeddings"]
    if kind == "dynamic":
        # Stretching begins where max_position_embeddings ends, and is meant for so many times more.
        settings["original_max_position_embeddings"] = longest
    scaling = check_scaling(settings, head_dim, str(place))
    found = {"rope_theta": theta, "rope_scaling": scaling}
    return found | ({"max_position_embeddings": int(longest * scaling["factor"])} if kind == "dynamic" else {})


def rope_keys(theta: float, scaling: dict[str, Any] | None, longest: int) -> dict[str, Any]:
    """Keys of ``config.json`` for rotary positions, so that :func:`network_arguments` finds the same in them."""
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    # transformers 4 and other readers look for rope_theta, and for rope_scaling where there is one.
    found: dict[str, Any] = {"rope_theta": theta, "rope_parameters": parameters, "max_position_embeddings": longest}
    if scaling is None:
        return found
    parameters |= scaling
    if scaling["rope_type"] == "dynamic":
        found["max_position_embeddings"] = parameters.pop("original_max_position_embeddings")
    return found | {"rope_scaling": parameters}
