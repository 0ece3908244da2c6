"""Read the checkpoints of every strategy, on one machine without a GPU.

| written by | format |
|---|---|
| one device, DDP, FSDP, FSDP2 | one file |
| FSDP and FSDP2 with sharded checkpoints | a folder of ``torch.distributed.checkpoint`` |
| DeepSpeed | DeepSpeed's folder |
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cola_lightning.checkpoints.safe_unpickle import check_no_code, deepspeed_data, plain_data_only
from cola_lightning.errors import InputError

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata  # slow to import

NETWORK = "network."
"""Prefix of the names of the network's weights in a checkpoint."""

# Keys that DeepSpeed's engine adds to those of Lightning.
_ENGINE = {
    "module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes", "shared_params",
    "frozen_param_fragments", "lr_scheduler", "data_sampler", "random_ltd", "sparse_tensor_module_names",
    "skipped_steps", "global_steps", "global_samples", "dp_world_size", "mp_world_size",
    "checkpoint_parallel_dimensions", "ds_config", "ds_version",
}  # fmt: skip

_MASTERS = {"single_partition_of_fp32_groups", "fp32_flat_groups"}
"""Names under which ZeRO keeps its float32 weights, beside the states of the optimizer."""

_WEIGHTS = "state_dict."
"""Prefix of the names of weights in the index of a sharded checkpoint."""

PART = 2**30
"""Bytes of weights that :func:`weights_in_parts` holds at a time, about."""


class Format(Enum):
    """How a checkpoint is stored."""

    FILE = "one file"
    SHARDS = "shards"
    DEEPSPEED = "DeepSpeed's folder"


@dataclass(frozen=True)
class Checkpoint:
    """The content of a training run's checkpoint.

    Args:
        weights: Weights of the network by their names in ``network.state_dict()``, on the CPU. They have the dtype of
            training; with DeepSpeed they are its float32 masters.
        hyper_parameters: Arguments of the LightningModule.
        state: The rest without optimizer states: counters, states of callbacks, position in the data.
    """

    weights: dict[str, Tensor]
    hyper_parameters: dict[str, Any]
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """Number of optimizer steps made."""
        return self.state["global_step"]


def format_of(path: Path) -> Format:
    """Return the format of a checkpoint.

    Raises:
        InputError: If it does not exist, or has none of these formats.
    """
    if path.is_file():
        return Format.FILE
    if (path / ".metadata").is_file() and (path / "meta.pt").is_file():
        return Format.SHARDS
    if (path / "checkpoint").is_dir() and (path / "latest").is_file():
        return Format.DEEPSPEED
    if not path.exists():
        raise InputError(f"{path} does not exist; name a checkpoint, as RUN_DIR/checkpoints/last.ckpt")
    raise InputError(f"{path} is not a checkpoint; name one, as RUN_DIR/checkpoints/last.ckpt")


def read(path: str | Path) -> Checkpoint:
    """Read a checkpoint of any strategy, without optimizer states. No code in it is run.

    Raises:
        InputError: If it is not whole, has no known format, or would run code.
    """
    path = Path(path)
    state = read_state(path)
    match format_of(path):
        case Format.FILE:
            weights = state.pop("state_dict")
        case Format.SHARDS:
            weights = {name: tensor for part in _shards_in_parts(path) for name, tensor in part.items()}
        case Format.DEEPSPEED:
            weights = _read_deepspeed(path)
            # DeepSpeed converts everything to float32, even buffers of whole numbers. Take those as they were stored.
            weights |= {name: state["module"][name] for name in state["buffer_names"] if name in state["module"]}
            state = {name: value for name, value in state.items() if name not in _ENGINE}
    weights = {
        name.removeprefix(NETWORK): tensor.detach()
        for name, tensor in weights.items()
        if str(name).startswith(NETWORK) and isinstance(tensor, Tensor)
    }
    if not weights:
        raise InputError(f"{path} holds no weights of a network of this package")
    state.pop("optimizer_states", None)
    return Checkpoint(weights, state.pop("hyper_parameters", {}), state)


