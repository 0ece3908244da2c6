"""One reader for the checkpoints of every strategy, on one CPU machine.

| written by | it is |
|---|---|
| one device, DDP, FSDP, FSDP2 | one file |
| FSDP and FSDP2, asked to write in shards | a folder of ``torch.distributed.checkpoint`` |
| DeepSpeed | a folder of DeepSpeed's |
"""

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import checkpoint as sharded
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from cola_lightning.checkpoints.trust import deepspeed_data, plain_data_only, read_index, refuse_code
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
        refuse_code(path)  # says so if that is why
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
    prefix = "state_dict."
    entries = read_index(path).state_dict_metadata
    tensors = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in entries.items()
        if key.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }
    refuse_code(path)
    with plain_data_only():
        sharded.load(tensors, checkpoint_id=path, no_dist=True)
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}


def _read_deepspeed(path: Path) -> dict[str, Tensor]:
    refuse_code(path)
    try:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
    except ImportError:
        raise InputError(f"{path} was written by DeepSpeed, which is not installed; pip install deepspeed") from None
    with plain_data_only(), deepspeed_data():
        return get_fp32_state_dict_from_zero_checkpoint(str(path), tag="checkpoint")
