"""Logical shards to batches, over ranks and workers, with the position that belongs to the batch last handed over."""

import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from enum import IntEnum
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from typing_extensions import TypedDict

from cola_lightning.data.logical_shards import Batch, LogicalShards, LogicalShardState
from cola_lightning.data.passes import PassEndError
from cola_lightning.data.rows import add_step_tokens
from cola_lightning.data.transfer import SentBatch
from cola_lightning.errors import InputError
from cola_lightning.private_apis import on_unsendable_item
from cola_lightning.signals import leave_signals_to_parent
from cola_lightning.stored_data import Count

States = dict[str, dict[str, Any]]
"""State of each logical shard, by its number."""


class Assignment(TypedDict):
    """How logical shards are dealt out, in a state of :class:`StreamLoader`."""

    at: Count
    replicas: Count
    workers: Count
    jointly: bool
    began: Count
    always: bool
    passes: Count


class LoaderState(TypedDict):
    """A state of :class:`StreamLoader`, of all ranks."""

    batches: Count
    assignment: Assignment
    logical_shards: dict[str, LogicalShardState]


MakeSomeLogicalShards = Callable[[Iterable[int], States], LogicalShards]
"""``f(logical shards, states)`` makes logical shards that go on at their states, or begin where they have none."""

# Micro-batches on a rank that make it worth while to let the processes read by themselves again after a pass: a change
# starts the workers anew, which takes about a second.
LONG_PASS = 500


class StreamError(InputError):
    """Data that cannot be read any more, seen by all ranks between the same two optimizer steps."""


class Verdict(IntEnum):
    """Outcome of fetching the batches of an optimizer step; ranks agree on the smallest."""

    FAILED = 0
    PASS_END = 1
    READ = 2


class OneRank:
    """Exchange between ranks; this one is for a single rank. Every rank calls every method in the same order."""

    def smallest(self, number: int) -> int:
        """The smallest of the ranks' numbers."""
        return number

    def gather(self, value: Any) -> list[Any]:
        """The ranks' values."""
        return [value]


