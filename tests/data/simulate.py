"""Simulate ranks and workers by threads of one process, on corpora of numbers."""

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from cola_lightning.data.logical_shards import MakeLogicalShards
from cola_lightning.data.packing import RowShape
from cola_lightning.data.passes import WHOLE
from cola_lightning.data.rank_exchange import OneRank
from cola_lightning.data.stream_loader import StreamLoader

EOS, PAD = 1, 0


class Numbers:
    """Corpus of numbers. ``encoded`` lists the first id of each document that was encoded.

    Document ``row`` of shard ``s`` is the id ``i = first + 2 (1000 s + row)``, then ``i + 1`` up to ``longest - 1``
    times, then EOS.
    """

    def __init__(self, sizes: list[int], longest: int = 9, first: int = 10, title: str = "numbers") -> None:
        self.sizes, self.longest, self.first, self.title = sizes, longest, first, title
        self.shards = [f"shard{number}" for number in range(len(sizes))]
        self.encoded: list[int] = []

    def read(self, shard, start=0, share=WHOLE):
        for row in range(start, self.sizes[shard]):
            if share.has(row):
                yield row, [self.first + 2 * (1000 * shard + row)]

    def encode(self, documents):
        self.encoded += [begin for [begin] in documents]
        return [
            np.array([begin] + [begin + 1] * (begin // 2 % self.longest) + [EOS], dtype=np.int32)
            for [begin] in documents
        ]

    def everything(self) -> set[int]:
        """List the first ids of all documents."""
        return {begin for shard in range(len(self.shards)) for _, [begin] in self.read(shard)}


def make_logical_shards(*corpora, num_logical_shards=1, block=5, weights=None, **shape) -> MakeLogicalShards:
    shape = RowShape(**({"length": 8, "packed": True, "pad_id": PAD} | shape))
    return MakeLogicalShards(
        list(corpora), list(weights or [1 / len(corpora)] * len(corpora)), num_logical_shards, block, "7", shape
    )


class Threads:
    """Exchange of values between ranks that are threads of one process."""

    def __init__(self, number: int) -> None:
        self.barrier = threading.Barrier(number, timeout=60)
        self.values: list[Any] = [None] * number

    def rank(self, number: int) -> OneRank:
        return _OfThreads(self, number)


class _OfThreads(OneRank):
    def __init__(self, threads: Threads, number: int) -> None:
        self.threads, self.number = threads, number

    def gather(self, value):
        self.threads.values[self.number] = value
        self.threads.barrier.wait()
        values = list(self.threads.values)
        self.threads.barrier.wait()
        return values

    def smallest(self, number):
        return min(self.gather(number))


class InProcess(StreamLoader):
    """Loader with its workers in this process. They take turns as PyTorch's do."""

    def _items(self) -> Iterator[Any]:
        streams = [iter(stream) for stream in self._streams()]
        while True:
            for stream in streams:
                yield next(stream)


RUNS: list["Run"] = []
"""Runs of the current test; a fixture closes them at its end."""


class Run:
    """Run on simulated ranks and workers, from a state or from the beginning."""

    def __init__(self, make, ranks=1, workers=0, state=None, batch_size=2, batches_per_step=1, kind=InProcess) -> None:
        self.batches_per_step = batches_per_step
        threads = Threads(ranks)
        self.loaders = [
            kind(
                make,
                make.num_logical_shards,
                batch_size,
                10**6,
                state=state,
                replicas=ranks,
                rank=rank,
                workers=workers,
                batches_per_step=batches_per_step,
                ranks=threads.rank(rank),
            )
            for rank in range(ranks)
        ]
        self.iterators = [iter(loader) for loader in self.loaders]
        # One thread per rank for the whole run, because workers end with the thread that started them.
        self.threads = [ThreadPoolExecutor(1) for _ in self.loaders]
        RUNS.append(self)

    def close(self) -> None:
        """End the workers in the threads that started them; from another thread each rank takes five seconds."""
        ended = [thread.submit(iterator.close) for thread, iterator in zip(self.threads, self.iterators, strict=True)]
        for future in ended:
            future.result()

    def take(self, micro_batches: int) -> list[list[list[int]]]:
        """Return the ids of the next micro-batches of all ranks, in the order of the run."""
        count = micro_batches // len(self.loaders)

        def of_rank(iterator):
            return [next(iterator)["input_ids"].tolist() for _ in range(count)]

        futures = [
            thread.submit(of_rank, iterator) for thread, iterator in zip(self.threads, self.iterators, strict=True)
        ]
        of_ranks = [future.result() for future in futures]
        return [batches[index] for index in range(count) for batches in of_ranks]

    def state(self) -> dict[str, Any]:
        """As the data module puts it together, and through JSON, because only plain data may be in it."""
        states = [loader.state_dict() for loader in self.loaders]
        assert len({state["batches"] for state in states}) == 1
        logical_shards = {
            logical_shard: value for state in states for logical_shard, value in state["logical_shards"].items()
        }
        assert len(logical_shards) == sum(
            len(state["logical_shards"]) for state in states
        )  # no logical shard has two owners
        return json.loads(json.dumps(states[0] | {"logical_shards": logical_shards}))
