"""Which checkpoint of a run to go on from."""

import os
import re
import time
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn

from cola_lightning.checkpoints.manifest import find_corruption
from cola_lightning.errors import InputError

LINK = "last.ckpt"
PARTIAL = ".partial"
"""Ending of what is still being written."""
_NAME = re.compile(r"step_(\d+)\.ckpt")


def checkpoint_name(step: int) -> str:
    """Name the checkpoint of so many optimizer steps."""
    return f"step_{step:08}.ckpt"


def step_of(path: Path) -> int | None:
    """Return the optimizer steps behind a checkpoint of :class:`Checkpoints`, by its name; ``last.ckpt`` that is a
    file or folder of its own, as in a copy whose links were followed, is opened. None where it is another's file."""
    if match := _NAME.fullmatch(path.name):
        return int(match[1])
    if path.name != LINK or path.is_symlink():
        return None
    from cola_lightning.checkpoints.formats import read_state  # not above: it needs torch's readers, this does not

    try:
        return int(read_state(path)["global_step"])
    except Exception:  # damage shows in many ways; it is named where the checkpoint would be used
        return -1


def written(folder: Path) -> list[Path]:
    """List the finished checkpoints of a run's folder, the newest first; not the link to the newest, and nothing that
    another callback or the user put there.

    They are ordered by their steps, because times are lost in copies. Checkpoints beyond the one that the link names
    are of a branch that the run left when it went back, so they come last.

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
    return sorted(steps, key=lambda path: (path not in left, steps[path], path.name != LINK), reverse=True)


def latest_valid(folder: Path, patience: float = 30.0) -> Path | None:
    """Find the newest checkpoint of a run's folder that is whole by its checksums; name damaged ones in a warning.

    Args:
        folder: Where the run writes its checkpoints.
        patience: Seconds for which a folder that cannot be read is tried again.

    Returns:
        None where there is none at all.

    Raises:
        InputError: If the folder cannot be read; a run must not begin anew because of that.
    """
    deadline = time.monotonic() + patience
    while True:
        try:
            found = written(folder)
            break
        except OSError as error:
            if time.monotonic() >= deadline:
                raise InputError(
                    f"{folder} cannot be read ({error}), so it is unknown from which checkpoint to go on; see to the "
                    "disk, or name a checkpoint by --ckpt_path"
                ) from error
            time.sleep(1)
    for path in found:
        if (problem := find_corruption(path)) is None:
            return path
        rank_zero_warn(f"{path} is damaged ({problem}); the checkpoint before it is used, if there is one")
    return None
