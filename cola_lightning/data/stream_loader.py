"""The run as one sequence of batches, drawn from logical shards by ranks and workers, with an exact position."""

from collections.abc import Iterator
from dataclasses import KW_ONLY, InitVar, dataclass, field
from enum import IntEnum
from itertools import islice
from typing import Any

from typing_extensions import TypedDict

from cola_lightning.data.assignment import Assignment, Shares
from cola_lightning.data.logical_shards import LogicalShardState
from cola_lightning.data.packing import Batch, add_step_tokens
from cola_lightning.data.passes import PassEndError
from cola_lightning.data.rank_exchange import OneRank
from cola_lightning.data.transfer import SentBatch
from cola_lightning.data.worker_process import start_loader
from cola_lightning.data.worker_streams import ApartStream, JointStream, MakeSomeLogicalShards, States, Stream, Streams
from cola_lightning.errors import InputError
from cola_lightning.stored_data import Count


class LoaderState(TypedDict):
    """State of a :class:`StreamLoader`, of all ranks."""

    batches: Count
    assignment: Assignment
    logical_shards: dict[str, LogicalShardState]


LONG_PASS = 500
"""Micro-batches of a rank that make it worthwhile to read apart again after a pass. The change starts the workers anew,
which takes about a second."""


class StreamError(InputError):
    """Data cannot be read any more; raised on all ranks between the same two optimizer steps."""


class Verdict(IntEnum):
    """Outcome of fetching the batches of an optimizer step. Ranks agree on the smallest."""

    FAILED = 0
    PASS_END = 1
    READ = 2


