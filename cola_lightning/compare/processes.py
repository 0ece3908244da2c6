"""Run functions in processes of their own, forked from one that has imported everything, because imports take longer
than a small run. The processes end when the comparison does, however it ends."""

import io
import os
import sys
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from threading import Thread
from typing import Any


def run(function: Callable[..., Any], arguments: tuple[Any, ...], log: Path, threads: int) -> int:
    """Call a function in a process of its own, and wait for it.

    Args:
        function: A function of a module, so that it can be named to the process.
        arguments: Its arguments.
        log: What the process prints is added to this file.
        threads: Of torch.

    Returns:
        The exit status, negative for a signal.
    """
    context = get_context("forkserver")
    # What this process has imported, the server imports once for all.
    context.set_forkserver_preload(sorted(name for name in sys.modules if name.startswith("cola_lightning.")))
    process = context.Process(target=_child, args=(function, arguments, str(log), threads, os.getpid()))
    process.start()
    process.join()
    return process.exitcode or 0


def _child(function: Callable[..., Any], arguments: tuple[Any, ...], log: str, threads: int, comparison: int) -> None:
    import torch

    Thread(target=_end_with, args=(comparison,), daemon=True).start()
    with open(log, "ab", buffering=0) as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)
    torch.set_num_threads(threads)
    function(*arguments)


def _end_with(comparison: int) -> None:
    """End when the comparison has, also by SIGKILL: the process that forks outlives it."""
    while True:
        time.sleep(0.2)
        try:
            os.kill(comparison, 0)
        except ProcessLookupError:
            os._exit(1)
