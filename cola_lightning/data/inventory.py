"""Describe the files of a source, and those of its folders that were left out."""

import os
from collections.abc import Iterable, Sequence
from math import gcd
from pathlib import Path
from typing import Any

from cola_lightning.data.readers import is_lines, is_plain_lines
from cola_lightning.data.remote import is_local

_NAMED = 3  # files that a line names


def describe(
    title: str,
    files: Sequence[str],
    folders: Iterable[str] = (),
    filesystem: Any = None,
    others: Sequence[str] = (),
    repeated: int = 0,
    left_out: Sequence[str] = (),
) -> list[str]:
    """Return the lines about a source that a run prints at its start.

    Args:
        title: Name of the source.
        files: Paths or addresses of the files that are read.
        folders: Folders on a disk that were searched; other files in them are listed as left out.
        filesystem: File system of files that are not on a disk, if known. Only its cached list of files is used.
        others: Files of other splits, which are not listed as left out.
        repeated: Number of files that several of the user's patterns match.
        left_out: Files that the user's patterns match but that are not read.
    """
    sizes = _sizes(files, filesystem)
    known = f", {_bytes(sum(size for size in sizes if size is not None))}" if None not in sizes else ""
    lines = [f"{title}: {_count(len(files), 'file')}{known}"]
    if repeated:
        lines.append(f"{title}: {_count(repeated, 'file')} named more than once, read once")
    in_folders = [Path(folder).expanduser().resolve() for folder in folders]  # their lines list these files too
    left_out = [name for name in left_out if not any(map(Path(name).resolve().is_relative_to, in_folders))]
    if left_out:
        lines.append(f"{title}: left out: {_count(len(left_out), 'other file')} {_some(left_out)}")
    for folder in folders:
        if left := _left_out(
            Path(folder).expanduser(), {Path(name).resolve() for name in [*files, *others] if is_local(name)}
        ):
            lines.append(f"{title}: left out in {folder}: " + "; ".join(left))
    return lines


def describe_repeated_reads(title: str, files: Sequence[str], num_logical_shards: int) -> list[str]:
    """Return a line if a pass reads compressed JSON Lines 1.25 times or more on average.

    S files are opened S + L - gcd(S, L) times in a pass of L logical shards. Example: 15 files and 16 logical shards,
    15 + 16 - 1 = 30 times, twice each. Plain JSON Lines and Parquet can be read from the middle; a compressed file is
    decompressed from its beginning each time.
    """
    packed = sum(is_lines(name) and not is_plain_lines(name) for name in files)
    times = (len(files) + num_logical_shards - gcd(len(files), num_logical_shards)) / max(1, len(files))
    if not packed or times < 1.25:
        return []
    return [
        f"{title}: {_count(packed, 'compressed file')} for {num_logical_shards} logical shards; a pass reads each "
        f"{times:.1f} times on average, because compressed lines cannot be read from the middle: unpack or prepare "
        f"them, or cut them into a multiple of {num_logical_shards} files"
    ]


def _left_out(folder: Path, files: set[Path]) -> list[str]:
    groups: dict[str, list[str]] = {}
    for root, folders, names in os.walk(folder):
        for name in sorted(folders):
            hidden = name.startswith(".")
            if hidden or Path(root, name).is_symlink():
                groups.setdefault("hidden folder" if hidden else "linked folder", []).append(name)
                folders.remove(name)  # os.walk does not enter it then
        for name in sorted(names):
            if Path(root, name).resolve() not in files:
                kind = "hidden file" if name.startswith(".") else "other file"
                groups.setdefault(kind, []).append(name)
    return [f"{_count(len(names), kind)} {_some(names)}" for kind, names in sorted(groups.items())]


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'s' * (number != 1)}"


def _some(names: Sequence[str]) -> str:
    shown = [name.replace("\\", "/").rpartition("/")[2] for name in names[:_NAMED]]
    return f"({', '.join(shown)}{', …' * (len(names) > _NAMED)})"


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
