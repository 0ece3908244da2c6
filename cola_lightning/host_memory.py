"""Refuse settings whose least need of memory is beyond what this machine has, before any work starts.

Only what certainly has to be held is counted, and so much less than a run needs: this is for slips of the keyboard
(one digit too many), which else are waited for, or end in a library.
"""

import os
import resource
from pathlib import Path

from cola_lightning.errors import InputError

_CGROUP = Path("/sys/fs/cgroup/memory.max")
BYTES_PER_TOKEN = 16
"""Bytes of a token in a batch: ``input_ids`` and ``labels``, int64."""


def check_memory(needed: float, what: str, fix: str) -> None:
    """Compare what would be held with the memory of this machine.

    Args:
        needed: Bytes.
        what: What they are of, with flags and values, for the message.
        fix: What to do, for the message.

    Raises:
        InputError: If it cannot be held.
    """
    if needed > (most := memory_of_machine()):
        raise InputError(
            f"{what} would take {needed / 2**30:,.0f} GiB of memory; this machine has {most / 2**30:,.0f} GiB; {fix}"
        )


def check_batch(batch_size: int, sequence_length: int, micro_batches: int = 1) -> None:
    """Check the memory of the token ids of an optimizer step's micro-batches, which are read together."""
    steps = f" times --trainer.accumulate_grad_batches {micro_batches}" if micro_batches > 1 else ""
    check_memory(
        batch_size * sequence_length * micro_batches * BYTES_PER_TOKEN,
        f"a batch of --data.batch_size {batch_size} rows of --data.sequence_length {sequence_length} tokens{steps}",
        "lower one of them",
    )


def check_workers(num_workers: int) -> None:
    """Check the memory of processes that read ahead: 16 MiB each, less than half of what Python alone takes."""
    check_memory(num_workers * 2**24, f"--data.num_workers {num_workers}", "take about as many as there are cores")


def memory_of_machine() -> float:
    """Bytes that a process can have: of the machine, its container, or the limit that the shell set (ulimit -v)."""
    found = [float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))]
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        found.append(limit)
    try:
        text = _CGROUP.read_text().strip()
    except OSError:
        text = "max"
    return min([*found, float(text)] if text.isdigit() else found)
