"""Compare the sizes in a checkpoint's hyper-parameters with those of its weights.

A network is built before its weights are filled in. A small file could ask for 10⁹ layers, which would take for ever to
build. Therefore the sizes are compared first.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cola_lightning.checkpoints.formats import NETWORK, Format, format_of, read_state, shard_entries
from cola_lightning.errors import InputError

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_EMBEDDING = "model.embed_tokens.weight"


def model_settings(path: Path) -> dict[str, Any]:
    """Read the arguments of the LightningModule in a checkpoint, without those that Lightning adds.

    Raises:
        InputError: If the checkpoint cannot be read, would run code, or has no such arguments.
    """
    stored = read_state(path).get("hyper_parameters", {})
    return {key: value for key, value in stored.items() if not str(key).startswith("_")}


def check_sizes(settings: Mapping[str, Any], path: Path) -> None:
    """Compare the settings of a checkpoint with the names and shapes of its weights. Nothing is built.

    Raises:
        InputError: If they do not fit together.
    """
    compare_sizes(settings, weight_shapes(path), path)


def compare_sizes(settings: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], place: object) -> None:
    """Compare settings with the shapes of weights.

    Args:
        settings: Arguments of the LightningModule.
        shapes: Shapes of the weights by their names in ``network.state_dict()``.
        place: The checkpoint, for the message.

    Raises:
        InputError: If they do not fit together.
    """
    # Numbers of the layers: 3 from "model.layers.3.mlp.up_proj.A.weight".
    layers = {int(match[1]) for name in shapes if (match := _LAYER.search(name))}
    # Both sizes are None if the embedding is missing: (32000, 512, None, None)[:2] or (None, None)[:2].
    vocab_size, hidden_size = (*shapes.get(_EMBEDDING, ()), None, None)[:2]
    found = {"num_hidden_layers": len(layers), "vocab_size": vocab_size, "hidden_size": hidden_size}
    trouble = f"{place} holds other weights than its hyper-parameters describe"
    for name, size in found.items():
        claimed = settings.get(name, size)
        if size is not None and claimed != size:
            raise InputError(f"{trouble}: {name} is {claimed!r} in them, {size} in the weights")
    # Whatever the method, some matrix of the MLP has intermediate_size rows or columns.
    most = max((max(shape, default=1) for shape in shapes.values()), default=0)
    claimed = settings.get("intermediate_size", 0)
    if shapes and not (isinstance(claimed, int) and claimed <= most):
        raise InputError(f"{trouble}: intermediate_size is {claimed!r} in them, and no weight has a size above {most}")


def weight_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Read the shapes of the network's weights by name, without reading a weight.

    Raises:
        InputError: If the checkpoint cannot be read, or would run code.
    """
    state = read_state(path)
    match format_of(path):
        case Format.FILE:
            named = {name: getattr(each, "shape", ()) for name, each in state["state_dict"].items()}
        case Format.SHARDS:
            named = {name: entry.size for name, entry in shard_entries(path).items()}
        case Format.DEEPSPEED:
            groups = state.get("param_shapes") or []
            named = {name: shape for group in groups for name, shape in group.items()}
    return {
        name.removeprefix(NETWORK): tuple(shape)
        for name, shape in named.items()
        if isinstance(name, str) and name.startswith(NETWORK)
    }
