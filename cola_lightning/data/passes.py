"""Passes over a source: each document once before any comes twice, for any number and sizes of shards.

A source is divided among L logical shards. In each pass, its S shards are shuffled and laid end to end, and logical
shard i gets the i-th of L equal stretches. A stretch begins and ends within a shard, so at most S + L - 1 parts of
shards are opened in a pass. If each shard were divided among all L, every logical shard would open every shard.

    S = 3 shards, L = 2 logical shards, order of the pass: c a b

        logical shard 0 |--- c ---|- a -|            c, and parts 0..1 of 2 of a
        logical shard 1                 |- a -|--- b ---|   parts 1..2 of 2 of a, and b

A part of a shard is a range of rows in Parquet and a range of bytes in plain JSON Lines, because these can be read from
the middle. It is every n-th row of compressed JSON Lines, because these have to be unpacked from the beginning, and
their number of rows is not known before.

The stretches are equal in shards, not in documents, because nobody counted those. So one logical shard may have no
documents left while others have some. It then takes documents from the stretches of the others
(:class:`SourceReaders`), and the next pass begins for all of them when no stretch has a document left.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from random import Random
from typing import Annotated, Any, NamedTuple, Protocol

import numpy as np
from annotated_types import Ge, Le
from typing_extensions import TypedDict

from cola_lightning.data.encoding import encode_in_batches
from cola_lightning.data.held_out import HeldOut
from cola_lightning.errors import InputError
from cola_lightning.stored_data import Count


class Share(NamedTuple):
    """Parts ``first`` to ``last`` - 1 of a shard that is divided into ``parts``.

    Example: parts 1 and 2 of 4, of a shard of 10 rows. If a part is every 4th row, they are rows 1, 5 and 9, and 2 and
    6. If a part is a range, the four ranges begin at 0, 10 * 1 // 4 = 2, 10 * 2 // 4 = 5 and 10 * 3 // 4 = 7.

        >>> share = Share(1, 3, 4)
        >>> [row for row in range(10) if share.has(row)]
        [1, 2, 5, 6, 9]
        >>> share.bounds(10)
        (2, 7)
    """

    first: int = 0
    last: int = 1
    parts: int = 1

    def has(self, row: int) -> bool:
        """Whether a row belongs to it, if a part is every ``parts``-th row."""
        return self.first <= row % self.parts < self.last

    def bounds(self, size: int) -> tuple[int, int]:
        """Return its first row or byte and the one after its last, if parts are ranges of ``size`` rows or bytes."""
        return size * self.first // self.parts, size * self.last // self.parts


WHOLE = Share()


class Corpus(Protocol):
    """Documents in shards. A document is text or ids; ``encode`` makes int32 ids of either."""

    title: str
    shards: list[str]

    def read(self, shard: int, start: int = 0, share: Share = WHOLE) -> Iterator[tuple[int, Any]]: ...

    def encode(self, documents: list[Any]) -> list[np.ndarray]: ...


class Document(NamedTuple):
    """Ids of a document, int32, and its shard and row."""

    ids: np.ndarray
    shard: int
    row: int


class PassEndError(Exception):
    """A logical shard has no document left in this pass, and another process has the other logical shards."""


def divide(shards: Sequence[int], logical_shard: int, num_logical_shards: int) -> list[tuple[int, Share]]:
    """Return the stretch of a logical shard: its shards in the order of the pass, each with the share of it.

    Count in units of 1/L of a shard. The shard at place k of the order covers units kL to (k + 1)L. Logical shard i
    gets units iS to (i + 1)S.

    Example: S = 3 shards in the order 2, 0, 1, and L = 2 logical shards. Shard 2 covers units 0 to 2, shard 0 units 2
    to 4, shard 1 units 4 to 6. Logical shard 0 gets units 0 to 3: both parts of shard 2, and the first of shard 0.

        >>> divide([2, 0, 1], 0, 2)
        [(2, Share(first=0, last=2, parts=2)), (0, Share(first=0, last=1, parts=2))]
    """
    begin, end = logical_shard * len(shards), (logical_shard + 1) * len(shards)
    stretch = []
    for place in range(begin // num_logical_shards, -(-end // num_logical_shards)):
        here = place * num_logical_shards  # the first unit of this shard
        first, last = max(begin - here, 0), min(end - here, num_logical_shards)
        stretch.append((shards[place], Share(first, last, num_logical_shards)))
    return stretch


ReaderState = TypedDict(
    "ReaderState", {"pass": Count, "unit": Count, "row": Count, "taken": Count, "through": Annotated[int, Ge(0), Le(1)]}
)
"""State of a :class:`Reader`."""


class Reader:
    """The documents of one source that belong to one logical shard, pass by pass, shuffled in blocks.

    A block of ``block`` documents is read and shuffled, in an order that depends on the seed and on where the block
    begins. So the state of a reader is the beginning of its block and the number of its documents that were taken.
    Resuming reads that block again, and tokenizes only documents that were not taken.

    Example: blocks of 3 documents, and a stretch of two shards: 7 with rows 0 to 3 at place 0, and 4 with rows 0 and 1
    at place 1. In the order of reading, "7:0" being row 0 of shard 7, the blocks are 7:0, 7:1, 7:2 and 7:3, 4:0, 4:1.
    Say the first is shuffled to 7:2, 7:0, 7:1, and the second to 4:0, 7:3, 4:1. The state after each document:

        document taken      -    7:2  7:0  7:1  4:0  7:3  4:1  none is left
        unit (place)        0     0    0    0    0    0    1    0
        row                 0     0    0    3    3    3    2    0
        taken               0     1    2    0    1    2    0    0
        through             0     0    0    0    0    0    0    1

    After 7:1 the first block is used up, so the state is where the second begins: the row after 7:2, the last that was
    read. A reader that resumes after 7:0 reads 7:0, 7:1 and 7:2, shuffles them as before, and tokenizes only 7:1.

    Args:
        corpus: The documents.
        logical_shard: Number of the logical shard.
        num_logical_shards: Number of logical shards.
        block: Documents that are shuffled together.
        seed: Text that every order depends on.
        state: Where to resume; a former value of :attr:`state`.

    Attributes:
        state: ``pass``: number of the pass; ``unit``, ``row``: the place in the stretch where the block begins;
            ``taken``: documents of the block that were taken; ``through``: 1 if the pass has no document left.
    """

    state: dict[str, int]
    _documents: Iterator[Document]

    def __init__(
        self,
        corpus: Corpus,
        logical_shard: int,
        num_logical_shards: int,
        block: int,
        seed: str,
        state: dict[str, int] | None = None,
    ) -> None:
        self.corpus, self.logical_shard, self.num_logical_shards = corpus, logical_shard, num_logical_shards
        self.block, self.seed = max(1, block), seed
        self._begin(state or _start(0))

    def begin_pass(self, number: int) -> None:
        """Begin a pass, given by its number."""
        self._begin(_start(number))

    def next(self) -> Document | None:
        """Return the next document, or None if this pass has none left.

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
        """Return the shards of a pass in the order in which they are read, each with the share of it."""
        shuffled = list(range(len(self.corpus.shards)))
        Random(f"{self.seed}/shards/{turn}" if turn else f"{self.seed}/shards").shuffle(shuffled)
        # Every L-th shard of the shuffled ones, from the first, the second … on: if L divides S, each stretch is whole
        # shards, shuffled[i::L] for logical shard i. Example: of 3, 1, 0, 2 and L = 2 the order is 3, 0, 1, 2. So
        # logical shard 0 gets shards 3 and 0, and logical shard 1 gets shards 1 and 2.
        order = [
            shard for first in range(self.num_logical_shards) for shard in shuffled[first :: self.num_logical_shards]
        ]
        stretch = divide(order, self.logical_shard, self.num_logical_shards)
        Random(f"{self.seed}/{self.logical_shard}/{turn}").shuffle(stretch)
        return stretch

    def _rows(self, stretch: list[tuple[int, Share]], unit: int, row: int) -> Iterator[tuple[tuple[int, int], Any]]:
        """Yield the documents of the pass from a place on: (place in the stretch, row), and text or ids."""
        for index in range(unit, len(stretch)):
            shard, share = stretch[index]
            for number, document in self.corpus.read(shard, row if index == unit else 0, share):
                yield (index, number), document

    def _shuffled(
        self, block: list[tuple[tuple[int, int], Any]], stretch: list[tuple[int, Share]], unit: int, row: int
    ) -> Iterator[Document]:
        turn, taken = self.state["pass"], self.state["taken"]
        order = list(range(len(block)))
        # The seed names the place where the block begins, so that a resumed reader, which reads the block again, gets
        # the same order, and every other block another one.
        Random(f"{self.seed}/{self.logical_shard}/{turn}/{unit}/{row}").shuffle(order)
        # The next block begins at the row after the last one of this block.
        last_unit, last_row = block[-1][0]
        end = _start(turn) | {"unit": last_unit, "row": last_row + 1}
        # Documents that were taken before are not encoded again.
        for (index, number), ids in encode_in_batches((block[at] for at in order[taken:]), self.corpus.encode):
            taken += 1
            # Set before the yield: the state is that after the document which is handed over now.
            here = {"pass": turn, "unit": unit, "row": row, "taken": taken, "through": 0}
            self.state = here if taken < len(order) else end
            yield Document(ids, stretch[index][0], number)


