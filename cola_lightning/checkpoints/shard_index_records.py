"""Define the records of a sharded checkpoint's index: their classes, their fields, and what each field may hold."""

from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from cola_lightning.private_apis.torch import storage_info

StorageInfo = storage_info()
Test = Callable[[object], bool]
"""Says whether a value is of the kind that a field holds."""


class ForeignError(Exception):
    """An index names something, or does something, that no index of torch's does."""


# -- tests of values ------------------------------------------------------------------------------


def is_size(value: object) -> bool:
    """Say whether a value is a ``torch.Size``."""
    return isinstance(value, torch.Size)


def is_text(value: object) -> bool:
    """Say whether a value is a text, and of no subclass of ``str``."""
    return type(value) is str


def is_count(value: object) -> bool:
    """Say whether a value is a whole number of at least 0; True is none."""
    return type(value) is int and value >= 0


def _or_none(accepts: Test) -> Test:
    return lambda value: value is None or accepts(value)


def _map(key: Test, entry: Test) -> Test:
    return lambda value: isinstance(value, dict) and all(key(name) and entry(each) for name, each in value.items())


def _list(entry: Test) -> Test:
    return lambda value: isinstance(value, list) and all(map(entry, value))


def _instance(*kinds: type) -> Test:
    return lambda value: isinstance(value, kinds)


def _is_path_of_keys(value: object) -> bool:
    return isinstance(value, tuple) and all(is_text(key) or is_count(key) for key in value)


# -- the records ----------------------------------------------------------------------------------

RECORDS: dict[type, dict[str, Test]] = {
    Metadata: {
        "state_dict_metadata": _map(is_text, _instance(TensorStorageMetadata, BytesStorageMetadata)),
        "planner_data": _or_none(_map(is_text, _is_path_of_keys)),
        "storage_data": _or_none(_map(_instance(MetadataIndex), _instance(StorageInfo))),
        "storage_meta": _or_none(_instance(StorageMeta)),
        "version": _or_none(is_text),
    },
    MetadataIndex: {"fqn": is_text, "offset": _or_none(is_size), "index": _or_none(is_count)},
    TensorStorageMetadata: {
        "properties": _instance(TensorProperties),
        "size": is_size,
        "chunks": _list(_instance(ChunkStorageMetadata)),
    },
    BytesStorageMetadata: {},
    ChunkStorageMetadata: {"offsets": is_size, "sizes": is_size},
    StorageMeta: {
        "checkpoint_id": _or_none(_instance(str, PurePosixPath)),
        "save_id": _or_none(is_text),
        "load_id": _or_none(is_text),
        "modules": _list(is_text),
    },
    StorageInfo: {
        "relative_path": is_text,
        "offset": is_count,
        "length": is_count,
        # A transform, such as compression, is only there if a program asked for it. This package does not.
        "transform_descriptors": lambda value: value is None or value == (),
    },
    TensorProperties: {},  # its state is a tuple, see _tensor_properties
}
"""Classes of the records, with a test for each field."""

RECORD_NAMES = {f"{kind.__module__}.{kind.__qualname__}": kind for kind in RECORDS}
"""Classes of the records by ``module.name``."""

_OPTIONAL = {"offset", "index", "transform_descriptors"}
"""Fields that older versions of torch leave out."""


# How a record comes to be, by opcodes: NEWOBJ makes it empty (shard_index_names.make_record), BUILD sets its fields, by
# check_state. A file may leave BUILD out, or change a dict of a record after BUILD has looked at it. Therefore
# parse_index asks check_record about every record again at the end, when the file can change nothing any more.


def check_state(record: object, state: object) -> dict[str, Any]:
    """Check the state that an index sets on a record, before it is set.

    Returns:
        Values by the names of the record's fields.

    Raises:
        ForeignError: If the object is no record, or a field is unknown or holds another kind of value.
    """
    fields = RECORDS.get(type(record))
    if fields is None:  # a class, for example: setting its attributes would replace its methods
        raise ForeignError(f"setting the state of a {type(record).__name__}")
    if isinstance(record, TensorProperties):
        return _tensor_properties(state)
    if isinstance(state, dict) and all(name in fields and fields[name](value) for name, value in state.items()):
        return state
    raise ForeignError(f"setting a {type(record).__name__} to {state!r}"[:200])


def check_record(record: object) -> None:
    """Check that each field of a record is set and holds its kind of value.

    A missing field must not pass, because a class attribute would be used instead of it.

    Raises:
        ForeignError: If a field holds another kind of value.
        ValueError: If a field is missing.
    """
    values = vars(record)
    for field, accepts in RECORDS[type(record)].items():
        if field not in values and field not in _OPTIONAL:
            raise ValueError(f"a {type(record).__name__} has no {field}")
        if not accepts(values.get(field)):
            raise ForeignError(f"a {type(record).__name__} with {field} {values.get(field)!r}"[:200])


def _tensor_properties(state: Any) -> dict[str, Any]:
    """Make the fields of TensorProperties from the tuple that its ``__getstate__`` returns."""
    kinds = {
        "dtype": torch.dtype,
        "layout": torch.layout,
        "requires_grad": bool,
        "memory_format": torch.memory_format,
        "pin_memory": bool,
    }
    # Example of a state: (torch.float32, torch.strided, False, torch.contiguous_format, False)
    fields = dict(zip(kinds, state, strict=True))
    if not all(isinstance(value, kinds[name]) for name, value in fields.items()):
        raise ForeignError(f"TensorProperties of {state!r}"[:200])
    return fields
