"""No checkpoint runs code: what would be unpickled is looked at first, without unpickling it.

Lightning and torch load a single file safely (``weights_only``). Sharded checkpoints and DeepSpeed's are opened by
their libraries with plain ``pickle``, so that their files have to be known as harmless before.
"""

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from cola_lightning.errors import InputError

# Classes of plain data that DeepSpeed writes besides what torch itself regards as safe.
_OF_DEEPSPEED = {
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
}
# What the index of a sharded checkpoint (torch.distributed.checkpoint) is made of.
_OF_INDEX = {
    "builtins": {"set"},
    "collections": {"OrderedDict"},
    "torch": {"Size", *(str(t).removeprefix("torch.") for t in vars(torch).values() if isinstance(t, torch.dtype))},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath", "WindowsPath"},
}


def refuse_code(path: Path) -> None:
    """Look through every part of a checkpoint (a file, or a folder of some strategy) that a library would unpickle.

    Raises:
        InputError: If a part is more than tensors and plain data; the message names the part and what it asks for.
    """
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.suffix in (".pt", ".ckpt"))
    for file in files:
        with file.open("rb") as stream:
            _refuse_globals(stream, file)
    if (path / ".metadata").is_file():
        _refuse_index(path)


def read_index(path: Path) -> Metadata:
    """The index of a sharded checkpoint: names, shapes and places of its tensors.

    Raises:
        InputError: If it cannot be read, or would run code.
    """
    index = path / ".metadata"
    try:
        with index.open("rb") as stream:
            return _IndexReader(stream).load()
    except _ForeignError as error:
        raise InputError(f"{index} asks to load {error}, which may run code; the checkpoint is not opened") from None
    except Exception as error:  # a pickle that was cut short fails in many ways
        raise InputError(f"{index} is not a readable index of a sharded checkpoint: {error}") from error


def _refuse_globals(stream: Any, name: object) -> None:
    try:
        wanted = set(torch.serialization.get_unsafe_globals_in_checkpoint(stream))
    except Exception as error:
        raise InputError(f"{name} is not a whole checkpoint: {error}") from error
    if foreign := sorted(wanted - _OF_DEEPSPEED):
        raise InputError(f"{name} asks to load {', '.join(foreign)}, which may run code; the checkpoint is not opened")


def _refuse_index(path: Path) -> None:
    index = read_index(path)
    for key, entry in index.state_dict_metadata.items():
        if not isinstance(entry, BytesStorageMetadata):
            continue  # tensors are loaded safely by torch itself
        for place, info in index.storage_data.items():
            if place.fqn == key:
                with (path / info.relative_path).open("rb") as stream:
                    stream.seek(info.offset)
                    _refuse_globals(io.BytesIO(stream.read(info.length)), f"{path / info.relative_path} ({key})")


class _ForeignError(Exception):
    pass


class _IndexReader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _OF_INDEX.get(module, ()):
            return super().find_class(module, name)
        raise _ForeignError(f"{module}.{name}")
