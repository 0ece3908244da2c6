"""How a worker process of a data loader starts, ends with its parent, and reports what it cannot do."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from multiprocessing.util import Finalize
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from cola_lightning.errors import InputError
from cola_lightning.private_apis.multiprocessing import on_unsendable_item
from cola_lightning.signals import die_with_parent, leave_signals_to_parent, tell


def start_loader(dataset: Dataset, workers: int, **options: Any) -> Iterator[Any]:
    """Begin to iterate a data set by torch's loader, whose workers are started now.

    Args:
        dataset: The data set. What it yields or is collated to goes to page-locked memory where there is a GPU.
        workers: Processes that read ahead; 0 for none.
        options: Further arguments of ``DataLoader``.

    Raises:
        InputError: If the system has no place for their semaphores, or starts no more processes.
    """
    loader: DataLoader = DataLoader(
        dataset,
        num_workers=workers,
        worker_init_fn=partial(begin_worker, os.getpid()),
        pin_memory=torch.cuda.is_available(),
        **options,
    )
    if not workers:
        return iter(loader)
    try:
        # PyTorch's iterator prints a traceback at its deletion if it was made in part. So see first whether there is
        # room for its semaphores: those of an event, of a queue of results, and of a queue of each worker.
        context = loader.multiprocessing_context or multiprocessing
        needed = [context.Event(), *(context.Queue() for _ in range(1 + workers))]
        del needed
        return iter(loader)
    except OSError as error:
        raise InputError(
            f"the {workers} workers of the data could not be started: {error}; make room in /dev/shm, where "
            "their semaphores are (docker run --shm-size), or in memory, or do without workers: --data.num_workers 0"
        ) from None


def begin_worker(parent: int, worker: int) -> None:
    """Prepare this worker process; a ``worker_init_fn`` of PyTorch once ``parent``, the parent's number, is bound."""
    leave_signals_to_parent()
    end_on_sigterm_of(parent)
    end_on_unsendable_batch()
    end_with_parent(parent)
    # Runs last of all that a process does at its end: it has the lowest priority.
    Finalize(None, _end_well, exitpriority=-1000)


def end_on_unsendable_batch() -> None:
    """End this worker if a batch cannot be sent. Python's queue would print an error and drop the batch, and the
    training process would wait for it without end. It does notice the end of a worker."""

    def end(error: Exception, batch: object) -> None:
        tell(f"error: a worker of the data could not send a batch: {error}; do without workers: --data.num_workers 0")
        os._exit(1)

    on_unsendable_item(end)


def end_with_parent(parent: int) -> None:
    """Let this process end when its parent is gone, even by SIGKILL.

    PyTorch's own watchdog looks only between two batches, and not while a worker waits for a server.

    Args:
        parent: Number of the process that started this one.
    """
    if multiprocessing.get_start_method(allow_none=True) == "forkserver":
        # The kernel has the server for the parent, which may live on.
        threading.Thread(target=_wait_for_parent, args=(parent,), daemon=True, name="parent").start()
    elif sys.platform == "linux":
        die_with_parent()
        if os.getppid() != parent:  # it was gone before the kernel was told
            _end_without_parent(parent)


def _wait_for_parent(parent: int) -> None:
    if process := multiprocessing.parent_process():
        process.join()
        _end_without_parent(parent)


def _end_without_parent(parent: int) -> None:
    tell(f"error: process {parent}, which started this worker, has ended; so does the worker")
    os._exit(1)


def end_on_sigterm_of(parent: int) -> None:
    """End this worker at once, with exit status 0, when its parent sends SIGTERM, and ignore SIGTERM of others.

    PyTorch sends it to a worker that has not ended five seconds after it was told to. A launcher sends it to all
    processes of a run, and then the run needs its data until it stops.
    """
    if sys.platform == "linux":
        # Only a waiting thread learns who sent a signal; the mask keeps it from being delivered elsewhere.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_wait_for_sigterm, args=(parent,), daemon=True, name="sigterm").start()


def _wait_for_sigterm(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def _end_well() -> None:
    """End this process with exit status 0 unless an exception ends it.

    What Python does after this can fail without a message, and PyTorch takes that for a crash of the worker: a worker
    that was started in a thread of a ``ThreadPoolExecutor`` waits for that thread, which it is itself.
    """
    if sys.exc_info()[0] is None:
        for stream in (sys.stdout, sys.stderr):
            with suppress(AttributeError, OSError, ValueError):  # no stream, a closed pipe, a closed stream
                stream.flush()
        os._exit(0)
