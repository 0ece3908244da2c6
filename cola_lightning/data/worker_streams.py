"""The stream of micro-batches that one process makes, from some logical shards or from all."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from cola_lightning.data.logical_shards import LogicalShards
from cola_lightning.data.passes import PassEndError
from cola_lightning.data.transfer import SentBatch
from cola_lightning.errors import InputError

States = dict[str, dict[str, Any]]
"""State of each logical shard, by its number."""

MakeSomeLogicalShards = Callable[[Iterable[int], States], LogicalShards]
"""``f(numbers, states)`` makes logical shards, each from its state or, where it has none, from the beginning."""


@dataclass
class Stream(ABC):
    """Makes the micro-batches of one process. Its last item is the exception that ended it, without a traceback, so
    that it can be sent to another process.

    Args:
        make_logical_shards: Makes the logical shards that this process reads.
        states: Where to resume.
        batch_size: Rows of a micro-batch (B).
    """

    make_logical_shards: MakeSomeLogicalShards
    states: States
    batch_size: int

    def __iter__(self) -> Iterator[SentBatch | Exception]:
        try:
            yield from self.batches()
        except (InputError, PassEndError) as error:
            yield type(error)(*error.args)

    @abstractmethod
    def batches(self) -> Iterator[SentBatch]:
        """Yield micro-batches without end, each with the states of the logical shards that changed."""


@dataclass
class ApartStream(Stream):
    """Draws from some logical shards in rotation.

    Example: with turns 1, 5 its micro-batches come from logical shards 1, 5, 1, 5 …, each with the new state of that
    logical shard alone. How turns follow from ranks, workers and position: :meth:`Shares.of_process`.

    Args:
        turns: Their numbers, in the order in which it draws from them.
    """

    turns: list[int]

    def batches(self) -> Iterator[SentBatch]:
        logical_shards = self.make_logical_shards(self.turns, self.states)
        while True:
            for index in self.turns:
                batch = logical_shards.batch(index, self.batch_size)
                yield SentBatch(batch, logical_shards.changed())


@dataclass
class JointStream(Stream):
    """Draws from all logical shards in rotation, and sends this process's share of the micro-batches.

    R micro-batches, one per rank, are a group; the workers of a rank take turns by groups. Example: 2 ranks, 2 workers.
    Worker 1 of rank 0 sends the first micro-batch of each second group:

        group              0       1       2       3
        micro-batch m    0   1   2   3   4   5   6   7
        rank             0   1   0   1   0   1   0   1
        worker           0   0   1   1   0   0   1   1

    Args:
        position: Micro-batches of the run before the first of this stream, over all ranks.
        replicas: Number of ranks (R).
        rank: This rank.
        num_logical_shards: Number of logical shards (L).
        worker: This worker of the rank.
        workers: Processes per rank that read.
    """

    position: int
    replicas: int
    rank: int
    num_logical_shards: int
    worker: int
    workers: int

    def batches(self) -> Iterator[SentBatch]:
        logical_shards = self.make_logical_shards(range(self.num_logical_shards), self.states)
        for group in count():
            # Make the batches of all ranks and of all workers, although only one of them is sent: what a logical shard
            # draws near the end of a pass depends on what every other one has drawn before.
            first = self.position + group * self.replicas
            batches = [
                logical_shards.batch((first + rank) % self.num_logical_shards, self.batch_size)
                for rank in range(self.replicas)
            ]
            # changed() is asked only here, so the states sent along are of all batches since this worker's last one,
            # also of those that other workers send. Each is the state after the batch that it is sent with.
            if group % self.workers == self.worker:
                yield SentBatch(batches[self.rank], logical_shards.changed())


class Streams(IterableDataset):
    """The streams of a rank's processes; each process iterates its own."""

    def __init__(self, streams: list[Stream]) -> None:
        self.streams = streams

    def __iter__(self) -> Iterator[SentBatch | Exception]:
        info = get_worker_info()
        return iter(self.streams[info.id if info else 0])
