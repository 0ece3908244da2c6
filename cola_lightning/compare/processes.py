"""Run functions in processes of their own.

The processes are forked from a server that has imported everything, because imports take longer than a small run. They
end when the comparison ends, also by SIGKILL.
"""

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
        log: File to which the output of the process is appended.
        threads: Threads of torch.

    Returns:
        The exit status; the negative number of a signal.
    """
    context = get_context("forkserver")
    # The server imports once what this process has imported.
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
    """End when the comparison has ended, also by SIGKILL. The server that forks would outlive it."""
    while True:
        time.sleep(0.2)
        try:
            os.kill(comparison, 0)
        except ProcessLookupError:
            os._exit(1)
