"""Which checkpoint of a run to go on from."""

from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn

from cola_lightning.checkpoints.integrity import damage

LINK = "last.ckpt"
PARTIAL = ".partial"
"""Ending of what is still being written."""


def written(folder: Path) -> list[Path]:
    """The finished checkpoints of a run's folder, the newest first; not the link to the newest."""
    found = [path for path in folder.glob("*.ckpt") if not path.is_symlink()]
    found.sort(key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True)
    link = folder / LINK
    if link.is_symlink() and link.exists():
        newest = link.resolve()
        found.sort(key=lambda path: path.resolve() != newest)
    return found


def newest_whole(folder: Path) -> Path | None:
    """The newest checkpoint of a run's folder that is whole, by its checksums; damaged ones are named in a warning.

    Returns:
        None where there is none at all.
    """
    for path in written(folder):
        if (problem := damage(path)) is None:
            return path
        rank_zero_warn(f"{path} is damaged ({problem}); the checkpoint before it is used, if there is one")
    return None
