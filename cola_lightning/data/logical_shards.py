"""Logical shards: the logical shards that a run is made of, each of which makes micro-batches and says where it stands.

A run has a fixed number of logical shards, whatever the number of ranks and workers. Each logical shard has a stretch
of every source's documents in each pass (see :mod:`cola_lightning.data.passes`), mixes the sources, and makes
micro-batches. Ranks and workers are given logical shards, so a change of their number moves logical shards about and
touches no document.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, NotRequired

import numpy as np
import torch
from annotated_types import Ge, Lt
from torch import Tensor
from typing_extensions import TypedDict

from cola_lightning.data.held_out import HeldOut
from cola_lightning.data.passes import ENCODE_BATCH_SIZE, Corpus, Document, Reader, ReaderState, SourceReaders
from cola_lightning.data.rows import IGNORE
from cola_lightning.errors import InputError
from cola_lightning.stored_data import Count

__all__ = ["ENCODE_BATCH_SIZE", "Batch", "Corpus", "LogicalShard", "LogicalShardState", "MakeLogicalShards", "RowShape"]

Batch = dict[str, Tensor]

# The rest of a document that a row cut rides along in the state if it is this short, so that going on needs no more
# reading. Of a longer one the state tells the place, because copying megabytes for each batch would take time that
# grows with the square of the document's length.
IDS_IN_STATE = 2048


class RestState(TypedDict):
    """The rest of a document that has begun, in a :class:`LogicalShardState`."""

    source: Count
    shard: Count
    row: Count
    begin: Count
    ids: NotRequired[list[Annotated[int, Ge(0), Lt(2**31)]]]


class LogicalShardState(TypedDict):
    """A state of :class:`LogicalShard`; each list has an entry for each source."""

    readers: list[ReaderState]
    documents: list[Count]
    tokens: list[Count]
    held_out: list[Count]
    rest: RestState | None


@dataclass
class RowShape:
    """How documents become rows.

    Args:
        length: Tokens of a row (T).
        packed: Documents end to end, cut every T ids, what is left over going on in the logical shard's next row; else
            one document a row, cut with its end-of-document id kept last.
        pad_id: Id that fills rows up.
        apart: In packed rows, number the documents, so that attention can keep to its own.
    """

    length: int
    packed: bool
    pad_id: int
    mask_documents: bool = False


class LogicalShard:
    """Micro-batches out of a logical shard's documents of all sources, mixed so that each has its share of the tokens.

    The next document is one of the source that is furthest behind its share. Logical shards do not begin alike: each
    takes its first document of a source a little later than the logical shard before, so that over all logical shards
    every source has its share from the first batches on. With sixteen logical shards and a weight of 1e-6, logical
    shard 0 takes the first after about 31,000 documents, logical shard 1 after 94,000, and so on.

    Args:
        index: Number of this logical shard.
        num_logical_shards: Number of logical shards.
        sources: Documents of each source.
        weights: Share of the tokens for each.
        shape: How documents become rows.
        state: Where to go on, as :meth:`state` told.
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
        self._held_out = list(state.get("held_out", [0] * len(sources)))  # before this logical shard was made
        # In tokens; what a source is given ahead of the others, as if it had handed out that many already.
        spread = max(1, num_logical_shards // len(sources))
        self._ahead = [
            ((index + source * spread) % num_logical_shards + 0.5) / num_logical_shards * shape.length
            for source in range(len(sources))
        ]
        self._rest: Document | None = None  # begun in an earlier row
        self._begin = self._rest_of = 0  # where it goes on, and its source
        if rest := state["rest"]:
            self._take_up(rest)

    def state(self) -> dict[str, Any]:
        """Plain numbers that say where the logical shard stands: the readers' places; of each source the documents and
        tokens handed out, and the documents left out because they are validated on; and what is left over of a document
        that has begun, as its ids or as its place."""
        rest = None
        if self._rest is not None:
            rest = {"source": self._rest_of, "shard": self._rest.shard, "row": self._rest.row, "begin": self._begin}
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
        """The next ``input_ids`` and ``labels``, each (B, T) int64, and with ``shape.apart`` ``document_ids`` too.

        Labels equal the ids but for -100 where nothing is to be learnt: padding, and with ``shape.apart`` the first
        token of a document, which nothing before it may foretell.

        Raises:
            PassEndError: If the logical shard needs a document from a logical shard that is in another process.
            InputError: If a source cannot be read.
        """
        size = (batch_size, self.shape.length)
        ids, labels = np.full(size, self.shape.pad_id, dtype=np.int64), np.full(size, IGNORE, dtype=np.int64)
        numbers = np.zeros(size, dtype=np.int64)
        for row in range(batch_size):
            if self.shape.packed:
                self._pack(ids[row], labels[row], numbers[row])
            else:
                self._pad(ids[row], labels[row])
        batch = {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}
        return batch | {"document_ids": torch.from_numpy(numbers)} if self.shape.mask_documents else batch

    def _pad(self, ids: np.ndarray, labels: np.ndarray) -> None:
        source = self._next_source()
        document = self.sources[source].next(self.index).ids
        kept = min(len(document), len(ids))
        ids[:kept] = document[:kept]
        ids[kept - 1] = document[-1]
        labels[:kept] = ids[:kept]
        self.documents[source] += 1
        self.tokens[source] += kept

    def _pack(self, ids: np.ndarray, labels: np.ndarray, numbers: np.ndarray) -> None:
        filled = number = 0
        while filled < len(ids):
            if self._rest is None:
                self._rest_of = self._next_source()
                self._rest, self._begin = self.sources[self._rest_of].next(self.index), 0
            piece = self._rest.ids[self._begin : self._begin + len(ids) - filled]
            end = filled + len(piece)
            ids[filled:end] = labels[filled:end] = piece
            numbers[filled:end] = number
            if self._begin == 0 and self.shape.mask_documents:
                labels[filled] = IGNORE
            self._begin += len(piece)
            self.tokens[self._rest_of] += len(piece)
            if self._begin == len(self._rest.ids):
                self.documents[self._rest_of] += 1
                self._rest = None
            filled, number = end, number + 1

    def _next_source(self) -> int:
        """The one that is furthest behind its share; the first of several."""
        if len(self.weights) == 1:
            return 0
        behind = ((self.tokens[i] + self._ahead[i]) / weight for i, weight in enumerate(self.weights))
        return min(enumerate(behind), key=lambda entry: entry[1])[0]

    def _take_up(self, rest: dict[str, Any]) -> None:
        """Go on within a document: with its ids from ``begin`` on, or, where the state lacks them, by reading it."""
        self._rest_of, shard, row = rest["source"], rest["shard"], rest["row"]
        if "ids" in rest:
            left = np.array(rest["ids"], dtype=np.int32)
            ids = np.concatenate((np.zeros(rest["begin"], dtype=np.int32), left))
        else:
            corpus = self.sources[self._rest_of].readers[self.index].corpus
            found = next(iter(corpus.read(shard, row)), None) if shard < len(corpus.shards) else None
            if found is None:
                raise InputError(
                    f"the checkpoint places a logical shard in row {row} of shard {shard} of {corpus.title}, which "
                    "there is not; it was altered, take another checkpoint"
                )
            [ids] = corpus.encode([found[1]])
        self._rest, self._begin = Document(ids, shard, row), rest["begin"]


class LogicalShards:
    """The logical shards that one process has: all of a run, which can then exchange documents, or some.

    Args:
        num_logical_shards: By number.
        sources: Their readers, by source.
    """

    def __init__(self, logical_shards: dict[int, LogicalShard], sources: list[SourceReaders]) -> None:
        self.logical_shards, self.sources = logical_shards, sources

    def batch(self, logical_shard: int, batch_size: int) -> Batch:
        """The next micro-batch of one of the logical shards; see :meth:`LogicalShard.batch`."""
        batch = self.logical_shards[logical_shard].batch(batch_size)
        self.sources[0].touched.add(logical_shard)
        return batch

    def changed(self) -> dict[str, dict[str, Any]]:
        """Where those logical shards stand whose state changed since this was asked last, by their number."""
        touched = set().union(*(source.touched for source in self.sources))
        for source in self.sources:
            source.touched.clear()
        return {str(logical_shard): self.logical_shards[logical_shard].state() for logical_shard in sorted(touched)}


@dataclass
class MakeLogicalShards:
    """Makes any logical shards of a run, from their numbers and the states to go on from; goes to the workers.

    Args:
        corpora: One a source.
        weights: Share of the tokens for each.
        num_logical_shards: Number of logical shards.
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
        indices = list(indices)
        for logical_shard, state in states.items():
            entries = {len(state[key]) for key in ("readers", "documents", "tokens", "held_out") if key in state}
            if entries != {len(self.corpora)} or ((rest := state["rest"]) and rest["source"] >= len(self.corpora)):
                raise InputError(
                    f"the checkpoint's state of logical shard {logical_shard} is not one of "
                    f"{len(self.corpora)} sources; it was altered, take another checkpoint"
                )
        sources = []
        for number, corpus in enumerate(self.corpora):
            readers = {
                logical_shard: Reader(
                    corpus,
                    logical_shard,
                    self.num_logical_shards,
                    self.block,
                    f"{self.seed}/{number}",
                    states[str(logical_shard)]["readers"][number] if str(logical_shard) in states else None,
                )
                for logical_shard in indices
            }
            sources.append(SourceReaders(readers, len(readers) == self.num_logical_shards, self.held_out))
        logical_shards = {
            logical_shard: LogicalShard(
                logical_shard,
                self.num_logical_shards,
                sources,
                self.weights,
                self.shape,
                states.get(str(logical_shard)),
            )
            for logical_shard in indices
        }
        return LogicalShards(logical_shards, sources)
