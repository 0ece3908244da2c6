"""Look up the names in a sharded checkpoint's index in tables; nothing is imported and nothing of the file's is called.

torch's index calls a few functions, such as ``torch.Size``. Each is replaced by a function that checks its arguments.
"""

from collections import OrderedDict
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any

import torch

from cola_lightning.checkpoints.shard_index_records import RECORD_NAMES, ForeignError, is_count, is_text


class Name(str):
    """``module.name`` of a record class or a function, as the file spells it. It stays a text and is never imported."""


# Tables of what a name may stand for, made from torch's own objects: str(torch.float32) is "torch.float32", as in the
# file. Names are only compared with the keys, so a name that is in no table cannot be reached by any spelling.
_DTYPES = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
_LAYOUTS = {str(value): value for value in vars(torch).values() if isinstance(value, torch.layout)}
_MEMORY_FORMATS = {  # by their number in torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING
    0: torch.contiguous_format,
    1: torch.channels_last,
    2: torch.preserve_format,
}


def resolve(name: str) -> Any:
    """Return what ``module.name`` stands for: a dtype; or a :class:`Name`, for a record class or a function.

    Raises:
        ForeignError: If it is none of these.
    """
    if name in _DTYPES:
        return _DTYPES[name]
    if name in RECORD_NAMES or name in _FUNCTIONS:
        return Name(name)
    raise ForeignError(name)


def make_record(name: object, arguments: object) -> Any:
    """Make an empty record of a class by its name.

    Raises:
        ForeignError: If it is no name of a record class, or there are arguments.
    """
    if not isinstance(name, Name) or name not in RECORD_NAMES or arguments != ():
        raise ForeignError(f"making a {name}"[:200])
    return object.__new__(RECORD_NAMES[name])


def call(name: object, arguments: object) -> Any:
    """Call the function of this module that stands for a name.

    Raises:
        ForeignError: If it is no name of a function, or the arguments are not of the kind that an index has.
    """
    if not isinstance(name, Name) or type(arguments) is not tuple:
        raise ForeignError(f"calling a {type(name).__name__}")
    if name not in _FUNCTIONS:
        raise ForeignError(f"calling {name}")
    return _FUNCTIONS[name](arguments)


def _size(arguments: tuple) -> torch.Size:
    (sizes,) = arguments
    if not isinstance(sizes, tuple | list) or not all(map(is_count, sizes)):
        raise ForeignError(f"torch.Size of {sizes!r}"[:200])
    return torch.Size(sizes)


def _path(arguments: tuple) -> PurePosixPath:
    if not all(map(is_text, arguments)):
        raise ForeignError("a path that is no text")
    return PurePosixPath(*arguments)


def _set(arguments: tuple) -> set:
    (items,) = arguments
    if not isinstance(items, list) or not all(map(is_text, items)):
        raise ForeignError("a set of other things than texts")
    return set(items)


def _ordered_dict(arguments: tuple) -> OrderedDict:
    if arguments:
        raise ForeignError("an OrderedDict with arguments")
    return OrderedDict()


_FUNCTIONS: dict[str, Callable[[tuple], Any]] = {
    "torch.Size": _size,
    "torch.serialization._get_layout": lambda arguments: _LAYOUTS[arguments[0]],
    "torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING": lambda arguments: _MEMORY_FORMATS[arguments[0]],
    "collections.OrderedDict": _ordered_dict,
    "builtins.set": _set,
    # The folder into which the checkpoint was written. It is not used, but it is part of the index. Paths have moved to
    # another module in Python 3.13.
    **{
        f"{module}.{name}": _path
        for module in ("pathlib", "pathlib._local")
        for name in ("Path", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")
    },
}
"""Functions by the names that they stand for; each takes the tuple of arguments."""