class StreamLoader:
    """The whole training run as one sequence of batches, drawn from the logical shards in rotation.

    Micro-batch ``m`` of the run, counted over all ranks, comes from logical shard ``m % num_logical_shards``. Rank
    ``r`` of R takes those with ``m % R == r`` and its workers take turns. There are two ways to make that sequence:

    - *Apart*: each process has some of the logical shards and reads nothing else. A logical shard's batches then depend
      on its own documents alone. This is how nearly all of a pass is read.
    - *Jointly*: each process has all logical shards, makes all micro-batches and hands over its own. This is how the
      end of a pass is read, where logical shards that are through take documents from others: what a logical shard is
      given then depends on what all others took. It is also how a process reads that is the only one.

    When a logical shard that is read apart has no document left for a batch, all ranks drop what they have of that
    optimizer step, tell each other where their logical shards stand, and go on jointly; after the pass they part again.
    The batches do not depend on when that happens, only on the logical shards' states. Where R x workers divides the
    number of logical shards, the batches are therefore the same sequence for any R and any number of workers. Where it
    does not, processes that read apart draw from their logical shards in turn; the order then depends on R and the
    workers, each logical shard's own sequence does not, and each document still comes once before any comes twice.

    To read jointly costs every process the reading of all there is, so it is made short: logical shards get equal
    shares of the shards. Passes that are shorter than LONG_PASS micro-batches of a rank are read jointly throughout.

    Lightning sees an object with a length and an iterator, nothing more: it then neither fetches a batch ahead, nor
    restores one rank's position on all ranks.

    Args:
        make_logical_shards: Makes logical shards from their numbers and the states to go on from.
        num_logical_shards: Number of logical shards.
        batch_size: Rows of a batch on one rank (B).
        batches: How many batches the run takes on this rank, which is the loader's length.
        state: Where to go on, as :meth:`state_dict` told, of all logical shards.
        replicas: Number of ranks that share the data.
        rank: This one among them.
        workers: Processes that read ahead; 0 for none.
        batches_per_step: Batches of an optimizer step. They are fetched together, so that data that fails does
            so between two steps, where a checkpoint is whole.
        ranks: How ranks agree.
        overfit: Begin every iteration where the first one did; for ``overfit_batches``.

    Raises:
        InputError: If ranks and workers are more than the logical shards.
        StreamError: While iterating, on every rank, when one cannot read on.
    """

    def __init__(
        self,
        make_logical_shards: MakeSomeLogicalShards,
        num_logical_shards: int,
        batch_size: int,
        batches: int,
        *,
        state: dict[str, Any] | None = None,
        replicas: int = 1,
        rank: int = 0,
        workers: int = 0,
        batches_per_step: int = 1,
        ranks: OneRank | None = None,
        overfit: bool = False,
    ) -> None:
        consumers = replicas * max(1, workers)
        if consumers > num_logical_shards:
            raise InputError(
                f"{replicas} ranks x {max(1, workers)} workers are more than the {num_logical_shards} logical shards; "
                f"set --data.num_logical_shards to a multiple of {consumers}, or use fewer workers"
            )
        self.make_logical_shards, self.num_logical_shards, self.batch_size, self.batches = (
            make_logical_shards,
            num_logical_shards,
            batch_size,
            batches,
        )
        self.replicas, self.rank, self.workers, self.batches_per_step = replicas, rank, workers, batches_per_step
        self.ranks = ranks or OneRank()
        state = state or {"batches": 0, "assignment": {}, "logical_shards": {}}
        self.position: int = state["batches"]
        self.states: States = dict(state["logical_shards"])
        # Logical shards are dealt out anew only where ranks or workers are other ones, or the order would change on the
        # way.
        then = state["assignment"]
        self.assignment = self._assign(
            jointly=consumers == 1 or self._pass_ends(), began=then.get("began", self.position)
        )
        if (then.get("replicas"), then.get("workers")) == (replicas, max(1, workers)):
            self.assignment = then
        self.overfit, self.start = overfit, (self.position, dict(self.states), self.assignment)

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Batch]:
        if self.overfit:
            self.position, self.states, self.assignment = self.start[0], dict(self.start[1]), self.start[2]
        verdict = Verdict.READ
        failure = None
        while verdict != Verdict.FAILED:
            items = iter(self._items())
            try:
                while True:
                    window, verdict, failure = self._window(items)
                    if verdict != Verdict.READ:
                        break
                    batches = add_step_tokens([made.batch for made in window])
                    for made, batch in zip(window, batches, strict=True):
                        # Counted as it is handed over, so that a checkpoint taken after this batch goes on at the next.
                        self.position += self.replicas
                        self.states |= made.states
                        yield batch
                    if self._may_part():
                        break
            finally:
                del items  # so that the workers end now, though a traceback may keep this frame
            if verdict == Verdict.PASS_END:
                self.states = {name: value for own in self.ranks.gather(self._own()) for name, value in own.items()}
                short = self.position - self.assignment["began"] < LONG_PASS * self.replicas
                self.assignment = self._assign(jointly=True, began=self.assignment["began"], always=short)
            elif verdict == Verdict.READ:
                self.assignment = self._assign(jointly=False, began=self.position)
        assert failure is not None
        raise failure

    def state_dict(self) -> dict[str, Any]:
        """Count of micro-batches of all ranks, the assignment of logical shards, and this rank's states."""
        return {"batches": self.position, "assignment": self.assignment, "logical_shards": self._own()}

    def _own(self) -> States:
        """The states that this rank tells. Of logical shards read jointly every rank knows all, and tells a part."""
        if self.assignment["jointly"]:
            return {
                logical_shard: state
                for logical_shard, state in self.states.items()
                if int(logical_shard) % self.replicas == self.rank
            }
        owned = {
            str(logical_shard) for worker in range(self.assignment["workers"]) for logical_shard in self._share(worker)
        }
        return {logical_shard: state for logical_shard, state in self.states.items() if logical_shard in owned}

    def _assign(self, jointly: bool, began: int, always: bool = False) -> dict[str, Any]:
        """How logical shards are dealt out from here on.

        Args:
            jointly: Whether every process has all logical shards.
            began: Position where logical shards began to be read apart in this pass.
            always: Whether it is not worth while to part again after the pass.
        """
        workers = max(1, self.workers)
        return {
            "at": self.position,
            "replicas": self.replicas,
            "workers": workers,
            "jointly": jointly,
            "began": began,
            "always": always or self.replicas * workers == 1,
            "passes": self._passes(),
        }

    def _may_part(self) -> bool:
        """Whether logical shards that are read jointly can be read apart again: a new pass has begun for all."""
        if not self.assignment["jointly"] or self.assignment["always"]:
            return False
        return self._passes() > self.assignment["passes"] and not self._pass_ends()

    def _passes(self) -> int:
        """Passes that are complete, of all sources together; a pass begins for all logical shards at once."""
        return max((sum(reader["pass"] for reader in state["readers"]) for state in self.states.values()), default=0)

    def _pass_ends(self) -> bool:
        """Whether a logical shard is through with a pass that others are not through with."""
        return any(reader["through"] for state in self.states.values() for reader in state["readers"])

    def _turns(self, process: int) -> list[int]:
        """The logical shards of one of this rank's worker processes, in the order in which it draws from them."""
        workers = self.assignment["workers"]
        drawn = (self.position - self.assignment["at"]) // self.replicas
        worker = (drawn + process) % workers  # whose turn it is comes first
        share = self._share(worker)
        begin = (drawn - worker + workers - 1) // workers % len(share)
        return share[begin:] + share[:begin]

    def _share(self, worker: int) -> list[int]:
        rotation = [(self.assignment["at"] + turn) % self.num_logical_shards for turn in range(self.num_logical_shards)]
        return rotation[worker * self.replicas + self.rank :: self.replicas * self.assignment["workers"]]

    def _window(self, items: Iterator[SentBatch | Exception]) -> tuple[list[SentBatch], Verdict, StreamError | None]:
        """The batches of an optimizer step, or none and why."""
        window: list[SentBatch] = []
        verdict, failure = Verdict.READ, None
        for item in islice(items, self.batches_per_step):
            if isinstance(item, Exception):
                verdict = Verdict.PASS_END if isinstance(item, PassEndError) else Verdict.FAILED
                failure = StreamError(*item.args)
                break
            window.append(item)
        agreed = Verdict(self.ranks.smallest(verdict))
        if agreed == Verdict.FAILED and verdict != Verdict.FAILED:
            failure = StreamError("another rank could not read its data; it says why")
        return window, agreed, failure

    def _streams(self) -> list["_Stream"]:
        """Assign logical shards to each of this rank's processes, from now on."""
        states, workers = dict(self.states), self.assignment["workers"]
        if not self.assignment["jointly"]:
            turns = [self._turns(process) for process in range(workers)]
            return [
                _Apart(self.make_logical_shards, states, self.batch_size, turns[process]) for process in range(workers)
            ]
        place = self.position, self.replicas, self.rank, self.num_logical_shards
        return [
            _Jointly(self.make_logical_shards, states, self.batch_size, *place, process, workers)
            for process in range(workers)
        ]

    def _items(self) -> Iterable[SentBatch | Exception]:
        ahead = {"prefetch_factor": max(2, 1 + self.batches_per_step // self.workers)} if self.workers else {}
        return DataLoader(
            _Streams(self._streams()),
            batch_size=None,
            num_workers=self.workers,
            worker_init_fn=partial(_worker_init, os.getpid()),
            pin_memory=torch.cuda.is_available(),
            **ahead,  # type: ignore[arg-type]
        )


class _Streams(IterableDataset):
    """The streams of a rank's processes, each of which runs its own."""

    def __init__(self, streams: list["_Stream"]) -> None:
        self.streams = streams

    def __iter__(self) -> Iterator[SentBatch | Exception]:
        info = get_worker_info()
        return iter(self.streams[info.id if info else 0])


class _Stream:
    """Batches of one process. What ends it is its last item, as an exception that a process can hand to another without
    the traceback around it."""

    def __init__(self, make_logical_shards: MakeSomeLogicalShards, states: States, batch_size: int) -> None:
        self.make_logical_shards, self.states, self.batch_size = make_logical_shards, states, batch_size

    def __iter__(self) -> Iterator[SentBatch | Exception]:
        try:
            yield from self.batches()
        except (InputError, PassEndError) as error:
            yield type(error)(*error.args)

    def batches(self) -> Iterator[SentBatch]:
        raise NotImplementedError


class _Apart(_Stream):
    """Some logical shards in rotation."""

    def __init__(
        self, make_logical_shards: MakeSomeLogicalShards, states: States, batch_size: int, turns: list[int]
    ) -> None:
        super().__init__(make_logical_shards, states, batch_size)
        self.turns = turns

    def batches(self) -> Iterator[SentBatch]:
        logical_shards = self.make_logical_shards(self.turns, self.states)
        while True:
            for index in self.turns:
                batch = logical_shards.batch(index, self.batch_size)
                yield SentBatch(batch, logical_shards.changed())


class _Jointly(_Stream):
    """All logical shards in rotation from a position on. Ranks x B rows, one micro-batch for each rank, are a group;
    the workers of a rank take turns by groups. With 2 ranks and 2 workers, worker 1 of rank 0 hands over the first
    micro-batch of each second group:

        group              0       1       2       3
        micro-batch m    0   1   2   3   4   5   6   7
        rank             0   1   0   1   0   1   0   1
        worker           0   0   1   1   0   0   1   1
    """

    def __init__(
        self,
        make_logical_shards: MakeSomeLogicalShards,
        states: States,
        batch_size: int,
        position: int,
        replicas: int,
        rank: int,
        num_logical_shards: int,
        worker: int,
        workers: int,
    ) -> None:
        super().__init__(make_logical_shards, states, batch_size)
        self.position, self.replicas, self.rank = position, replicas, rank
        self.num_logical_shards, self.worker, self.workers = num_logical_shards, worker, workers

    def batches(self) -> Iterator[SentBatch]:
        logical_shards = self.make_logical_shards(range(self.num_logical_shards), self.states)
        group = 0
        while True:
            first = self.position + group * self.replicas
            batches = [
                logical_shards.batch((first + rank) % self.num_logical_shards, self.batch_size)
                for rank in range(self.replicas)
            ]
            if group % self.workers == self.worker:
                yield SentBatch(batches[self.rank], logical_shards.changed())
            group += 1


def _worker_init(parent: int, worker: int) -> None:
    leave_signals_to_parent()
    end_where_batches_are_lost()
    die_with(parent)


def end_where_batches_are_lost() -> None:
    """End this worker where a batch cannot be handed over. Python's queue would print an error and drop the batch, and
    the training process would wait for it for ever; a worker that ended it hears of."""

    def end(error: Exception, batch: object) -> None:
        os.write(
            2,
            f"error: a batch could not be handed over by a worker of the data: {error}; set --data.num_workers 0 to do "
            "without workers\n".encode(),
        )
        os._exit(1)

    on_unsendable_item(end)


def die_with(parent: int) -> None:
    """Have the kernel kill this process when its ``parent``, given by its number, is gone, even by SIGKILL.

    PyTorch's own watchdog looks only between two batches, and not while a worker waits for a server.
    """
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None, use_errno=True).prctl(set_parent_death_signal, signal.SIGKILL)
        if os.getppid() != parent:  # it was gone before the kernel knew
            os._exit(1)