def _start(turn: int) -> dict[str, int]:
    return {"pass": turn, "unit": 0, "row": 0, "taken": 0, "through": 0}


class SourceReaders:
    """The readers of one source, by the number of their logical shard.

    Args:
        readers: Readers of all logical shards, or of some.
        complete: Whether these are all. Only then can one logical shard take documents from another.
        held_out: Documents that are left out, because they are validated on.

    Attributes:
        left_out: Number of documents left out since the readers were made, by logical shard.
        touched: Logical shards whose reader's state changed since :meth:`LogicalShards.changed` was called.
    """

    def __init__(self, readers: dict[int, Reader], complete: bool, held_out: HeldOut | None = None) -> None:
        self.readers, self.complete, self.held_out = readers, complete, held_out
        self.left_out = dict.fromkeys(readers, 0)
        self.touched: set[int] = set()

    def next(self, logical_shard: int) -> Document:
        """Return the next document for a logical shard, from its own stretch or else from the next one that has any.

        Raises:
            PassEndError: If its own stretch has none left, and another process has the other stretches.
            InputError: If the source has no document, or cannot be read.
        """
        # Example: of 4 logical shards, number 2 takes from its own stretch, then from those of 3, 0 and 1.
        count = len(self.readers)
        turns = [(logical_shard + step) % count for step in range(count)] if self.complete else [logical_shard]
        for _ in range(2):  # what is left of this pass, then a whole pass; a source without a document ends here
            for other in turns:
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
        held_out = self.left_out[logical_shard]
        reason = "every one is held out for validation" if held_out else "every shard or every text is empty"
        raise InputError(f"{self.readers[logical_shard].corpus.title} has no document; {reason}")