@dataclass(eq=False)
class StreamLoader:
    """The whole training run as one sequence of batches, drawn from the logical shards in rotation.

    Micro-batch ``m`` of the run, counted over all ranks, comes from logical shard ``m % num_logical_shards``. Rank
    ``r`` of R takes those with ``m % R == r``, and its workers take turns; :class:`Shares` has an example. There are
    two ways to make that sequence:

    - *Apart*: each process has some of the logical shards and reads nothing else. A logical shard's batches then depend
      on its own documents alone. Nearly all of a pass is read in this way.
    - *Jointly*: each process has all logical shards, makes all micro-batches, and sends only its own. The end of a pass
      is read in this way, where logical shards without documents left take some from others: what one gets then depends
      on what all others took. A process that is the only one always reads in this way.

    When a logical shard that is read apart has no document left for a batch, all ranks drop what they have of that
    optimizer step, exchange the states of their logical shards, and continue jointly. After the pass they read apart
    again. The batches do not depend on when that happens, only on the logical shards' states. Where R x workers divides
    the number of logical shards, the batches are therefore the same sequence for any R and any number of workers. Where
    it does not, processes that read apart draw from their logical shards in turn. The order then depends on R and the
    workers, but the sequence of each logical shard does not, and each document still comes once before any comes twice.

    Example: L = 4 logical shards, R = 2 ranks without workers, and steps of 2 micro-batches on each rank, so that each
    step adds 4 to the position. Logical shard 3 is the first to have no document left:

        position when the step begins    4000        4004        4008        4008        4012
        read                             apart       apart       apart       jointly     jointly
        micro-batches m of rank 0     4000 4002   4004 4006   4008 4010   4008 4010   4012 4014
        micro-batches m of rank 1     4001 4003   4005 4007   4009   -    4009 4011   4013 4015
        logical shards, m % 4          0 1 2 3     0 1 2 3     0 1 2 -     0 1 2 3     0 1 2 3

    In the third step rank 1 has not enough documents for m = 4011. Both ranks drop the step: the position stays 4008,
    and the states are those after m = 4007. Each rank tells the other its states, and both make the four micro-batches
    from all logical shards. The first three are the same as before; for the fourth, logical shard 3 takes what it lacks
    from logical shard 0. Rank 0 trains on 4008 and 4010, rank 1 on 4009 and 4011. When no logical shard has a document
    left, the next pass begins for all of them, and after that step the ranks read apart again.

    Reading jointly costs every process the reading of all there is. It is short, because logical shards get equal
    shares of the shards. Passes shorter than LONG_PASS micro-batches of a rank are read jointly throughout.

    Lightning sees an object with a length and an iterator, nothing more. So it neither fetches a batch ahead, nor
    restores one rank's position on all ranks.

    Args:
        make_logical_shards: Makes logical shards from their numbers and states.
        num_logical_shards: Number of logical shards.
        batch_size: Rows of a batch on one rank (B).
        batches: Batches of the run on this rank, which is the loader's length.
        state: Where to resume, as returned by :meth:`state_dict`, of all logical shards.
        replicas: Number of ranks that share the data (R).
        rank: This rank.
        workers: Processes that read ahead; 0 for none.
        batches_per_step: Batches of an optimizer step. They are fetched together, so that data that cannot be read
            fails between two steps, where a checkpoint is consistent.
        ranks: How ranks agree.
        overfit: Begin every iteration where the first one began; for ``overfit_batches``.

    Raises:
        InputError: If there are more processes than logical shards.
        StreamError: While iterating, on every rank, when one cannot read on.
    """

    make_logical_shards: MakeSomeLogicalShards
    num_logical_shards: int
    batch_size: int
    batches: int
    _: KW_ONLY
    state: InitVar[dict[str, Any] | None] = None
    replicas: int = 1
    rank: int = 0
    workers: int = 0
    batches_per_step: int = 1
    ranks: OneRank = field(default_factory=OneRank)
    overfit: bool = False

    def __post_init__(self, state: dict[str, Any] | None) -> None:
        consumers = self.replicas * max(1, self.workers)
        if consumers > self.num_logical_shards:
            raise InputError(
                f"{self.replicas} ranks x {max(1, self.workers)} workers are more than the {self.num_logical_shards} "
                f"logical shards; set --data.num_logical_shards to a multiple of {consumers}, or use fewer workers"
            )
        state = state or {"batches": 0, "assignment": {}, "logical_shards": {}}
        self.position: int = state["batches"]
        self.states: States = dict(state["logical_shards"])
        # Only another number of ranks or workers makes a new assignment. Otherwise the order would change on resuming.
        then = state["assignment"]
        if (then.get("replicas"), then.get("workers")) == (self.replicas, max(1, self.workers)):
            self.assignment = then
        else:
            # A pass that has ended for some logical shards can only be read on jointly.
            jointly = consumers == 1 or self._pass_ends()
            self.assignment = self._assign(jointly, began=then.get("began", self.position))
        self.start = self.position, dict(self.states), self.assignment

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Batch]:
        if self.overfit:
            self.position, self.states, self.assignment = self.start[0], dict(self.start[1]), self.start[2]
        verdict, failure = Verdict.READ, None
        # Each round of this loop reads under one assignment, with workers of its own. It ends when all ranks agree that
        # a pass has ended, that the next pass has begun, or that a rank cannot read on.
        while verdict != Verdict.FAILED:
            try:
                items = self._items()
            except InputError as error:  # all ranks fail in the same step
                items = iter([error])
            try:
                while True:
                    # Fetch a whole optimizer step before a batch of it is given out. If a rank has not got its part,
                    # all ranks drop theirs: positions and states still are those after the last complete step.
                    step, verdict, failure = self._fetch_step(items)
                    if verdict != Verdict.READ:
                        break
                    batches = add_step_tokens([sent.batch for sent in step])
                    for sent, batch in zip(step, batches, strict=True):
                        # Counted before the yield, so that a checkpoint taken after this batch resumes at the next.
                        self.position += self.replicas
                        self.states |= sent.states
                        yield batch
                    if self._can_read_apart_again():
                        break
            finally:
                del items  # ends the workers now, even if a traceback keeps this frame
            if verdict == Verdict.PASS_END:
                # From apart to jointly: every rank needs the states of all logical shards, of which it has its own.
                self.states = self.ranks.merge(self._own_states())
                short = self.position - self.assignment["began"] < LONG_PASS * self.replicas
                self.assignment = self._assign(jointly=True, began=self.assignment["began"], always=short)
            elif verdict == Verdict.READ:
                # From jointly to apart: every rank knows all states already.
                self.assignment = self._assign(jointly=False, began=self.position)
        assert failure is not None
        raise failure

    def state_dict(self) -> dict[str, Any]:
        """Return the count of micro-batches of all ranks, the assignment, and this rank's states."""
        return {"batches": self.position, "assignment": self.assignment, "logical_shards": self._own_states()}

    def _own_states(self) -> States:
        """Return the states that this rank contributes. Of logical shards read jointly every rank knows all, and
        contributes a part. Example: of 5, rank 0 of 2 contributes 0, 2 and 4, and rank 1 contributes 1 and 3."""
        if self.assignment["jointly"]:
            own = set(range(self.rank, self.num_logical_shards, self.replicas))
        else:
            own = Shares(self.num_logical_shards, self.rank, self.assignment).of_rank()
        return {index: state for index, state in self.states.items() if int(index) in own}

    def _assign(self, jointly: bool, began: int, always: bool = False) -> dict[str, Any]:
        """Make the assignment from the present position on; :class:`Assignment` explains the arguments."""
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

    def _can_read_apart_again(self) -> bool:
        """Whether logical shards are read jointly and a new pass has begun for all."""
        if not self.assignment["jointly"] or self.assignment["always"]:
            return False
        return self._passes() > self.assignment["passes"] and not self._pass_ends()

    def _passes(self) -> int:
        """Count the complete passes of all sources together. A pass begins for all logical shards at once."""
        return max((sum(reader["pass"] for reader in state["readers"]) for state in self.states.values()), default=0)

    def _pass_ends(self) -> bool:
        """Whether a logical shard has no document left in a pass in which others have some."""
        return any(reader["through"] for state in self.states.values() for reader in state["readers"])

    def _fetch_step(self, items: Iterator[Any]) -> tuple[list[SentBatch], Verdict, StreamError | None]:
        """Fetch the batches of an optimizer step, and agree with all ranks on the outcome."""
        step: list[SentBatch] = []
        verdict, failure = Verdict.READ, None
        for item in islice(items, self.batches_per_step):
            if isinstance(item, Exception):
                verdict = Verdict.PASS_END if isinstance(item, PassEndError) else Verdict.FAILED
                failure = StreamError(*item.args)
                break
            step.append(item)
        agreed = Verdict(self.ranks.smallest(verdict))
        if agreed == Verdict.FAILED and verdict != Verdict.FAILED:
            failure = StreamError("another rank could not read its data; it says why")
        return step, agreed, failure

    def _streams(self) -> list[Stream]:
        """Make the stream of each of this rank's processes, from the present position on."""
        states, workers = dict(self.states), self.assignment["workers"]
        streams: list[Stream] = []
        for process in range(workers):
            arguments = self.make_logical_shards, states, self.batch_size
            if self.assignment["jointly"]:
                place = self.position, self.replicas, self.rank, self.num_logical_shards
                streams.append(JointStream(*arguments, *place, process, workers))
            else:
                shares = Shares(self.num_logical_shards, self.rank, self.assignment)
                streams.append(ApartStream(*arguments, shares.of_process(process, self.position)))
        return streams

    def _items(self) -> Iterator[SentBatch | Exception]:
        # Each worker reads its share of a step ahead, and one batch more. Example: of steps of 8 batches, each of 3
        # workers makes 2 or 3, and reads 1 + 8 // 3 = 3 ahead.
        ahead = max(2, 1 + self.batches_per_step // self.workers) if self.workers else None
        return start_loader(Streams(self._streams()), self.workers, batch_size=None, prefetch_factor=ahead)
