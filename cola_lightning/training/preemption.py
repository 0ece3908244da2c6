"""SIGTERM, SIGINT, SIGHUP, SIGUSR1: end a run after a whole optimizer step, the same one on all ranks.

A signal passes these steps:

1. ``signals.Listener`` notes its number, in a thread. The training loop runs on.
2. After each optimizer step, ``callbacks.Checkpoints`` calls :meth:`StopSignal.agreed`, by which all ranks exchange
   what they have noted.
3. When all ranks know of the signal, ``Checkpoints`` saves the step, asks SLURM to requeue the job (SIGUSR1), and
   raises :class:`Preempted`.

Lightning saves inside the signal handler instead, which may run in the middle of a collective operation, and broadcasts
at every batch, for which the host waits.
"""

import os
import signal
import subprocess
from datetime import timedelta

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import distributed

from cola_lightning.private_apis.lightning import ignore_signals, skip_sigterm_broadcast
from cola_lightning.signals import LISTENER, Phase


class Preempted(SystemExit):
    """End the process after its checkpoint was written.

    Rank 0 exits with 128 + the signal's number, as shells report it. Other ranks exit with 0, because a launcher treats
    any other status as a crash.
    """

    def __init__(self, number: int, rank: int) -> None:
        super().__init__(0 if rank else 128 + number)


SILENCE = timedelta(minutes=30)
"""How long a rank waits for one that is alive but silent."""


class StopSignal:
    """Find an optimizer step at which every rank knows of a signal.

    After each optimizer step, and after each batch of a validation, every rank starts an all-reduce of the number that
    it has noted. It runs on the CPU (gloo) beside the training, and its result is read one step later, when it has
    arrived. So no rank waits, and all ranks stop at the same step, at most two after the signal. Example, with SIGTERM
    (15) at rank 1 during step 7:

    ====== ============================= ===========================
    after  all-reduce starts with        result read
    ====== ============================= ===========================
    step 6 rank 0: 0, rank 1: 0          of step 5: 0
    step 7 rank 0: 0, rank 1: 15         of step 6: 0
    step 8 not needed                    of step 7: 15, so all stop
    ====== ============================= ===========================

    The all-reduce fails on every rank if one is gone.
    """

    def __init__(self) -> None:
        self.group: distributed.ProcessGroup | None = None
        self.exchange: tuple[torch.Tensor, distributed.Work] | None = None

    def install(self, trainer: L.Trainer) -> None:
        """Begin to exchange signals, as training begins. From now on, a signal no longer ends the process at once."""
        if trainer.world_size > 1:
            self.group = distributed.new_group(backend="gloo", timeout=SILENCE)
        skip_sigterm_broadcast(trainer)  # because this exchange replaces it
        LISTENER.phase = Phase.TRAINING

    def agreed(self) -> int:
        """Return the number of the signal for which all ranks stop now, or 0. Every rank calls this equally often.

        Raises:
            RuntimeError: If another rank is gone, or silent for ``SILENCE``.
        """
        if self.group is None:
            return LISTENER.noted
        # Read the result of the exchange that the call before started.
        number = 0
        if self.exchange is not None:
            flag, work = self.exchange
            try:
                work.wait()
            except RuntimeError as error:
                raise RuntimeError(
                    "another process of this run is gone, so this one stops; the output of that process "
                    "says why. Go on with --ckpt_path last"
                ) from error
            number = int(flag)
        # Start the next exchange. The maximum is a signal's number if any rank has noted one.
        flag = torch.tensor([LISTENER.noted])
        work = distributed.all_reduce(flag, distributed.ReduceOp.MAX, group=self.group, async_op=True)
        self.exchange = (flag, work)
        return number


def own_signals(trainer: L.Trainer) -> None:
    """Keep Lightning from handling signals, and let rank 0 requeue the job if a signal comes before training.

    Lightning's handlers save in the middle of a step. Under SLURM they save into the working directory, and the next
    start goes on from that file.
    """
    ignore_signals(trainer)
    if trainer.is_global_zero:
        LISTENER.before_exit = requeue


def requeue(number: int) -> None:
    """Ask SLURM to start the job again, if it sent SIGUSR1 before the time limit (``--signal=USR1@…``).

    For SIGTERM there is nothing to do: SLURM requeues a job that it preempts by itself, and a job that is cancelled
    must end.
    """
    if signal.Signals(number).name != "SIGUSR1" or "SLURM_JOB_ID" not in os.environ:
        return
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    if os.environ.get("SLURM_PROCID", "0") != "0":
        return
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
        problem = done.returncode and (done.stderr.strip() or f"exit status {done.returncode}")
    except OSError as error:  # a container may have no scontrol
        problem = str(error)
    if problem:
        rank_zero_warn(f"job {job} was not requeued ({problem}); start it again by hand, it goes on where it was")
    else:
        rank_zero_info(f"Requeued job {job}")
