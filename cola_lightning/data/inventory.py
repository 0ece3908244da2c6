"""Say what a source was found to hold, and what of its folders was left out."""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cola_lightning.data.remote import is_local

_NAMED = 3  # files that a line names


def describe(
    title: str, files: Sequence[str], folders: Iterable[str] = (), filesystem: Any = None, others: Sequence[str] = ()
) -> list[str]:
    """Make the lines that a run says at its start about a source.

    Args:
        title: What it is called.
        files: Paths or addresses that are read.
        folders: Folders on a disk that they were looked for in; what else they hold is listed.
        filesystem: Of the files that are not on a disk, where it is known; asked only for what it knows already.
        others: Files that belong to other splits.
    """
    sizes = _sizes(files, filesystem)
    known = f", {_bytes(sum(size for size in sizes if size is not None))}" if None not in sizes else ""
    lines = [f"{title}: {len(files):,} file{'s' * (len(files) != 1)}{known}"]
    for folder in folders:
        if left := _left_out(
            Path(folder).expanduser(), {Path(name).resolve() for name in [*files, *others] if is_local(name)}
        ):
            lines.append(f"{title}: left out in {folder}: " + "; ".join(left))
    return lines


def _left_out(folder: Path, files: set[Path]) -> list[str]:
    groups: dict[str, list[str]] = {}
    for root, folders, names in os.walk(folder):
        for name in sorted(folders):
            path = Path(root, name)
            hidden, linked = name.startswith("."), path.is_symlink()
            if hidden or linked:
                groups.setdefault("hidden folders" if hidden else "linked folders", []).append(name)
        folders[:] = [name for name in folders if not name.startswith(".") and not Path(root, name).is_symlink()]
        for name in sorted(names):
            if Path(root, name).resolve() not in files:
                kind = "hidden files" if name.startswith(".") else "other files"
                groups.setdefault(kind, []).append(name)
    found = Counter({kind: len(names) for kind, names in groups.items()})
    return [
        f"{count} {kind} ({', '.join(groups[kind][:_NAMED])}{', …' * (count > _NAMED)})"
        for kind, count in sorted(found.items())
    ]


def _sizes(files: Sequence[str], filesystem: Any) -> list[int | None]:
    known: dict[str, int | None] = {}
    if filesystem is not None:
        known = {entry["name"]: entry["size"] for entries in filesystem.dircache.values() for entry in entries}
    return [
        os.path.getsize(name.removeprefix("file://")) if is_local(name) else known.get(name.partition("://")[2])
        for name in files
    ]


def _bytes(count: int) -> str:
    size, units = float(count), ["bytes", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:,.0f} bytes" if units[0] == "bytes" else f"{size:,.1f} {units[0]}"
