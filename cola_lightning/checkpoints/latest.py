"""List the checkpoints of a run, and find the one to resume from."""

import os
import re
import time
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn

from cola_lightning.checkpoints.manifest import find_corruption
from cola_lightning.errors import InputError

LINK = "last.ckpt"
"""Name of the link to the newest checkpoint."""

PARTIAL = ".partial"
"""Ending of the name of a checkpoint that is still being written."""

_NAME = re.compile(r"step_(\d+)\.ckpt")


def checkpoint_name(step: int) -> str:
    """Make the name of a checkpoint from its number of optimizer steps."""
    return f"step_{step:08}.ckpt"


def step_of(path: Path) -> int | None:
    """Return the number of optimizer steps of a checkpoint that :class:`Checkpoints` has written.

    The number is in the name. ``last.ckpt`` is usually a link. In a copy that has followed links it is a checkpoint
    itself, which is opened to read its step.

    Returns:
        None if the file is not of this callback, or is the link; -1 if the checkpoint cannot be read.
    """
    if match := _NAME.fullmatch(path.name):
        return int(match[1])
    if path.name != LINK or path.is_symlink():
        return None
    from cola_lightning.checkpoints.formats import read_state  # imported here, because only this case needs torch

    try:
        return int(read_state(path)["global_step"])
    except Exception:  # damage has many forms; latest_valid reports it
        return -1


def written(folder: Path) -> list[Path]:
    """List the finished checkpoints in a run's folder, the newest first.

    The link to the newest is left out, and so are files of other callbacks and of the user. The order is by steps,
    because a copy does not keep times. A checkpoint with more steps than the one that the link names comes last,
    because the run left it behind when it went back to an earlier step.

    Raises:
        OSError: If the folder cannot be read.
    """
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    steps = {path: step for path in (folder / name for name in names) if (step := step_of(path)) is not None}
    link = folder / LINK
    current = step_of(Path(os.readlink(link))) if link.is_symlink() and link.exists() else None
    left = {path for path, step in steps.items() if current is not None and step > current}
    # Example: steps 10, 20 and 30 are there, and the run went back and wrote 20 last, so that the link names it. The
    # order is 20, 10, 30. If last.ckpt is a copy of step 20 instead of a link, the order is by steps alone: 30, 20,
    # last.ckpt, 10.
    return sorted(steps, key=lambda path: (path not in left, steps[path], path.name != LINK), reverse=True)


def latest_valid(folder: Path, patience: float = 30.0) -> Path | None:
    """Find the newest checkpoint in a run's folder with matching checksums. Warn of each damaged one.

    Args:
        folder: Folder into which the run writes its checkpoints.
        patience: Seconds for which reading the folder is tried again after an error.

    Returns:
        The checkpoint; None if there is none.

    Raises:
        InputError: If the folder cannot be read. A run must not start from the beginning because of that.
    """
    deadline = time.monotonic() + patience
    while True:
        try:
            found = written(folder)
            break
        except OSError as error:
            if time.monotonic() >= deadline:
                raise InputError(
                    f"{folder} cannot be read ({error}), so it is unknown which checkpoint to resume from; check the "
                    "disk, or name a checkpoint by --ckpt_path"
                ) from error
            time.sleep(1)
    for path in found:
        if (problem := find_corruption(path)) is None:
            return path
        rank_zero_warn(f"{path} is damaged ({problem}); the checkpoint before it is used, if there is one")
    return None
