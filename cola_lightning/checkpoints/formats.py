"""One reader for the checkpoints of every strategy, on one CPU machine.

| written by | it is |
|---|---|
| one device, DDP, FSDP, FSDP2 | one file |
| FSDP and FSDP2, asked to write in shards | a folder of ``torch.distributed.checkpoint`` |
| DeepSpeed | a folder of DeepSpeed's |
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import checkpoint as sharded
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from cola_lightning.checkpoints.safe_unpickle import check_no_code, deepspeed_data, plain_data_only, read_index
from cola_lightning.errors import InputError

NETWORK = "network."
"""Prefix, in a checkpoint, of the names of the network's weights."""


# What DeepSpeed's engine adds to what Lightning gives it.
_ENGINE = {
    "module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes", "shared_params",
    "frozen_param_fragments", "lr_scheduler", "data_sampler", "random_ltd", "sparse_tensor_module_names",
    "skipped_steps", "global_steps", "global_samples", "dp_world_size", "mp_world_size",
    "checkpoint_parallel_dimensions", "ds_config", "ds_version",
}  # fmt: skip


_MASTERS = {"single_partition_of_fp32_groups", "fp32_flat_groups"}
"""Under these names ZeRO keeps its float32 weights, beside the states of the optimizer."""
PART = 2**30


class Format(Enum):
    FILE = "one file"
    SHARDS = "shards"
    DEEPSPEED = "DeepSpeed's folder"


@dataclass(frozen=True)
class Checkpoint:
    """What a training run left behind.

    Args:
        weights: The network's, by their names in ``network.state_dict()``, on the CPU. DeepSpeed keeps float32 masters,
            which these then are; else they have the dtype they were trained in.
        hyper_parameters: The arguments of the LightningModule.
        state: Everything else but optimizer states: counters, callbacks, the data's position.
    """

    weights: dict[str, Tensor]
    hyper_parameters: dict[str, Any]
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps that were made."""
        return self.state["global_step"]


def format_of(path: Path) -> Format:
    """How a checkpoint was written.

    Raises:
        InputError: If there is none, or of no kind that is known.
    """
    if path.is_file():
        return Format.FILE
    if (path / ".metadata").is_file() and (path / "meta.pt").is_file():
        return Format.SHARDS
    if (path / "checkpoint").is_dir() and (path / "latest").is_file():
        return Format.DEEPSPEED
    if not path.exists():
        raise InputError(f"{path} does not exist; name a checkpoint, as RUN_DIR/checkpoints/last.ckpt")
    raise InputError(f"{path} is no checkpoint; name one, as RUN_DIR/checkpoints/last.ckpt")


def read(path: str | Path) -> Checkpoint:
    """Weights and facts of a checkpoint, whatever strategy wrote it; nothing in it is run.

    Raises:
        InputError: If it is not whole, is of no known kind, or would run code.
    """
    path = Path(path)
    state = read_state(path)
    match format_of(path):
        case Format.FILE:
            weights = state.pop("state_dict")
        case Format.SHARDS:
            weights = _read_shards(path)
        case Format.DEEPSPEED:
            weights = _read_deepspeed(path)
            # It makes float32 of everything, buffers of whole numbers included.
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
    """The weights of a checkpoint a few at a time, so that no more than about ``PART`` bytes of them are in memory.

    Those of DeepSpeed are what its ranks hold: whole tensors, or flat pieces of many (ZeRO-3's parameters are in the
    float32 masters alone).

    Raises:
        InputError: If it cannot be read, or would run code.
    """
    match format_of(path):
        case Format.FILE:  # mapped
            yield {name: each for name, each in read_state(path)["state_dict"].items() if isinstance(each, Tensor)}
        case Format.SHARDS:
            yield from _shards_in_parts(path)
        case Format.DEEPSPEED:
            check_no_code(path)
            for file in sorted((path / "checkpoint").glob("*.pt")):
                with plain_data_only(), _deepspeed(path):
                    state = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
                optimizer = state.get("optimizer_state_dict") if isinstance(state, dict) else None
                held = {key: optimizer[key] for key in _MASTERS & set(optimizer or {})}
                if isinstance(state, dict) and isinstance(state.get("module"), dict):
                    held |= state["module"]
                yield {f"{file.name}: {name}": each for name, each in _tensors(held)}


def _tensors(content: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Tensors in nested dicts and lists, each with the keys that lead to it."""
    if isinstance(content, Tensor):
        yield name, content
    elif isinstance(content, dict | list | tuple):
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            yield from _tensors(value, f"{name}.{key}".lstrip("."))


def read_state(path: Path) -> dict[str, Any]:
    """Everything but sharded weights and optimizer states; tensors of a single file are mapped, not read.

    Raises:
        InputError: If it cannot be read, or would run code.
    """
    files = {
        Format.FILE: lambda: path,
        Format.SHARDS: lambda: path / "meta.pt",
        Format.DEEPSPEED: lambda: min((path / "checkpoint").glob("*_model_states.pt"), default=path / "checkpoint"),
    }
    file = files[format_of(path)]()
    try:
        state = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:
        check_no_code(path)  # says so if that is why
        raise InputError(f"{file} is not a whole checkpoint: {error}") from error
    _check_ours(state, file, has_weights=format_of(path) is Format.FILE)
    return state


def _check_ours(state: Any, file: Path, has_weights: bool) -> None:
    """Refuse what torch can load and no run of Lightning wrote, as the bare weights of another program."""
    expected = {"global_step": int} | ({"state_dict": dict} if has_weights else {})
    ours = isinstance(state, dict) and all(isinstance(state.get(key), kind) for key, kind in expected.items())
    if not ours or not isinstance(state.get("hyper_parameters", {}), dict):
        raise InputError(
            f"{file} holds no checkpoint of a run, but {_describe(state)}; weights that another program wrote are read "
            f"from a folder with config.json and model.safetensors"
        )


def _describe(state: Any) -> str:
    if not isinstance(state, dict):
        return f"a {type(state).__name__}"
    return f"{len(state)} entries ({', '.join(map(str, list(state)[:3]))}{', …' if len(state) > 3 else ''})"


def _read_shards(path: Path) -> dict[str, Tensor]:
    return {name: tensor for part in _shards_in_parts(path) for name, tensor in part.items()}


def _shards_in_parts(path: Path) -> Iterator[dict[str, Tensor]]:
    prefix = "state_dict."
    entries = read_index(path).state_dict_metadata
    weights = [
        (key, entry)
        for key, entry in entries.items()
        if key.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    ]
    check_no_code(path)
    while weights:
        tensors: dict[str, Tensor] = {}
        while weights and (not tensors or sum(tensor.nbytes for tensor in tensors.values()) < PART):
            key, entry = weights.pop(0)
            tensors[key] = torch.empty(entry.size, dtype=entry.properties.dtype)
        with plain_data_only():
            sharded.load(tensors, checkpoint_id=path, no_dist=True)
        yield {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}


def _read_deepspeed(path: Path) -> dict[str, Tensor]:
    check_no_code(path)
    with plain_data_only(), _deepspeed(path):
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        return get_fp32_state_dict_from_zero_checkpoint(str(path), tag="checkpoint")


@contextmanager
def _deepspeed(path: Path) -> Iterator[None]:
    """Let its plain data be read, or say that it is not installed."""
    with ExitStack() as stack:
        try:
            stack.enter_context(deepspeed_data())
        except ImportError:
            raise InputError(
                f"{path} was written by DeepSpeed, which is not installed; pip install deepspeed"
            ) from None
        yield
