"""How a worker process of a data loader behaves: it ends with its parent, and does not lose a batch in silence."""

import ctypes
import os
import signal
import sys

from cola_lightning.private_apis import on_unsendable_item
from cola_lightning.signals import leave_signals_to_parent


def begin_worker(parent: int, worker: int) -> None:
    """Prepare this worker process; a ``worker_init_fn`` of PyTorch once ``parent``, the parent's number, is bound."""
    leave_signals_to_parent()
    end_on_unsendable_batch()
    end_with_parent(parent)


def end_on_unsendable_batch() -> None:
    """End this worker if a batch cannot be sent. Python's queue would print an error and drop the batch, and the
    training process would wait for it without end. It does notice the end of a worker."""

    def end(error: Exception, batch: object) -> None:
        os.write(
            2,
            f"error: a worker of the data could not send a batch: {error}; set --data.num_workers 0 to do without "
            "workers\n".encode(),
        )
        os._exit(1)

    on_unsendable_item(end)


def end_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent is gone, even by SIGKILL.

    PyTorch's own watchdog looks only between two batches, and not while a worker waits for a server.

    Args:
        parent: Number of the parent process.
    """
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None, use_errno=True).prctl(set_parent_death_signal, signal.SIGKILL)
        if os.getppid() != parent:  # it was gone before the kernel was told
            os._exit(1)
