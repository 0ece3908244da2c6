"""Being told to stop: SIGTERM and SIGUSR1 end a run after a whole optimizer step that all ranks agree on.

Lightning's own way saves inside the signal handler, which may be in the middle of a collective operation, and asks
every rank at every batch with a broadcast that makes the device wait. Here a handler does nothing but take note.
"""

import os
import signal
import subprocess
import threading
from datetime import timedelta
from types import FrameType

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import distributed

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


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
        self.noted = 0
        self.group: distributed.ProcessGroup | None = None
        self.exchange: tuple[torch.Tensor, distributed.Work] | None = None

    def install(self, trainer: L.Trainer) -> None:
        """Listen, from now until the trainer puts back the handlers it found."""
        if trainer.world_size > 1:
            self.group = distributed.new_group(backend="gloo", timeout=self.timeout)
        # This exchange replaces Lightning's, which is a broadcast on the device at each batch.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.noted = number

    def agreed(self) -> int:
        """The signal that all ranks are to stop for, or 0. Every rank calls this equally often.

        Raises:
            RuntimeError: If another rank is gone, or silent for longer than the timeout.
        """
        if self.group is None:
            return self.noted
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
        flag = torch.tensor([self.noted])
        work = distributed.all_reduce(flag, distributed.ReduceOp.MAX, group=self.group, async_op=True)
        self.exchange = (flag, work)
        return number


def requeue(number: int) -> None:
    """Ask SLURM to start the job again, where it sent SIGUSR1 before the time limit (``--signal=USR1@…``).

    SIGTERM asks for nothing: SLURM requeues by itself a job that it preempts, and one that is cancelled should end.
    """
    if number != signal.SIGUSR1 or "SLURM_JOB_ID" not in os.environ:
        return
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
        problem = done.returncode and (done.stderr.strip() or f"exit status {done.returncode}")
    except OSError as error:  # in a container there may be no scontrol
        problem = str(error)
    if problem:
        rank_zero_warn(f"job {job} was not requeued ({problem}); start it again by hand, it goes on where it was")
    else:
        rank_zero_info(f"Requeued job {job}")
