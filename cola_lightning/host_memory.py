"""Refuse settings that need more memory than this machine has, before any work starts.

Only the memory that is certainly needed is counted, which is much less than a run needs. These checks are for typing
errors, such as one digit too many. Without them the user would wait, and then get an error from a library.
"""

import math
import os
from pathlib import Path

from cola_lightning.errors import InputError, check_at_least

try:
    import resource
except ImportError:  # on Windows
    resource = None  # type: ignore[assignment]

_CGROUP = Path("/sys/fs/cgroup/memory.max")
GIB = 2**30
"""Bytes of a GiB."""
BYTES_PER_TOKEN = 16
"""Bytes of a token in a batch: ``input_ids`` and ``labels``, int64."""


def check_memory(needed: float, what: str, fix: str) -> None:
    """Compare an amount of memory with that of this machine.

    Args:
        needed: Bytes.
        what: What needs them, with flags and values, for the message.
        fix: Remedy for the user, for the message.

    Raises:
        InputError: If the machine has less.
    """
    if needed > (most := memory_of_machine()):
        raise InputError(
            f"{what} would take {needed / GIB:,.0f} GiB of memory; this machine has {most / GIB:,.0f} GiB; {fix}"
        )


def check_batch(batch_size: int, sequence_length: int, micro_batches: int = 1) -> None:
    """Check the memory of the token ids of one optimizer step, because its micro-batches are read together.

    Args:
        batch_size: Rows of a micro-batch.
        sequence_length: Tokens of a row (T).
        micro_batches: Micro-batches of an optimizer step.

    Raises:
        InputError: If the machine has less.
    """
    steps = f" times --trainer.accumulate_grad_batches {micro_batches}" if micro_batches > 1 else ""
    check_memory(
        batch_size * sequence_length * micro_batches * BYTES_PER_TOKEN,
        f"a batch of --data.batch_size {batch_size} rows of --data.sequence_length {sequence_length} tokens{steps}",
        "lower one of them",
    )


def check_workers(num_workers: int) -> None:
    """Check the number of worker processes, and their memory, 16 MiB each: less than half of what Python alone takes.

    Raises:
        InputError: If there are fewer than none, or the machine has less memory.
    """
    check_at_least(0, "--data.", num_workers=num_workers)
    check_memory(num_workers * 2**24, f"--data.num_workers {num_workers}", "take about as many as there are cores")


def memory_of_machine() -> float:
    """Return the bytes that a process can have: the least of the machine's, the container's and the shell's limit.

    The shell's limit is that of ``ulimit -v``. Where none can be asked for, as on Windows, this is infinity, so
    that nothing is refused.
    """
    found = [math.inf]
    if hasattr(os, "sysconf"):
        found.append(float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")))
    if resource is not None and (limit := resource.getrlimit(resource.RLIMIT_AS)[0]) != resource.RLIM_INFINITY:
        found.append(limit)
    try:
        text = _CGROUP.read_text().strip()
    except OSError:
        text = "max"
    return min([*found, float(text)] if text.isdigit() else found)
