"""Write and check the manifest of a checkpoint: the sizes and checksums of its files.

A checkpoint of one file needs no manifest, because torch writes it as a zip archive with a CRC-32 of every part. A
folder (sharded checkpoints, DeepSpeed's) gets a list of its files with sizes and CRC-32s.
"""

import json
import os
import sys
import zlib
from pathlib import Path
from zipfile import BadZipFile, ZipFile

MANIFEST = "files.json"
"""Name of the manifest in a folder."""
_CHUNK = 1 << 24


def write_manifest(folder: Path, checksums: dict[str, int]) -> None:
    """Write the manifest of a folder, from the :func:`checksum` of each file by its name in the folder."""
    entries = {name: {"bytes": (folder / name).stat().st_size, "crc32": crc} for name, crc in sorted(checksums.items())}
    (folder / MANIFEST).write_text(json.dumps(entries, indent=1) + "\n")
    for path in [*(folder / name for name in entries), folder / MANIFEST]:
        sync(path)


def contents(folder: Path) -> list[str]:
    """List the files in a folder in order, by their names relative to it, without the manifest."""
    names = (file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    return sorted(name for name in names if name != MANIFEST)


def checksum(file: Path) -> int:
    """Compute the CRC-32 of a file's bytes."""
    crc = 0
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            crc = zlib.crc32(chunk, crc)
    return crc


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk, not only in memory.

    Windows can open no folder, and flushes a file only for those who may write it.
    """
    windows = sys.platform == "win32"
    if windows and path.is_dir():
        return
    handle = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def find_corruption(path: Path) -> str | None:
    """Read every byte of a checkpoint and compare it with the checksums.

    Returns:
        A few words that say what is wrong; None if the checkpoint is whole.
    """
    try:
        if path.is_dir():
            return _folder_corruption(path)
        with ZipFile(path) as archive:
            broken = archive.testzip()  # name of the first part whose checksum differs, or None
        return broken and f"checksum of {broken} differs"
    except BadZipFile:
        return "cut short, or no checkpoint at all"
    except OSError as error:
        return f"{error.strerror or error}"
    except Exception as error:  # a flipped bit can make zipfile ask for a password, and a manifest can hold anything
        return f"cannot be checked: {type(error).__name__}: {error}"


def _folder_corruption(folder: Path) -> str | None:
    try:
        entries = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except ValueError:
        return f"{MANIFEST} is not readable"
    for name, entry in entries.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != entry["bytes"]:
            return f"{name} has {file.stat().st_size} bytes of {entry['bytes']}"
        if checksum(file) != entry["crc32"]:
            return f"checksum of {name} differs"
    return None
