"""Logical shards: the parts that a run's data is divided into, each of which makes micro-batches and has a state.

A run has a fixed number of logical shards, whatever the number of ranks and workers. In each pass, a logical shard has
a stretch of the documents of every source (see :mod:`cola_lightning.data.passes`). It mixes the sources and makes
micro-batches. Ranks and workers are assigned logical shards, so another number of them reassigns logical shards and
changes nothing within one.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, NotRequired

import numpy as np
from annotated_types import Ge, Lt
from typing_extensions import TypedDict

from cola_lightning.data.held_out import HeldOut
from cola_lightning.data.packing import Batch, Piece, RowArrays, RowShape
from cola_lightning.data.passes import Document, Reader, ReaderState, SourceReaders
from cola_lightning.errors import InputError
from cola_lightning.stored_data import Count

IDS_IN_STATE = 2048
"""A state holds the ids of the rest of a document that a row cut, if it is this short, so that resuming needs no more
reading. For a longer rest it holds the place, because copying megabytes for each batch would take time that grows with
the square of the document's length."""


class RestState(TypedDict):
    """The rest of a document that a row cut, in a :class:`LogicalShardState`."""

    source: Count
    shard: Count
    row: Count
    begin: Count
    ids: NotRequired[list[Annotated[int, Ge(0), Lt(2**31)]]]


class LogicalShardState(TypedDict):
    """State of a :class:`LogicalShard`. Each list has one entry per source."""

    readers: list[ReaderState]
    documents: list[Count]
    tokens: list[Count]
    held_out: list[Count]
    rest: RestState | None


