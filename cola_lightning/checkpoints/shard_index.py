"""Read ``.metadata``, the index of a sharded checkpoint, without ``pickle``.

torch writes the index of ``torch.distributed.checkpoint`` as a pickle and reads it with ``pickle.load``, which runs
whatever the file asks for. This interpreter understands the few opcodes and names that such an index consists of, and
nothing else. docs/security.md lists them and says why they are enough.
"""

import math
import struct
from collections import OrderedDict
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

from cola_lightning.private_apis import StorageInfo

LIMIT = 1 << 30
"""Bytes of an index at most; that of a 7B model on 64 ranks has about 20 MB."""


class ForeignError(Exception):
    """An index names something, or does something, that no index of torch's does."""


class _Name(str):
    """``module.name`` as the file spells it: text until ``_call`` or ``_new`` looks it up; never imported."""


def _is_size(value: object) -> bool:
    return isinstance(value, torch.Size)


def _is_text(value: object) -> bool:
    return type(value) is str


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _or_none(accepts: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: value is None or accepts(value)


def _map(key: Callable[[object], bool], entry: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, dict) and all(key(name) and entry(each) for name, each in value.items())


def _list(entry: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list) and all(map(entry, value))


def _a(*kinds: type) -> Callable[[object], bool]:
    return lambda value: isinstance(value, kinds)


def _is_path_of_keys(value: object) -> bool:
    return isinstance(value, tuple) and all(_is_text(key) or _is_count(key) for key in value)


# The records of an index: their classes, their fields, and what each field may hold.
_RECORDS: dict[type, dict[str, Callable[[object], bool]]] = {
    Metadata: {
        "state_dict_metadata": _map(_is_text, _a(TensorStorageMetadata, BytesStorageMetadata)),
        "planner_data": _or_none(_map(_is_text, _is_path_of_keys)),
        "storage_data": _or_none(_map(_a(MetadataIndex), _a(StorageInfo))),
        "storage_meta": _or_none(_a(StorageMeta)),
        "version": _or_none(_is_text),
    },
    MetadataIndex: {"fqn": _is_text, "offset": _or_none(_is_size), "index": _or_none(_is_count)},
    TensorStorageMetadata: {
        "properties": _a(TensorProperties),
        "size": _is_size,
        "chunks": _list(_a(ChunkStorageMetadata)),
    },
    BytesStorageMetadata: {},
    ChunkStorageMetadata: {"offsets": _is_size, "sizes": _is_size},
    StorageMeta: {
        "checkpoint_id": _or_none(_a(str, PurePosixPath)),
        "save_id": _or_none(_is_text),
        "load_id": _or_none(_is_text),
        "modules": _list(_is_text),
    },
    StorageInfo: {
        "relative_path": _is_text,
        "offset": _is_count,
        "length": _is_count,
        # Transforms, as compression, are off unless a program asks for them; this one does not.
        "transform_descriptors": lambda value: value is None or value == (),
    },
    TensorProperties: {},  # has a state of its own form, see _properties
}
_BY_NAME = {f"{kind.__module__}.{kind.__qualname__}": kind for kind in _RECORDS}
_DTYPES = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
_LAYOUTS = {str(value): value for value in vars(torch).values() if isinstance(value, torch.layout)}
_MEMORY_FORMATS = {  # by their number in torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING
    0: torch.contiguous_format,
    1: torch.channels_last,
    2: torch.preserve_format,
}
_ENCODING = "torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING"
_OPTIONAL = {"offset", "index", "transform_descriptors"}
"""Fields that older versions of torch leave out."""
_MARK = object()


def parse_index(content: bytes) -> Metadata:
    """Make the index of a sharded checkpoint from the bytes of its ``.metadata``.

    Raises:
        ForeignError: If it names or does what no index does.
        ValueError: If it is cut short, or makes no sense.
    """
    if len(content) > LIMIT:
        raise ValueError(f"it has {len(content):,} bytes; an index has {LIMIT:,} at most")
    try:
        metadata = _Reader(content).run()
    except (IndexError, KeyError, struct.error, TypeError, AttributeError, OverflowError, UnicodeDecodeError) as error:
        raise ValueError(f"cut short or malformed ({type(error).__name__}: {error})") from error
    if not isinstance(metadata, Metadata):
        raise ValueError("it holds no index")
    # Again, now that nothing changes any more: a dict could be filled after it had been looked at.
    _check(metadata)
    for place, info in (metadata.storage_data or {}).items():
        _check(place)
        _check(info)
    for entry in metadata.state_dict_metadata.values():
        _check(entry)
        for chunk in entry.chunks if isinstance(entry, TensorStorageMetadata) else ():
            _check(chunk)
    return metadata


def tensor_bytes(metadata: Metadata) -> int:
    """The bytes that the tensors of an index take."""
    tensors = [entry for entry in metadata.state_dict_metadata.values() if isinstance(entry, TensorStorageMetadata)]
    return sum(math.prod(entry.size) * entry.properties.dtype.itemsize for entry in tensors)


def _check(record: Any) -> None:
    """Every field must hold its kind, and be there: a class attribute would stand in for one that is missing."""
    values = vars(record)
    for field, accepts in _RECORDS[type(record)].items():
        if field not in values and field not in _OPTIONAL:
            raise ValueError(f"a {type(record).__name__} has no {field}")
        if not accepts(values.get(field)):
            raise ForeignError(f"a {type(record).__name__} whose {field} is {values.get(field)!r}"[:200])


def _properties(state: Any) -> dict[str, Any]:
    """The fields of TensorProperties from the tuple that its ``__getstate__`` makes."""
    dtype, layout, requires_grad, memory_format, pin_memory = state
    fields = {
        "dtype": dtype,
        "layout": layout,
        "requires_grad": requires_grad,
        "memory_format": memory_format,
        "pin_memory": pin_memory,
    }
    kinds = (torch.dtype, torch.layout, bool, torch.memory_format, bool)
    if not all(isinstance(value, kind) for value, kind in zip(fields.values(), kinds, strict=True)):
        raise ForeignError(f"TensorProperties of {state!r}"[:200])
    return fields


class _Reader:
    """A stack machine as ``pickle`` describes it, with those opcodes alone that an index needs."""

    def __init__(self, content: bytes) -> None:
        self.content, self.at = content, 0
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        while (code := self.take(1)) != b".":
            if code not in _OPCODES:
                raise ForeignError(f"the pickle opcode {code!r}")
            _OPCODES[code](self)
        (result,) = self.stack
        return result

    # -- reading --

    def take(self, count: int) -> bytes:
        piece = self.content[self.at : self.at + count]
        if len(piece) != count:
            raise ValueError("cut short")
        self.at += count
        return piece

    def number(self, form: str) -> Any:
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form)))[0]

    def line(self) -> str:
        end = self.content.index(b"\n", self.at)
        text = self.content[self.at : end].decode("utf-8")
        self.at = end + 1
        return text

    def protocol(self) -> None:
        if (version := self.number("B")) not in (2, 3, 4, 5):
            raise ValueError(f"pickle protocol {version}")

    # -- values --

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def long(self) -> None:
        self.push(int.from_bytes(self.take(self.number("B")), "little", signed=True))

    def text(self, form: str) -> None:
        self.push(self.take(self.number(form)).decode("utf-8"))

    def since_mark(self) -> list[Any]:
        last = len(self.stack) - 1
        while self.stack[last] is not _MARK:
            last -= 1
            if last < 0:
                raise ValueError("no mark")
        items = self.stack[last + 1 :]
        del self.stack[last:]
        return items

    def pop(self, count: int) -> list[Any]:
        items = self.stack[-count:]
        if len(items) != count or any(item is _MARK for item in items):
            raise ValueError("too few values")
        del self.stack[-count:]
        return items

    def extend(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise ForeignError(f"appending to a {type(self.stack[-1]).__name__}")
        self.stack[-1].extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) not in (dict, OrderedDict):
            raise ForeignError(f"setting an item of a {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # A tuple as key could take for ever to hash, where it holds itself many times over.
            if type(key) not in (str, int, MetadataIndex):
                raise ForeignError(f"a {type(key).__name__} as key")
            target[key] = value

    # -- memo --

    def memoize(self, key: int) -> None:
        self.memo[key] = self.stack[-1]

    # -- names and records --

    def name(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise ForeignError("a name that is no text")
        self.push(_resolve(f"{module}.{name}"))

    def new(self) -> None:
        name, arguments = self.pop(2)
        if not isinstance(name, _Name) or name not in _BY_NAME or arguments != ():
            raise ForeignError(f"making a {name}"[:200])
        self.push(object.__new__(_BY_NAME[name]))

    def call(self) -> None:
        name, arguments = self.pop(2)
        if not isinstance(name, _Name) or type(arguments) is not tuple:
            raise ForeignError(f"calling a {type(name).__name__}")
        self.push(_call(name, arguments))

    def build(self) -> None:
        """Set the fields of a record: by name, only those that it has, and only to what they may hold."""
        record, state = self.pop(2)
        fields = _RECORDS.get(type(record))
        if fields is None:  # a class, say, whose attributes this would set
            raise ForeignError(f"setting the state of a {type(record).__name__}")
        if isinstance(record, TensorProperties):
            checked = _properties(state)
        elif isinstance(state, dict) and all(name in fields and fields[name](value) for name, value in state.items()):
            checked = state
        else:
            raise ForeignError(f"setting a {type(record).__name__} to {state!r}"[:200])
        for name, value in checked.items():
            object.__setattr__(record, name, value)  # MetadataIndex is frozen
        self.push(record)


def _resolve(name: str) -> Any:
    if name in _DTYPES:
        return _DTYPES[name]
    if name in _BY_NAME or name in _CALLS:
        return _Name(name)
    raise ForeignError(name)


def _size(arguments: tuple) -> torch.Size:
    (sizes,) = arguments
    if not isinstance(sizes, tuple | list) or not all(map(_is_count, sizes)):
        raise ForeignError(f"torch.Size of {sizes!r}"[:200])
    return torch.Size(sizes)


def _path(arguments: tuple) -> PurePosixPath:
    if not all(map(_is_text, arguments)):
        raise ForeignError("a path that is no text")
    return PurePosixPath(*arguments)


def _set(arguments: tuple) -> set:
    (items,) = arguments
    if not isinstance(items, list) or not all(map(_is_text, items)):
        raise ForeignError("a set of other things than texts")
    return set(items)


def _ordered(arguments: tuple) -> OrderedDict:
    if arguments:
        raise ForeignError("an OrderedDict with arguments")
    return OrderedDict()


_CALLS: dict[str, Callable[[tuple], Any]] = {
    "torch.Size": _size,
    "torch.serialization._get_layout": lambda arguments: _LAYOUTS[arguments[0]],
    _ENCODING: lambda arguments: _MEMORY_FORMATS[arguments[0]],
    "collections.OrderedDict": _ordered,
    "builtins.set": _set,
    # Python 3.13 has moved its paths; what wrote the checkpoint where is of no use here, but part of the index.
    **{
        f"{module}.{name}": _path
        for module in ("pathlib", "pathlib._local")
        for name in ("Path", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")
    },
}


def _call(name: _Name, arguments: tuple) -> Any:
    if name not in _CALLS:
        raise ForeignError(f"calling {name}")
    return _CALLS[name](arguments)


_OPCODES: dict[bytes, Callable[[_Reader], None]] = {
    b"\x80": _Reader.protocol,
    b"\x95": lambda r: r.take(8) and None,  # FRAME: a length, of use to readers of pipes
    b"(": lambda r: r.push(_MARK),
    # values
    b"N": lambda r: r.push(None),
    b"\x88": lambda r: r.push(True),
    b"\x89": lambda r: r.push(False),
    b"J": lambda r: r.push(r.number("i")),
    b"K": lambda r: r.push(r.number("B")),
    b"M": lambda r: r.push(r.number("H")),
    b"\x8a": _Reader.long,
    b"\x8c": lambda r: r.text("B"),
    b"X": lambda r: r.text("I"),
    # containers
    b"}": lambda r: r.push({}),
    b"]": lambda r: r.push([]),
    b")": lambda r: r.push(()),
    b"\x85": lambda r: r.push(tuple(r.pop(1))),
    b"\x86": lambda r: r.push(tuple(r.pop(2))),
    b"\x87": lambda r: r.push(tuple(r.pop(3))),
    b"t": lambda r: r.push(tuple(r.since_mark())),
    b"a": lambda r: r.extend(r.pop(1)),
    b"e": lambda r: r.extend(r.since_mark()),
    b"s": lambda r: r.set_items(r.pop(2)),
    b"u": lambda r: r.set_items(r.since_mark()),
    # memo
    b"\x94": lambda r: r.memoize(len(r.memo)),
    b"q": lambda r: r.memoize(r.number("B")),
    b"r": lambda r: r.memoize(r.number("I")),
    b"h": lambda r: r.push(r.memo[r.number("B")]),
    b"j": lambda r: r.push(r.memo[r.number("I")]),
    # names and records
    b"\x93": lambda r: r.name(*r.pop(2)),
    b"c": lambda r: r.name(r.line(), r.line()),
    b"\x81": _Reader.new,
    b"R": _Reader.call,
    b"b": _Reader.build,
}
