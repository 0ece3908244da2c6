"""Time limits for the processes of a run: how long ranks wait for each other at its start and at its end."""

import os
import subprocess
import threading
from collections.abc import Callable
from typing import Any

import lightning as L

from cola_lightning.errors import RankError

SECONDS_TO_FIND_EACH_OTHER = 300.0
"""Seconds that a rank waits for the others at the start."""


def limit_rendezvous(trainer: L.Trainer, seconds: float = SECONDS_TO_FIND_EACH_OTHER) -> None:
    """End this process, with a line on standard error, if the ranks do not find each other within ``seconds``.

    torch would wait half an hour for a rank that died at the start.
    """
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
    """Wait until the ranks that this process launched have ended, because they are killed when it ends.

    Raises:
        RankError: If one failed, or has not ended after ``seconds``, in which case it is killed.
    """
    for process in getattr(trainer.strategy.launcher, "procs", []):
        try:
            if status := process.wait(seconds):
                raise RankError(f"a process of this run ended with status {status}; its output says why")
        except subprocess.TimeoutExpired:
            process.kill()
            raise RankError(f"a process of this run had not ended after {seconds:.0f} s and was killed") from None
