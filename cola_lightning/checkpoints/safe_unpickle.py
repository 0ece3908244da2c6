"""Load only tensors and plain data from checkpoints of every strategy, so that nothing in them runs code.

There are two parts. Inside :func:`plain_data_only`, every loader that a strategy may use can unpickle nothing else. And
:func:`check_no_code` reads a checkpoint beforehand, to report a problem in one line before any work starts. Only the
first is needed for safety, because it acts on the bytes that are used.
"""

import io
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, BadZipFile, ZipFile

import torch

from cola_lightning.errors import InputError
from cola_lightning.private_apis.lightning import replace_fsdp_loader
from cola_lightning.private_apis.torch import replace_index_reader

# Classes of plain data in DeepSpeed's checkpoints that torch itself does not regard as safe.
_OF_DEEPSPEED = {
    "deepspeed.runtime.fp16.loss_scaler": ("DynamicLossScaler", "LossScaler"),
    "deepspeed.runtime.zero.config": ("ZeroStageEnum",),
    "deepspeed.utils.tensor_fragment": ("fragment_address",),
}
_DEEPSPEED_NAMES = {f"{module}.{name}" for module, names in _OF_DEEPSPEED.items() for name in names}
_FORCE, _FORCE_NOT = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
_SUFFIXES = (".pt", ".ckpt")
"""Endings of the files in a folder that a library opens with ``torch.load``."""


# -- while loading ----------------------------------------------------------------------------------------------------


@contextmanager
def plain_data_only() -> Iterator[None]:
    """Restrict every loader of checkpoints in this process to tensors and plain data, inside this context.

    - ``torch.load`` obeys ``TORCH_FORCE_WEIGHTS_ONLY_LOAD``, even if a library passes ``weights_only=False``. DeepSpeed
      does so, and also ``torch.distributed.checkpoint`` for data other than tensors.
    - torch unpickles the index of a sharded checkpoint. Here :func:`.shard_index.parse_index` reads it.
    - Lightning's FSDP reads one file with its own unpickler. Here it uses ``torch.load``.
    """
    from cola_lightning.checkpoints.shard_index import read_metadata  # imports torch.distributed.checkpoint: 0.9 s

    with ExitStack() as stack:
        for name, value in ((_FORCE, "1"), (_FORCE_NOT, None)):
            stack.callback(_set_variable, name, os.environ.get(name))
            _set_variable(name, value)
        stack.enter_context(replace_index_reader(read_metadata))
        stack.enter_context(replace_fsdp_loader(_load_mapped))
        yield


def _set_variable(name: str, value: str | None) -> None:
    """Set an environment variable; None deletes it."""
    os.environ.pop(name, None)
    if value is not None:
        os.environ[name] = value


def deepspeed_data(path: Path) -> AbstractContextManager[Any]:
    """Allow ``torch.load`` to make the classes of plain data in DeepSpeed's checkpoints, inside this context.

    Args:
        path: The checkpoint, for the message.

    Raises:
        InputError: If DeepSpeed is not installed.
    """
    try:
        classes = [getattr(import_module(module), name) for module, names in _OF_DEEPSPEED.items() for name in names]
    except ImportError:
        raise InputError(f"{path} was written by DeepSpeed, which is not installed; pip install deepspeed") from None
    return torch.serialization.safe_globals(classes)


def _load_mapped(path: str | Path) -> Any:
    return torch.load(path, map_location="cpu", mmap=True, weights_only=True)


# -- beforehand -------------------------------------------------------------------------------------------------------


def check_no_code(path: Path) -> None:
    """Check every part of a checkpoint that a library would open.

    Args:
        path: A file, or the folder of any strategy.

    Raises:
        InputError: If a part holds more than tensors and plain data, is a link that leaves the folder, or is packed.
            The message names the part and the problem.
    """
    if path.is_file():
        _check_globals(path)
        return
    for file in files_within(path):
        if file.suffix in _SUFFIXES:
            _check_globals(file)
    if (path / ".metadata").is_file():
        _check_index(path)


def files_within(folder: Path) -> list[Path]:
    """List all files below a folder in order, including links to files in it.

    Raises:
        InputError: If a link leaves the folder, or leads to a folder.
    """
    top, found = folder.resolve(), []
    for place, folders, files in os.walk(folder, followlinks=False):
        for name in folders + files:
            path = Path(place, name)
            if path.is_symlink():
                target = path.resolve()
                if not target.is_relative_to(top):
                    raise InputError(
                        f"{path} is a link to {target}, outside of the checkpoint, which is not followed; copy the "
                        "folder and the targets of its links (cp -rL)"
                    )
                if target.is_dir():
                    raise InputError(f"{path} is a link to a folder, which no strategy writes; copy it there (cp -rL)")
            if name in files:
                found.append(path)
    return sorted(found)


def _check_globals(source: Path | io.BytesIO, name: object = None) -> None:
    """Check the classes and functions that a pickle of torch names; ``name`` is for the message."""
    name = name or source
    try:
        _check_archive(source, name)
        if not isinstance(source, Path):
            source.seek(0)  # the archive was read from it
        wanted = set(torch.serialization.get_unsafe_globals_in_checkpoint(source))
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{name} is not a whole checkpoint: {' '.join(str(error).split())[:200]}") from error
    if foreign := sorted(wanted - _DEEPSPEED_NAMES):
        raise InputError(f"{name} asks to load {', '.join(foreign)}, which may run code; the checkpoint is not opened")


def _check_archive(source: Path | io.BytesIO, name: object) -> None:
    """Refuse a zip archive that torch would not write.

    torch writes each part once and uncompressed. A compressed part could grow without bound. If two parts had one name,
    a program might read the first and another the second.
    """
    try:
        with ZipFile(source) as archive:
            parts = archive.infolist()
    except BadZipFile:
        return  # the old format of torch, or none; the caller reports it
    if packed := [part.filename for part in parts if part.compress_type != ZIP_STORED]:
        raise InputError(f"{name} is packed ({packed[0]}), and torch packs no checkpoint; it is not opened")
    if len({part.filename for part in parts}) < len(parts):
        raise InputError(f"{name} holds two parts of one name, which torch never writes; it is not opened")
    size = source.stat().st_size if isinstance(source, Path) else len(source.getbuffer())
    if (claimed := sum(part.file_size for part in parts)) > size:
        raise InputError(f"{name} has {size:,} bytes and claims {claimed:,}; it is not opened")


def _check_index(path: Path) -> None:
    """Check the data in the shards that is not tensors. Each piece is a pickle of its own."""
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    from cola_lightning.checkpoints.shard_index import read_index

    index = read_index(path)
    for place, info in (index.storage_data or {}).items():
        if isinstance(index.state_dict_metadata.get(place.fqn), BytesStorageMetadata):
            with (path / info.relative_path).open("rb") as stream:
                stream.seek(info.offset)
                content = io.BytesIO(stream.read(info.length))
            _check_globals(content, f"{path / info.relative_path} ({place.fqn})")
