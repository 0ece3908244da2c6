"""Keep the newest checkpoints of a folder: make room for a new one, link to the newest, delete old ones.

Only files named ``step_….ckpt`` are touched, and never the newest of them. Rank 0 alone calls these functions.
"""

import errno
import os
import shutil
from contextlib import suppress
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn

from cola_lightning.checkpoints.latest import LINK, PARTIAL, checkpoint_name, step_of, written
from cola_lightning.checkpoints.writer import remove, size

_FULL = [os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT)] + ["PytorchStreamWriter failed"]
"""Texts by which a full disk shows in an error, also through torch's zip writer."""


def says_disk_is_full(problem: str | None) -> bool:
    """Return whether a text of an error says that a disk or a quota is full."""
    return problem is not None and any(text in problem for text in _FULL)


def make_room(folder: Path, keep: int) -> None:
    """Delete the oldest checkpoint before a new one is written, if there is room for one only after that.

    A new checkpoint is assumed to be as large as the newest, with 5 % in reserve.
    """
    with suppress(OSError):
        found = written(folder)  # the newest first
        if len(found) >= keep:
            free, needed = shutil.disk_usage(folder).free, size(found[0])
            if free < 1.05 * needed <= free + size(found[-1]):
                free_oldest(folder, keep)


def free_oldest(folder: Path, keep: int) -> bool:
    """Delete the oldest checkpoint of a full folder if there are ``keep`` or more; return whether that was done."""
    with suppress(OSError):
        found = written(folder)
        if len(found) >= keep:
            rank_zero_warn(f"{folder} is full: {found[-1].name} is removed before a newer checkpoint is written")
            remove(found[-1])
            return True
    return False


def point_to(path: Path) -> None:
    """Let ``last.ckpt`` link to this checkpoint. If it cannot, delete the link: without it, the highest step counts."""
    link = path.with_name(LINK)
    try:
        if not link.is_symlink() and link.exists():
            # A copy of the folder that followed links has a whole checkpoint here: give it the name of its step.
            own = path.with_name(checkpoint_name(max(0, step_of(link) or 0)))
            if own.exists():
                remove(link)
            else:
                os.replace(link, own)
        # Make the link beside its place and rename it, so that there is a link at every moment.
        fresh = link.with_name(LINK + PARTIAL)
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(path.name)
        os.replace(fresh, link)
    except OSError as error:
        rank_zero_warn(f"{link} could not be changed ({error}); the newest checkpoint is {path}")
        with suppress(OSError):
            if link.is_symlink():
                link.unlink()


def remove_old(folder: Path, keep: int) -> None:
    """Delete all but the newest ``keep`` checkpoints."""
    try:
        for old in written(folder)[keep:]:
            remove(old)
    except OSError as error:
        rank_zero_warn(f"an old checkpoint in {folder} could not be removed ({error}); it is tried again")
