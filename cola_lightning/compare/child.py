"""Command lines in processes of their own, forked from one that has imported everything: imports take longer than a
small run. They end when the comparison does, however it ends."""

import os
import sys
from multiprocessing import get_context
from pathlib import Path

PRELOAD = ["cola_lightning.cli"]


def run(flags: list[str], log: Path, threads: int) -> int:
    """Run a command line, its output added to a file, and wait for it; the exit status, negative for a signal."""
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    process = context.Process(target=_child, args=(flags, str(log), threads))
    process.start()
    process.join()
    return process.exitcode or 0


def _child(flags: list[str], log: str, threads: int) -> None:
    import torch

    from cola_lightning.cli import main  # not above: the command line imports this package
    from cola_lightning.data.stream import die_with

    die_with(os.getppid())
    with open(log, "ab", buffering=0) as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    torch.set_num_threads(threads)
    main(flags)
