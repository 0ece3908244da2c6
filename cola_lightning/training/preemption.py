"""Being told to stop: a signal ends a run after a whole optimizer step that all ranks agree on.

Lightning's own way saves inside the signal handler, which may be in the middle of a collective operation, and asks
every rank at every batch with a broadcast that makes the device wait. Here ``signals`` takes note, and the training
loop looks.
"""

import os
import signal
import subprocess
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import distributed

from cola_lightning.errors import RankError
from cola_lightning.private_apis import ignore_signals, skip_sigterm_broadcast
from cola_lightning.signals import LISTENER, Phase

SECONDS_TO_FIND_EACH_OTHER = 300.0
"""How long a rank waits for the others at the start."""


class Preempted(SystemExit):
    """Ends the process after its checkpoint was written. Rank 0 exits as a signal would end it, 128 + its number; the
    others with 0, so that their launcher does not take them for crashed."""

    def __init__(self, number: int, rank: int) -> None:
        super().__init__(0 if rank else 128 + number)


class StopSignal:
    """Notes a signal, and finds a step at which every rank knows of it.

    Once an optimizer step, or a batch of a validation, the ranks begin to exchange what they have noted, on the CPU and
    beside the training; the answer is looked at one later, when it is there. So nothing waits, and all stop at the same
    place, at most two after the signal. A rank that is gone shows there too.

    Args:
        timeout: How long a rank waits for one that is alive but silent.
    """

    def __init__(self, timeout: timedelta = timedelta(minutes=30)) -> None:
        self.timeout = timeout
        self.group: distributed.ProcessGroup | None = None
        self.exchange: tuple[torch.Tensor, distributed.Work] | None = None

    def install(self, trainer: L.Trainer) -> None:
        """Look for signals from now on: training begins."""
        if trainer.world_size > 1:
            self.group = distributed.new_group(backend="gloo", timeout=self.timeout)
        skip_sigterm_broadcast(trainer)  # because this exchange replaces it
        LISTENER.phase = Phase.TRAINING

    def agreed(self) -> int:
        """The signal that all ranks are to stop for, or 0. Every rank calls this equally often.

        Raises:
            RuntimeError: If another rank is gone, or silent for longer than the timeout.
        """
        if self.group is None:
            return LISTENER.noted
        number = 0
        if self.exchange is not None:
            flag, work = self.exchange
            try:
                work.wait()
            except RuntimeError as error:
                raise RuntimeError(
                    "another process of this run is gone, so this one stops; the cause stands in that one's output. "
                    "Go on with --ckpt_path last"
                ) from error
            number = int(flag)
        flag = torch.tensor([LISTENER.noted])
        work = distributed.all_reduce(flag, distributed.ReduceOp.MAX, group=self.group, async_op=True)
        self.exchange = (flag, work)
        return number


def own_signals(trainer: L.Trainer) -> None:
    """Keep Lightning from listening to signals: its hooks would save in the middle of a step, under SLURM into the
    working directory, and go on from such a file at the next start.
    """
    ignore_signals(trainer)
    if trainer.is_global_zero:
        LISTENER.before_exit = requeue


def limit_rendezvous(trainer: L.Trainer, seconds: float = SECONDS_TO_FIND_EACH_OTHER) -> None:
    """End this process, with a line, if the ranks of a run do not find each other in so many seconds. The library that
    waits for a rank that died meanwhile would do so for half an hour."""
    strategy: Any = trainer.strategy
    find: Callable[[], None] = strategy.setup_environment

    def give_up() -> None:
        os.write(
            2,
            f"error: rank {trainer.global_rank} did not find the other {trainer.world_size - 1} ranks of this run "
            f"within {seconds:.0f} s; see what ended them, or --trainer.num_nodes, --trainer.devices, MASTER_ADDR "
            "and MASTER_PORT\n".encode(),
        )
        os._exit(1)

    def find_in_time() -> None:
        timer = threading.Timer(seconds, give_up)
        timer.daemon = True
        timer.start()
        try:
            find()
        finally:
            timer.cancel()

    if trainer.world_size > 1:
        strategy.setup_environment = find_in_time


def await_ranks(trainer: L.Trainer, seconds: float = 60.0) -> None:
    """Wait until the ranks that this one launched have ended: they are killed with it.

    Raises:
        InputError: If one failed.
    """
    for process in getattr(trainer.strategy.launcher, "procs", []):
        try:
            if status := process.wait(seconds):
                raise RankError(f"a process of this run ended with status {status}; its output says why")
        except subprocess.TimeoutExpired:
            process.kill()
            raise RankError(f"a process of this run had not ended after {seconds:.0f} s and was killed") from None


def requeue(number: int) -> None:
    """Ask SLURM to start the job again, where it sent SIGUSR1 before the time limit (``--signal=USR1@…``).

    SIGTERM asks for nothing: SLURM requeues by itself a job that it preempts, and one that is cancelled should end.
    """
    if number != signal.SIGUSR1 or "SLURM_JOB_ID" not in os.environ:
        return
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    if os.environ.get("SLURM_PROCID", "0") != "0":
        return
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
        problem = done.returncode and (done.stderr.strip() or f"exit status {done.returncode}")
    except OSError as error:  # in a container there may be no scontrol
        problem = str(error)
    if problem:
        rank_zero_warn(f"job {job} was not requeued ({problem}); start it again by hand, it goes on where it was")
    else:
        rank_zero_info(f"Requeued job {job}")
