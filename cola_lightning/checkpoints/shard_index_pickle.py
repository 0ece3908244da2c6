"""Interpret the part of ``pickle`` that a sharded checkpoint's index is written in.

A pickle is a program for a stack machine: each opcode, of one byte, pushes a value or makes one of the topmost values.
For example ``K 2 K 3 \\x86 .`` pushes 2, pushes 3, replaces both by the tuple (2, 3), and returns it. The opcodes are
those of Python's ``pickletools``.
"""

import struct
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch.distributed.checkpoint.metadata import MetadataIndex

from cola_lightning.checkpoints import shard_index_names as names
from cola_lightning.checkpoints.shard_index_records import ForeignError, check_state

_MARK = object()
"""Value on the stack that marks where the items of a container begin."""


class Interpreter:
    """A stack machine with only the opcodes that an index needs.

    Args:
        content: The pickle.
    """

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.position = 0
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        """Values that the file uses again, by number."""

    def run(self) -> Any:
        """Run the pickle and return the value that it makes.

        Raises:
            ForeignError: If it names or does what no index does.
            ValueError, LookupError, TypeError, …: If it is malformed.
        """
        while (code := self.take(1)) != b".":
            if code not in OPCODES:
                raise ForeignError(f"the pickle opcode {code!r}")
            OPCODES[code](self)
        (result,) = self.stack
        return result

    # -- read the file --

    def take(self, count: int) -> bytes:
        """Read so many bytes."""
        piece = self.content[self.position : self.position + count]
        if len(piece) != count:
            raise ValueError("cut short")
        self.position += count
        return piece

    def number(self, form: str) -> Any:
        """Read a number in a format of ``struct``, little-endian."""
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form)))[0]

    def line(self) -> str:
        """Read a text that ends with a line feed."""
        end = self.content.index(b"\n", self.position)
        text = self.content[self.position : end].decode("utf-8")
        self.position = end + 1
        return text

    def protocol(self) -> None:
        """Read the version of the pickle protocol."""
        if (version := self.number("B")) not in (2, 3, 4, 5):
            raise ValueError(f"pickle protocol {version}")

    def frame(self) -> None:
        """Skip the length of a frame, which only helps to read from a pipe."""
        self.take(8)

    # -- push and pop values --

    def push(self, value: Any) -> None:
        """Push a value."""
        self.stack.append(value)

    def long(self) -> None:
        """Read a whole number of any length and push it."""
        self.push(int.from_bytes(self.take(self.number("B")), "little", signed=True))

    def text(self, form: str) -> None:
        """Read the length of a text, in a format of ``struct``, and the text, and push it."""
        self.push(self.take(self.number(form)).decode("utf-8"))

    def pop(self, count: int) -> list[Any]:
        """Pop so many values, the topmost last."""
        # A mark among them means that the file takes more values than it has pushed since that mark.
        items = self.stack[-count:]
        if len(items) != count or any(item is _MARK for item in items):
            raise ValueError("too few values")
        del self.stack[-count:]
        return items

    def pop_to_mark(self) -> list[Any]:
        """Pop the values above the topmost mark, and the mark."""
        # Example: of the stack [{}, MARK, "a", 1], the items are ["a", 1], and [{}] is left for set_items to fill.
        last = len(self.stack) - 1
        while self.stack[last] is not _MARK:
            last -= 1
            if last < 0:
                raise ValueError("no mark")
        items = self.stack[last + 1 :]
        del self.stack[last:]
        return items

    def memoize(self, key: int) -> None:
        """Keep the topmost value for use by :meth:`recall`."""
        self.memo[key] = self.stack[-1]

    def recall(self, key: int) -> None:
        """Push a value that was kept."""
        self.push(self.memo[key])

    # -- fill containers --

    def extend(self, items: list[Any]) -> None:
        """Append items to the topmost value, a list."""
        if type(self.stack[-1]) is not list:
            raise ForeignError(f"appending to a {type(self.stack[-1]).__name__}")
        self.stack[-1].extend(items)

    def set_items(self, items: list[Any]) -> None:
        """Set items of the topmost value, a dict; keys and values alternate in ``items``."""
        target = self.stack[-1]
        if type(target) not in (dict, OrderedDict):
            raise ForeignError(f"setting an item of a {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # A tuple that holds itself many times over would take for ever to hash, so no tuple is a key.
            if type(key) not in (str, int, MetadataIndex):
                raise ForeignError(f"a {type(key).__name__} as key")
            target[key] = value

    # -- names and records --

    def name(self, module: Any, name: Any) -> None:
        """Push what ``module.name`` stands for."""
        if type(module) is not str or type(name) is not str:
            raise ForeignError("a name that is no text")
        self.push(names.resolve(f"{module}.{name}"))

    def new(self) -> None:
        """Make an empty record from the topmost name."""
        self.push(names.make_record(*self.pop(2)))

    def call(self) -> None:
        """Call the function that the topmost name stands for."""
        self.push(names.call(*self.pop(2)))

    def build(self) -> None:
        """Set the fields of the topmost record."""
        record, state = self.pop(2)
        for name, value in check_state(record, state).items():
            object.__setattr__(record, name, value)  # setattr would fail on MetadataIndex, which is frozen
        self.push(record)


# The comments are the names in ``pickletools``. MEMOIZE takes the next number, which is how many values are kept.
OPCODES: dict[bytes, Callable[[Interpreter], Any]] = {
    b"\x80": Interpreter.protocol,  # PROTO
    b"\x95": Interpreter.frame,  # FRAME
    b"(": lambda r: r.push(_MARK),  # MARK
    # values
    b"N": lambda r: r.push(None),  # NONE
    b"\x88": lambda r: r.push(True),  # NEWTRUE
    b"\x89": lambda r: r.push(False),  # NEWFALSE
    b"J": lambda r: r.push(r.number("i")),  # BININT
    b"K": lambda r: r.push(r.number("B")),  # BININT1
    b"M": lambda r: r.push(r.number("H")),  # BININT2
    b"\x8a": Interpreter.long,  # LONG1
    b"\x8c": lambda r: r.text("B"),  # SHORT_BINUNICODE
    b"X": lambda r: r.text("I"),  # BINUNICODE
    # containers
    b"}": lambda r: r.push({}),  # EMPTY_DICT
    b"]": lambda r: r.push([]),  # EMPTY_LIST
    b")": lambda r: r.push(()),  # EMPTY_TUPLE
    b"\x85": lambda r: r.push(tuple(r.pop(1))),  # TUPLE1
    b"\x86": lambda r: r.push(tuple(r.pop(2))),  # TUPLE2
    b"\x87": lambda r: r.push(tuple(r.pop(3))),  # TUPLE3
    b"t": lambda r: r.push(tuple(r.pop_to_mark())),  # TUPLE
    b"a": lambda r: r.extend(r.pop(1)),  # APPEND
    b"e": lambda r: r.extend(r.pop_to_mark()),  # APPENDS
    b"s": lambda r: r.set_items(r.pop(2)),  # SETITEM
    b"u": lambda r: r.set_items(r.pop_to_mark()),  # SETITEMS
    # memo
    b"\x94": lambda r: r.memoize(len(r.memo)),  # MEMOIZE
    b"q": lambda r: r.memoize(r.number("B")),  # BINPUT
    b"r": lambda r: r.memoize(r.number("I")),  # LONG_BINPUT
    b"h": lambda r: r.recall(r.number("B")),  # BINGET
    b"j": lambda r: r.recall(r.number("I")),  # LONG_BINGET
    # names and records
    b"\x93": lambda r: r.name(*r.pop(2)),  # STACK_GLOBAL
    b"c": lambda r: r.name(r.line(), r.line()),  # GLOBAL
    b"\x81": Interpreter.new,  # NEWOBJ
    b"R": Interpreter.call,  # REDUCE
    b"b": Interpreter.build,  # BUILD
}
"""Methods by opcode; ``.``, which ends a pickle, is in :meth:`Interpreter.run`."""
