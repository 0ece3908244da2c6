"""Compare the sizes that a checkpoint or folder claims with those of the tensors that it holds.

A network is built before its weights are filled in. One of 10⁹ layers would take for ever, however small the file that
asks for it; so what can be counted in the file is counted first.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from cola_lightning.checkpoints.formats import NETWORK, Format, format_of, read_state
from cola_lightning.checkpoints.safe_unpickle import read_index
from cola_lightning.errors import InputError

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_EMBEDDING = "model.embed_tokens.weight"


def model_settings(path: Path) -> dict[str, Any]:
    """The arguments of the LightningModule that a checkpoint holds, without those that Lightning itself adds.

    Raises:
        InputError: If it cannot be read, or would run code, or holds none.
    """
    stored = read_state(path).get("hyper_parameters", {})
    if not isinstance(stored, Mapping):
        raise InputError(f"{path} is no checkpoint of this package: its hyper-parameters are a {type(stored).__name__}")
    return {key: value for key, value in stored.items() if not str(key).startswith("_")}


def check_sizes(settings: Mapping[str, Any], path: Path) -> None:
    """Compare the settings of a checkpoint with its weights, by name and shape; nothing is built.

    Raises:
        InputError: If they do not go together, or cannot be of a network.
    """
    compare_sizes(settings, weight_shapes(path), path)


def compare_sizes(settings: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], place: object) -> None:
    """The same, for weights whose shapes are known by their names in ``network.state_dict()``."""
    layers = {int(found[1]) for name in shapes if (found := _LAYER.search(name))}
    vocab_size, hidden_size = (*shapes.get(_EMBEDDING, ()), None, None)[:2]
    found = {"num_hidden_layers": len(layers), "vocab_size": vocab_size, "hidden_size": hidden_size}
    trouble = f"{place} holds other weights than its hyper-parameters describe"
    for name, size in found.items():
        claimed = settings.get(name, size)
        if size is not None and claimed != size:
            raise InputError(f"{trouble}: {name} is {claimed!r} by them, {size} by the weights")
    most = max((max(shape, default=1) for shape in shapes.values()), default=0)
    claimed = settings.get("intermediate_size", 0)
    if shapes and not (isinstance(claimed, int) and claimed <= most):
        raise InputError(f"{trouble}: intermediate_size is {claimed!r} by them, no weight has more than {most} rows")


def weight_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the network's weights, by name, without reading any."""
    state = read_state(path)
    match format_of(path):
        case Format.FILE:
            found = state.get("state_dict")
            named = {name: getattr(each, "shape", ()) for name, each in found.items()} if _is_dict(found) else {}
        case Format.SHARDS:
            entries = read_index(path).state_dict_metadata
            named = {
                name.removeprefix("state_dict."): entry.size
                for name, entry in entries.items()
                if isinstance(entry, TensorStorageMetadata) and name.startswith("state_dict.")
            }
        case Format.DEEPSPEED:
            groups = state.get("param_shapes") or []
            named = {name: shape for group in groups for name, shape in group.items()}
    return {
        name.removeprefix(NETWORK): tuple(shape)
        for name, shape in named.items()
        if isinstance(name, str) and name.startswith(NETWORK)
    }


def _is_dict(value: object) -> bool:
    return isinstance(value, Mapping)
