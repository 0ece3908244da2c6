"""Command lines in processes of their own, forked from one that has imported everything: imports take longer than a
small run. They end when the comparison does, however it ends."""

import os
import sys
import time
from multiprocessing import get_context
from pathlib import Path
from threading import Thread

PRELOAD = ["cola_lightning.cli.app"]


def run(flags: list[str], log: Path, threads: int) -> int:
    """Run a command line, its output added to a file, and wait for it; the exit status, negative for a signal."""
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    process = context.Process(target=_child, args=(flags, str(log), threads, os.getpid()))
    process.start()
    process.join()
    return process.exitcode or 0


def _child(flags: list[str], log: str, threads: int, comparison: int) -> None:
    import torch

    from cola_lightning.cli.app import main  # not above: the command line imports this package

    Thread(target=_end_with, args=(comparison,), daemon=True).start()
    with open(log, "ab", buffering=0) as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    torch.set_num_threads(threads)
    main(flags)


def _end_with(comparison: int) -> None:
    """End when the comparison has, also by SIGKILL: the process that forks outlives it."""
    while True:
        time.sleep(0.2)
        try:
            os.kill(comparison, 0)
        except ProcessLookupError:
            os._exit(1)
