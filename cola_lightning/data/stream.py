"""Lanes to batches, over ranks and workers, with the position that belongs to the batch last handed over."""

import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from cola_lightning.data.lanes import Batch, Lane
from cola_lightning.data.rows import add_step_tokens
from cola_lightning.errors import InputError

MakeLane = Callable[[int, dict[str, Any] | None], Lane]
"""``f(lane, state)`` makes a lane that goes on at the state, or begins where that is None."""


class StreamError(InputError):
    """Data that cannot be read any more, seen by all ranks between the same two optimizer steps."""


@dataclass
class _Made:
    """A batch on its way from a worker, with where its lane stands after it.

    A class of its own, because PyTorch would look into a dict or a tuple for tensors, number by number.
    """

    batch: Batch
    lane: int
    state: dict[str, Any]

    def pin_memory(self, device: Any = None) -> "_Made":
        return _Made({name: tensor.pin_memory() for name, tensor in self.batch.items()}, self.lane, self.state)


class StreamLoader:
    """The whole training run as one sequence of batches, drawn from the lanes in rotation.

    Micro-batch ``m`` of the run, counted over all ranks, comes from lane ``m % lanes``. Rank ``r`` of R takes those
    with ``m % R == r`` and its workers take turns. Where R x workers divides the number of lanes, the batches are
    therefore the same sequence for any R and any number of workers. Where it does not, lanes are dealt out as evenly as
    possible and drawn from in turn; the order then depends on R and the workers, each lane's own sequence does not.

    Lightning sees an object with a length and an iterator, nothing more: it then neither fetches a batch ahead, nor
    restores one rank's position on all ranks.

    Args:
        make_lane: Makes a lane from its number and the state to go on from.
        lanes: Number of lanes.
        batch_size: Rows of a batch on one rank (B).
        batches: How many batches the run takes on this rank, which is the loader's length.
        state: Where to go on, as :meth:`state_dict` told, of all lanes.
        replicas: Number of ranks that share the data.
        rank: This one among them.
        workers: Processes that read ahead; 0 for none.
        window: Batches of an optimizer step. They are fetched together, so that each knows the step's tokens, and so
            that data that fails does so between two steps, where a checkpoint is whole.
        all_well: Given whether this rank has its batches, says whether every rank has; all ranks call it.

    Raises:
        InputError: If ranks and workers are more than the lanes.
        StreamError: While iterating, on every rank, when one cannot read on.
    """

    def __init__(
        self,
        make_lane: MakeLane,
        lanes: int,
        batch_size: int,
        batches: int,
        *,
        state: dict[str, Any] | None = None,
        replicas: int = 1,
        rank: int = 0,
        workers: int = 0,
        window: int = 1,
        all_well: Callable[[bool], bool] = bool,
    ) -> None:
        consumers = replicas * max(1, workers)
        if consumers > lanes:
            raise InputError(
                f"{replicas} ranks x {max(1, workers)} workers are more than the {lanes} lanes that the data is dealt "
                f"out in; set --data.lanes to a multiple of {consumers} from the start of the run, or use fewer workers"
            )
        self.make_lane, self.lanes, self.batch_size, self.batches = make_lane, lanes, batch_size, batches
        self.replicas, self.rank, self.workers, self.window, self.all_well = replicas, rank, workers, window, all_well
        state = state or {"batches": 0, "dealt": {}, "lanes": {}}
        self.position: int = state["batches"]
        self.states: dict[str, dict[str, Any]] = dict(state["lanes"])
        # Lanes are dealt out anew only where ranks or workers are other ones, or the order would change on the way.
        self.dealt = {"at": self.position, "replicas": replicas, "workers": max(1, workers)}
        if state["dealt"] | {"at": self.position} == self.dealt:
            self.dealt = state["dealt"]

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Batch]:
        items = iter(self._loader())
        failure = None
        try:
            while failure is None:
                window, failure = self._window(items)
                batches = add_step_tokens([made.batch for made in window])
                for made, batch in zip(window, batches, strict=True):
                    # Counted as it is handed over, so that a checkpoint taken after this batch goes on at the next.
                    self.position += self.replicas
                    self.states[str(made.lane)] = made.state
                    yield batch
        finally:
            del items  # so that the workers end now, though a traceback may keep this frame
        raise failure

    def state_dict(self) -> dict[str, Any]:
        """Micro-batches handed over on all ranks, how lanes are dealt out, and where each of this rank's stands."""
        owned = {str(lane) for worker in range(self.dealt["workers"]) for lane in self._share(worker)}
        states = {lane: state for lane, state in self.states.items() if lane in owned}
        return {"batches": self.position, "dealt": self.dealt, "lanes": states}

    def _turns(self, process: int) -> list[int]:
        """The lanes of one of this rank's worker processes, in the order in which it draws from them from now on."""
        workers = self.dealt["workers"]
        drawn = (self.position - self.dealt["at"]) // self.replicas
        worker = (drawn + process) % workers  # whose turn it is comes first
        share = self._share(worker)
        begin = (drawn - worker + workers - 1) // workers % len(share)
        return share[begin:] + share[:begin]

    def _share(self, worker: int) -> list[int]:
        rotation = [(self.dealt["at"] + turn) % self.lanes for turn in range(self.lanes)]
        return rotation[worker * self.replicas + self.rank :: self.replicas * self.dealt["workers"]]

    def _window(self, items: Iterator["_Made | InputError"]) -> tuple[list[_Made], StreamError | None]:
        """The batches of an optimizer step, or none and why."""
        window: list[_Made] = []
        failure = None
        for item in islice(items, self.window):
            if isinstance(item, InputError):
                failure = StreamError(*item.args)
                break
            window.append(item)
        if self.all_well(failure is None):
            return window, None
        return [], failure or StreamError("another rank could not read its data; it says why")

    def _loader(self) -> DataLoader:
        ahead = {"prefetch_factor": max(2, 1 + self.window // self.workers)} if self.workers else {}
        turns = [self._turns(process) for process in range(self.dealt["workers"])]
        return DataLoader(
            _Stream(self.make_lane, turns, dict(self.states), self.batch_size),
            batch_size=None,
            num_workers=self.workers,
            worker_init_fn=partial(_worker_init, os.getpid()),
            pin_memory=torch.cuda.is_available(),
            **ahead,  # type: ignore[arg-type]
        )


class _Stream(IterableDataset):
    """What one worker runs: its lanes in rotation. A failure is its last item, as an exception that a process can hand
    to another without the traceback around it."""

    def __init__(
        self, make_lane: MakeLane, turns: list[list[int]], states: dict[str, dict[str, Any]], batch_size: int
    ) -> None:
        self.make_lane, self.turns, self.states, self.batch_size = make_lane, turns, states, batch_size

    def __iter__(self) -> Iterator["_Made | InputError"]:
        info = get_worker_info()
        turns = self.turns[info.id if info else 0]
        try:
            lanes = {index: self.make_lane(index, self.states.get(str(index))) for index in turns}
            while True:
                for index, lane in lanes.items():
                    batch = lane.batch(self.batch_size)
                    yield _Made(batch, index, lane.state())
        except InputError as error:
            yield InputError(*error.args)


def _worker_init(parent: int, worker: int) -> None:
    die_with(parent)


def die_with(parent: int) -> None:
    """Have the kernel kill this process when its ``parent``, given by its number, is gone, even by SIGKILL.

    PyTorch's own watchdog looks only between two batches, and not while a worker waits for a server.
    """
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None, use_errno=True).prctl(set_parent_death_signal, signal.SIGKILL)
        if os.getppid() != parent:  # it was gone before the kernel knew
            os._exit(1)