def weights_in_parts(path: Path) -> Iterator[dict[str, Tensor]]:
    """Read the weights of a checkpoint in parts, so that only about ``PART`` bytes of them are in memory.

    Yields:
        Tensors by name. Those of DeepSpeed are as its ranks hold them: whole tensors, or flat pieces of several. (The
        parameters of ZeRO-3 are only in the float32 masters.)

    Raises:
        InputError: If it cannot be read, or would run code.
    """
    match format_of(path):
        case Format.FILE:  # its tensors are mapped, not read
            yield {name: each for name, each in read_state(path)["state_dict"].items() if isinstance(each, Tensor)}
        case Format.SHARDS:
            yield from _shards_in_parts(path)
        case Format.DEEPSPEED:
            check_no_code(path)
            for file in sorted((path / "checkpoint").glob("*.pt")):
                with plain_data_only(), deepspeed_data(path):
                    state = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
                # A file with states of the optimizer has the float32 masters among them; one with model states has the
                # weights under "module".
                parts = state if isinstance(state, dict) else {}
                optimizer, module = parts.get("optimizer_state_dict"), parts.get("module")
                weights: dict[str, Any] = {}
                if isinstance(optimizer, dict):
                    weights |= {key: optimizer[key] for key in _MASTERS & optimizer.keys()}
                if isinstance(module, dict):
                    weights |= module
                yield {f"{file.name}: {name}": each for name, each in _tensors(weights)}


def _tensors(content: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in nested dicts and lists, each with the keys that lead to it."""
    if isinstance(content, Tensor):
        yield name, content
    elif isinstance(content, dict | list | tuple):
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            yield from _tensors(value, f"{name}.{key}".lstrip("."))


def read_state(path: Path) -> dict[str, Any]:
    """Read a checkpoint without sharded weights and optimizer states. Tensors of a single file are mapped, not read.

    Raises:
        InputError: If it cannot be read, or would run code.
    """
    # Of DeepSpeed's files, the first by name is rank 0's. If there is none, loading its folder fails below, with a
    # message.
    files = {
        Format.FILE: lambda: path,
        Format.SHARDS: lambda: path / "meta.pt",
        Format.DEEPSPEED: lambda: min((path / "checkpoint").glob("*_model_states.pt"), default=path / "checkpoint"),
    }
    file = files[format_of(path)]()
    try:
        state = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:
        check_no_code(path)  # raises an error that names the code, if that was the reason
        raise InputError(f"{file} is not a whole checkpoint: {error}") from error
    _check_ours(state, file, has_weights=format_of(path) is Format.FILE)
    return state


def tokens_of(state: dict[str, Any]) -> int | None:
    """Return the tokens that a run was trained on, which the callback Throughput counts; None if it did not.

    Args:
        state: Content of the checkpoint.
    """
    callbacks = state.get("callbacks")
    for name, kept in callbacks.items() if isinstance(callbacks, dict) else ():
        if str(name).startswith("Throughput") and isinstance(kept, dict) and type(kept.get("tokens")) is int:
            return kept["tokens"]
    return None


def _check_ours(state: Any, file: Path, has_weights: bool) -> None:
    """Refuse a file that torch can load but that no run of Lightning wrote, such as the weights of another program."""
    expected = {"global_step": int} | ({"state_dict": dict} if has_weights else {})
    ours = isinstance(state, dict) and all(isinstance(state.get(key), kind) for key, kind in expected.items())
    if not ours or not isinstance(state.get("hyper_parameters", {}), dict):
        found = f"a {type(state).__name__}"
        if isinstance(state, dict):
            found = f"{len(state)} entries ({', '.join(map(str, list(state)[:3]))}{', …' if len(state) > 3 else ''})"
        raise InputError(
            f"{file} holds no checkpoint of a run, but {found}; weights that another program wrote are read "
            f"from a folder with config.json and model.safetensors"
        )


def shard_entries(path: Path) -> "dict[str, TensorStorageMetadata]":
    """Read shape and dtype of each of the weights in a sharded checkpoint, by name.

    Raises:
        InputError: If it cannot be read, or would run code.
    """
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    from cola_lightning.checkpoints.shard_index import read_index

    return {
        name.removeprefix(_WEIGHTS): entry
        for name, entry in read_index(path).state_dict_metadata.items()
        if name.startswith(_WEIGHTS) and isinstance(entry, TensorStorageMetadata)
    }


def _shards_in_parts(path: Path) -> Iterator[dict[str, Tensor]]:
    from torch.distributed import checkpoint as sharded

    weights = [*shard_entries(path).items()]
    check_no_code(path)
    while weights:
        # As many tensors as fit into PART; at least one, however large. They are allocated here, and torch fills them.
        tensors: dict[str, Tensor] = {}
        while weights and (not tensors or sum(tensor.nbytes for tensor in tensors.values()) < PART):
            name, entry = weights.pop(0)
            tensors[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
        with plain_data_only():
            sharded.load(
                {_WEIGHTS + name: tensor for name, tensor in tensors.items()}, checkpoint_id=path, no_dist=True
            )
        yield tensors


def _read_deepspeed(path: Path) -> dict[str, Tensor]:
    check_no_code(path)
    with plain_data_only(), deepspeed_data(path):
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        return get_fp32_state_dict_from_zero_checkpoint(str(path), tag="checkpoint")