class LogicalShard:
    """Makes micro-batches of one logical shard's documents, and gives each source its share of the tokens.

    The next document comes from the source whose tokens, divided by its weight, are fewest. If each logical shard began
    with all counts at 0, each would take its first document of a rare source at once, and the first batches of the run
    would hold far too many. So each count has a head start that differs by logical shard: logical shard i of L begins
    with the count of source s at ((i + s * spread) mod L + 1/2) / L of a row.

    Example: L = 16, rows of T = 256 tokens, two sources of weights 1 - 1e-6 and 1e-6; spread is 16 // 2 = 8. Logical
    shard 0 begins with source 1 at (8 + 1/2) / 16 * 256 = 136 tokens, which divided by 1e-6 is 136 million. Its first
    document of source 1 comes once source 0 has given 136 million tokens. Logical shard 8 begins with 8 tokens, so its
    first document of source 1 comes after 8 million tokens of source 0; logical shard 9 after 24 million, and so on.
    Over all logical shards that is one row of source 1 in 256 million tokens, as due.

    Args:
        index: Number of this logical shard (i).
        num_logical_shards: Number of logical shards (L).
        sources: Documents of each source.
        weights: Share of the tokens of each source.
        shape: How documents become rows.
        state: Where to resume, as returned by :meth:`state`.
    """

    def __init__(
        self,
        index: int,
        num_logical_shards: int,
        sources: list[SourceReaders],
        weights: list[float],
        shape: RowShape,
        state: dict[str, Any] | None = None,
    ) -> None:
        self.index, self.sources, self.weights, self.shape = index, sources, weights, shape
        state = state or {"documents": [0] * len(sources), "tokens": [0] * len(sources), "rest": None}
        self.documents, self.tokens = list(state["documents"]), list(state["tokens"])
        self._held_out = list(state.get("held_out", [0] * len(sources)))  # before this object was made
        # The head starts of one source over all logical shards are 1/2, 3/2 … (2L - 1)/2 of L in some order. ``spread``
        # shifts that order by source, so that a logical shard is not early for all rare sources at once.
        spread = max(1, num_logical_shards // len(sources))
        self._head_start = [  # tokens
            ((index + source * spread) % num_logical_shards + 0.5) / num_logical_shards * shape.length
            for source in range(len(sources))
        ]
        self._rest: Document | None = None  # document that earlier rows hold the beginning of
        self._begin = self._rest_source = 0  # first of its ids that no row holds yet, and its source
        if rest := state["rest"]:
            self._restore_rest(rest)

    def state(self) -> dict[str, Any]:
        """Return where the logical shard is, in plain numbers: the readers' places; by source, the documents and tokens
        used and the documents left out because they are validated on; and the rest of a document that a row cut, as its
        ids or as its place."""
        rest = None
        if self._rest is not None:
            rest = {"source": self._rest_source, "shard": self._rest.shard, "row": self._rest.row, "begin": self._begin}
            if len(self._rest.ids) - self._begin <= IDS_IN_STATE:
                rest["ids"] = self._rest.ids[self._begin :].tolist()
        return {
            "readers": [dict(source.readers[self.index].state) for source in self.sources],
            "documents": list(self.documents),
            "tokens": list(self.tokens),
            "held_out": [
                before + source.left_out[self.index]
                for before, source in zip(self._held_out, self.sources, strict=True)
            ],
            "rest": rest,
        }

    def batch(self, batch_size: int) -> Batch:
        """Make the next ``input_ids`` and ``labels``, each (B, T) int64, and with a document mask ``document_ids``.

        Raises:
            PassEndError: If the next document belongs to a logical shard that another process has.
            InputError: If a source cannot be read.
        """
        rows = RowArrays(batch_size, self.shape)
        for row in range(batch_size):
            if self.shape.packed:
                rows.pack(row, self._next_piece)
            else:
                source = self._next_source()
                self.tokens[source] += rows.pad(row, self.sources[source].next(self.index).ids)
                self.documents[source] += 1
        return rows.tensors()

    def _next_piece(self, most: int) -> Piece:
        """Take at most that many ids: the rest of a document that a row cut, or the beginning of the next document."""
        if self._rest is None:
            self._rest_source = self._next_source()
            self._rest, self._begin = self.sources[self._rest_source].next(self.index), 0
        # Example: a document of 10 ids, of which the row before held 4. Of a row with 8 free places it gets ids 4 to 9,
        # and the next call begins a new document in the 2 places that are left.
        piece = Piece(self._rest.ids[self._begin : self._begin + most], self._begin == 0)
        self._begin += len(piece.ids)
        self.tokens[self._rest_source] += len(piece.ids)
        if self._begin == len(self._rest.ids):
            self.documents[self._rest_source] += 1
            self._rest = None
        return piece

    def _next_source(self) -> int:
        """Return the source that is furthest behind its share; the first of several."""
        if len(self.weights) == 1:
            return 0
        # Tokens divided by weight are how far each source has come on a common scale. Example: of weights 3/4 and 1/4,
        # 300 and 100 tokens are 400 and 400: both are where they should be, and the first of them is next.
        progress = [(self.tokens[i] + self._head_start[i]) / weight for i, weight in enumerate(self.weights)]
        return progress.index(min(progress))

    def _restore_rest(self, rest: dict[str, Any]) -> None:
        """Resume within a document, with its ids from ``begin`` on, or by reading it where the state lacks them."""
        self._rest_source, shard, row = rest["source"], rest["shard"], rest["row"]
        if "ids" in rest:
            # Positions count from the beginning of the document, which is not needed any more: fill it with zeros.
            left = np.array(rest["ids"], dtype=np.int32)
            ids = np.concatenate((np.zeros(rest["begin"], dtype=np.int32), left))
        else:
            corpus = self.sources[self._rest_source].readers[self.index].corpus
            found = next(iter(corpus.read(shard, row)), None) if shard < len(corpus.shards) else None
            if found is None:
                raise InputError(
                    f"the checkpoint places a logical shard in row {row} of shard {shard} of {corpus.title}, which "
                    "does not exist; the checkpoint was altered, use another one"
                )
            [ids] = corpus.encode([found[1]])
        self._rest, self._begin = Document(ids, shard, row), rest["begin"]


class LogicalShards:
    """The logical shards of one process: all of a run, which can then exchange documents, or some.

    Args:
        logical_shards: By number.
        sources: Their readers, by source.
    """

    def __init__(self, logical_shards: dict[int, LogicalShard], sources: list[SourceReaders]) -> None:
        self.logical_shards, self.sources = logical_shards, sources

    def batch(self, logical_shard: int, batch_size: int) -> Batch:
        """Make the next micro-batch of a logical shard; see :meth:`LogicalShard.batch`."""
        batch = self.logical_shards[logical_shard].batch(batch_size)
        # A row may be made of the rest of a document alone, without a call of a reader. The state changed all the same.
        self.sources[0].touched.add(logical_shard)
        return batch

    def changed(self) -> dict[str, dict[str, Any]]:
        """Return the states of the logical shards that changed since the last call, by their number."""
        touched = set().union(*(source.touched for source in self.sources))
        for source in self.sources:
            source.touched.clear()
        return {str(logical_shard): self.logical_shards[logical_shard].state() for logical_shard in sorted(touched)}


@dataclass
class MakeLogicalShards:
    """Makes any logical shards of a run from their numbers and states. It is sent to the workers.

    Args:
        corpora: One per source.
        weights: Share of the tokens of each source.
        num_logical_shards: Number of logical shards (L).
        block: Documents of a logical shard that are shuffled together.
        seed: Text that every order depends on.
        shape: How documents become rows.
        held_out: Documents that are left out of training, because they are validated on.
    """

    corpora: list[Any]
    weights: list[float]
    num_logical_shards: int
    block: int
    seed: str
    shape: RowShape
    held_out: HeldOut | None = None

    def __call__(self, indices: Iterable[int], states: dict[str, dict[str, Any]]) -> LogicalShards:
        """Make the logical shards of these numbers, each from its state or, where it has none, from the beginning.

        Raises:
            InputError: If a state does not fit the sources.
        """
        indices = list(indices)
        self._check(states)
        # By source, and in each by logical shard, because a logical shard may take documents from another one's reader.
        sources = []
        for number, corpus in enumerate(self.corpora):
            readers = {
                index: Reader(
                    corpus,
                    index,
                    self.num_logical_shards,
                    self.block,
                    f"{self.seed}/{number}",
                    states[str(index)]["readers"][number] if str(index) in states else None,
                )
                for index in indices
            }
            sources.append(SourceReaders(readers, len(readers) == self.num_logical_shards, self.held_out))
        logical_shards = {
            index: LogicalShard(
                index, self.num_logical_shards, sources, self.weights, self.shape, states.get(str(index))
            )
            for index in indices
        }
        return LogicalShards(logical_shards, sources)

    def _check(self, states: dict[str, dict[str, Any]]) -> None:
        for index, state in states.items():
            entries = {len(state[key]) for key in ("readers", "documents", "tokens", "held_out") if key in state}
            if entries != {len(self.corpora)} or ((rest := state["rest"]) and rest["source"] >= len(self.corpora)):
                raise InputError(
                    f"the checkpoint's state of logical shard {index} is not one of {len(self.corpora)} sources; the "
                    "checkpoint was altered, use another one"
                )
