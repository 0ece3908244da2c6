"""Read ``.metadata``, the index of a sharded checkpoint, without ``pickle``.

torch writes the index of ``torch.distributed.checkpoint`` as a pickle and reads it with ``pickle.load``, which runs
whatever the file asks for. The interpreter in :mod:`.shard_index_pickle` understands the few opcodes, names
(:mod:`.shard_index_names`) and records (:mod:`.shard_index_records`) that an index consists of, and nothing else.
docs/security.md lists them and says why they are enough.
"""

import math
import struct

from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from cola_lightning.checkpoints.shard_index_pickle import Interpreter
from cola_lightning.checkpoints.shard_index_records import check_record

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
