"""Run functions in processes of their own.

The processes are forked from a server that has imported everything, because imports take longer than a small run. They
end when the comparison ends, also by SIGKILL. The server does not look for a GPU, because a process cannot use one that
its parent has initialized.
"""

import io
import os
import signal
import sys
from collections.abc import Callable, Sequence
from multiprocessing import forkserver, get_context
from multiprocessing.connection import wait
from pathlib import Path
from threading import Lock
from typing import Any

from cola_lightning.data.worker_process import end_with_parent

IMPORTED_LATE = ("attrs", "pydantic.main", "pydantic.type_adapter", "torch.profiler", "torch.utils.tensorboard")
"""Modules that a run imports only when it needs them."""
_LOCK = Lock()


def start_server(also: Sequence[str] = ()) -> None:
    """Start the server, which imports once what this process has imported, while this process does other things.

    Args:
        also: Other modules that it imports; those that are not installed are left out.
    """
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # a look for a GPU does not initialize CUDA then
    own = sorted(name for name in sys.modules if name.startswith("cola_lightning."))
    forkserver.set_forkserver_preload([*IMPORTED_LATE, *also, *own])
    forkserver.ensure_running()


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
    process = get_context("forkserver").Process(
        target=_child, args=(function, arguments, str(log), threads, os.getpid())
    )
    with _LOCK:
        start_server()  # unless it runs
        process.start()
    wait([process.sentinel])
    # A start reads the exit statuses of all other processes. If two threads read the same one at a time, one of them
    # gets nothing, and the standard library takes the process to have failed.
    with _LOCK:
        process.join()
        return process.exitcode or 0


def _child(function: Callable[..., Any], arguments: tuple[Any, ...], log: str, threads: int, comparison: int) -> None:
    import torch

    end_with_parent(comparison)
    with open(log, "ab", buffering=0) as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)
    torch.set_num_threads(threads)
    try:
        function(*arguments)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)  # as a shell reports it; multiprocessing would report 1, like any other exception
