"""Read ``.metadata``, the index of a sharded checkpoint, without ``pickle``.

torch writes the index of ``torch.distributed.checkpoint`` as a pickle and reads it with ``pickle.load``, which runs
whatever the file asks for. The interpreter in :mod:`.shard_index_pickle` understands the few opcodes, names
(:mod:`.shard_index_names`) and records (:mod:`.shard_index_records`) that an index consists of, and nothing else.
docs/security.md lists them and says why they are enough.
"""

import math
import struct
from pathlib import Path, PurePath

from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from cola_lightning.checkpoints.shard_index_pickle import Interpreter
from cola_lightning.checkpoints.shard_index_records import ForeignError, check_record
from cola_lightning.errors import InputError

LIMIT = 1 << 30
"""Largest size of an index, in bytes; that of a 7B model on 64 ranks has about 20 MB."""


def parse_index(content: bytes) -> Metadata:
    """Make the index of a sharded checkpoint from the bytes of its ``.metadata``.

    Raises:
        ForeignError: If it names or does what no index does.
        ValueError: If it is too large, cut short or malformed.
    """
    if len(content) > LIMIT:
        raise ValueError(f"it has {len(content):,} bytes; an index has {LIMIT:,} at most")
    try:
        metadata = Interpreter(content).run()
    except (IndexError, KeyError, struct.error, TypeError, AttributeError, OverflowError, UnicodeDecodeError) as error:
        raise ValueError(f"cut short or malformed ({type(error).__name__}: {error})") from error
    if not isinstance(metadata, Metadata):
        raise ValueError("it holds no index")
    # Check every record again, because the file could fill a dict after it had been checked. Nothing changes any more.
    check_record(metadata)
    for place, info in (metadata.storage_data or {}).items():
        check_record(place)
        check_record(info)
    for entry in metadata.state_dict_metadata.values():
        check_record(entry)
        for chunk in entry.chunks if isinstance(entry, TensorStorageMetadata) else ():
            check_record(chunk)
    return metadata


def tensor_bytes(metadata: Metadata) -> int:
    """Count the bytes of the tensors that an index describes."""
    tensors = [entry for entry in metadata.state_dict_metadata.values() if isinstance(entry, TensorStorageMetadata)]
    return sum(math.prod(entry.size) * entry.properties.dtype.itemsize for entry in tensors)


def read_metadata(reader: FileSystemReader, file: Path) -> Metadata:
    """Read the index; this replaces ``FileSystemReader.read_metadata``."""
    metadata = read_index(file.parent, file.name)
    metadata.storage_meta = metadata.storage_meta or StorageMeta()
    metadata.storage_meta.load_id = reader.load_id
    return metadata


def read_index(path: Path, name: str = ".metadata") -> Metadata:
    """Read the index of a sharded checkpoint: names, shapes and places of its tensors.

    Args:
        path: Folder of the checkpoint.
        name: Name of the index in it.

    Raises:
        InputError: If it cannot be read, would run code, or claims more data than the folder holds.
    """
    file = path / name
    try:
        metadata = parse_index(file.read_bytes())
    except ForeignError as error:
        raise InputError(f"{file} asks to load {error}, which may run code; the checkpoint is not opened") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{file} is not a readable index of a sharded checkpoint: {error}") from error
    # Compare what the index claims with the files beside it, before anybody allocates the tensors that it describes.
    sizes = {name.name: name.stat().st_size for name in path.iterdir() if name.is_file()}
    for place, info in (metadata.storage_data or {}).items():
        if PurePath(info.relative_path).name != info.relative_path:
            raise InputError(f"{file} places {place.fqn} in {info.relative_path}, outside of the checkpoint")
        if info.relative_path not in sizes:
            raise InputError(f"{path} is not whole: {info.relative_path} with {place.fqn} is missing")
        if info.offset + info.length > sizes[info.relative_path]:
            raise InputError(f"{path} is not whole: {info.relative_path} is cut short before the end of {place.fqn}")
    if (claimed := tensor_bytes(metadata)) > sum(sizes.values()):
        raise InputError(f"{file} claims {claimed:,} bytes of tensors, but the folder holds {sum(sizes.values()):,}")
    return metadata
