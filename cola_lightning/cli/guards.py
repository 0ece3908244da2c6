"""Guard a command while it runs: errors of libraries become one line."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.distributed import DistBackendError

from cola_lightning.callbacks.out_of_memory import out_of_memory
from cola_lightning.checkpoints.restore import explain_settings, lost_connection
from cola_lightning.errors import InputError, RankError

SETTINGS_ERRORS = (
    "conditioned on metric|but no `dataloader_idx` argument|Found more than one stateful callback"
    "|only supported on CUDA GPUs"
)
"""RuntimeErrors of Lightning about settings: EarlyStopping on a metric that the run does not log, validation data of
several loaders, the same callback twice, and DeepSpeed by another name than those that are checked before."""


class OutOfMemoryError(InputError):
    """The memory of the device does not suffice."""

    exit_status = 1


@contextmanager
def guard_run() -> Iterator[None]:
    """Turn errors of libraries about settings, memory and lost ranks into an InputError."""
    try:
        with explain_settings():
            yield
    except MisconfigurationException as error:
        raise InputError(str(error)) from error
    except RuntimeError as error:
        if re.search(SETTINGS_ERRORS, str(error)):
            raise InputError(str(error)) from error
        if lost_connection(error) and not isinstance(error, DistBackendError):  # NCCL's may have any other cause
            reason = " ".join(str(error).split())[:200]
            raise RankError(f"another process of this run ended; its output says why ({reason})") from error
        if not out_of_memory(error) or not getattr(error, "__notes__", None):
            raise
        what = str(error).rpartition("DefaultCPUAllocator: ")[2]
        short = OutOfMemoryError(what.split(". ")[0])
        for note in error.__notes__:
            short.add_note(note)
        raise short from error
