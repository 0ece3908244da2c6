"""Passes over a source: each document once before any comes twice, whatever the shards' number and sizes.

A source is divided among L logical shards. In each pass the S shards are shuffled anew and laid end to
end, and logical shard i gets the i-th of L equal stretches. A stretch begins and ends within a shard, so at most S + L
shards are opened, where every logical shard would have to open every shard if each shard were divided by L.

    S = 3 shards, L = 2 logical shards, order of the pass: c a b

        logical shard 0 |--- c ---|- a -|            c, and share 0..1 of 2 of a
        logical shard 1                 |- a -|--- b ---|   share 1..2 of 2 of a, and b

The share of a shard is a range of rows where the format can be entered in the middle (Parquet), and every so many rows
where it cannot (compressed JSON Lines, whose number of rows is not known until it is read).

The stretches are equal in shards, not in documents, which nobody counted. So a logical shard may be through with its
stretch while others are not. It then takes documents from the stretches of the others (:class:`SourceReaders`), and
the next pass begins for all of them when no stretch has a document left.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from random import Random
from typing import Annotated, Any, NamedTuple, Protocol

import numpy as np
from annotated_types import Ge, Le
from typing_extensions import TypedDict

from cola_lightning.data.held_out import HeldOut
from cola_lightning.errors import InputError
from cola_lightning.stored_data import Count

ENCODE_BATCH_SIZE = 64  # documents; enough to keep a tokenizer's threads busy
ENCODED_CHARACTERS = 2_000_000  # at most, unless one document alone has more


class Share(NamedTuple):
    """Parts ``first`` to ``last`` - 1 of a shard that is divided into ``parts``."""

    first: int = 0
    last: int = 1
    parts: int = 1

    def has(self, row: int) -> bool:
        """Whether the row belongs to it, where parts are every ``parts``-th row."""
        return self.first <= row % self.parts < self.last

    def bounds(self, rows: int) -> tuple[int, int]:
        """First row, and first row after the last, where parts are ranges of ``rows`` rows."""
        return rows * self.first // self.parts, rows * self.last // self.parts


WHOLE = Share()


class Corpus(Protocol):
    """Documents in shards. A document is text, or ids already; ``encode`` makes int32 ids of either."""

    title: str
    shards: list[str]

    def read(self, shard: int, start: int = 0, share: Share = WHOLE) -> Iterator[tuple[int, Any]]: ...

    def encode(self, documents: list[Any]) -> list[np.ndarray]: ...


class Document(NamedTuple):
    """Ids of a document, int32, and the shard and row that it stands in."""

    ids: np.ndarray
    shard: int
    row: int


class PassEndError(Exception):
    """A logical shard has no document left in this pass, and the others are in another process."""


def divide(shards: Sequence[int], logical_shard: int, num_logical_shards: int) -> list[tuple[int, Share]]:
    """The stretch of one logical shard: shards in the order of the pass, each with the share of it.

    In units of 1/L of a shard, shard k covers units kL to (k + 1)L, and logical shard i gets units iS to (i + 1)S.

        >>> divide([2, 0, 1], 0, 2)
        [(2, Share(first=0, last=2, parts=2)), (0, Share(first=0, last=1, parts=2))]
    """
    begin, end = logical_shard * len(shards), (logical_shard + 1) * len(shards)
    stretch = []
    for place in range(begin // num_logical_shards, -(-end // num_logical_shards)):
        first, last = (
            max(begin - place * num_logical_shards, 0),
            min(end - place * num_logical_shards, num_logical_shards),
        )
        stretch.append((shards[place], Share(first, last, num_logical_shards)))
    return stretch


ReaderState = TypedDict(
    "ReaderState", {"pass": Count, "unit": Count, "row": Count, "taken": Count, "through": Annotated[int, Ge(0), Le(1)]}
)
"""A state of :class:`Reader`."""


class Reader:
    """The documents of one source that belong to one logical shard, pass by pass, shuffled in blocks.

    A block of ``block`` documents is read, put in an order that is a function of the seed and of where it begins, and
    handed out. So where a reader stands is the beginning of its block and how much of it is gone, and to take it up
    again is to read that block again; only what had not been handed out is tokenized.

    Args:
        corpus: The documents.
        logical shard: Number of the logical shard.
        num_logical_shards: Number of logical shards.
        block: Documents that are shuffled together.
        seed: Text that every order depends on.
        state: Where to go on, as :attr:`state` told.

    Attributes:
        state: ``pass``; ``unit``, ``row``: the place in the stretch where the block begins; ``taken``: documents of
            the block that were handed out; ``through``: whether the pass is.
    """

    def __init__(
        self,
        corpus: Corpus,
        logical_shard: int,
        num_logical_shards: int,
        block: int,
        seed: str,
        state: dict[str, int] | None = None,
    ) -> None:
        self.corpus, self.logical_shard, self.num_logical_shards, self.block, self.seed = (
            corpus,
            logical_shard,
            num_logical_shards,
            max(1, block),
            seed,
        )
        self._begin(state or _start(0))

    def begin_pass(self, number: int) -> None:
        self._begin(_start(number))

    def next(self) -> Document | None:
        """The next document, or None if there is none left in this pass.

        Raises:
            InputError: If a shard cannot be read.
        """
        if self.state["through"]:
            return None
        document = next(self._documents, None)
        if document is None:
            self.state = _start(self.state["pass"]) | {"through": 1}
        return document

    def _begin(self, state: dict[str, int]) -> None:
        self.state = dict(state)
        self._documents = self._read_pass()

    def _read_pass(self) -> Iterator[Document]:
        stretch = self._stretch(self.state["pass"])
        unit, row = self.state["unit"], self.state["row"]
        rows = self._rows(stretch, unit, row)
        while block := list(islice(rows, self.block)):
            yield from self._shuffled(block, stretch, unit, row)
            unit, row = self.state["unit"], self.state["row"]

    def _stretch(self, turn: int) -> list[tuple[int, Share]]:
        """The shards of a pass in the order in which they are read, each with the share of it."""
        shuffled = list(range(len(self.corpus.shards)))
        Random(f"{self.seed}/shards/{turn}" if turn else f"{self.seed}/shards").shuffle(shuffled)
        # Laid end to end as cards are dealt, so that whole shards go round where L divides their number.
        order = [
            shard for first in range(self.num_logical_shards) for shard in shuffled[first :: self.num_logical_shards]
        ]
        stretch = divide(order, self.logical_shard, self.num_logical_shards)
        Random(f"{self.seed}/{self.logical_shard}/{turn}").shuffle(stretch)
        return stretch

    def _rows(self, stretch: list[tuple[int, Share]], unit: int, row: int) -> Iterator[tuple[int, int, Any]]:
        """Documents of the pass from a place on: unit of the stretch, row, text or ids."""
        for index in range(unit, len(stretch)):
            shard, share = stretch[index]
            for number, document in self.corpus.read(shard, row if index == unit else 0, share):
                yield index, number, document

    def _shuffled(
        self, block: list[tuple[int, int, Any]], stretch: list[tuple[int, Share]], unit: int, row: int
    ) -> Iterator[Document]:
        turn, taken = self.state["pass"], self.state["taken"]
        order = list(range(len(block)))
        Random(f"{self.seed}/{self.logical_shard}/{turn}/{unit}/{row}").shuffle(order)
        # The next block begins at the row after the last one of this block.
        end = _start(turn) | {"unit": block[-1][0], "row": block[-1][1] + 1}
        while taken < len(order):
            some = _encoded_together([block[index] for index in order[taken : taken + ENCODE_BATCH_SIZE]])
            for (index, number, _), ids in zip(some, self.corpus.encode([entry[2] for entry in some]), strict=True):
                taken += 1
                here = {"pass": turn, "unit": unit, "row": row, "taken": taken, "through": 0}
                self.state = here if taken < len(order) else end
                yield Document(ids, stretch[index][0], number)


def _start(turn: int) -> dict[str, int]:
    return {"pass": turn, "unit": 0, "row": 0, "taken": 0, "through": 0}


def _encoded_together(entries: list[tuple[int, int, Any]]) -> list[tuple[int, int, Any]]:
    """As many of the first entries as have ENCODED_CHARACTERS together, and at least one."""
    total = 0
    for count, (_, _, document) in enumerate(entries):
        total += len(document)
        if total > ENCODED_CHARACTERS:
            return entries[: max(1, count)]
    return entries


class SourceReaders:
    """The readers of one source, by the number of their logical shard.

    Args:
        readers: Of all logical shards, or of some.
        complete: Whether they are all. Only then can documents move from one logical shard to another.
        held_out: Documents that are left out, because they are validated on.

    Attributes:
        left_out: How many were, by logical shard, since the readers were made.
        touched: Logical shards whose reader's state changed; whoever passes the states on empties it.
    """

    def __init__(self, readers: dict[int, Reader], complete: bool, held_out: HeldOut | None = None) -> None:
        self.readers, self.complete, self.held_out = readers, complete, held_out
        self.left_out = dict.fromkeys(readers, 0)
        self.touched: set[int] = set()

    def next(self, logical_shard: int) -> Document:
        """The next document for a logical shard: of its own stretch, or else of the next one that has any.

        Raises:
            PassEndError: If its own stretch is through, and the others are not here.
            InputError: If the source has no document, or cannot be read.
        """
        for _ in range(2):
            for other in self._in_turn(logical_shard):
                reader = self.readers[other]
                if reader.state["through"] and self.complete:
                    continue
                self.touched.add(other)
                while (document := reader.next()) is not None:
                    if self.held_out is None or not self.held_out.has(document.ids):
                        return document
                    self.left_out[logical_shard] += 1
                if not self.complete:
                    raise PassEndError
            # No stretch has a document left: the next pass begins.
            for reader in self.readers.values():
                reader.begin_pass(reader.state["pass"] + 1)
            self.touched.update(self.readers)
        reason = (
            "every one is held out for validation"
            if self.left_out[logical_shard]
            else "every shard or every text is empty"
        )
        raise InputError(f"{self.readers[logical_shard].corpus.title} has no document; {reason}")

    def _in_turn(self, logical_shard: int) -> Iterator[int]:
        yield logical_shard
        for step in range(1, len(self.readers)):
            yield (logical_shard + step) % len(self.readers)
