"""Assign logical shards to processes, and order the draws from them."""

from dataclasses import dataclass
from typing import Any

from typing_extensions import TypedDict

from cola_lightning.stored_data import Count


class Assignment(TypedDict):
    """How logical shards are assigned from a position on, in a state of :class:`StreamLoader`.

    Attributes:
        at: Position where the assignment began, in micro-batches of all ranks.
        replicas: Number of ranks (R).
        workers: Processes per rank that read (W), 1 without worker processes.
        jointly: Whether every process has all logical shards.
        began: Position where logical shards began to be read apart in this pass.
        always: Whether reading apart is not worthwhile after this pass either.
        passes: Passes that were complete, of all sources together.
    """

    at: Count
    replicas: Count
    workers: Count
    jointly: bool
    began: Count
    always: bool
    passes: Count


@dataclass
class Shares:
    """The logical shards of each process while logical shards are read apart.

    The run draws from logical shard ``m % L`` for its micro-batch ``m``, counted over all ranks. From position ``at``
    on, micro-batches go to the ranks in turn, and the workers of a rank take turns. So worker w of rank r gets every
    R * W-th logical shard, beginning with the one of micro-batch ``at + w * R + r``.

    Example: L = 8 logical shards, R = 2 ranks, W = 2 workers, ``at`` = 3.

        micro-batch m        3  4  5  6  7  8  9 10 11 12
        logical shard m % 8  3  4  5  6  7  0  1  2  3  4
        rank                 0  1  0  1  0  1  0  1  0  1      (m - at) % 2
        worker               0  0  1  1  0  0  1  1  0  0      (m - at) // 2 % 2

    Worker 0 of rank 0 has logical shards 3 and 7, worker 1 of rank 0 has 5 and 1. If L is not a multiple of R * W,
    shares differ by one logical shard. A process then still draws from its own in turn, so that from the second round
    on, micro-batch ``m`` may come from another logical shard than ``m % L``.

    Args:
        num_logical_shards: Number of logical shards (L).
        rank: This rank (r).
        assignment: How they are assigned.
    """

    num_logical_shards: int
    rank: int
    assignment: dict[str, Any]

    def of_worker(self, worker: int) -> list[int]:
        """List the logical shards of a worker of this rank, in the order in which it first draws from them."""
        at, replicas, workers = (self.assignment[name] for name in ("at", "replicas", "workers"))
        rotation = [(at + turn) % self.num_logical_shards for turn in range(self.num_logical_shards)]
        return rotation[worker * replicas + self.rank :: replicas * workers]

    def of_process(self, process: int, position: int) -> list[int]:
        """List the logical shards of a process that is started at a position, beginning with the one that it draws from
        first. PyTorch asks its processes in the order 0, 1, …, so process 0 is the worker whose turn it is.

        Example: rank 0 as above, started at position 9. It has drawn (9 - 3) // 2 = 3 micro-batches, by workers 0, 1
        and 0. So process 0 is worker (3 + 0) % 2 = 1, which has drawn once. Its share is 5, 1 and it continues with the
        second: 1, 5. Process 1 is worker (3 + 1) % 2 = 0, which has drawn twice. It begins again with the first: 3, 7.

        Args:
            process: Number of the process, from 0 on.
            position: Micro-batches of the run before it, over all ranks.
        """
        workers = self.assignment["workers"]
        drawn = (position - self.assignment["at"]) // self.assignment["replicas"]  # by this rank
        worker = (drawn + process) % workers
        share = self.of_worker(worker)
        drawn_by_worker = (drawn - worker + workers - 1) // workers  # rounded up: worker 0 draws first
        begin = drawn_by_worker % len(share)
        return share[begin:] + share[:begin]

    def of_rank(self) -> set[int]:
        """Return the logical shards of all workers of this rank."""
        return {index for worker in range(self.assignment["workers"]) for index in self.of_worker(worker)}
