"""Lanes: the independent streams that a run is made of, each of which can say where it stands in a few numbers.

A run has a fixed number of lanes, whatever the number of ranks and workers. Each lane owns a share of every source's
documents, goes through it pass after pass, and makes micro-batches of them. Ranks and workers are dealt lanes, so a
change of their number moves lanes about and touches no document.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from math import gcd
from random import Random
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from cola_lightning.data.rows import IGNORE
from cola_lightning.errors import InputError

ENCODED_TOGETHER = 64  # documents; enough to keep a tokenizer's threads busy

Batch = dict[str, Tensor]


class Corpus(Protocol):
    """Documents in shards. A document is text, or ids already; ``encode`` makes int32 ids of either."""

    title: str
    shards: list[str]

    def read(self, shard: int, start: int, part: int, parts: int) -> Iterator[tuple[int, Any]]: ...

    def encode(self, documents: list[Any]) -> list[np.ndarray]: ...


class Reader:
    """The documents of one corpus that belong to one lane, pass after pass, shuffled in blocks.

    A block of ``block`` documents is read, put in an order that is a function of the seed and of where it begins, and
    handed out. So where a reader stands is the beginning of its block and how much of it is gone, and to take it up
    again is to read that block again; only what had not been handed out is tokenised.

    Args:
        corpus: The documents.
        lane: This lane.
        lanes: Number of lanes.
        block: Documents that are shuffled together.
        seed: Text that every order depends on.
        state: Where to go on, as :attr:`state` told.
    """

    def __init__(
        self, corpus: Corpus, lane: int, lanes: int, block: int, seed: str, state: dict[str, int] | None = None
    ) -> None:
        self.corpus, self.block, self.seed = corpus, max(1, block), f"{seed}/{lane}"
        # Fewer shards than lanes are cut into as many parts as make the lanes equal.
        shards = len(corpus.shards)
        parts = lanes // gcd(shards, lanes) if shards < lanes else 1
        units = [(shard, part, parts) for shard in range(shards) for part in range(parts)]
        Random(f"{seed}/shards").shuffle(units)
        # The share of a lane is the same in every pass, so that no document comes again before its lane is through.
        self.units = units[lane::lanes]
        self.state = state or {"pass": 0, "unit": 0, "row": 0, "taken": 0}

    def __iter__(self) -> Iterator[np.ndarray]:
        """Ids of one document after another, without end.

        Raises:
            InputError: If there is no document.
        """
        while True:
            turn, unit, row = self.state["pass"], self.state["unit"], self.state["row"]
            documents = self._documents(turn, unit, row)
            while block := list(islice(documents, self.block)):
                yield from self._shuffled(block, unit, row)
                unit, row = self.state["unit"], self.state["row"]
            if (unit, row) == (0, 0):
                raise InputError(
                    f"{self.corpus.title} has no document for one of the lanes; it is empty, or has fewer documents "
                    f"than --data.lanes"
                )
            self.state = {"pass": turn + 1, "unit": 0, "row": 0, "taken": 0}

    def _documents(self, turn: int, unit: int, row: int) -> Iterator[tuple[int, int, Any]]:
        """Documents of a pass from a place on, each with the place after it."""
        order = list(self.units)
        Random(f"{self.seed}/{turn}").shuffle(order)
        for index in range(unit, len(order)):
            shard, part, parts = order[index]
            for number, document in self.corpus.read(shard, row if index == unit else 0, part, parts):
                yield index, number + 1, document

    def _shuffled(self, block: list[tuple[int, int, Any]], unit: int, row: int) -> Iterator[np.ndarray]:
        turn, taken = self.state["pass"], self.state["taken"]
        order = list(range(len(block)))
        Random(f"{self.seed}/{turn}/{unit}/{row}").shuffle(order)
        end = {"pass": turn, "unit": block[-1][0], "row": block[-1][1], "taken": 0}
        for begin in range(taken, len(order), ENCODED_TOGETHER):
            documents = [block[index][2] for index in order[begin : begin + ENCODED_TOGETHER]]
            for ids in self.corpus.encode(documents):
                taken += 1
                here = {"pass": turn, "unit": unit, "row": row, "taken": taken}
                self.state = here if taken < len(order) else end
                yield ids


@dataclass
class RowShape:
    """How documents become rows.

    Args:
        length: Tokens of a row (T).
        packed: Documents end to end, cut every T ids, what is left over going on in the lane's next row; else one
            document a row, cut with its end-of-document id kept last.
        pad_id: Id that fills rows up.
        apart: In packed rows, number the documents, so that attention can keep to its own.
    """

    length: int
    packed: bool
    pad_id: int
    apart: bool = False


class Lane:
    """Micro-batches out of a lane's share of all sources, mixed so that each has its share of the tokens.

    Args:
        readers: One a source.
        weights: Share of the tokens for each.
        shape: How documents become rows.
        state: Where to go on, as :meth:`state` told.
    """

    def __init__(
        self, readers: list[Reader], weights: list[float], shape: RowShape, state: dict[str, Any] | None = None
    ) -> None:
        self.readers, self.weights, self.shape = readers, weights, shape
        state = state or {"documents": [0] * len(readers), "tokens": [0] * len(readers), "rest": [], "rest_of": 0}
        self.documents, self.tokens = list(state["documents"]), list(state["tokens"])
        self._rest, self._rest_of = np.array(state["rest"], dtype=np.int32), state["rest_of"]
        self._streams = [iter(reader) for reader in readers]

    def state(self) -> dict[str, Any]:
        """Plain numbers that say where the lane stands: the readers' places, documents and tokens handed out of each
        source, and the ids left over of a document that has begun."""
        return {
            "readers": [dict(reader.state) for reader in self.readers],
            "documents": list(self.documents),
            "tokens": list(self.tokens),
            "rest": self._rest.tolist(),
            "rest_of": self._rest_of,
        }

    def batch(self, batch_size: int) -> Batch:
        """The next ``input_ids`` and ``labels``, each (B, T) int64, and with ``shape.apart`` ``document_ids`` too.

        Labels equal the ids but for -100 where nothing is to be learnt: padding, and with ``shape.apart`` the first
        token of a document, which nothing before it may foretell.
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
        return batch | {"document_ids": torch.from_numpy(numbers)} if self.shape.apart else batch

    def _pad(self, ids: np.ndarray, labels: np.ndarray) -> None:
        source = self._next_source()
        document = next(self._streams[source])
        kept = min(len(document), len(ids))
        ids[:kept] = document[:kept]
        ids[kept - 1] = document[-1]
        labels[:kept] = ids[:kept]
        self.documents[source] += 1
        self.tokens[source] += kept

    def _pack(self, ids: np.ndarray, labels: np.ndarray, numbers: np.ndarray) -> None:
        filled = number = 0
        while filled < len(ids):
            begins = not len(self._rest)
            if begins:
                self._rest_of = self._next_source()
                self._rest = next(self._streams[self._rest_of])
            piece = self._rest[: len(ids) - filled]
            end = filled + len(piece)
            ids[filled:end] = labels[filled:end] = piece
            numbers[filled:end] = number
            if begins and self.shape.apart:
                labels[filled] = IGNORE
            self._rest = self._rest[len(piece) :]
            self.documents[self._rest_of] += not len(self._rest)
            self.tokens[self._rest_of] += len(piece)
            filled, number = end, number + 1

    def _next_source(self) -> int:
        """The one that is furthest behind its share; the first of several."""
        return min(range(len(self.weights)), key=lambda source: self.tokens[source] / self.weights[source])


@dataclass
class MakeLanes:
    """Makes any lane of a run, from its number and the state to go on from; goes to the workers.

    Args:
        corpora: One a source.
        weights: Share of the tokens for each.
        lanes: Number of lanes.
        block: Documents of a lane that are shuffled together.
        seed: Text that every order depends on.
        shape: How documents become rows.
    """

    corpora: list[Any]
    weights: list[float]
    lanes: int
    block: int
    seed: str
    shape: RowShape

    def __call__(self, lane: int, state: dict[str, Any] | None) -> Lane:
        readers = [
            Reader(
                corpus, lane, self.lanes, self.block, f"{self.seed}/{index}", state["readers"][index] if state else None
            )
            for index, corpus in enumerate(self.corpora)
        ]
        return Lane(readers, self.weights, self.shape, state)
