"""Set how the C library allocates memory, where a network is trained on a processor."""

import ctypes
import os
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Numbers of two options in glibc's malloc.h."""
_SET_BY_USER = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> None:
    """Keep memory that was freed for the next allocation, in this process, where the C library is glibc.

    A training step allocates what the last one freed. By default glibc returns large blocks to the kernel, which has to
    clear each page again: 3 to 7 % of a step's processor time (measured in docs/lab_log.md). Nothing is changed if the
    user has set the thresholds by environment.
    """
    if sys.platform != "linux" or any(name in os.environ for name in _SET_BY_USER):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is None:
        return
    if not mallopt(_MMAP_THRESHOLD, 2**30):
        mallopt(_MMAP_THRESHOLD, 2**25)  # the most that an older glibc accepts
    mallopt(_TRIM_THRESHOLD, 2**31 - 1)
